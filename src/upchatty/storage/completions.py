"""Queries on the record of completions."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from sqlalchemy import Column, Dialect, Table, bindparam, exists, func, select
from sqlalchemy.dialects import postgresql, sqlite

from upchatty.storage.database import Database
from upchatty.storage.tables import chatbots, completions

COLUMNS = tuple(column.name for column in completions.columns)
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
    async with database.transaction() as connection:
        statement, again = _insert(connection.dialect)
        await connection.exec_driver_sql(
            statement, [(*record, *(record[place] for place in again)) for record in records]
        )


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
def _insert(dialect: Dialect) -> tuple[str, list[int]]:
    """The statement as the driver takes it, since SQLAlchemy's own work for a row takes longer than the
    insert; and the places of the columns whose values it wants once more behind a record's."""
    values = select(*(bindparam(column.name, type_=column.type) for column in completions.columns))
    is_there = exists().where(chatbots.c.id == bindparam("chatbot_id", type_=chatbots.c.id.type))
    insert = INSERT[dialect.name](completions).from_select(list(COLUMNS), values.where(is_there))
    compiled = insert.on_conflict_do_nothing().compile(dialect=dialect)
    places = [COLUMNS.index(name) for name in compiled.positiontup or ()]
    assert places[: len(COLUMNS)] == list(range(len(COLUMNS)))
    return str(compiled), places[len(COLUMNS) :]
