"""The load generator for everything but throughput: lean, and with times that mean something.

At a constant rate every request has a time at which it is due, and its latency counts from then, so that
a server that falls behind cannot hide it. Throughput is left to wrk, which is quicker.
"""

import asyncio
import collections
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import httptools
import msgspec

from benchmarks.clock import PreciseTimer
from benchmarks.gateway.target import Question, Target

FIRST_TEXT = b"word1"


@dataclass(slots=True)
class Answer:
    """What came back. The times are those of `time.monotonic()`.

    Attributes:
        due: When the request should have been sent.
        status: The HTTP status; 0 when the connection ended before the answer did.
        first: When the first text came.
        ended: When all had come.
    """

    due: float
    status: int = 0
    first: float = 0.0
    ended: float = 0.0
    body: bytearray = field(default_factory=bytearray)


class _Usage(msgspec.Struct):
    completion_tokens: int


class _Message(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    message: _Message = msgspec.field(default_factory=_Message)
    delta: _Message = msgspec.field(default_factory=_Message)


class _Completion(msgspec.Struct):
    """A whole answer or a chunk, as far as it is checked."""

    choices: list[_Choice] = msgspec.field(default_factory=list)
    usage: _Usage | None = None


def mistake(answer: Answer, question: Question) -> str:
    """What is wrong with an answer: status, text, pieces, usage, the end. Empty: nothing."""
    if answer.status != 200:
        return f"status {answer.status}: {bytes(answer.body[:300])!r}"
    body = bytes(answer.body)
    if question.stream:
        events = [
            event.removeprefix(b"data: ") for event in body.split(b"\n\n") if event.startswith(b"data: ")
        ]
        if not events or events[-1].strip() != b"[DONE]":
            return f"a stream without its end: {body[-200:]!r}"
        chunks = [msgspec.json.decode(event, type=_Completion) for event in events[:-1]]
        pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    else:
        chunks = [msgspec.json.decode(body, type=_Completion)]
        pieces = [chunk.choices[0].message.content or "" for chunk in chunks]
    if "".join(pieces) != question.answer:
        return f"another text: {body[:300]!r}"
    if question.stream and len([piece for piece in pieces if piece]) != question.chunks:
        return f"{len([piece for piece in pieces if piece])} pieces in place of {question.chunks}"
    if [chunk.usage.completion_tokens for chunk in chunks if chunk.usage][-1:] != [question.chunks]:
        return f"no usage or a wrong one: {body[-300:]!r}"
    return ""


class Connection(asyncio.Protocol):
    """One connection, with one request at a time.

    Args:
        pool: Where it goes when an answer has ended.
    """

    def __init__(self, pool: "Pool") -> None:
        self._pool = pool
        self._answer: Answer | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's own, which does not derive from it

    def ask(self, request: bytes, answer: Answer, done: Callable[[Answer], object]) -> None:
        """Send a request; `done` is called with the answer when all of it has come, or the connection ended."""
        self._answer, self._done = answer, done
        self._parser = httptools.HttpResponseParser(self)
        self._transport.write(request)

    def abort(self) -> None:
        """Go away in mid-answer, as a caller does who closes the page."""
        self._answer = None
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._answer is not None:
            self._parser.feed_data(data)

    def on_body(self, data: bytes) -> None:
        answer = self._answer
        if answer is None:
            return
        answer.body += data
        if not answer.first and FIRST_TEXT in answer.body:
            answer.first = time.monotonic()

    def on_message_complete(self) -> None:
        if self._answer is not None:
            self._finish(self._answer, self._parser.get_status_code(), self._parser.should_keep_alive())

    def connection_lost(self, exc: Exception | None) -> None:
        self._pool.forget(self)
        if self._answer is not None:
            self._finish(self._answer, 0, keep_alive=False)

    def _finish(self, answer: Answer, status: int, keep_alive: bool) -> None:
        answer.status, answer.ended = status, time.monotonic()
        self._answer = None
        if keep_alive:
            self._pool.idle.append(self)
        else:
            self._transport.abort()
        self._done(answer)


class Pool:
    """Connections to one target, kept alive.

    Args:
        target: What is asked.
        timer: Says when something is due.
    """

    def __init__(self, target: Target, timer: PreciseTimer) -> None:
        self.target = target
        self.idle: list[Connection] = []
        self._timer = timer
        self._loop = asyncio.get_running_loop()

    def close(self) -> None:
        """Close what is idle."""
        for connection in [*self.idle]:
            connection.abort()
        self.idle.clear()

    def forget(self, connection: Connection) -> None:
        """It is closed."""
        if connection in self.idle:
            self.idle.remove(connection)

    async def connection(self) -> Connection:
        """One that is idle, or a new one."""
        if self.idle:
            return self.idle.pop()
        _, connection = await self._loop.create_connection(
            lambda: Connection(self), "127.0.0.1", self.target.port
        )
        return connection

    async def ask(self, request: bytes) -> Answer:
        """One request, and its answer."""
        connection = await self.connection()
        future: asyncio.Future[Answer] = self._loop.create_future()
        connection.ask(request, Answer(time.monotonic()), future.set_result)
        return await future

    async def check(self, question: Question) -> str:
        """Ask, and say what is wrong with the answer; empty: nothing."""
        try:
            async with asyncio.timeout(20):
                return mistake(await self.ask(self.target.request(question)), question)
        except TimeoutError:
            return "no answer within 20 seconds"
        except (OSError, msgspec.MsgspecError) as error:
            return str(error)

    async def at_rate(
        self, question: Question, rate: float, number: int, patience: float = 60.0
    ) -> list[Answer]:
        """Ask at a constant rate, whether answers come or not.

        Args:
            question: What is asked.
            rate: Requests a second.
            number: Requests in all.
            patience: Seconds to wait for what is still open after the last one.

        Returns:
            The answers in the order in which they were due; those that did not come have the status 0.
        """
        asking = _AtRate(self, self._timer, self.target.request(question), rate, number)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(number / rate + patience):
                await asking.finished.wait()
        return asking.answers


class _AtRate:
    """Sends a request again and again at a constant rate."""

    def __init__(self, pool: Pool, timer: PreciseTimer, request: bytes, rate: float, number: int) -> None:
        self.answers: list[Answer] = []
        self.finished = asyncio.Event()
        self._pool, self._timer = pool, timer
        self._request, self._rate, self._left = request, rate, number
        self._connecting: set[asyncio.Task[None]] = set()
        self._dues = collections.deque(time.monotonic() + 0.01 + each / rate for each in range(number))
        timer.call_at(self._dues[0], self._send)

    def _send(self) -> None:
        while self._dues and self._dues[0] <= time.monotonic():
            answer = Answer(self._dues.popleft())
            self.answers.append(answer)
            if self._pool.idle:
                self._pool.idle.pop().ask(self._request, answer, self._done)
            else:
                task = asyncio.create_task(self._send_anew(answer))
                self._connecting.add(task)
                task.add_done_callback(self._connecting.discard)
        if self._dues:
            self._timer.call_at(self._dues[0], self._send)

    async def _send_anew(self, answer: Answer) -> None:
        try:
            connection = await self._pool.connection()
        except OSError:
            self._done(answer)
        else:
            connection.ask(self._request, answer, self._done)

    def _done(self, _: Answer) -> None:
        self._left -= 1
        if not self._left:
            self.finished.set()


def percentile(values: list[float], share: float) -> float:
    """The value that this share of the values does not exceed."""
    return sorted(values)[min(int(len(values) * share), len(values) - 1)]
