"""Queries on the jobs that read documents.

A job is claimed by one worker at a time, for as long as a lease that the worker renews. Whoever asks for a
document to be read while it is being read changes the job's `created_at`: then the worker does not end the
job, but puts it back.
"""

from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, RowMapping, case, delete, exists, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from upchatty.storage.database import Database
from upchatty.storage.tables import documents, jobs

Values = dict[str, Any]


class Claim(NamedTuple):
    """A job that a worker has claimed, and its document."""

    document: RowMapping
    attempts: int
    """How often it was claimed, this time included."""
    created_at: int


async def enqueue(connection: AsyncConnection, document_id: str, now: int) -> None:
    """Have a document read, within a transaction; once more where it is being read."""
    insert = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
    newer = case((jobs.c.created_at < now, now), else_=jobs.c.created_at + 1)
    run_at = case((jobs.c.worker.is_(None), now), else_=jobs.c.run_at)
    await connection.execute(
        insert(jobs)
        .values(document_id=document_id, attempts=0, run_at=now, created_at=now)
        .on_conflict_do_update(
            index_elements=[jobs.c.document_id], set_={"attempts": 0, "run_at": run_at, "created_at": newer}
        )
    )


async def enqueue_due(database: Database, now: int) -> int:
    """Have the documents read whose time to be read again has come.

    Returns:
        How many these are.
    """
    async with database.transaction() as connection:
        due = await connection.execute(
            update(documents)
            .where(documents.c.read_again_at <= now)
            .values(read_again_at=None, status="pending", updated_at=now)
            .returning(documents.c.id)
        )
        ids = due.scalars().all()
        for document_id in ids:
            await enqueue(connection, document_id, now)
    return len(ids)


async def enqueue_all(database: Database, document_ids: Iterable[str], now: int) -> None:
    """Have these documents read."""
    async with database.transaction() as connection:
        for document_id in document_ids:
            found = await connection.execute(
                update(documents)
                .where(documents.c.id == document_id)
                .values(status="pending", updated_at=now)
            )
            if found.rowcount:
                await enqueue(connection, document_id, now)


async def is_work_waiting(database: Database, now: int) -> bool:
    """Whether a worker would find something to do."""
    query = select(
        or_(
            exists(select(jobs.c.document_id).where(jobs.c.run_at <= now)),
            exists(select(documents.c.id).where(documents.c.read_again_at <= now)),
        )
    )
    async with database.transaction() as connection:
        return bool((await connection.execute(query)).scalar_one())


async def claim(database: Database, worker: str, now: int, lease_until: int) -> Claim | None:
    """Claim the job that has waited for longest, and note that its document is being read.

    Args:
        database: Where it is stored.
        worker: Who claims it.
        now: Unix milliseconds.
        lease_until: Until when it is this worker's, unless that renews it.

    Returns:
        The job, or None where nothing waits.
    """
    # SQLite writes one at a time; on PostgreSQL workers pass over what another one is claiming.
    first = (
        select(jobs.c.document_id)
        .where(jobs.c.run_at <= now)
        .order_by(jobs.c.run_at)
        .limit(1)
        .with_for_update(skip_locked=True)
        .scalar_subquery()
    )
    async with database.transaction() as connection:
        claimed = await connection.execute(
            update(jobs)
            .where(jobs.c.document_id == first)
            .values(worker=worker, run_at=lease_until, attempts=jobs.c.attempts + 1)
            .returning(jobs.c.document_id, jobs.c.attempts, jobs.c.created_at)
        )
        job = claimed.one_or_none()
    if job is None:
        return None
    async with database.transaction() as connection:
        changed = await connection.execute(
            update(documents)
            .where(documents.c.id == job.document_id)
            .values(status="reading", done=0, total=None, updated_at=now)
            .returning(documents)
        )
        document = changed.mappings().one_or_none()
    if document is None:  # deleted in between: there may be others
        return await claim(database, worker, now, lease_until)
    return Claim(document, job.attempts, job.created_at)


async def renew(database: Database, worker: str, document_ids: Collection[str], lease_until: int) -> set[str]:
    """Renew a worker's leases.

    Returns:
        The documents whose jobs are still this worker's.
    """
    async with database.transaction() as connection:
        renewed = await connection.execute(
            update(jobs)
            .where(jobs.c.worker == worker, jobs.c.document_id.in_(document_ids))
            .values(run_at=lease_until)
            .returning(jobs.c.document_id)
        )
        return set(renewed.scalars())


async def finish(database: Database, worker: str, document_id: str, created_at: int, now: int) -> None:
    """End a job; where the document was meanwhile asked to be read again, put it back."""
    mine = (jobs.c.document_id == document_id, jobs.c.worker == worker)
    async with database.transaction() as connection:
        ended = await connection.execute(delete(jobs).where(*mine, jobs.c.created_at == created_at))
    if not ended.rowcount:
        await _give_back(database, mine, {"run_at": now}, {})


async def put_off(
    database: Database, worker: str, document_id: str, *, reason: str, run_at: int, now: int
) -> None:
    """Have a job done later, and say why with its document."""
    mine = (jobs.c.document_id == document_id, jobs.c.worker == worker)
    await _give_back(database, mine, {"run_at": run_at}, {"reason": reason, "updated_at": now})


async def give_back(database: Database, worker: str, now: int) -> None:
    """Give back what a worker that ends has claimed, as if it had not."""
    unclaimed = {"run_at": now, "attempts": jobs.c.attempts - 1}
    await _give_back(database, (jobs.c.worker == worker,), unclaimed, {})


async def workers(database: Database) -> list[str]:
    """Who has claimed jobs."""
    query = select(jobs.c.worker).where(jobs.c.worker.is_not(None)).distinct()
    async with database.transaction() as connection:
        return [worker for worker in (await connection.execute(query)).scalars() if worker]


async def take_over(database: Database, gone: Collection[str], now: int) -> None:
    """Free the jobs of workers that are gone."""
    await _give_back(database, (jobs.c.worker.in_(gone),), {"run_at": now}, {})


async def _give_back(
    database: Database, which: tuple[ColumnElement[bool], ...], job: Values, document: Values
) -> None:
    """Unclaim jobs, whose documents wait again."""
    theirs = select(jobs.c.document_id).where(*which)
    async with database.transaction() as connection:
        # The documents come first, as where one is deleted: so neither waits for the other.
        await connection.execute(
            update(documents).where(documents.c.id.in_(theirs)).values(status="pending", **document)
        )
        await connection.execute(update(jobs).where(*which).values(worker=None, **job))
