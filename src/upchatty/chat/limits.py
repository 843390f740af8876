"""Limits: what may be asked now, and what it has cost.

A request is admitted before the engine is asked, and settled when its answer has ended, however it
ended. In between, a lease keeps what it may still use from the others: ten requests at once do not
take ten times the budget. True usage is what counts in the end.

Minutes slide. Days and months are the calendar's, in UTC; they begin with what the record of
completions says was used in them, so that a restart forgets nothing.

The headers are OpenAI's: https://platform.openai.com/docs/guides/rate-limits
"""

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from math import ceil
from typing import NamedTuple

from sqlalchemy import Column
from uuid_utils import uuid7

from upchatty.auth import Caller
from upchatty.errors import Forbidden, LimitsUnavailable, RateLimited
from upchatty.limits import TOKEN_LIMITS, WORDS, ChatbotLimits, Limits
from upchatty.metrics import Metrics
from upchatty.storage.completions import tokens_since
from upchatty.storage.counters import Counters, Leases, Minute
from upchatty.storage.database import Database
from upchatty.storage.tables import completions

SOON = 1.0  # seconds: running answers give back what they do not need, nobody knows when
CLOSE_SECONDS = 3.0

Headers = list[tuple[bytes, bytes]]


class Period(NamedTuple):
    """A day or a month, and what was used in it."""

    name: str
    begins: datetime
    seconds_left: int
    """Until the next one begins, rounded up."""
    used: int = 0

    @classmethod
    def of(cls, limit: str) -> "Period":
        """The one that a limit means now."""
        now = datetime.fromtimestamp(time.time(), UTC)
        begins = now.replace(hour=0, minute=0, second=0, microsecond=0)
        ends = begins + timedelta(days=1)
        if limit == "tokens_per_month":
            begins = begins.replace(day=1)
            ends = (begins + timedelta(days=31)).replace(day=1)
        return cls(f"{limit}:{begins:%Y-%m-%d}", begins, ceil((ends - now).total_seconds()))

    def plus(self, amount: int) -> "Period":
        """The same after a further use."""
        return self._replace(used=self.used + amount)

    def seconds_until(self, used: int) -> float:
        """In how many seconds no more than `used` counts."""
        return 0.0 if self.used <= used else self.seconds_left


class Owner(NamedTuple):
    """A key or a chatbot that has limits."""

    kind: str
    id: str
    limits: Limits
    column: Column[str]
    """What names it in the record of completions."""

    @property
    def needs_lease(self) -> bool:
        """Whether any of its limits is about what is running."""
        return any(getattr(self.limits, field) for field in ("concurrent_streams", *TOKEN_LIMITS))

    def counter(self, name: str) -> str:
        """The name of one of its counters."""
        return f"{self.id}:{name}"


class State(NamedTuple):
    """One limit at this moment."""

    owner: Owner
    limit: str
    amount: int
    window: Minute | Period
    reserved: int = 0
    """Tokens that other running requests may still take."""

    @property
    def left(self) -> int:
        """What is neither used nor reserved."""
        return self.amount - self.window.used - self.reserved


class Refusal(NamedTuple):
    """Why a request has to wait, and for how many seconds."""

    limit: str
    problem: str
    seconds: float
    hopeless: bool = False
    """Whether waiting does not help either."""


class Admission:
    """A request that may be answered.

    Args:
        limiter: Whoever admits it.
        owners: Whose limits it is under.
    """

    def __init__(self, limiter: "Limiter", owners: Sequence[Owner]) -> None:
        self.lease = uuid7().hex
        self.owners = owners
        self.max_tokens = 0
        """Tokens that the answer may take."""
        self.tokens = 0
        """Tokens that prompt and answer may take together; once it is settled, those that they took."""
        self.states: list[State] = []
        self.requests: list[State] = []
        self._limiter = limiter

    @property
    def headers(self) -> Headers:
        """OpenAI's headers on the tightest limits, as they are after this request."""
        return _headers(self.requests, 1) + _headers(self.states, self.tokens)

    def settle(self, total_tokens: int) -> None:
        """End it: count what it took, give back the rest. To be called once, however it ended."""
        self.tokens = total_tokens
        self._limiter.settle(self)


class Limiter:
    """Keeps requests within the limits of their keys and chatbots.

    Args:
        counters: Where is counted.
        database: Has the record of completions.
        metrics: Count the refusals.
    """

    def __init__(self, counters: Counters, database: Database, metrics: Metrics) -> None:
        self._counters = counters
        self._database = database
        self._metrics = metrics
        self._settling: set[asyncio.Task[None]] = set()

    async def admit(
        self,
        caller: Caller,
        chatbot_id: str,
        limits: ChatbotLimits | None,
        *,
        prompt_tokens: int,
        max_tokens: int,
    ) -> Admission:
        """Let a request in, or not. Whoever gets the admission has to settle it.

        Args:
            caller: Who asks, with the key's limits.
            chatbot_id: Whom.
            limits: The chatbot's limits.
            prompt_tokens: What the prompt takes, about.
            max_tokens: What the answer takes at most; the admission may allow fewer.

        Raises:
            Forbidden: The chatbot has expired.
            RateLimited: A limit is reached.
            LimitsUnavailable: The shared counters cannot be reached.
            StorageUnavailable: The record of completions cannot be read.
        """
        owners = []
        if caller.limits is not None:
            owners.append(Owner("key", caller.key_id, caller.limits, completions.c.key_id))
        if limits is not None:
            _check_expiry(limits)
            owners.append(Owner("chatbot", chatbot_id, limits, completions.c.chatbot_id))
        admission = Admission(self, owners)
        try:
            async with self._counters.guarded():
                await self._admit(admission, prompt_tokens, max_tokens)
        except BaseException:
            admission.settle(0)
            raise
        return admission

    def settle(self, admission: Admission) -> None:
        """Begin to count what a request took; the next one is not admitted before it is counted."""
        task = asyncio.create_task(self._settle(admission))
        self._settling.add(task)
        task.add_done_callback(self._settling.discard)

    async def close(self) -> None:
        """Count what is left to be counted."""
        if self._settling:
            await asyncio.wait(self._settling, timeout=CLOSE_SECONDS)
        await self._counters.close()

    async def _admit(self, admission: Admission, prompt_tokens: int, max_tokens: int) -> None:
        if self._settling:
            await asyncio.wait(self._settling)
        refusals: list[Refusal] = []
        for owner in admission.owners:
            leases = Leases(0, 0)
            if owner.needs_lease:
                leases = await self._counters.take(owner.id, admission.lease, prompt_tokens + max_tokens)
            if (most := owner.limits.concurrent_streams) is not None and leases.running >= most:
                refusals.append(_too_many_at_once(owner, most))
            await self._read(admission, owner, leases.tokens)
        refusals += [_too_many_requests(state) for state in admission.requests if state.left < 1]
        need = prompt_tokens + 1
        refusals += [_too_many_tokens(state, need) for state in admission.states if state.left < need]
        if not refusals:
            refusals = await self._count_request(admission)
        if refusals:
            raise self._refused(admission, refusals)
        left = min((state.left for state in admission.states), default=prompt_tokens + max_tokens)
        admission.max_tokens = min(max_tokens, left - prompt_tokens)
        admission.tokens = prompt_tokens + admission.max_tokens
        for owner in admission.owners:
            if owner.needs_lease:
                await self._counters.lower(owner.id, admission.lease, admission.tokens)

    async def _read(self, admission: Admission, owner: Owner, reserved: int) -> None:
        """What an owner's limits say now."""
        for limit in ("requests_per_minute", *TOKEN_LIMITS):
            if (amount := getattr(owner.limits, limit)) is None:
                continue
            window: Minute | Period
            if limit in ("requests_per_minute", "tokens_per_minute"):
                window = await self._counters.minute(owner.counter(limit))
            else:
                window = await self._period(owner, limit)
            if limit == "requests_per_minute":
                admission.requests.append(State(owner, limit, amount, window))
            else:
                admission.states.append(State(owner, limit, amount, window, reserved))

    async def _period(self, owner: Owner, limit: str) -> Period:
        period = Period.of(limit)
        name = owner.counter(period.name)
        used = await self._counters.period(name)
        if not used:
            since = int(period.begins.timestamp() * 1000)
            before = await tokens_since(self._database, owner.column, owner.id, since)
            await self._counters.begin_period(name, before, period.seconds_left)
            used = await self._counters.period(name)
        return period.plus(used)

    async def _count_request(self, admission: Admission) -> list[Refusal]:
        """Count the request itself, unless another one was faster."""
        for state in admission.requests:
            name = state.owner.counter(state.limit)
            if not await self._counters.add_to_minute(name, 1, state.amount):
                window = await self._counters.minute(name)
                return [_too_many_requests(state._replace(window=window))]
        return []

    async def _settle(self, admission: Admission) -> None:
        with suppress(LimitsUnavailable):  # which the log has; the leases end by themselves
            try:
                if admission.tokens:
                    await self._count_tokens(admission)
            finally:
                await self._release(admission)

    async def _count_tokens(self, admission: Admission) -> None:
        async with self._counters.guarded():
            for owner, limit, _, window, _ in admission.states:
                if isinstance(window, Period):
                    name = owner.counter(window.name)
                    await self._counters.add_to_period(name, admission.tokens, window.seconds_left)
                else:
                    await self._counters.add_to_minute(owner.counter(limit), admission.tokens)

    async def _release(self, admission: Admission) -> None:
        async with self._counters.guarded():
            for owner in admission.owners:
                if owner.needs_lease:
                    await self._counters.release(owner.id, admission.lease)

    def _refused(self, admission: Admission, refusals: list[Refusal]) -> RateLimited:
        """The error that names the limit which holds longest."""
        longest = max(refusals, key=lambda refusal: (refusal.hopeless, refusal.seconds))
        self._metrics.rate_limited.labels(longest.limit).inc()
        error = RateLimited(problem=longest.problem, retry_after=longest.seconds)
        headers = _headers(admission.requests, 0) + _headers(admission.states, 0)
        error.headers |= {name.decode(): value.decode() for name, value in headers}
        if longest.hopeless:
            error.headers["x-should-retry"] = "false"  # OpenAI's clients heed it
        return error


def _check_expiry(limits: ChatbotLimits) -> None:
    if limits.expires_at is not None and limits.expires_at <= time.time():
        moment = datetime.fromtimestamp(limits.expires_at, UTC)
        raise Forbidden(problem=f"this chatbot has expired: it answered until {moment:%Y-%m-%d %H:%M:%S} UTC")


def _too_many_at_once(owner: Owner, most: int) -> Refusal:
    problem = (
        f"this {owner.kind} may have {most:,} {WORDS['concurrent_streams']}, and that many are being made; "
        "come back when one of them has ended"
    )
    return Refusal("concurrent_streams", problem, SOON)


def _too_many_requests(state: State) -> Refusal:
    seconds = state.window.seconds_until(state.amount - 1)
    return Refusal(state.limit, _used_up(state, seconds), seconds)


def _too_many_tokens(state: State, need: int) -> Refusal:
    if need > state.amount:
        problem = f"the request is too large: it needs about {need:,} tokens, and {_of(state)}"
        return Refusal(state.limit, problem, state.window.seconds_until(0) or SOON, hopeless=True)
    seconds = state.window.seconds_until(state.amount - need)
    if seconds:
        return Refusal(state.limit, _used_up(state, seconds), seconds)
    problem = f"{_of(state)}, and running answers hold what is left; come back when they have ended"
    return Refusal(state.limit, problem, SOON)


def _used_up(state: State, seconds: float) -> str:
    return f"{_of(state)}, and they are used up; come back in {_in_words(ceil(seconds))}"


def _of(state: State) -> str:
    return f"this {state.owner.kind} has {state.amount:,} {WORDS[state.limit]}"


def _in_words(seconds: int) -> str:
    """A time to wait, rounded up."""
    for unit, length in (("day", 86_400), ("hour", 3600), ("minute", 60)):
        if seconds >= 2 * length:
            return f"{ceil(seconds / length)} {unit}s"
    return f"{seconds} second" if seconds == 1 else f"{seconds} seconds"


def _headers(states: Sequence[State], taken: int) -> Headers:
    """The three headers on the tightest of some limits, after `taken` more."""
    if not states:
        return []
    state = min(states, key=lambda state: state.left)
    kind = b"requests" if state.limit == "requests_per_minute" else b"tokens"
    reset = state.window.plus(taken).seconds_until(0)
    return [
        (b"x-ratelimit-limit-" + kind, b"%d" % state.amount),
        (b"x-ratelimit-remaining-" + kind, b"%d" % max(0, state.left - taken)),
        (b"x-ratelimit-reset-" + kind, _duration(reset).encode()),
    ]


def _duration(seconds: float) -> str:
    """A duration as OpenAI writes it: `120ms`, `6m0s`."""
    if seconds < 1:
        return f"{ceil(seconds * 1000)}ms"
    minutes, rest = divmod(ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes}m{rest}s"
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"
