"""Queries on chatbots and their versions."""

from typing import Any

from sqlalchemy import RowMapping, Select, delete, func, insert, select, update

from upchatty.storage.database import Database
from upchatty.storage.tables import chatbot_versions, chatbots, passage_totals

Values = dict[str, Any]


def _versions() -> Select[Any]:
    """Versions, each with how much its chatbot knows, so that an answer need not ask for that as well."""
    versions = select(
        chatbots.c.id,
        chatbots.c.published_version,
        chatbots.c.created_at,
        chatbot_versions.c.version,
        chatbot_versions.c.name,
        chatbot_versions.c.instructions,
        chatbot_versions.c.model,
        chatbot_versions.c.temperature,
        chatbot_versions.c.max_tokens,
        chatbot_versions.c.keep_text,
        chatbot_versions.c.limits,
        chatbot_versions.c.policy,
        chatbot_versions.c.threshold,
        chatbot_versions.c.fallback_message,
        chatbot_versions.c.passages,
        func.coalesce(passage_totals.c.passages, 0).label("known_passages"),
        func.coalesce(passage_totals.c.length, 0).label("known_terms"),
        chatbot_versions.c.created_at.label("updated_at"),
    )
    return versions.join_from(chatbots, chatbot_versions).outerjoin(
        passage_totals, passage_totals.c.chatbot_id == chatbots.c.id
    )


async def add_chatbot(database: Database, chatbot: Values, version: Values) -> None:
    """Store a new chatbot with its first version."""
    async with database.transaction() as connection:
        await connection.execute(insert(chatbots).values(chatbot))
        await connection.execute(insert(chatbot_versions).values(version))


async def get_chatbot(database: Database, chatbot_id: str, version: int | None = None) -> RowMapping | None:
    """One version of a chatbot: the published one where none is named."""
    wanted = chatbots.c.published_version if version is None else version
    query = _versions().where(chatbots.c.id == chatbot_id, chatbot_versions.c.version == wanted)
    async with database.transaction() as connection:
        found: RowMapping | None = (await connection.execute(query)).mappings().one_or_none()
        return found


async def list_chatbots(
    database: Database, *, after: str = "", limit: int | None = None, only: frozenset[str] | None = None
) -> list[RowMapping]:
    """The published versions in the order of their ids, which is that of their making.

    Args:
        database: Where to look.
        after: The id after which to begin.
        limit: How many at most.
        only: The ids to choose from, or None for all.
    """
    query = (
        _versions()
        .where(chatbots.c.id > after, chatbot_versions.c.version == chatbots.c.published_version)
        .order_by(chatbots.c.id)
        .limit(limit)
    )
    if only is not None:
        query = query.where(chatbots.c.id.in_(only))
    async with database.transaction() as connection:
        return list((await connection.execute(query)).mappings())


async def list_versions(
    database: Database, chatbot_id: str, *, after: int = 0, limit: int | None = None
) -> list[RowMapping]:
    """A chatbot's versions, oldest first; none where there is no such chatbot."""
    query = (
        _versions()
        .where(chatbots.c.id == chatbot_id, chatbot_versions.c.version > after)
        .order_by(chatbot_versions.c.version)
        .limit(limit)
    )
    async with database.transaction() as connection:
        return list((await connection.execute(query)).mappings())


async def add_version(database: Database, chatbot_id: str, changes: Values, created_at: int) -> bool:
    """Add a version that differs from the published one by `changes`, and publish it.

    Returns:
        Whether the chatbot exists.
    """
    async with database.transaction() as connection:
        # The update comes first: it locks the chatbot, so that two changes at once make two versions.
        counted = await connection.execute(
            update(chatbots)
            .where(chatbots.c.id == chatbot_id)
            .values(latest_version=chatbots.c.latest_version + 1)
            .returning(chatbots.c.latest_version, chatbots.c.published_version)
        )
        row = counted.one_or_none()
        if row is None:
            return False
        base = select(chatbot_versions).where(
            chatbot_versions.c.chatbot_id == chatbot_id, chatbot_versions.c.version == row.published_version
        )
        version = dict((await connection.execute(base)).mappings().one())
        version |= changes | {"version": row.latest_version, "created_at": created_at}
        await connection.execute(insert(chatbot_versions).values(version))
        await connection.execute(
            update(chatbots).where(chatbots.c.id == chatbot_id).values(published_version=row.latest_version)
        )
        return True


async def publish_version(database: Database, chatbot_id: str, version: int) -> bool:
    """Make an existing version the published one.

    Returns:
        Whether the chatbot has that version.
    """
    exists = (
        select(chatbot_versions.c.version)
        .where(chatbot_versions.c.chatbot_id == chatbot_id, chatbot_versions.c.version == version)
        .exists()
    )
    async with database.transaction() as connection:
        changed = await connection.execute(
            update(chatbots).where(chatbots.c.id == chatbot_id, exists).values(published_version=version)
        )
        return changed.rowcount > 0


async def delete_chatbot(database: Database, chatbot_id: str) -> bool:
    """Delete a chatbot with all it owns.

    Returns:
        Whether there was one.
    """
    async with database.transaction() as connection:
        return (await connection.execute(delete(chatbots).where(chatbots.c.id == chatbot_id))).rowcount > 0
