"""Questions to which a chatbot's documents had no answer."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import RowMapping, bindparam, delete, exists, insert, literal, select, update

from upchatty.storage.database import Database
from upchatty.storage.tables import chatbots, unanswered

COLUMNS = ("id", "chatbot_id", "question", "score", "embedding_model", "embedding", "created_at")
Values = dict[str, Any]


async def add_unanswered(database: Database, questions: Sequence[Values], most: int) -> None:
    """Store questions, and of each chatbot no more than the newest.

    Args:
        database: Where to.
        questions: Values of every column; those of chatbots that are gone by now go with them.
        most: How many a chatbot keeps.
    """
    values = select(*(bindparam(name, type_=unanswered.c[name].type) for name in COLUMNS))
    is_there = exists().where(chatbots.c.id == bindparam("chatbot_id", type_=chatbots.c.id.type))
    statement = insert(unanswered).from_select(list(COLUMNS), values.where(is_there))
    async with database.transaction() as connection:
        await connection.execute(statement, list(questions))
        for chatbot_id in {question["chatbot_id"] for question in questions}:
            newest_beyond = (
                select(unanswered.c.created_at)
                .where(unanswered.c.chatbot_id == chatbot_id)
                .order_by(unanswered.c.created_at.desc())
                .offset(most)
                .limit(1)
                .scalar_subquery()
            )
            await connection.execute(
                delete(unanswered).where(
                    unanswered.c.chatbot_id == chatbot_id, unanswered.c.created_at <= newest_beyond
                )
            )


async def newest_unanswered(
    database: Database, chatbot_id: str, *, start: int, end: int, limit: int
) -> list[RowMapping]:
    """A chatbot's questions of a time, newest first.

    Args:
        database: Where to look.
        chatbot_id: The chatbot.
        start: From when on, unix milliseconds.
        end: Until when, itself excluded.
        limit: How many at most.
    """
    query = (
        select(unanswered)
        .where(
            unanswered.c.chatbot_id == chatbot_id,
            unanswered.c.created_at >= start,
            unanswered.c.created_at < end,
        )
        .order_by(unanswered.c.created_at.desc(), unanswered.c.id.desc())
        .limit(limit)
    )
    async with database.transaction() as connection:
        return list((await connection.execute(query)).mappings())


async def set_embeddings(database: Database, model: str, embeddings: dict[str, bytes]) -> None:
    """Keep the embeddings of questions.

    Args:
        database: Where the questions are.
        model: What made them: the model's fingerprint.
        embeddings: By the questions' ids.
    """
    statement = (
        update(unanswered)
        .where(unanswered.c.id == bindparam("question_id"))
        .values(embedding_model=literal(model), embedding=bindparam("vector"))
    )
    rows = [{"question_id": key, "vector": vector} for key, vector in embeddings.items()]
    async with database.transaction() as connection:
        await connection.execute(statement, rows)


async def clear_unanswered(database: Database, chatbot_id: str) -> None:
    """Forget a chatbot's questions."""
    async with database.transaction() as connection:
        await connection.execute(delete(unanswered).where(unanswered.c.chatbot_id == chatbot_id))
