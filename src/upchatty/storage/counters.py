"""Counters of what keys and chatbots use, in this process's memory.

What is used up is counted with the `limits` library. Beside it are leases: what running answers may
still use.
"""

import asyncio
from collections import defaultdict
from contextlib import AbstractAsyncContextManager, nullcontext
from math import floor
from typing import NamedTuple

from limits.aio.storage import MemoryStorage, RedisStorage

MINUTE = 60
UNLIMITED = 2**50  # exact also where numbers are doubles
A_MOMENT = 0.01  # seconds, so that what is promised for then is true by then


class Minute(NamedTuple):
    """A sliding minute: the last whole one, which fades, and the one that is filling. Times are seconds."""

    before: int
    fades_in: float
    now: int
    ends_in: float

    @property
    def used(self) -> int:
        """How much counts at this moment."""
        return floor(self.before * self.fades_in / MINUTE + self.now)

    def plus(self, amount: int) -> "Minute":
        """The same after a further use."""
        return self._replace(now=self.now + amount, ends_in=self.ends_in or MINUTE)

    def seconds_until(self, used: int) -> float:
        """In how many seconds no more than `used` counts, if nothing is added."""
        if self.used <= used:
            return 0.0
        most = used + 1 - self.now
        if most > 0:
            return self.fades_in - most * MINUTE / self.before + A_MOMENT
        return self.ends_in + MINUTE - (used + 1) * MINUTE / self.now + A_MOMENT


class Leases(NamedTuple):
    """What other answers hold that are being made: how many they are, and how many tokens they may take."""

    running: int
    tokens: int


class Counters:
    """Counters in this process's memory. Every method is done before another task can come between."""

    def __init__(self, storage: RedisStorage | None = None) -> None:
        self._storage = storage or MemoryStorage()
        self._leases: defaultdict[str, dict[str, int]] = defaultdict(dict)
        self._looking: asyncio.Task[None] | None = None
        self._resting: asyncio.Task[None] | None = None

    def guarded(self) -> AbstractAsyncContextManager[None]:
        """A block in which the counters are used.

        Raises:
            LimitsUnavailable: They cannot be reached, or not in time.
        """
        return nullcontext()

    async def minute(self, name: str) -> Minute:
        """What counts of the sliding minute of this name."""
        before, fades_in, now, ends_in = await self._storage.get_sliding_window(name, MINUTE)
        return Minute(before, fades_in, now, max(0.0, ends_in - MINUTE))

    async def add_to_minute(self, name: str, amount: int, most: int = UNLIMITED) -> bool:
        """Count, and say so, unless more than `most` would count then."""
        counted = await self._storage.acquire_sliding_window_entry(name, most, MINUTE, amount)
        self._rest()
        return counted

    async def period(self, name: str) -> int:
        """What counts of the period of this name."""
        return await self._storage.get(name)

    async def add_to_period(self, name: str, amount: int, seconds: int) -> None:
        """Count in a period, of which `seconds` are left."""
        await self._storage.incr(name, seconds, amount)
        self._rest()

    async def begin_period(self, name: str, amount: int, seconds: int) -> None:
        """Begin a period with what was used in it before, unless it has begun."""
        if amount and not await self.period(name):
            await self.add_to_period(name, amount, seconds)

    async def take(self, owner: str, lease: str, tokens: int) -> Leases:
        """Take a lease on an owner's tokens; says what the others hold."""
        others = self._leases[owner]
        held = Leases(len(others), sum(others.values()))
        others[lease] = tokens
        return held

    async def lower(self, owner: str, lease: str, tokens: int) -> None:
        """Have a lease hold fewer tokens."""
        self._leases[owner][lease] = tokens

    async def release(self, owner: str, lease: str) -> None:
        """End a lease."""
        self._leases[owner].pop(lease, None)
        if not self._leases[owner]:
            del self._leases[owner]

    async def close(self) -> None:
        """Let go of what the counters hold."""
        for task in (self._looking, self._resting):
            if task:
                task.cancel()

    def _rest(self) -> None:
        """Have the memory looked through for what has expired once a minute.

        By itself `limits` does so at every count, unless its timer is busy. That takes a millisecond where
        there are a thousand counters.
        """
        storage = self._storage
        if isinstance(storage, MemoryStorage) and storage.timer is not self._resting:
            self._looking = storage.timer
            self._resting = storage.timer = asyncio.create_task(asyncio.sleep(MINUTE))
