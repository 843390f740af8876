"""Passages put into a chatbot as a worker does it, and searched as a server does it."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from sqlalchemy import insert

from benchmarks.retrieval.vectors import CachedEmbedding
from upchatty.engines.embedding import EmbeddingModel
from upchatty.knowledge.search import Search
from upchatty.knowledge.splitting import Passage
from upchatty.knowledge.words import terms
from upchatty.settings import Settings
from upchatty.storage import tables
from upchatty.storage.database import Database
from upchatty.storage.passages import NewPassage, publish


def open_search(database: Database, embedding: CachedEmbedding) -> Search:
    """Search in a database as it is without settings."""
    return Search(database, cast("EmbeddingModel", embedding), None, Settings())


async def add_chatbot(database: Database, chatbot: str) -> None:
    """Put a chatbot in.

    Raises:
        StorageUnavailable: The database failed.
    """
    row = {"id": chatbot, "published_version": 1, "latest_version": 1, "created_at": 0}
    async with database.transaction() as connection:
        await connection.execute(insert(tables.chatbots).values(row))


async def add_document(
    database: Database, chatbot: str, title: str, passages: Sequence[Passage], embedding: CachedEmbedding
) -> None:
    """Put a document in.

    Raises:
        StorageUnavailable: The database failed.
    """
    passages = list({passage.hash: passage for passage in passages}.values())
    identity = hashlib.sha256(f"{chatbot} {title}".encode()).hexdigest()
    row = {"id": f"doc_{identity[:20]}", "chatbot_id": chatbot, "kind": "file", "identity": identity}
    times = {"created_at": 0, "updated_at": 0}
    async with database.transaction() as connection:
        await connection.execute(insert(tables.documents).values(title=title, status="ready", **row, **times))
    vectors = await embedding.embed([passage.searched for passage in passages])
    new = [
        NewPassage(
            position=position,
            headings=passage.headings,
            page=passage.page,
            anchor=passage.anchor,
            text=passage.text,
            terms=" ".join(terms(passage.searched)),
            tokens=passage.tokens,
            hash=passage.hash,
            embedding=vector.astype("<f2").tobytes(),
        )
        for position, (passage, vector) in enumerate(zip(passages, vectors, strict=True))
    ]
    await publish(database, row["id"], chatbot, passages=new, embedding_model=embedding.fingerprint)


async def open_database(url: str, folder: Path) -> Database:
    """A database with its tables.

    Args:
        url: Of an empty PostgreSQL database; empty: SQLite.
        folder: Where SQLite's file is put.

    Raises:
        StorageUnavailable: It cannot be had.
    """
    database = Database(url, folder / "upchatty.db")
    await database.migrate()
    return database
