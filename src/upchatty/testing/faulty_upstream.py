"""An OpenAI-compatible server that fails on demand, down to the byte; a process of its own.

    python -m upchatty.testing.faulty_upstream --port 9000 --control-port 9001 \
        --behaviour '{"fault": "close_midevent", "times": 1}'

It answers `POST …/chat/completions` and `GET …/models` on one port, over plain TCP, since no HTTP
library misbehaves well enough. On the other port, `POST /control` with a behaviour as JSON sets what
it does from now on, and `GET /control` tells its counters. `upchatty.testing.FaultyUpstream` starts
and steers it from Python.
"""

import argparse
import asyncio
import json
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum, auto
from http import HTTPStatus
from pathlib import Path
from typing import Any

from upchatty.testing import dialects
from upchatty.testing.dialects import DIALECTS

HOST = "127.0.0.1"
BACKLOG = 1024
LONGEST_HEAD = 64 * 1024  # bytes
ENDLESS_BYTES = 10 * 1024 * 1024
GARBAGE = b"\x15\x03\x03\x00\x02\x02\x28\x00\xff\xfe no HTTP at all \r\n\r\n"
PAGE = b"<!DOCTYPE html><html><title>Welcome</title><p>Please sign in to this network.</p></html>"
STREAM = "text/event-stream"
PACKET_SECONDS = 0.0005  # so that what is sent as one packet is read as one

FAULTS: Mapping[str, str] = {
    "none": "answers as it should",
    "refuse": "does not listen, and closes the connections that it has; another fault makes it listen again",
    "tls": "speaks TLS, with a certificate that nobody trusts (needs the package trustme)",
    "hang_headers": "takes every request, and never answers",
    "close_before_headers": "takes every request, and closes the connection",
    "garbage": "answers with bytes that are no HTTP",
    "stale_keepalive": "closes a connection `idle` seconds after an answer without having said that it would",
    "stale_request": "takes the second request on a connection, and closes it without a byte",
    "status": "answers with another status and further headers: `status`, `headers`, `message`",
    "html": "answers with a web page and the status 200",
    "slow": "takes `first_pause` seconds to the first piece, and `pause` seconds between two",
    "hang_midstream": "says nothing more",
    "close_midstream": "closes the connection between two events",
    "close_midevent": "closes the connection in the middle of an event",
    "reset_midstream": "resets the connection, as a crashed machine's peer sees it",
    "truncated_chunked": "closes the connection in the middle of an HTTP chunk",
    "garbage_event": "sends an event that is no JSON, and goes on",
    "endless_line": "sends ten megabytes without a line's end",
    "error_event": "sends an event that tells an error, in the dialect's own way",
}
"""Every fault by name, with what it does. From `hang_midstream` on, they come `after` some pieces."""

EVERY_PATH = ("hang_headers", "close_before_headers", "garbage")
"""Faults that do not look at what is asked; others meet completions only."""

PIECES = ("Good ", "day, ", "wörld ", "漢字 ", "😀", ".")


@dataclass(frozen=True, kw_only=True)
class Behaviour:
    """What the upstream does.

    Args:
        fault: One of `FAULTS`.
        dialect: One of `DIALECTS`.
        times: Completions that meet the fault, after which there is none; 0: all of them.
        pieces: The answer's text, one event and one token each.
        finish_reason: Why it ends.
        after: Pieces before a fault in mid-answer.
        status: For the fault `status`.
        headers: Further headers for the fault `status`.
        message: The sentence in an error.
        first_pause: Seconds before the first piece, for the fault `slow`.
        pause: Seconds between two pieces, for the fault `slow`.
        idle: Seconds for the fault `stale_keepalive`.

    Raises:
        ValueError: There is no such fault or dialect.
    """

    fault: str = "none"
    dialect: str = "usage_after_finish"
    times: int = 0
    pieces: Sequence[str] = PIECES
    finish_reason: str = "stop"
    after: int = 2
    status: int = 500
    headers: Mapping[str, str] = field(default_factory=dict)
    message: str = "injected failure"
    first_pause: float = 0.5
    pause: float = 0.1
    idle: float = 0.0

    def __post_init__(self) -> None:
        if self.fault not in FAULTS:
            raise ValueError(f"fault: expected one of {', '.join(FAULTS)}, got {self.fault!r}")
        if self.dialect not in DIALECTS:
            raise ValueError(f"dialect: expected one of {', '.join(DIALECTS)}, got {self.dialect!r}")

    def healthy(self) -> "Behaviour":
        """The same without its fault."""
        return Behaviour(dialect=self.dialect, pieces=self.pieces, finish_reason=self.finish_reason)


@dataclass
class Counters:
    """What has happened so far."""

    accepted: int = 0
    """Connections."""
    connections: int = 0
    """Of these, open at this moment."""
    requests: int = 0
    """Completions asked for."""
    running: int = 0
    """Of these, being answered at this moment."""
    completed: int = 0
    """Of these, answered as the behaviour says, up to its end."""
    aborted: int = 0
    """Of these, given up by the caller before."""
    probes: int = 0
    """Requests for anything else, such as the list of models."""
    last_headers: dict[str, str] = field(default_factory=dict)
    """Of the last completion that was asked for; names in lower case."""
    last_body: dict[str, Any] = field(default_factory=dict)


# An answer is a sequence of steps: bytes to send at a time, seconds to wait, and how it ends where that
# is not the protocol's way.


class Ending(Enum):
    """How a connection comes to nothing."""

    HANG = auto()
    CLOSE = auto()
    RESET = auto()


Step = bytes | float | Ending


@dataclass(frozen=True)
class Request:
    """A request, read whole."""

    method: str
    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    """Empty where there is none."""
    number: int
    """How many came before it on the same connection."""

    @property
    def is_completion(self) -> bool:
        """Whether it asks for an answer."""
        return self.method == "POST" and self.path.endswith("/chat/completions")


def steps(behaviour: Behaviour, request: Request) -> Iterator[Step]:
    """What a request is answered with."""
    fault = behaviour.fault
    if fault == "hang_headers":
        yield Ending.HANG
    if fault == "close_before_headers":
        yield Ending.CLOSE
    if fault == "garbage":
        yield GARBAGE
        yield Ending.CLOSE
    if request.is_completion:
        yield from _completion(behaviour, request)
    elif request.method == "GET" and request.path.endswith("/models"):
        models = [{"id": "faulty", "object": "model", "created": 0, "owned_by": "nobody"}]
        yield _response(200, dialects.encode({"object": "list", "data": models}))
    else:
        yield _response(404, dialects.encode({"error": {"message": f"there is no {request.path}"}}))


def _completion(behaviour: Behaviour, request: Request) -> Iterator[Step]:
    fault = behaviour.fault
    if fault == "stale_request" and request.number > 0:
        yield Ending.CLOSE
    if fault == "status":
        error = {"error": {"message": behaviour.message, "type": "server_error", "code": behaviour.status}}
        yield _response(behaviour.status, dialects.encode(error), headers=behaviour.headers)
    elif fault == "html":
        yield _response(200, PAGE, "text/html; charset=utf-8")
    elif request.body.get("stream") and behaviour.dialect != "whole_json":
        yield from _streamed(behaviour)
    else:
        yield from _whole(behaviour)
    if fault == "stale_keepalive":
        yield behaviour.idle
        yield Ending.CLOSE


def _whole(behaviour: Behaviour) -> Iterator[Step]:
    """A whole answer has one middle, in which every fault of that kind cuts it."""
    body = dialects.whole(behaviour.dialect, behaviour.pieces, behaviour.finish_reason)
    response = _response(200, body)
    match behaviour.fault:
        case "slow":
            yield behaviour.first_pause + behaviour.pause * (len(behaviour.pieces) - 1)
            yield response
        case "hang_midstream":
            yield response[: -len(body) // 2]
            yield Ending.HANG
        case "close_midstream" | "close_midevent" | "truncated_chunked":
            yield response[: -len(body) // 2]
            yield Ending.CLOSE
        case "reset_midstream":
            yield response[: -len(body) // 2]
            yield Ending.RESET
        case "garbage_event":
            yield _response(200, b"<html>this is no JSON")
        case "endless_line":
            yield _response(200, b" " * ENDLESS_BYTES)
        case "error_event":
            yield _response(200, dialects.encode({"error": {"message": behaviour.message}}))
        case _:
            yield response


def _streamed(behaviour: Behaviour) -> Iterator[Step]:
    packets = list(_packets(behaviour))
    dialect = behaviour.dialect
    match dialect:
        case "no_length":
            yield _head({"Content-Type": STREAM, "Connection": "close"})
            yield from packets
            yield Ending.CLOSE
            return
        case "content_length":
            body = b"".join(packet for packet in packets if isinstance(packet, bytes))
            yield _head({"Content-Type": STREAM, "Content-Length": str(len(body))})
            yield from packets
            return
        case "early_hints":
            yield b"HTTP/1.1 103 Early Hints\r\nLink: </style.css>; rel=preload\r\n\r\n"
    fields = {"Content-Type": STREAM, "Transfer-Encoding": "chunked"}
    if dialect == "encoding_none":
        fields["Content-Encoding"] = "none"
    answer = [_head(fields), *(_chunk(step, dialect) for step in packets)]
    if behaviour.fault == "truncated_chunked" and isinstance(last := answer[-2], bytes):
        answer[-2] = last[: len(last) // 2]
    if not isinstance(packets[-1], Ending):
        answer.append(b"0;last\r\nX-Tokens: 6\r\n\r\n" if dialect == "chunk_extensions" else b"0\r\n\r\n")
    match dialect:
        case "one_packet":
            yield b"".join(step for step in answer if isinstance(step, bytes))
            yield from (step for step in answer if isinstance(step, Ending))
        case "split_bytes":
            for step in answer:
                yield from _cut(step) if isinstance(step, bytes) else [step]
        case _:
            yield from answer


def _packets(behaviour: Behaviour) -> Iterator[Step]:
    """The events, with the fault among them."""
    fault, after = behaviour.fault, behaviour.after
    told = dialects.stream(behaviour.dialect, behaviour.pieces, behaviour.finish_reason)
    yield from told.before
    if fault == "slow":
        yield behaviour.first_pause
        for number, piece in enumerate(told.pieces):
            if number > 0:
                yield behaviour.pause
            yield piece
        yield from told.end
        return
    if fault == "error_event" or behaviour.dialect in dialects.ERRORS:
        yield from told.pieces[:after]
        yield dialects.error(behaviour.dialect, behaviour.message)
        return
    breaks = list(_break(fault, told.pieces[after:]))
    yield from told.pieces[:after] if breaks else told.pieces
    yield from breaks
    if not breaks or fault == "garbage_event":
        yield from told.end


def _break(fault: str, pieces: list[bytes]) -> Iterator[Step]:
    """What comes instead of the remaining pieces; nothing where the fault is of another kind."""
    match fault:
        case "hang_midstream":
            yield Ending.HANG
        case "close_midstream":
            yield Ending.CLOSE
        case "close_midevent":
            yield b'data: {"choices":[{"index":0,"delta":{"content":"cu'
            yield Ending.CLOSE
        case "reset_midstream":
            yield Ending.RESET
        case "truncated_chunked":
            yield from pieces[:1]  # of whose chunk half is sent
            yield Ending.CLOSE
        case "garbage_event":
            yield b"data: <html>this is no JSON\n\n"
            yield from pieces
        case "endless_line":
            yield b"data: " + b"x" * ENDLESS_BYTES


def _chunk(step: Step, dialect: str) -> Step:
    if not isinstance(step, bytes):
        return step
    extension = b';name="value"' if dialect == "chunk_extensions" else b""
    return b"%x%s\r\n%s\r\n" % (len(step), extension, step)


def _cut(data: bytes) -> Iterator[bytes]:
    for start in range(0, len(data), dialects.SPLIT_BYTES):
        yield data[start : start + dialects.SPLIT_BYTES]


def _response(
    status: int,
    body: bytes,
    content_type: str = "application/json",
    headers: Mapping[str, str] | None = None,
) -> bytes:
    fields = {"Content-Type": content_type, "Content-Length": str(len(body)), **(headers or {})}
    return _head(fields, status) + body


def _head(headers: Mapping[str, str], status: int = 200) -> bytes:
    lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


class Connection:
    """One connection, read request by request.

    Args:
        reader: What comes.
        writer: What goes.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._early = b""
        self._number = 0

    async def request(self) -> Request | None:
        """The next request, or None where the other side has none left."""
        try:
            head = self._early + await self._reader.readuntil(b"\r\n\r\n")
            self._early = b""
            first, *lines = head.decode("latin-1").rstrip().split("\r\n")
            method, path, _ = first.split(" ", 2)
            headers = {
                name.strip().lower(): value.strip()
                for name, _, value in (line.partition(":") for line in lines)
            }
            body = await self._reader.readexactly(int(headers.get("content-length", 0)))
        except (asyncio.IncompleteReadError, ConnectionError, ssl.SSLError):
            return None
        self._number += 1
        return Request(method, path, headers, json.loads(body or b"{}"), self._number - 1)

    async def play(self, answer: Iterator[Step]) -> bool:
        """Send an answer.

        Returns:
            Whether it has a protocol's end, so that another request may follow.

        Raises:
            ConnectionResetError: The other side has gone before the end.
        """
        is_first = True
        for step in answer:
            match step:
                case bytes():
                    if not is_first:
                        await self._wait(PACKET_SECONDS)
                    is_first = False
                    self._writer.write(step)
                    await self._writer.drain()
                case float() | int():
                    await self._wait(step)
                case Ending.HANG:
                    await self._wait(None)
                case Ending.CLOSE:
                    return False
                case Ending.RESET:
                    self._reset()
                    return False
        return True

    async def _wait(self, seconds: float | None) -> None:
        """Wait, for ever where that is None, but not longer than the other side does."""
        try:
            async with asyncio.timeout(seconds):
                while early := await self._reader.read(1):
                    self._early += early
        except TimeoutError:
            return
        raise ConnectionResetError

    def _reset(self) -> None:
        connection = self._writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()


class Upstream:
    """The server.

    Args:
        behaviour: What it does at first.
        port: Where it answers; 0 takes a free one.
    """

    def __init__(self, behaviour: Behaviour, port: int) -> None:
        self.behaviour = behaviour
        self.counters = Counters()
        self.port = port
        self._left = behaviour.times
        self._listener: asyncio.Server | None = None
        self._listens_as = "refuse"
        self._connections: set[asyncio.Task[None]] = set()
        self._certificate: ssl.SSLContext | None = None

    async def become(self, behaviour: Behaviour) -> None:
        """Behave like this from now on, the answers that are under way excepted."""
        self.behaviour, self._left = behaviour, behaviour.times
        wanted = behaviour.fault if behaviour.fault in ("refuse", "tls") else "none"
        if wanted == self._listens_as:
            return
        await self._stop_listening()
        if wanted != "refuse":
            await self._listen(_untrusted() if wanted == "tls" else None)
        self._listens_as = wanted

    async def reserve(self) -> None:
        """Find out the port, even if it is to refuse connections."""
        if self.port == 0:
            await self._listen(None)
            await self._stop_listening()

    async def control(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request for the counters or another behaviour."""
        request = await Connection(reader, writer).request()
        if request:
            status, answer = await self._controlled(request)
            writer.write(_response(status, dialects.encode(answer), headers={"Connection": "close"}))
        writer.close()

    async def _controlled(self, request: Request) -> tuple[int, object]:
        if request.path != "/control" or request.method not in ("GET", "POST"):
            return 404, {"error": "expected GET or POST /control"}
        if request.method == "GET":
            return 200, asdict(self.behaviour) | asdict(self.counters)
        try:
            behaviour = Behaviour(**request.body)
        except (TypeError, ValueError) as error:
            return 400, {"error": str(error)}
        await self.become(behaviour)
        return 200, asdict(behaviour)

    async def _listen(self, tls: ssl.SSLContext | None) -> None:
        self._listener = await asyncio.start_server(
            self._serve, HOST, self.port, limit=LONGEST_HEAD, backlog=BACKLOG, ssl=tls
        )
        self.port = self._listener.sockets[0].getsockname()[1]

    async def _stop_listening(self) -> None:
        if self._listener:
            self._listener.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._connections.add(task)
        self.counters.accepted += 1
        self.counters.connections += 1
        connection = Connection(reader, writer)
        try:
            while request := await connection.request():
                if not await self._answer(connection, request):
                    break
        except (ConnectionError, asyncio.CancelledError):
            pass  # the other side is gone, or this one wants to be
        finally:
            writer.close()
            self.counters.connections -= 1
            self._connections.discard(task)

    async def _answer(self, connection: Connection, request: Request) -> bool:
        counters = self.counters
        if not request.is_completion:
            counters.probes += 1
            everywhere = self.behaviour.fault in EVERY_PATH
            return await connection.play(
                steps(self.behaviour if everywhere else self.behaviour.healthy(), request)
            )
        counters.requests += 1
        counters.running += 1
        counters.last_headers, counters.last_body = request.headers, request.body
        try:
            ended = await connection.play(steps(self._next_behaviour(), request))
        except ConnectionError:
            counters.aborted += 1
            raise
        finally:
            counters.running -= 1
        counters.completed += 1
        return ended

    def _next_behaviour(self) -> Behaviour:
        if not self.behaviour.times:
            return self.behaviour
        self._left -= 1
        return self.behaviour if self._left >= 0 else self.behaviour.healthy()


def _untrusted() -> ssl.SSLContext:
    """A server's TLS with a certificate made this minute."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "trustme", "--quiet", "--dir", folder, "--identities", HOST]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except subprocess.CalledProcessError as error:
            raise ValueError("the fault tls needs the package trustme") from error
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(Path(folder) / "server.pem", Path(folder) / "server.key")
        return context


async def _run(arguments: argparse.Namespace) -> None:
    behaviour = Behaviour(**json.loads(arguments.behaviour))
    upstream = Upstream(behaviour, arguments.port)
    await upstream.reserve()
    await upstream.become(behaviour)
    control = await asyncio.start_server(upstream.control, HOST, arguments.control_port)
    ports = {"port": upstream.port, "control_port": control.sockets[0].getsockname()[1]}
    print(json.dumps(ports), flush=True)
    if arguments.until_input_ends:
        await asyncio.to_thread(sys.stdin.read)
    else:
        await asyncio.Event().wait()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="An OpenAI-compatible server that fails on demand.",
        epilog=f"faults: {', '.join(FAULTS)}; dialects: {', '.join(DIALECTS)}",
    )
    parser.add_argument("--port", type=int, default=0, help="where it answers; 0 takes a free port")
    parser.add_argument("--control-port", type=int, default=0, help="where it is steered")
    parser.add_argument("--behaviour", default="{}", help='as JSON, such as {"fault": "hang_headers"}')
    parser.add_argument("--until-input-ends", action="store_true", help="end when standard input does")
    try:
        asyncio.run(_run(parser.parse_args()))
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
