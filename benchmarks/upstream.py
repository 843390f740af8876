"""A mock upstream: an OpenAI-compatible server that answers as the question says.

`python -m benchmarks.upstream PORT`

The last message may say `mock: chunks=100 delay=20 pause=1000`: the pieces of the answer, the milliseconds
before it and those between two pieces; `each=1` writes each piece by itself. Without it the answer has 12
pieces and comes at once. An answer that is asked for whole has the same text as a streamed one.

It does as little as it can, so that what is measured is what stands before it.
"""

import asyncio
import functools
import sys
from typing import cast

import uvloop

from benchmarks.clock import PreciseTimer

MARK = b"mock: "
CHUNK = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1700000000,"model":"mock",'
    b'"choices":[{"index":0,"delta":%b,"finish_reason":%b}]}\n\n'
)
USAGE = b'"usage":{"prompt_tokens":20,"completion_tokens":%d,"total_tokens":%d}'
USAGE_CHUNK = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1700000000,"model":"mock",'
    b'"choices":[],%b}\n\n'
)
WHOLE = (
    b'{"id":"chatcmpl-1","object":"chat.completion","created":1700000000,"model":"mock","choices":[{"index":0,'
    b'"message":{"role":"assistant","content":"%b"},"finish_reason":"stop"}],%b}'
)
MODELS = b'{"object":"list","data":[{"id":"mock","object":"model","created":1700000000,"owned_by":"mock"}]}'
JSON_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
DONE = b"data: [DONE]\n\n"


def words(chunks: int) -> list[str]:
    """The pieces of the answer; together they are its text."""
    return ["word1", *(f" word{number}" for number in range(2, chunks + 1))]


class Plan:
    """What is written for one kind of question, made beforehand.

    Args:
        text: What follows `mock: `, such as `chunks=100 delay=20`.
    """

    def __init__(self, text: str) -> None:
        values = dict(pair.split("=") for pair in text.split())
        chunks = int(values.get("chunks", 12))
        self.delay = int(values.get("delay", 0)) / 1000
        self.pause = int(values.get("pause", 0)) / 1000
        self.each = values.get("each") == "1"
        usage = USAGE % (chunks, 20 + chunks)
        whole = WHOLE % ("".join(words(chunks)).encode(), usage)
        self.whole = JSON_HEAD % len(whole) + whole
        self.head = STREAM_HEAD + _chunked(CHUNK % (b'{"role":"assistant","content":""}', b"null"))
        self.pieces = [
            _chunked(CHUNK % (b'{"content":"%b"}' % word.encode(), b"null")) for word in words(chunks)
        ]
        self.end = b"".join(map(_chunked, (CHUNK % (b"{}", b'"stop"'), USAGE_CHUNK % usage, DONE)))
        self.end += b"0\r\n\r\n"
        self.at_once = self.head + b"".join(self.pieces) + self.end


@functools.cache
def plan_for(text: bytes) -> Plan:
    """The plan for what follows `mock: `."""
    return Plan(text.decode())


def _chunked(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


class Upstream(asyncio.Protocol):
    """One connection."""

    def __init__(self, loop: asyncio.AbstractEventLoop, timer: PreciseTimer) -> None:
        self._loop, self._timer = loop, timer
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's own, which does not derive from it

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = self._buffer[:end].lower()
            start = head.find(b"content-length:")
            length = int(head[start + 15 :].split(b"\r\n", 1)[0]) if start >= 0 else 0
            if len(self._buffer) < end + 4 + length:
                return
            body, self._buffer = self._buffer[end + 4 : end + 4 + length], self._buffer[end + 4 + length :]
            if head.startswith(b"get"):
                self._transport.write(JSON_HEAD % len(MODELS) + MODELS)
            else:
                self._answer(body)

    def _answer(self, body: bytes) -> None:
        start = body.rfind(MARK)
        plan = plan_for(body[start + len(MARK) : body.index(b'"', start)] if start >= 0 else b"")
        streamed = b'"stream":true' in body or b'"stream": true' in body
        write = functools.partial(self._stream if streamed else self._whole, plan)
        if plan.delay:
            self._timer.call_later(plan.delay, write)
        else:
            write()

    def _whole(self, plan: Plan) -> None:
        if not self._transport.is_closing():
            self._transport.write(plan.whole)

    def _stream(self, plan: Plan) -> None:
        if self._transport.is_closing():
            return
        if not plan.pause and not plan.each:
            self._transport.write(plan.at_once)
            return
        self._transport.write(plan.head)
        self._continue(plan, 0)

    def _continue(self, plan: Plan, number: int) -> None:
        if self._transport.is_closing():
            return
        if number == len(plan.pieces):
            self._transport.write(plan.end)
            return
        self._transport.write(plan.pieces[number])
        following = functools.partial(self._continue, plan, number + 1)
        if plan.pause:
            self._timer.call_later(plan.pause, following)
        else:
            self._loop.call_soon(following)  # the loop joins what is written in one turn of it


async def main() -> None:
    if len(sys.argv) != 2 or not sys.argv[1].isdecimal():
        sys.exit("usage: python -m benchmarks.upstream PORT")
    loop = asyncio.get_running_loop()
    timer = PreciseTimer(loop)
    server = await loop.create_server(
        lambda: Upstream(loop, timer), "127.0.0.1", int(sys.argv[1]), backlog=4096
    )
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
