"""Mock upstreams: an OpenAI-compatible server that answers at once, or after a while.

`python -m benchmarks.upstream PORT [--delay SECONDS] [--chunks N] [--pause SECONDS]`

It does as little as it can, so that what is measured is what stands before it.
"""

import argparse
import asyncio
from functools import partial
from typing import cast

import uvloop

CHUNK = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1700000000,"model":"mock",'
    b'"choices":[{"index":0,"delta":%s,"finish_reason":%s}]}\n\n'
)
USAGE = b'"usage":{"prompt_tokens":20,"completion_tokens":%d,"total_tokens":%d}'
WHOLE = (
    b'{"id":"chatcmpl-1","object":"chat.completion","created":1700000000,"model":"mock","choices":[{"index":0,'
    b'"message":{"role":"assistant","content":"I am well, thank you. How can I help you today?"},'
    b'"finish_reason":"stop"}],' + USAGE % (12, 32) + b"}"
)
WHOLE_RESPONSE = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (
    len(WHOLE),
    WHOLE,
)
STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
ROLE = CHUNK % (b'{"role":"assistant","content":""}', b"null")
WORD = CHUNK % (b'{"content":" word"}', b"null")
FINISH = CHUNK % (b"{}", b'"stop"')
DONE = b"data: [DONE]\n\n"


def _chunked(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


class Upstream(asyncio.Protocol):
    """One connection.

    Args:
        delay: Seconds before an answer.
        chunks: Pieces of a streamed answer.
        pause: Seconds between two pieces; 0: all at once.
    """

    def __init__(self, delay: float, chunks: int, pause: float) -> None:
        self._delay, self._chunks, self._pause = delay, chunks, pause
        self._buffer = b""
        usage = (
            b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1700000000,"model":"mock",'
        )
        usage += b'"choices":[],' + USAGE % (chunks, 20 + chunks) + b"}\n\n"
        self._end = _chunked(FINISH + usage + DONE) + b"0\r\n\r\n"
        self._at_once = STREAM_HEAD + _chunked(ROLE) + _chunked(WORD) * chunks + self._end

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
            answer = partial(self._stream if b'"stream":true' in body.replace(b" ", b"") else self._whole)
            if self._delay:
                asyncio.get_running_loop().call_later(self._delay, answer)
            else:
                answer()

    def _whole(self) -> None:
        self._transport.write(WHOLE_RESPONSE)

    def _stream(self) -> None:
        if not self._pause:
            self._transport.write(self._at_once)
            return
        self._transport.write(STREAM_HEAD + _chunked(ROLE))
        self._continue(self._chunks)

    def _continue(self, left: int) -> None:
        if self._transport.is_closing():
            return
        if left == 0:
            self._transport.write(self._end)
            return
        self._transport.write(_chunked(WORD))
        asyncio.get_running_loop().call_later(self._pause, self._continue, left - 1)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("port", type=int)
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--chunks", type=int, default=12)
    parser.add_argument("--pause", type=float, default=0.0)
    arguments = parser.parse_args()
    make = partial(Upstream, arguments.delay, arguments.chunks, arguments.pause)
    server = await asyncio.get_running_loop().create_server(make, "127.0.0.1", arguments.port, backlog=4096)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
