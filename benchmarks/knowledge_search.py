"""How long a search takes without the question's embedding, and what a cold chatbot costs.

Passages are made of random words as frequent as those of a language are (Zipf's law) with random vectors,
and put in as a worker does. Prints Markdown.
"""

import argparse
import asyncio
import hashlib
import random
import tempfile
import time
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import psutil
from numpy.typing import NDArray
from sqlalchemy import insert

from upchatty.knowledge.search import Search
from upchatty.knowledge.words import terms
from upchatty.settings import Settings
from upchatty.storage.database import Database
from upchatty.storage.passages import NewPassage, publish
from upchatty.storage.tables import chatbots, documents

DIMENSIONS, WORDS, WORDS_OF_PASSAGE, WORDS_OF_QUESTION = 384, 50_000, 90, 6
PASSAGES_OF_DOCUMENT = 1_000
TARGETS_MS = {1_000: 3.0, 10_000: 6.0, 100_000: 25.0}


class Language:
    """Random texts.

    Args:
        seed: What makes them the same in every run.
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._words = ["".join(self._random.choices("abcdefghiklmnoprstuvw", k=7)) for _ in range(WORDS)]
        self._weights = list(accumulate(1 / (rank + 2.7) for rank in range(WORDS)))

    def text(self, words: int) -> str:
        """A text of so many words."""
        return " ".join(self._random.choices(self._words, cum_weights=self._weights, k=words))


class RandomEmbedding:
    """In place of the embedding model: a vector at once, which stands for its text."""

    fingerprint = "random"

    async def embed(self, texts: Sequence[str], *, seconds: float | None = None) -> NDArray[np.float32]:
        """Vectors of length 1."""
        seeds = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) for text in texts]
        vectors = np.stack([np.random.default_rng(seed).standard_normal(DIMENSIONS) for seed in seeds])
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


async def fill(database: Database, chatbot: str, count: int, language: Language) -> None:
    """Give a chatbot so many passages."""
    embedding = RandomEmbedding()
    async with database.transaction() as connection:
        row = {"id": chatbot, "published_version": 1, "latest_version": 1, "created_at": 0}
        await connection.execute(insert(chatbots).values(row))
    for begin in range(0, count, PASSAGES_OF_DOCUMENT):
        document = f"doc_{chatbot}_{begin}"
        identity = hashlib.sha256(document.encode()).hexdigest()
        row = {"id": document, "chatbot_id": chatbot, "kind": "text", "identity": identity, "title": document}
        async with database.transaction() as connection:
            row |= {"status": "ready", "created_at": 0, "updated_at": 0}
            await connection.execute(insert(documents).values(row))
        texts = [language.text(WORDS_OF_PASSAGE) for _ in range(min(PASSAGES_OF_DOCUMENT, count - begin))]
        vectors = (await embedding.embed(texts)).astype("<f2")
        passages = [
            NewPassage(
                position=position,
                headings=[],
                page=None,
                anchor=None,
                text=text,
                terms=" ".join(terms(text)),
                tokens=WORDS_OF_PASSAGE,
                hash=hashlib.sha256(text.encode()).hexdigest(),
                embedding=vector.tobytes(),
            )
            for position, (text, vector) in enumerate(zip(texts, vectors, strict=True))
        ]
        await publish(database, document, chatbot, passages=passages, embedding_model=embedding.fingerprint)


async def measure(search: Search, chatbot: str, language: Language, times: int) -> list[float]:
    """Milliseconds of searches, without their embedding, sorted."""
    taken = []
    for _ in range(times):
        question = language.text(WORDS_OF_QUESTION)
        embedded = time.perf_counter()
        await RandomEmbedding().embed([question])
        started = time.perf_counter()
        await search.search(chatbot, [question])
        taken.append((time.perf_counter() - started - (started - embedded)) * 1000)
    return sorted(taken)


async def run(url: str, sizes: list[int], chatbot_count: int, times: int) -> None:
    """Measure one database, and print a table."""
    language, process = Language(1), psutil.Process()
    with tempfile.TemporaryDirectory() as folder:
        database = Database(url, Path(folder) / "upchatty.db")
        await database.migrate()
        settings = Settings(data_dir=Path(folder))
        print("| passages of the chatbot | first ms | p50 ms | p95 ms | target p95 ms | MiB more |")
        print("|---|---|---|---|---|---|")
        for size in sizes:
            chatbot = f"bot_{size}"
            await fill(database, chatbot, size, language)
            search = Search(database, RandomEmbedding(), None, settings)  # type: ignore[arg-type]
            before = process.memory_info().rss
            [first] = await measure(search, chatbot, language, 1)
            taken = await measure(search, chatbot, language, times)
            more = (process.memory_info().rss - before) / 2**20
            p50, p95 = taken[len(taken) // 2], taken[len(taken) * 95 // 100]
            print(
                f"| {size:,} | {first:.1f} | {p50:.1f} | {p95:.1f} | {TARGETS_MS.get(size, '')} | {more:.0f} |"
            )
        if chatbot_count:
            await many(database, settings, chatbot_count, language)
        await database.close()


async def many(database: Database, settings: Settings, count: int, language: Language) -> None:
    """First searches of many chatbots with 1,000 passages each, within a fifth of the memory they need."""
    for number in range(count):
        await fill(database, f"bot_of_many_{number}", 1_000, language)
    limited = Settings(data_dir=settings.data_dir, knowledge_memory=str(count * 1_000 * DIMENSIONS // 5))
    search = Search(database, RandomEmbedding(), None, limited)  # type: ignore[arg-type]
    cold = sorted(
        [(await measure(search, f"bot_of_many_{n}", language, 1))[0] for _ in range(2) for n in range(count)]
    )
    print(
        f"\n{count} chatbots with 1,000 passages each, {limited.knowledge_memory_bytes / 2**20:.0f} MiB for"
    )
    print(f"vectors: a cold chatbot's first search takes p50 {cold[len(cold) // 2]:.1f} ms,")
    print(f"p95 {cold[len(cold) * 95 // 100]:.1f} ms, at most {cold[-1]:.1f} ms (target: 100 ms).")


def main() -> None:
    """Measure what the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--database-url", default="", help="postgresql://…; absent: SQLite")
    parser.add_argument("--sizes", type=int, nargs="*", default=[1_000, 10_000, 100_000])
    parser.add_argument("--chatbots", type=int, default=100)
    parser.add_argument("--times", type=int, default=200)
    given = parser.parse_args()
    asyncio.run(run(given.database_url, given.sizes, given.chatbots, given.times))


if __name__ == "__main__":
    main()
