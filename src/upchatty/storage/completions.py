"""Queries on the record of completions."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from sqlalchemy import Column, Dialect, Table, func, select
from sqlalchemy.dialects import postgresql, sqlite

from upchatty.storage.database import Database
from upchatty.storage.tables import chatbots, completions

COLUMNS = tuple(column.name for column in completions.columns)
CHATBOT = COLUMNS.index("chatbot_id")
INSERT: dict[str, Callable[[Table], sqlite.Insert | postgresql.Insert]] = {
    "sqlite": sqlite.insert,
    "postgresql": postgresql.insert,
}


async def add_completions(database: Database, records: Sequence[tuple[Any, ...]]) -> None:
    """Store a batch of records; those of chatbots that are gone by now go with them.

    A batch may come again, after a connection that broke before it could say that it had stored it.

    Args:
        database: Where to.
        records: Values in the order of `COLUMNS`, JSON as text.
    """
    wanted = {record[CHATBOT] for record in records}
    async with database.transaction() as connection:
        present = set(
            (await connection.execute(select(chatbots.c.id).where(chatbots.c.id.in_(wanted)))).scalars()
        )
        if rows := [record for record in records if record[CHATBOT] in present]:
            await connection.exec_driver_sql(_insert(connection.dialect), rows)


async def tokens_since(database: Database, owner: Column[Any], owner_id: str, since: int) -> int:
    """How many tokens a key or a chatbot has used, prompts and answers together.

    Args:
        database: Where to look.
        owner: The column that names it, `completions.c.key_id` or `completions.c.chatbot_id`.
        owner_id: Its id.
        since: From when on, unix milliseconds.
    """
    columns = completions.c
    total = func.coalesce(func.sum(columns.prompt_tokens + columns.completion_tokens), 0)
    query = select(total).where(owner == owner_id, columns.created_at >= since)
    async with database.transaction() as connection:
        return int((await connection.execute(query)).scalar_one())


@cache
def _insert(dialect: Dialect) -> str:
    """The statement as the driver takes it; SQLAlchemy's own work for a row takes longer than the insert."""
    compiled = INSERT[dialect.name](completions).on_conflict_do_nothing().compile(dialect=dialect)
    assert tuple(compiled.positiontup or ()) == COLUMNS
    return str(compiled)
