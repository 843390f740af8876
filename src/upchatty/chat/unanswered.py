"""Questions that a grounded chatbot could not answer: kept for its owner, those that are alike together."""

import asyncio
import time
import unicodedata
from contextlib import suppress
from typing import Any, Literal

import msgspec
import numpy as np
import structlog
from numpy.typing import NDArray
from sqlalchemy import RowMapping
from uuid_utils import uuid7

from upchatty.engines.embedding import EmbeddingModel
from upchatty.errors import RequestError
from upchatty.storage import unanswered as storage
from upchatty.storage.database import Database

KEPT_QUESTIONS = 10_000  # of a chatbot, the newest
LONGEST_QUESTION = 2_000  # characters of it that are kept
MOST_WAITING = 1_000
BATCH_SECONDS = 0.05
CLOSE_SECONDS = 3.0
ALIKE = 0.75
"""The cosine from which on two questions count as the same one. Of MiniLM's, paraphrases are mostly above,
and other questions on the same matter below."""
COMPARED = 2_000  # different wordings, the most frequent ones; others are alone with their like
EMBEDDED_AT_ONCE = 256
EXAMPLES = 5

Matrix = NDArray[np.float32]
log = structlog.get_logger()


class UnansweredCluster(msgspec.Struct, kw_only=True):
    """Questions that are alike. Times are unix seconds."""

    object: Literal["unanswered"] = "unanswered"
    id: str
    """After which the next page goes on."""
    question: str
    """The most typical one."""
    count: int
    examples: list[str]
    """Other wordings, the most frequent first."""
    score: float
    """The best that a passage had for one of them."""
    first_at: int
    last_at: int


class _Wording(msgspec.Struct):
    """All questions with the same words."""

    id: str
    text: str
    count: int
    score: float
    first_ms: int
    last_ms: int
    embedding: bytes | None = None


class Unanswered:
    """The questions that chatbots could not answer.

    Args:
        database: Where they are kept.
        embedding: Tells which are alike; None: only the same words are.
    """

    def __init__(self, database: Database, embedding: EmbeddingModel | None) -> None:
        self._database = database
        self._embedding = embedding
        self._waiting: list[dict[str, Any]] = []
        self._writer: asyncio.Task[None] | None = None

    def add(self, chatbot_id: str, question: str, score: float) -> None:
        """Keep a question. It is written behind the answer, within a second.

        Args:
            chatbot_id: Who was asked.
            question: What.
            score: Of the best passage.
        """
        if len(self._waiting) >= MOST_WAITING:
            return
        self._waiting.append(
            {
                "id": f"una_{uuid7().hex}",
                "chatbot_id": chatbot_id,
                "question": question[:LONGEST_QUESTION].replace("\0", "\ufffd"),
                "score": score,
                "embedding_model": None,
                "embedding": None,
                "created_at": time.time_ns() // 1_000_000,
            }
        )
        if self._writer is None:
            self._writer = asyncio.create_task(self._write())

    async def close(self) -> None:
        """Write what is left."""
        if self._writer:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._writer, CLOSE_SECONDS)

    async def clusters(self, chatbot_id: str, start: int, end: int) -> list[UnansweredCluster]:
        """A chatbot's questions of a time, those that are alike together, the most frequent first.

        Args:
            chatbot_id: The chatbot.
            start: From when on, unix milliseconds.
            end: Until when, itself excluded.

        Raises:
            StorageUnavailable: The database does not answer.
        """
        rows = await storage.newest_unanswered(
            self._database, chatbot_id, start=start, end=end, limit=KEPT_QUESTIONS
        )
        wordings = await asyncio.to_thread(_wordings, rows)
        model = await self._embed(wordings[:COMPARED], rows)
        if not model:
            return [_cluster([wording], 0) for wording in wordings]
        return await asyncio.to_thread(_clustered, wordings)

    async def clear(self, chatbot_id: str) -> None:
        """Forget a chatbot's questions."""
        await storage.clear_unanswered(self._database, chatbot_id)

    async def _write(self) -> None:
        try:
            while self._waiting:
                await asyncio.sleep(BATCH_SECONDS)
                batch, self._waiting = self._waiting, []
                await storage.add_unanswered(self._database, batch, KEPT_QUESTIONS)
        except RequestError as error:
            log.error("unanswered questions lost", problem=str(error))
        finally:
            self._writer = None

    async def _embed(self, wordings: list[_Wording], rows: list[RowMapping]) -> str | None:
        """Give wordings their embeddings, made now where there is none yet; the model that made them."""
        if not self._embedding or not wordings:
            return None
        try:
            model = self._embedding.fingerprint
            stored = {row["id"]: row["embedding"] for row in rows if row["embedding_model"] == model}
            for wording in wordings:
                wording.embedding = stored.get(wording.id)
            missing = [wording for wording in wordings if wording.embedding is None]
            for at in range(0, len(missing), EMBEDDED_AT_ONCE):
                batch = missing[at : at + EMBEDDED_AT_ONCE]
                vectors = await self._embedding.embed([wording.text for wording in batch])
                for wording, vector in zip(batch, vectors, strict=True):
                    wording.embedding = vector.astype("<f2").tobytes()
                made = {wording.id: wording.embedding for wording in batch if wording.embedding}
                await storage.set_embeddings(self._database, model, made)
        except (RequestError, OSError) as error:
            log.warning("unanswered questions not compared", problem=str(error))
            return None
        return model


def _wordings(rows: list[RowMapping]) -> list[_Wording]:
    """Questions with the same words as one, the most frequent first. Its id is its oldest question's."""
    found: dict[str, _Wording] = {}
    for row in rows:  # newest first
        words = _words(row["question"])
        if wording := found.get(words):
            wording.id, wording.first_ms = row["id"], row["created_at"]
            wording.count += 1
            wording.score = max(wording.score, row["score"])
        else:
            when = row["created_at"]
            found[words] = _Wording(row["id"], row["question"], 1, row["score"], when, when)
    return sorted(found.values(), key=lambda wording: (-wording.count, -wording.last_ms))


def _words(question: str) -> str:
    normal = unicodedata.normalize("NFKC", question).casefold()
    return " ".join("".join(c if c.isalnum() else " " for c in normal).split()) or question


def _clustered(wordings: list[_Wording]) -> list[UnansweredCluster]:
    """Leader clustering: a wording joins the nearest of the groups whose first one is like it, or begins one.
    Frequent wordings come first, and so lead."""
    groups: list[list[_Wording]] = []
    leaders: Matrix | None = None
    for wording in wordings:
        if wording.embedding is None:
            groups.append([wording])
            continue
        vector = np.frombuffer(wording.embedding, "<f2").astype(np.float32)
        if leaders is None:
            leaders = np.zeros((COMPARED, len(vector)), np.float32)
        likeness = leaders[: len(groups)] @ vector
        nearest = int(likeness.argmax()) if groups else -1
        if nearest >= 0 and likeness[nearest] >= ALIKE:
            groups[nearest].append(wording)
        else:
            leaders[len(groups)] = vector
            groups.append([wording])
    found = [_cluster(group, _most_typical(group)) for group in groups]
    return sorted(found, key=lambda cluster: (-cluster.count, -cluster.last_at, cluster.id))


def _most_typical(group: list[_Wording]) -> int:
    """The place of the wording that is nearest to all questions of a group."""
    if len(group) == 1:
        return 0
    vectors = np.stack([np.frombuffer(w.embedding or b"", "<f2").astype(np.float32) for w in group])
    counts = np.array([wording.count for wording in group], np.float32)
    return int((vectors @ (counts @ vectors)).argmax())


def _cluster(group: list[_Wording], typical: int) -> UnansweredCluster:
    others = [wording.text for place, wording in enumerate(group) if place != typical]
    return UnansweredCluster(
        id=min(wording.id for wording in group),
        question=group[typical].text,
        count=sum(wording.count for wording in group),
        examples=others[:EXAMPLES],
        score=round(max(wording.score for wording in group), 4),
        first_at=min(wording.first_ms for wording in group) // 1000,
        last_at=max(wording.last_ms for wording in group) // 1000,
    )
