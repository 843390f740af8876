"""One of the servers that run a model: how much work it has, how quick it is, and whether it is well."""

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable

import structlog

from upchatty.engines.client import EngineClient
from upchatty.engines.llama import LlamaServer
from upchatty.errors import QueueFull, RequestError

FAILURES = 3  # in a row set a replica aside
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 5.0  # seconds until it is probed
PROBE_SECONDS = 2.0
MINUTE = 60.0
MEMORY_SECONDS = 10.0  # a slow answer is half forgotten after seven of these seconds
QUICKEST = 0.005  # seconds to a first token; below, all are equally quick
AFFINITY = 2.0  # so many times the work of another replica is worth a prefix in the cache
ALIKE = 0.05  # seconds; below, latency says nothing about that

log = structlog.get_logger()


class Replica:
    """One server.

    Args:
        name: Its address, for logs and metrics.
        engine: The client of the server, or the child that is one.
        slots: Answers that it generates at the same time.
        weight: Its share of the work.
        requests_per_minute: Requests that it takes within any minute, None: any number.
        on_change: Called when it may be able to take work again.
    """

    def __init__(
        self,
        name: str,
        engine: EngineClient | LlamaServer,
        slots: int,
        *,
        weight: float = 1.0,
        requests_per_minute: int | None = None,
        on_change: Callable[[], None],
    ) -> None:
        self.name = name
        self.engine = engine
        self._slots = slots
        self._weight = weight
        self._on_change = on_change
        self._sent: deque[float] | None = deque(maxlen=requests_per_minute) if requests_per_minute else None
        self.running = 0
        self._failures = 0
        self._pause = FIRST_PAUSE
        self._rests_until = 0.0  # because it has said so
        self.latency = 0.0
        """Seconds to the first token, as last seen; 0: never."""
        self._measured_at = self._taken_at = 0.0
        self._prober: asyncio.Task[None] | None = None
        self._on_trial = False

    @property
    def is_set_aside(self) -> bool:
        """Whether it has failed so often that it gets no requests until a probe succeeds."""
        return self._prober is not None

    def away_for(self, now: float) -> float:
        """Seconds, at least, until it takes requests again; 0 if it does now, though its slots may be full.

        Args:
            now: The monotonic clock's time.
        """
        if self._prober is not None:
            return self._pause
        away = self._rests_until - now
        if self._sent is not None and len(self._sent) == self._sent.maxlen:
            away = max(away, self._sent[0] + MINUTE - now)
        return max(away, 0.0)

    def has_slot(self) -> bool:
        """Whether it can begin an answer now."""
        return self.running < (1 if self._on_trial else self._slots)

    def load(self, now: float, least_latency: float) -> tuple[float, float]:
        """How long an answer would wait here, in a measure of its own: the time to the first token, as lately
        seen, times the answers being made; of equals, the one that was chosen longest ago. This is Finagle's
        peak EWMA, which gives a slow server less early, and forgets:
        https://linkerd.io/2016/03/16/beyond-round-robin-load-balancing-for-latency/.

        Args:
            now: The monotonic clock's time.
            least_latency: Seconds that the quickest one takes; the others are taken for no quicker.
        """
        latency = self.latency * math.exp((self._measured_at - now) / MEMORY_SECONDS)
        return max(latency, least_latency) * self._work, self._taken_at

    def is_worth_it(self, other: "Replica") -> bool:
        """Whether this one, which has a prompt's prefix in its cache, is to be preferred to another one that
        has less to do: unless its work, or what was last seen of its latency, is more than twice as much."""
        known = other.latency or self.latency
        return max(self.latency, ALIKE) * self._work <= AFFINITY * max(known, ALIKE) * other._work

    @property
    def _work(self) -> float:
        return (self.running + 1) / self._weight

    def take(self) -> None:
        """Begin an answer here."""
        self.running += 1
        self._taken_at = time.monotonic()
        if self._sent is not None:
            self._sent.append(self._taken_at)

    def release(self) -> None:
        """End an answer here."""
        self.running -= 1
        self._on_change()

    def answered(self, seconds: float) -> None:
        """It has begun to answer, so many seconds after it was asked."""
        now = time.monotonic()
        decayed = self.latency * math.exp((self._measured_at - now) / MEMORY_SECONDS)
        self.latency = seconds if seconds > decayed else (decayed + seconds) / 2
        self._measured_at = now
        if self._failures or self._on_trial:
            self._failures, self._pause, self._on_trial = 0, FIRST_PAUSE, False
            self._on_change()

    def failed(self, error: RequestError) -> None:
        """It has failed to answer."""
        if isinstance(error, QueueFull):  # it is well, and has too much to do
            if error.retry_after:
                self._rests_until = time.monotonic() + error.retry_after
                asyncio.get_running_loop().call_later(error.retry_after, self._on_change)
            return
        self._failures += 1
        is_ours = isinstance(self.engine, LlamaServer)  # which is supervised
        if not is_ours and self._prober is None and (self._on_trial or self._failures >= FAILURES):
            self._on_trial = False
            log.warning("replica set aside", replica=self.name, failures=self._failures, problem=str(error))
            self._prober = asyncio.create_task(self._probe())
            self._on_change()

    async def stop(self) -> None:
        """Stop the engine, or close the connections to it."""
        if self._prober:
            self._prober.cancel()
        if isinstance(self.engine, LlamaServer):
            await self.engine.stop()
        else:
            self.engine.close()

    async def _probe(self) -> None:
        assert isinstance(self.engine, EngineClient)
        while True:
            await asyncio.sleep(self._pause)
            if await self.engine.answers(PROBE_SECONDS):
                break
            self._pause = min(self._pause * 2, LONGEST_PAUSE)
        log.info("replica on trial", replica=self.name)
        self._pause = min(self._pause * 2, LONGEST_PAUSE)  # should the trial fail
        self._prober, self._on_trial = None, True
        self._on_change()
