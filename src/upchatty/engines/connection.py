"""One HTTP/1.1 connection to an engine, and the answers that come over it.

This is the way of every token, so it does no more than that needs: httptools parses, and a body's bytes
are handed on as one network read brought them. Protocol: https://www.rfc-editor.org/rfc/rfc9112.
"""

import asyncio
from collections.abc import Callable
from typing import cast

import httptools

LONGEST_HEAD = 64 * 1024  # bytes of an answer before its body
LONGEST_BODY = 4 * 1024 * 1024  # of an answer that is read whole
BUFFER_BYTES = 256 * 1024  # of a body that nobody has read yet; more is left to the network
IDLE_SECONDS = 60.0  # a connection that nobody uses for so long is closed
DRAIN_SECONDS = 1.0  # for the end of a body of which nothing is wanted any more
NEVER = float("inf")


class ConnectionBroken(Exception):
    """The connection ended, or carried something that is no HTTP, before the answer did."""


class StaleConnection(ConnectionBroken):
    """The other side had closed a connection that was kept alive, before the request came."""


class Silent(Exception):
    """Nothing came for as long as the caller would wait.

    Args:
        seconds: How long that was.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds


class Connection(asyncio.Protocol):
    """A connection that carries one exchange at a time.

    Args:
        on_free: Called when an exchange is over and the connection can carry another one.
        on_lost: Called when the connection is gone.
    """

    def __init__(
        self, on_free: Callable[["Connection"], None], on_lost: Callable[["Connection"], None]
    ) -> None:
        self._on_free, self._on_lost = on_free, on_lost
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._parser = httptools.HttpResponseParser(self)
        self._timer: asyncio.TimerHandle | None = None
        self._exchanges = 0
        self._keeps_alive = True
        self._error: Exception | None = None
        self._paused = False
        self._waiter: asyncio.Future[None] | None = None
        self._begin(IDLE_SECONDS, NEVER)
        self.complete = True

    def _begin(self, timeout_seconds: float, deadline: float) -> None:
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.complete = False
        self.deadline = deadline
        """When a wait ends even if something comes now and then, by the loop's clock."""
        self._body: list[bytes] = []
        self._size = 0  # of what is in the body's list, or of the head so far
        self._has_head = self._draining = False
        self._ends_with_connection = False
        self._timeout_seconds = timeout_seconds
        self._heard_at = self._loop.time()

    @property
    def usable(self) -> bool:
        """Whether it can carry an exchange now."""
        return self.complete and self._error is None

    async def exchange(self, request: bytes, timeout_seconds: float, deadline: float) -> None:
        """Send a request, and wait for the head of its answer.

        Args:
            request: All of it.
            timeout_seconds: How long the other side may be silent.
            deadline: When the wait ends anyway, by the loop's clock.

        Raises:
            StaleConnection, ConnectionBroken, Silent: There is no answer.
        """
        self._begin(timeout_seconds, deadline)
        self._exchanges += 1
        self._watch_silence()
        self._transport.write(request)
        while not self._has_head:
            await self._wait()

    async def read(self) -> bytes:
        """What has come of the body, at least a byte; empty at its end.

        Raises:
            ConnectionBroken, Silent: There is no more, and it was not the end.
        """
        while not self._body:
            if self.complete:
                return b""
            await self._wait()
        data = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        self._body.clear()
        self._size = 0
        if self._paused:
            self._paused = False
            self._transport.resume_reading()
        return data

    async def read_all(self) -> bytes:
        """The whole body, or as much of it as is of use."""
        data = b""
        while len(data) < LONGEST_BODY and (packet := await self.read()):
            data += packet
        return data

    def close(self) -> None:
        """End the exchange. The connection goes on if the answer was complete, else it is closed, which
        is what stops an engine."""
        if self.usable and self._keeps_alive:
            self._timeout_seconds, self.deadline, self._heard_at = IDLE_SECONDS, NEVER, self._loop.time()
            self._on_free(self)
        else:
            self.abort()

    def close_soon(self) -> None:
        """End an exchange of which nothing more is wanted; the end of its framing may be on its way."""
        if self.complete or self._error:
            self.close()
            return
        self._body.clear()
        self._draining = True
        self.deadline = self._loop.time() + DRAIN_SECONDS
        self._watch_silence()

    def abort(self) -> None:
        """Close the connection at once."""
        self._error = self._error or ConnectionBroken("it was given up")
        self._transport.abort()

    async def _wait(self) -> None:
        if self._error:
            raise self._error
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)

    def _fail(self, error: Exception) -> None:
        if self._error is None:
            self._error = error
        if self._waiter and not self._waiter.done():
            self._waiter.set_exception(self._error)
        self._transport.abort()

    # One timer watches for silence: what comes only moves the time that it looks at.

    def _watch_silence(self) -> None:
        if self._timer is None or self._timer.when() > self._silent_at():
            if self._timer:
                self._timer.cancel()
            self._timer = self._loop.call_at(self._silent_at(), self._look)

    def _silent_at(self) -> float:
        return min(self._heard_at + self._timeout_seconds, self.deadline)

    def _look(self) -> None:
        self._timer = None
        if self._paused:
            self._heard_at = self._loop.time()  # it is not the engine that is slow
        if self._loop.time() < self._silent_at():
            self._watch_silence()
        else:
            self._fail(Silent(round(self._loop.time() - self._heard_at, 1)))

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's own does not derive from it
        self._watch_silence()

    def data_received(self, data: bytes) -> None:
        self._heard_at = self._loop.time()
        if self.complete:
            self._fail(ConnectionBroken("it spoke without being asked"))
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._fail(ConnectionBroken("it sent something that is no HTTP"))
            return
        if not self._has_head:
            self._size += len(data)
            if self._size > LONGEST_HEAD:
                self._fail(ConnectionBroken("it sent a head without an end"))
            return
        if self._size > BUFFER_BYTES and not self._paused and not self.complete:
            self._paused = True
            self._transport.pause_reading()
        self._wake()

    def connection_lost(self, error: Exception | None) -> None:
        if self._timer:
            self._timer.cancel()
        if self._ends_with_connection and error is None and self._error is None and not self.complete:
            self.complete = True
            self._error = ConnectionBroken("it closed the connection")
            self._wake()
        elif self._exchanges > 1 and self._size == 0 and not self._has_head:
            self._fail(StaleConnection("it had closed the connection"))
        else:
            self._fail(ConnectionBroken("it closed the connection"))
        self._on_lost(self)

    # httptools

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()
        if self.status < 200:  # an interim answer; the one that counts follows
            self.headers.clear()
            return
        self._has_head = True
        self._size = 0
        self._ends_with_connection = not (
            b"content-length" in self.headers
            or b"transfer-encoding" in self.headers
            or self.status in (204, 304)
        )

    def on_body(self, body: bytes) -> None:
        self._body.append(body)
        self._size += len(body)

    def on_message_complete(self) -> None:
        if self._has_head:
            self.complete = True
            self._keeps_alive = self._parser.should_keep_alive()
            if self._draining:
                self._loop.call_soon(self.close)
