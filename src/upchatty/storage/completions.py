"""Queries on the record of completions."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import insert, select

from upchatty.storage.database import Database
from upchatty.storage.tables import chatbots, completions


async def add_completions(database: Database, records: Sequence[dict[str, Any]]) -> None:
    """Store a batch of records; those of chatbots that are gone by now go with them."""
    wanted = {record["chatbot_id"] for record in records}
    async with database.transaction() as connection:
        present = set(
            (await connection.execute(select(chatbots.c.id).where(chatbots.c.id.in_(wanted)))).scalars()
        )
        if rows := [record for record in records if record["chatbot_id"] in present]:
            await connection.execute(insert(completions), rows)
