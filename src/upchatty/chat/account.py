"""The record of every completion, written behind the answer and never in its way."""

import asyncio
from collections import deque
from contextlib import suppress
from operator import attrgetter

import msgspec
import structlog

from upchatty.errors import StorageUnavailable
from upchatty.metrics import Metrics
from upchatty.storage.completions import COLUMNS, add_completions
from upchatty.storage.database import Database

BATCH_SECONDS = 0.05  # with the time of a commit, less than the 100 ms that a crash may cost
BATCH_SIZE = 500
RETRY_SECONDS = 1.0
KEPT_RECORDS = 10_000  # while the database cannot take them
CLOSE_SECONDS = 5.0

log = structlog.get_logger()
_row = attrgetter(*COLUMNS)


class CompletionRecord(msgspec.Struct):
    """What is kept of one completion. `created_at` is unix milliseconds, the other times milliseconds."""

    id: str
    chatbot_id: str
    version: int
    key_id: str
    model: str
    created_at: int
    streamed: bool
    finish_reason: str
    """OpenAI's, or `cancelled` where the caller went away, or `error`."""
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    queue_ms: float
    first_token_ms: float | None
    duration_ms: float
    messages: str | None
    """JSON."""
    answer: str | None
    fallback_for: str | None
    """The model that should have answered, where it was not this one."""
    retries: int
    estimated: bool
    """Whether the tokens were counted here, since the engine had not told them."""


class Recorder:
    """Writes records in batches, from a task of its own.

    While the database cannot take them they are kept, the newest ones, and the log says so.

    Args:
        database: Where they go.
        metrics: Counts those that are lost.
    """

    def __init__(self, database: Database, metrics: Metrics) -> None:
        self._database = database
        self._metrics = metrics
        self._records: deque[CompletionRecord] = deque()
        self._something = asyncio.Event()
        self._closing = asyncio.Event()
        self._writer: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to write."""
        self._writer = asyncio.create_task(self._write())

    def add(self, record: CompletionRecord) -> None:
        """Take a record; it is written within 100 ms."""
        if len(self._records) >= KEPT_RECORDS:
            self._records.popleft()
            self._metrics.records_lost.inc()
        self._records.append(record)
        self._something.set()

    async def close(self) -> None:
        """Write what is left, within a few seconds."""
        self._closing.set()
        self._something.set()
        if self._writer:
            await asyncio.wait([self._writer], timeout=CLOSE_SECONDS)
            self._writer.cancel()
            await asyncio.wait([self._writer], timeout=RETRY_SECONDS)  # a driver may swallow it
        if self._records:
            self._metrics.records_lost.inc(len(self._records))
            log.error("records lost", count=len(self._records), reason="the database could not take them")

    async def _write(self) -> None:
        while self._records or not self._closing.is_set():
            await self._something.wait()
            await self._pause(BATCH_SECONDS)
            self._something.clear()
            while self._records and await self._write_batch():
                pass
            if self._records:
                self._something.set()
                await asyncio.sleep(RETRY_SECONDS)

    async def _pause(self, seconds: float) -> None:
        """Wait, but not when the server is closing."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._closing.wait(), seconds)

    async def _write_batch(self) -> bool:
        batch = [self._records.popleft() for _ in range(min(BATCH_SIZE, len(self._records)))]
        try:
            await self._store(batch)
        except (StorageUnavailable, asyncio.CancelledError) as error:
            self._records.extendleft(reversed(batch))
            if isinstance(error, asyncio.CancelledError):
                raise
            log.error("records cannot be written", waiting=len(self._records), problem=_cause(error))
            return False
        return True

    async def _store(self, batch: list[CompletionRecord]) -> None:
        """Write a batch; a record that the database refuses for what it says must not hold up the others."""
        try:
            await add_completions(self._database, [_row(record) for record in batch])
        except StorageUnavailable:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, the other records matter more
            if len(batch) == 1:
                self._metrics.records_lost.inc()
                log.error("record refused", id=batch[0].id, problem=_cause(error))
                return
            middle = len(batch) // 2
            await self._store(batch[:middle])
            await self._store(batch[middle:])


def _cause(error: Exception) -> str:
    return str(error.__cause__ or error).partition("\n")[0]
