"""Queries on documents, their contents, and the embeddings of those that are being read."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sqlalchemy import RowMapping, case, delete, func, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from upchatty.storage.database import Database
from upchatty.storage.jobs import enqueue
from upchatty.storage.tables import chatbots, document_contents, documents, jobs, passages, staged_embeddings

Values = dict[str, Any]
UNFINISHED = ("pending", "reading")
SITES = ("site", "sitemap")
IDS_AT_ONCE = 500


async def put_document(
    database: Database, document: Values, content: bytes | None, *, anew: bool, now: int
) -> str | None:
    """Store a document and have it read, or bring the one that is the same up to date.

    The same is the one with the same identity; of files also the one with the same bytes, whatever its name.

    Args:
        database: Where it is stored.
        document: Its columns. Of one that exists, title, URL and options are changed, if they are given.
        content: Its bytes, where they are kept.
        anew: Whether one that exists is read again although its content has not changed.
        now: Unix milliseconds.

    Returns:
        The document's id, or None if there is no such chatbot.
    """
    async with database.transaction() as connection:
        if not await _lock_chatbot(connection, document["chatbot_id"]):
            return None
        same = await _find_same(connection, document)
        if same is None:
            await connection.execute(insert(documents).values(document))
            await _keep_content(connection, document["id"], content)
            await enqueue(connection, document["id"], now)
            return str(document["id"])
        await _bring_up_to_date(connection, same, document, content, anew=anew, now=now)
        return str(same["id"])


async def put_page(
    database: Database, document: Values, content: bytes | None, *, content_hash: str | None, now: int
) -> bool:
    """Store a page of a site or sitemap and have it read, or bring it up to date where it has changed.

    Args:
        database: Where it is stored.
        document: The page's columns.
        content: Its bytes, kept until they are read; None: they are to be fetched.
        content_hash: Of the bytes.
        now: Unix milliseconds.

    Returns:
        Whether the site is still there.
    """
    async with database.transaction() as connection:
        if not await _lock_chatbot(connection, document["chatbot_id"]):
            return False
        parent = select(documents.c.id).where(documents.c.id == document["parent_id"])
        if (await connection.execute(parent)).one_or_none() is None:
            return False
        same = await _find_same(connection, document)
        if same is None:
            await connection.execute(insert(documents).values(document))
        elif same["parent_id"] != document["parent_id"]:
            return True  # a document of its own, or another site's page
        elif same["content_hash"] == content_hash and same["status"] == "ready":
            return True
        else:
            columns = {name: document[name] for name in ("media_type", "etag", "last_modified")}
            await connection.execute(
                update(documents)
                .where(documents.c.id == same["id"])
                .values(**columns, status="pending", updated_at=now)
            )
        document_id = same["id"] if same else document["id"]
        await _keep_content(connection, document_id, content)
        await enqueue(connection, document_id, now)
        return True


async def _lock_chatbot(connection: AsyncConnection, chatbot_id: str) -> bool:
    """Have one transaction at a time add documents to a chatbot; False if there is none."""
    found = await connection.execute(
        update(chatbots)
        .where(chatbots.c.id == chatbot_id)
        .values(published_version=chatbots.c.published_version)
    )
    return found.rowcount > 0


async def _find_same(connection: AsyncConnection, document: Values) -> RowMapping | None:
    of_chatbot = select(documents).where(documents.c.chatbot_id == document["chatbot_id"])
    by_identity = of_chatbot.where(documents.c.identity == document["identity"])
    same = (await connection.execute(by_identity)).mappings().one_or_none()
    if document["kind"] != "file":
        return same
    by_content = of_chatbot.where(
        documents.c.kind == "file", documents.c.content_hash == document["content_hash"]
    )
    twin = (await connection.execute(by_content.limit(1))).mappings().first()
    if twin and same and twin["id"] != same["id"]:
        # The file has become a copy of another one, and its former content is nobody's any more.
        await connection.execute(delete(documents).where(documents.c.id == same["id"]))
    return twin or same


async def _bring_up_to_date(
    connection: AsyncConnection,
    same: RowMapping,
    document: Values,
    content: bytes | None,
    *,
    anew: bool,
    now: int,
) -> None:
    options: Values = document["options"] or {}
    changes: Values = {"options": (same["options"] or {}) | options, "updated_at": now}
    if options.get("titled"):
        changes["title"] = document["title"]
    if document["url"]:
        changes["url"] = document["url"]
    has_changed = content is not None and same["content_hash"] != document["content_hash"]
    if has_changed:
        changes |= {name: document[name] for name in ("content_hash", "media_type")}
        await _keep_content(connection, same["id"], content)
    retitled = changes.get("title", same["title"]) != same["title"]
    is_read = anew or has_changed or retitled or same["status"] == "failed"
    if is_read:
        changes |= {"status": "pending", "reason": None, "read_again_at": None}
    await connection.execute(update(documents).where(documents.c.id == same["id"]).values(changes))
    if is_read:
        await enqueue(connection, same["id"], now)


async def _keep_content(connection: AsyncConnection, document_id: str, content: bytes | None) -> None:
    if content is None:
        return
    upsert = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
    await connection.execute(
        upsert(document_contents)
        .values(document_id=document_id, content=content)
        .on_conflict_do_update(index_elements=[document_contents.c.document_id], set_={"content": content})
    )


async def get_document(database: Database, chatbot_id: str, document_id: str) -> RowMapping | None:
    """A chatbot's document."""
    query = select(documents).where(documents.c.id == document_id, documents.c.chatbot_id == chatbot_id)
    async with database.transaction() as connection:
        return (await connection.execute(query)).mappings().one_or_none()


async def get_documents(database: Database, chatbot_id: str, document_ids: Sequence[str]) -> list[RowMapping]:
    """Those of a chatbot's documents that are named, in the order of their ids."""
    query = select(documents).where(documents.c.chatbot_id == chatbot_id).order_by(documents.c.id)
    ids = sorted(document_ids)
    found: list[RowMapping] = []
    async with database.transaction() as connection:
        for start in range(0, len(ids), IDS_AT_ONCE):
            some = query.where(documents.c.id.in_(ids[start : start + IDS_AT_ONCE]))
            found += (await connection.execute(some)).mappings()
    return found


async def list_documents(
    database: Database,
    chatbot_id: str,
    *,
    after: str = "",
    limit: int | None = None,
    status: str | None = None,
    parent: str | None = None,
) -> list[RowMapping]:
    """A chatbot's documents in the order of their ids, which is that of their adding.

    Args:
        database: Where to look.
        chatbot_id: Whose.
        after: The id after which to begin.
        limit: How many at most.
        status: Only those with this status.
        parent: Only the pages of this one.
    """
    query = select(documents).where(documents.c.chatbot_id == chatbot_id, documents.c.id > after)
    if status is not None:
        query = query.where(documents.c.status == status)
    if parent is not None:
        query = query.where(documents.c.parent_id == parent)
    async with database.transaction() as connection:
        found = await connection.execute(query.order_by(documents.c.id).limit(limit))
        return list(found.mappings())


async def delete_document(database: Database, chatbot_id: str, document_id: str) -> bool:
    """Delete a document with its passages, its job, and its pages.

    Returns:
        Whether there was one.
    """
    async with database.transaction() as connection:
        deleted = await connection.execute(
            delete(documents).where(documents.c.id == document_id, documents.c.chatbot_id == chatbot_id)
        )
        return deleted.rowcount > 0


async def read_again(database: Database, chatbot_id: str, document_id: str, now: int) -> bool:
    """Have a document read again.

    Returns:
        Whether there is one.
    """
    async with database.transaction() as connection:
        found = await connection.execute(
            update(documents)
            .where(documents.c.id == document_id, documents.c.chatbot_id == chatbot_id)
            .values(status="pending", reason=None, read_again_at=None, updated_at=now)
        )
        if found.rowcount:
            await enqueue(connection, document_id, now)
        return found.rowcount > 0


async def set_document(database: Database, document_id: str, values: Values) -> bool:
    """Change a document's columns.

    Returns:
        Whether it is still there.
    """
    async with database.transaction() as connection:
        changed = await connection.execute(
            update(documents).where(documents.c.id == document_id).values(values)
        )
        return changed.rowcount > 0


async def get_content(database: Database, document_id: str) -> bytes | None:
    """A document's bytes, where they are kept."""
    query = select(document_contents.c.content).where(document_contents.c.document_id == document_id)
    async with database.transaction() as connection:
        content: bytes | None = (await connection.execute(query)).scalar_one_or_none()
        return content


async def drop_working_copies(
    database: Database, document_id: str, *, keep_content: bool, created_at: int
) -> None:
    """Delete what was needed until a document was read.

    Args:
        database: Where it is stored.
        document_id: The document.
        keep_content: Whether its bytes are kept.
        created_at: Of the job: where it is a newer one by now, the bytes are that one's.
    """
    async with database.transaction() as connection:
        await connection.execute(
            delete(staged_embeddings).where(staged_embeddings.c.document_id == document_id)
        )
        if not keep_content:
            this_job = select(jobs.c.document_id).where(
                jobs.c.document_id == document_id, jobs.c.created_at == created_at
            )
            await connection.execute(
                delete(document_contents).where(document_contents.c.document_id.in_(this_job))
            )


async def staged(database: Database, document_id: str, embedding_model: str) -> dict[str, bytes]:
    """The embeddings by their passage's hash that an earlier attempt at a document has made."""
    query = select(staged_embeddings.c.hash, staged_embeddings.c.embedding).where(
        staged_embeddings.c.document_id == document_id,
        staged_embeddings.c.embedding_model == embedding_model,
    )
    async with database.transaction() as connection:
        return {row.hash: row.embedding for row in await connection.execute(query)}


async def stage(
    database: Database,
    document_id: str,
    embedding_model: str,
    embeddings: Mapping[str, bytes],
    *,
    done: int,
    total: int,
) -> bool:
    """Keep embeddings of a document that is being read, and note how far it is.

    Returns:
        Whether the document is still there.
    """
    rows = [
        {"document_id": document_id, "hash": key, "embedding_model": embedding_model, "embedding": value}
        for key, value in embeddings.items()
    ]
    async with database.transaction() as connection:
        progress = await connection.execute(
            update(documents).where(documents.c.id == document_id).values(done=done, total=total)
        )
        if progress.rowcount and rows:
            upsert = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
            await connection.execute(upsert(staged_embeddings).on_conflict_do_nothing(), rows)
        return progress.rowcount > 0


async def pages_of(database: Database, parent_id: str) -> dict[str, RowMapping]:
    """The pages of a site or sitemap by their URL."""
    query = select(
        documents.c.id,
        documents.c.url,
        documents.c.status,
        documents.c.etag,
        documents.c.last_modified,
    ).where(documents.c.parent_id == parent_id)
    async with database.transaction() as connection:
        return {row["url"]: row for row in (await connection.execute(query)).mappings()}


async def delete_pages(database: Database, document_ids: Collection[str]) -> None:
    """Delete pages with their passages."""
    ids = list(document_ids)
    for start in range(0, len(ids), IDS_AT_ONCE):
        async with database.transaction() as connection:
            some = ids[start : start + IDS_AT_ONCE]
            await connection.execute(delete(documents).where(documents.c.id.in_(some)))


_SETTLED = (
    documents.c.kind.in_(SITES),
    ~select(jobs.c.document_id).where(jobs.c.document_id == documents.c.id).exists(),
)


async def unsettled_sites(database: Database) -> list[str]:
    """The sites and sitemaps that are being read, and whose own job is done: their pages are left."""
    query = select(documents.c.id).where(documents.c.status == "reading", *_SETTLED)
    async with database.transaction() as connection:
        return list((await connection.execute(query)).scalars())


async def settle_site(database: Database, document_id: str, values: Values, ended: Values) -> None:
    """Note how far a site is, if it is one; and that it has ended, unless it is itself to be read still."""
    site = update(documents).where(documents.c.id == document_id, documents.c.kind.in_(SITES))
    async with database.transaction() as connection:
        await connection.execute(site.values(values))
        if ended:
            await connection.execute(site.where(documents.c.status != "failed", *_SETTLED).values(ended))


async def sum_of_pages(database: Database, parent_id: str) -> RowMapping:
    """What a site's pages come to: `pages`, `unfinished`, `failed`, `bytes`, `passages`, `tokens`."""

    def count(condition: Any) -> Any:
        return func.coalesce(func.sum(case((condition, 1), else_=0)), 0)

    query = select(
        func.count().label("pages"),
        count(documents.c.status.in_(UNFINISHED)).label("unfinished"),
        count(documents.c.status == "failed").label("failed"),
        func.coalesce(func.sum(documents.c.bytes), 0).label("bytes"),
        func.coalesce(func.sum(documents.c.passages), 0).label("passages"),
        func.coalesce(func.sum(documents.c.tokens), 0).label("tokens"),
        func.max(case((documents.c.status == "failed", documents.c.reason))).label("a_reason"),
    ).where(documents.c.parent_id == parent_id)
    async with database.transaction() as connection:
        return (await connection.execute(query)).mappings().one()


async def embedded_otherwise(database: Database, embedding_model: str) -> list[str]:
    """The documents whose passages have no embeddings of this model, or an older one's."""
    of_model = select(passages.c.id).where(
        passages.c.document_id == documents.c.id, passages.c.embedding_model == embedding_model
    )
    query = select(documents.c.id).where(documents.c.passages > 0, ~of_model.exists())
    async with database.transaction() as connection:
        found = await connection.execute(query.where(documents.c.kind.not_in(SITES)))
        return list(found.scalars())
