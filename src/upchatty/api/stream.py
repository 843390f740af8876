"""Server-sent events as the contract's section 3 has them.

Everything that stays the same in a stream is encoded once: a chunk is its text between two constants.
"""

import asyncio

import msgspec
from litestar.types import Send

HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
KEEP_ALIVE_SECONDS = 10.0

_encode = msgspec.json.Encoder().encode


class Chunks:
    """The chunks of one answer, encoded as events.

    Args:
        completion_id: The answer's id.
        created: Unix seconds.
        model: The chatbot's id as the caller sent it.
    """

    def __init__(self, completion_id: str, created: int, model: str) -> None:
        head = {"id": completion_id, "object": "chat.completion.chunk", "created": created, "model": model}
        self._head = b"data: " + _encode(head)[:-1]
        self._before = self._head + b',"choices":[{"index":0,"delta":{"content":'
        self._after = b'},"finish_reason":null}]}\n\n'
        self._between = self._after + self._before

    def role(self) -> bytes:
        """The first chunk."""
        delta = b'{"role":"assistant","content":""}'
        return self._head + b',"choices":[{"index":0,"delta":' + delta + b',"finish_reason":null}]}\n\n'

    def contents(self, texts: list[str]) -> bytes:
        """Pieces of the answer, a chunk for each."""
        return self._before + self._between.join(map(_encode, texts)) + self._after

    def finish(self, reason: str) -> bytes:
        """The chunk that says why the answer ended."""
        return (
            self._head + b',"choices":[{"index":0,"delta":{},"finish_reason":' + _encode(reason) + b"}]}\n\n"
        )

    def finish_with_sources(self, reason: str, sources: bytes, annotations: bytes) -> bytes:
        """The same with where the answer came from, both given as JSON lists."""
        delta = b"{}" if annotations == b"[]" else b'{"annotations":' + annotations + b"}"
        choice = b'{"index":0,"delta":' + delta + b',"finish_reason":' + _encode(reason) + b"}"
        return self._head + b',"choices":[' + choice + b'],"sources":' + sources + b"}\n\n"

    def usage(self, usage: bytes) -> bytes:
        """The chunk with the usage, given as JSON."""
        return self._head + b',"choices":[],"usage":' + usage + b"}\n\n"


class EventStream:
    """A response of events. Its status goes out with the first of them, so that until then an error
    can still be a plain response. While nothing is sent, a comment goes out every ten seconds.

    Args:
        send: The request's ASGI channel.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._loop = asyncio.get_running_loop()
        self._written_at = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None
        self._keeping_alive: asyncio.Task[None] | None = None
        self.headers = list(HEADERS)
        """Sent with the status."""
        self.started = False

    def open(self) -> None:
        """Begin to keep the stream alive."""
        self._timer = self._loop.call_later(KEEP_ALIVE_SECONDS, self._keep_alive)

    async def send(self, events: bytes) -> None:
        """Send events at once."""
        await self._write(events, more=True)

    async def finish(self, events: bytes) -> None:
        """Send the last events, and the end."""
        await self._write(events + DONE, more=False)

    async def fail(self, sentence: str) -> None:
        """Send the error event, after which a stream just ends."""
        await self._write(b"data: " + _encode({"error": sentence}) + b"\n\n", more=False)

    def close(self) -> None:
        """Keep it alive no longer."""
        if self._timer:
            self._timer.cancel()
        if self._keeping_alive:
            self._keeping_alive.cancel()

    def _keep_alive(self) -> None:
        due = self._written_at + KEEP_ALIVE_SECONDS
        if self._loop.time() >= due:
            self._keeping_alive = self._loop.create_task(self._write(KEEP_ALIVE, more=True))
            due = self._loop.time() + KEEP_ALIVE_SECONDS
        self._timer = self._loop.call_at(due, self._keep_alive)

    async def _write(self, body: bytes, *, more: bool) -> None:
        self._written_at = self._loop.time()
        if not self.started:
            self.started = True
            await self._send({"type": "http.response.start", "status": 200, "headers": self.headers})
        await self._send({"type": "http.response.body", "body": body, "more_body": more})
