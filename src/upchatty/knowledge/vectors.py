"""Embeddings in memory, chatbot by chatbot, for databases that cannot search them: SQLite.

A vector is kept as 8-bit numbers and a scale, a quarter of float32, which finds the nearest hundred well
enough: they are compared exactly afterwards. The scan is NumKong's; of 100,000 vectors with 384 dimensions
it takes 6 ms, where NumPy with float32 takes 9.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence

import numkong
import numpy as np
import structlog
from numpy.typing import NDArray
from sqlalchemy import Connection, Row

from upchatty.storage.passages import Totals, embeddings_after, passage_ids

LOADED_AT_ONCE = 2048  # vectors
BYTES_BESIDE = 12  # of a vector: its id and its scale
STALE_SHARE = 50  # of that many vectors one may be of a passage that is gone

Vector = NDArray[np.float32]
_Ids = NDArray[np.int64]
_Codes = NDArray[np.int8]
log = structlog.get_logger()


class Vectors:
    """The vectors of those chatbots that were asked last; several threads may ask at once.

    Args:
        memory: Bytes that they may take together.
    """

    def __init__(self, memory: int) -> None:
        self._memory = memory
        self._chatbots: OrderedDict[tuple[str, str], _ChatbotVectors] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def memory(self) -> int:
        """Bytes that are taken."""
        return sum(vectors.memory for vectors in self._chatbots.values())

    def nearest(
        self,
        connection: Connection,
        chatbot_id: str,
        totals: Totals,
        *,
        question: Vector,
        embedding_model: str,
        limit: int,
    ) -> list[int]:
        """The ids of the passages that are nearest to a question; passages that are gone may be among them.

        Args:
            connection: Where vectors are loaded from.
            chatbot_id: The chatbot.
            totals: Its passages as a whole, as they are at the connection's moment.
            question: The question's embedding, of length 1.
            embedding_model: The model that made it.
            limit: How many at least, where there are so many.
        """
        if totals.passages * (len(question) + BYTES_BESIDE) > self._memory:
            log.warning("chatbot_exceeds_knowledge_memory", chatbot=chatbot_id, passages=totals.passages)
            return []
        key = (chatbot_id, embedding_model)
        with self._lock:
            vectors = self._chatbots.setdefault(key, _ChatbotVectors(len(question)))
            self._chatbots.move_to_end(key)
        with vectors.loading:
            _follow(connection, vectors, key, totals)
            scannable = vectors.scannable(limit, totals)
        with self._lock:
            self._make_room(key)
        return _scan(*scannable, question)

    def _make_room(self, asked: tuple[str, str]) -> None:
        for key in [*self._chatbots]:
            if self.memory <= self._memory:
                return
            if key != asked and not self._chatbots[key].loading.locked():
                del self._chatbots[key]


def _follow(connection: Connection, vectors: "_ChatbotVectors", key: tuple[str, str], totals: Totals) -> None:
    """Load what was published since, and forget what is gone when it becomes too much."""
    if vectors.revision >= totals.revision:
        return
    if vectors.is_empty:
        vectors.removed = totals.removed
        vectors.reserve(totals.passages)
    while rows := embeddings_after(connection, *key, vectors.place, LOADED_AT_ONCE):
        vectors.add(rows)
    if (totals.removed - vectors.removed) * STALE_SHARE > totals.passages:
        ids: list[int] = []
        while page := passage_ids(connection, key[0], after=ids[-1] if ids else 0):
            ids += page
        vectors.keep(ids)
        vectors.removed = totals.removed
    vectors.revision = totals.revision


class _ChatbotVectors:
    def __init__(self, dimensions: int) -> None:
        self.loading = threading.Lock()
        self.revision = -1
        self.removed = 0
        self.place = (0, 0)
        self._count = 0
        self._ids = np.empty(0, np.int64)
        self._scales = np.empty(0, np.float32)
        self._codes = np.empty((0, dimensions), np.int8)

    @property
    def is_empty(self) -> bool:
        return self._count == 0

    @property
    def memory(self) -> int:
        return self._ids.nbytes + self._scales.nbytes + self._codes.nbytes

    def reserve(self, count: int) -> None:
        """Make room for vectors. What is scanned meanwhile stays as it is."""
        more = max(0, count - len(self._ids))
        self._ids = np.concatenate([self._ids, np.empty(more, np.int64)])
        self._scales = np.concatenate([self._scales, np.empty(more, np.float32)])
        self._codes = np.concatenate([self._codes, np.empty((more, self._codes.shape[1]), np.int8)])

    def add(self, rows: Sequence[Row[int, int, bytes]]) -> None:
        size = self._codes.shape[1] * 2
        fitting = [row for row in rows if len(row[2]) == size]
        end = self._count + len(fitting)
        if end > len(self._ids):
            self.reserve(max(end, self._count + self._count // 4))
        exact = np.frombuffer(b"".join(row[2] for row in fitting), "<f2").astype(np.float32)
        exact = exact.reshape(len(fitting), -1) if fitting else exact.reshape(0, self._codes.shape[1])
        scales = np.maximum(np.abs(exact).max(axis=1, initial=0), 1e-9) / 127
        self._ids[self._count : end] = [row[1] for row in fitting]
        self._scales[self._count : end] = scales
        self._codes[self._count : end] = np.rint(exact / scales[:, None])
        self._count = end
        self.place = (rows[-1][0], rows[-1][1])

    def keep(self, ids: list[int]) -> None:
        kept = np.flatnonzero(np.isin(self._ids[: self._count], np.array(ids, np.int64)))
        self._ids, self._scales, self._codes = self._ids[kept], self._scales[kept], self._codes[kept]
        self._count = len(kept)

    def scannable(self, limit: int, totals: Totals) -> tuple[_Ids, Vector, _Codes, int]:
        """What there is to scan, which stays as it is, and how many to find: those that are gone come on
        top of the limit."""
        end = self._count
        return self._ids[:end], self._scales[:end], self._codes[:end], limit + totals.removed - self.removed


def _scan(ids: _Ids, scales: Vector, codes: _Codes, wanted: int, question: Vector) -> list[int]:
    if len(ids) > wanted:
        code = np.rint(question / max(float(np.abs(question).max()), 1e-9) * 127).astype(np.int8)
        likeness = np.asarray(numkong.cdist(code[None], codes, "dot")).reshape(-1) * scales
        ids = ids[np.argpartition(likeness, -wanted)[-wanted:]]
    found: list[int] = ids.tolist()
    return found
