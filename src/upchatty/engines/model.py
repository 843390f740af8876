"""A model with its replicas: who answers, who waits, and what happens when one of them fails.

Until the first token is there, a request goes to one replica after another; after it, never again.
"""

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from upchatty.engines.client import EngineClient, EngineStream, Prompt
from upchatty.engines.dialect import Completion, Message
from upchatty.engines.llama import LlamaServer
from upchatty.engines.loader import Loader
from upchatty.engines.replica import QUICKEST, Replica
from upchatty.errors import EngineFailed, EngineNotReady, EngineTimeout, QueueFull, RequestError, Unavailable
from upchatty.metrics import ModelMetrics
from upchatty.settings import ModelSettings

if TYPE_CHECKING:
    from upchatty.tracing import Attempt, Trace  # which are costly to import

RETRIED = (EngineFailed, EngineTimeout, Unavailable)
"""What another replica may do better."""
REMEMBERED = 10_000  # prefixes
Answer = TypeVar("Answer")
Call = Callable[[EngineClient, float], Awaitable[Answer]]


class Generation:
    """An answer that is being generated, with the slot that it takes.

    Args:
        model: The model that answers.
        completion: Its account.
        trace: Of the request, where it is traced.
    """

    def __init__(self, model: "Model", completion: Completion, trace: "Trace | None" = None) -> None:
        self.model = model
        self.completion = completion
        self._trace = trace
        self._attempt: Attempt | None = None
        self.queue_seconds = 0.0
        self.retries = 0
        self._replica: Replica | None = None
        self._stream: EngineStream | None = None
        self._first: list[str] | None = None

    async def begin(self, prompt: Prompt, affinity: str, deadline: float) -> None:
        """Wait for a slot, and in it for the first token.

        Args:
            prompt: What is asked.
            affinity: What requests with the same beginning have in common.
            deadline: When the first token has to be there, by the monotonic clock.

        Raises:
            RequestError: No replica could answer.
        """
        tried: list[Replica] = []
        while True:
            asked_at, refusal = time.monotonic(), None
            try:
                self._replica = await self.model.take_slot(affinity, tried, deadline)
            except BaseException as error:
                refusal = error
                raise
            finally:
                waited = time.monotonic() - asked_at
                self.queue_seconds += waited
                if self._trace:
                    self._trace.queued(waited, refusal)
            try:
                return await self._ask(prompt, deadline)
            except RETRIED as error:
                tried.append(self._replica)
                self._let_go()
                if not self.model.may_retry(tried, deadline):
                    raise
                self.model.metrics.retries[_reason(error)] += 1
                self.retries += 1
                self.completion.restart()

    @property
    def has_ended(self) -> bool:
        """Whether the engine has sent all."""
        return self._first is None and self._stream is not None and self._stream.has_ended

    async def next(self) -> list[str] | None:
        """The next pieces of text; None at the end.

        Raises:
            RequestError: The engine failed.
        """
        if self._first is not None:
            first, self._first = self._first, None
            return first
        assert self._stream and self._replica
        try:
            texts = await self._stream.next()
        except RETRIED as error:
            self._end_attempt(error)
            self._replica.failed(error)
            raise
        if texts is None:
            self._end_attempt()
        return texts

    def close(self) -> None:
        """Give the slot back. An engine that has not ended stops."""
        if self._replica:
            self._let_go()

    async def _ask(self, prompt: Prompt, deadline: float) -> None:
        assert self._replica
        replica, started = self._replica, time.monotonic()
        try:
            client = _client(replica)
            if self._trace:
                self._attempt = self._trace.attempt(
                    model=self.model.name,
                    engine_model=client.model,
                    url=client.base_url,
                    parameters=prompt.parameters,
                )
            headers = self._attempt.headers if self._attempt else b""
            self._stream = await client.begin(prompt, self.completion, deadline, headers)
            self._first = await self._stream.next()
            self._stream.first_token_came()
            if self._attempt and self._first:
                self._attempt.first_token()
        except RequestError as error:
            self._end_attempt(error)
            # Callers may set the deadline so low that any replica fails.
            if isinstance(error, RETRIED) and time.monotonic() < deadline:
                replica.failed(error)
            raise
        replica.answered(time.monotonic() - started)

    def _end_attempt(self, error: RequestError | None = None, *, cancelled: bool = False) -> None:
        if self._attempt:
            self._attempt.end(
                error,
                cancelled=cancelled,
                finish_reason=self.completion.finish_reason,
                input_tokens=self.completion.usage.prompt_tokens,
                cached_tokens=self.completion.usage.cached_tokens,
                output_tokens=self.completion.usage.completion_tokens,
            )
            self._attempt = None

    def _let_go(self) -> None:
        assert self._replica
        self._end_attempt(cancelled=self.completion.finish_reason is None)
        if self._stream:
            self._stream.close()
            self._stream = None
        replica, self._replica = self._replica, None
        replica.release()


@dataclass(slots=True, eq=False)
class _Waiter:
    """A request in the queue."""

    affinity: str
    tried: list[Replica]
    slot: "asyncio.Future[Replica]" = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class Model:
    """A model.

    Args:
        name: Its name in the settings.
        settings: How it is run.
        metrics: Counts what happens to it.
    """

    def __init__(self, name: str, settings: ModelSettings, metrics: ModelMetrics) -> None:
        self.name = name
        self.settings = settings
        self.metrics = metrics
        self.replicas: list[Replica] = []
        self.loader: Loader | None = None
        """What loads the engine, if it runs here."""
        self._queue: deque[_Waiter] = deque()
        self._homes: OrderedDict[str, set[Replica]] = OrderedDict()  # who has which prefix cached

    @property
    def waiting(self) -> int:
        """Requests in the queue, for a slot or until the model is loaded."""
        return len(self._queue) + (self.loader.waiting if self.loader else 0)

    @property
    def running(self) -> int:
        """Answers being generated."""
        return sum(replica.running for replica in self.replicas)

    @property
    def local(self) -> LlamaServer | None:
        """The engine, if it runs here."""
        return self.loader.server if self.loader else None

    @property
    def context(self) -> int | None:
        """The tokens that one conversation may take, or None where the engine does not say."""
        return self.local.context if self.local else None

    @property
    def restarts(self) -> int:
        """How often an engine that runs here was started again."""
        return self.local.restarts if self.local else 0

    async def count_tokens(self, messages: list[Message]) -> int | None:
        """The length of a prompt in tokens, or None where the engine has no way to tell."""
        return await self.local.client().count_tokens(messages) if self.local else None

    async def start(self) -> None:
        """Load the model, if it runs here.

        Raises:
            ModelFileError: llama.cpp cannot load its file.
            ConfigurationError: It takes more memory than it may.
        """
        if self.loader:
            await self.loader.start()

    async def hold(self, deadline: float) -> None:
        """Have the model in memory, if it runs here, until `let_go`; see `Loader.hold`."""
        if self.loader:
            await self.loader.hold(deadline)

    def let_go(self) -> None:
        """End what `hold` began."""
        if self.loader:
            self.loader.release()

    async def stop(self) -> None:
        """Stop the engine, or close the connections to it."""
        if self.loader:
            await self.loader.stop()
        await asyncio.gather(*(replica.stop() for replica in self.replicas))

    async def answers(self, seconds: float) -> bool:
        """Whether an engine answers, found out within `seconds`, or will once it is loaded again."""
        if self.loader and self.loader.is_away:
            return True
        clients = []
        for replica in self.replicas:
            try:
                clients.append(_client(replica))
            except EngineNotReady:
                return False
        probes = [asyncio.create_task(client.answers(seconds)) for client in clients]
        try:
            for probe in asyncio.as_completed(probes):
                if await probe:
                    return True
            return False
        finally:
            for task in probes:
                task.cancel()

    # The choice

    async def take_slot(self, affinity: str, tried: list[Replica], deadline: float) -> Replica:
        """A replica that has a slot for this request, at once or from the queue; see `Generation.begin`.

        Raises:
            Unavailable: There is none, or the queue is full, or the wait took too long.
        """
        if not self._queue and (replica := self._choose(affinity, tried)):
            return replica
        self._check_reachable(tried)
        if len(self._queue) >= self.settings.queue:
            raise QueueFull(model=self.name, problem=f"{len(self._queue)} requests are waiting already")
        waiter = _Waiter(affinity, tried)
        self._queue.append(waiter)
        try:
            return await self._slot_for(waiter, deadline)
        except BaseException:
            if waiter in self._queue:
                self._queue.remove(waiter)
            elif waiter.slot.done() and not waiter.slot.cancelled() and not waiter.slot.exception():
                waiter.slot.result().release()  # it came when nobody was waiting any more
            raise

    def may_retry(self, tried: list[Replica], deadline: float) -> bool:
        """Whether there is another replica, and time."""
        now = time.monotonic()
        return now < deadline and any(
            replica not in tried and not replica.away_for(now) for replica in self.replicas
        )

    async def ask(self, call: Call[Answer], deadline: float) -> Answer:
        """Have a replica answer something that is no completion, another one where it fails.

        Args:
            call: Asks a replica, until the deadline.
            deadline: Until when, by the monotonic clock.

        Raises:
            RequestError: No replica could answer.
        """
        await self.hold(deadline)
        tried: list[Replica] = []
        try:
            while True:
                replica, started = await self.take_slot("", tried, deadline), time.monotonic()
                try:
                    answer = await call(_client(replica), deadline)
                    replica.answered(time.monotonic() - started)
                    return answer
                except RETRIED as error:
                    tried.append(replica)
                    if time.monotonic() < deadline:
                        replica.failed(error)
                    if not self.may_retry(tried, deadline):
                        raise
                    self.metrics.retries[_reason(error)] += 1
                finally:
                    replica.release()
        finally:
            self.let_go()

    def serve_queue(self) -> None:
        """Give out the slots that are free."""
        for waiter in [*self._queue]:
            if waiter.slot.done():
                continue  # it is leaving
            try:
                self._check_reachable(waiter.tried)
            except Unavailable as error:
                self._queue.remove(waiter)
                waiter.slot.set_exception(error)
                continue
            if replica := self._choose(waiter.affinity, waiter.tried):
                self._queue.remove(waiter)
                waiter.slot.set_result(replica)
            elif not any(replica.has_slot() for replica in self.replicas):
                return

    async def _slot_for(self, waiter: _Waiter, deadline: float) -> Replica:
        patience = min(self.settings.queue_seconds, deadline - time.monotonic())
        try:
            async with asyncio.timeout(patience):
                return await waiter.slot
        except TimeoutError:
            raise QueueFull(
                model=self.name, problem=f"no slot became free in {patience:.3g} seconds"
            ) from None

    def _choose(self, affinity: str, tried: list[Replica]) -> Replica | None:
        """The least loaded replica, or one that has the prefix cached unless that has far more to do."""
        now = time.monotonic()
        if len(self.replicas) == 1:
            [only] = self.replicas
            if tried or not only.has_slot() or only.away_for(now):
                return None
            only.take()
            return only
        able = [
            replica
            for replica in self.replicas
            if replica.has_slot() and replica not in tried and not replica.away_for(now)
        ]
        if not able:
            return None
        quickest = min((replica.latency for replica in able if replica.latency), default=0.0)

        def load(replica: Replica) -> tuple[float, float]:
            return replica.load(now, max(quickest, QUICKEST))

        chosen = min(able, key=load)
        homes = self._homes.setdefault(affinity, set())
        if chosen not in homes and (near := homes.intersection(able)):
            home = min(near, key=load)
            if home.is_worth_it(chosen):
                chosen = home
        homes.add(chosen)
        self._homes.move_to_end(affinity)
        if len(self._homes) > REMEMBERED:
            self._homes.popitem(last=False)
        chosen.take()
        return chosen

    def _check_reachable(self, tried: list[Replica]) -> None:
        """Raise Unavailable unless a replica that was not tried takes requests, now or when it has a slot."""
        now = time.monotonic()
        times = [replica.away_for(now) for replica in self.replicas if replica not in tried]
        if not times or min(times) == 0:
            return
        if all(replica.is_set_aside for replica in self.replicas):
            problem = "its server fails again and again" if len(times) == 1 else "all of its servers fail"
            raise EngineNotReady(model=self.name, problem=problem, retry_after=min(times))
        raise QueueFull(model=self.name, problem="its server has too many requests", retry_after=min(times))


def _client(replica: Replica) -> EngineClient:
    return replica.engine if isinstance(replica.engine, EngineClient) else replica.engine.client()


def _reason(error: RequestError) -> str:
    """Why a replica did not answer, in a word for metrics."""
    match error:
        case EngineTimeout():
            return "timeout"
        case QueueFull():
            return "busy"
        case EngineNotReady():
            return "unavailable"
    return "failed"
