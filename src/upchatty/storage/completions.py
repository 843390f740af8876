"""Queries on the record of completions."""

from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import Table, select
from sqlalchemy.dialects import postgresql, sqlite

from upchatty.storage.database import Database
from upchatty.storage.tables import chatbots, completions

INSERT: dict[str, Callable[[Table], sqlite.Insert | postgresql.Insert]] = {
    "sqlite": sqlite.insert,
    "postgresql": postgresql.insert,
}


async def add_completions(database: Database, records: Sequence[dict[str, Any]]) -> None:
    """Store a batch of records; those of chatbots that are gone by now go with them.

    A batch may come again, after a connection that broke before it could say that it had stored it.
    """
    wanted = {record["chatbot_id"] for record in records}
    async with database.transaction() as connection:
        present = set(
            (await connection.execute(select(chatbots.c.id).where(chatbots.c.id.in_(wanted)))).scalars()
        )
        if rows := [record for record in records if record["chatbot_id"] in present]:
            insert = INSERT[connection.dialect.name]
            await connection.execute(insert(completions).on_conflict_do_nothing(), rows)
