"""An engine and UpChatty itself, both inside the test's event loop.

    async with ScriptedEngine() as engine:
        engine.script(ScriptedAnswer(pieces=["Good ", "morning."]))
        settings = Settings(data_dir=tmp_path, models={"default": {"url": engine.url}})
        async with running_server(settings) as server:
            ...  # POST to f"{server.address}/api/v1/chat/completions" with f"Bearer {server.key}"

The engine speaks OpenAI's chat completions (https://platform.openai.com/docs/api-reference/chat) and
embeddings, reranks as Jina's and Cohere's servers do, and misbehaves on demand. Where a fault can be had
from a real engine, such as its sudden death, take that.
"""

import asyncio
import math
import re
import struct
import time
import zlib
from base64 import b64encode
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import msgspec
from aiohttp import web

from upchatty.app import Running, server_in_this_process
from upchatty.settings import Settings

STOP_SECONDS = 0.5
PROMPT_TOKENS = 10


@dataclass(frozen=True, kw_only=True)
class ScriptedAnswer:
    """What the engine does with one request."""

    pieces: Sequence[str] = ("Hello", ", ", "world", ".")
    """The answer's text, one event for each piece and one token each."""
    headers_delay: float = 0.0
    """Seconds until the engine says anything at all; `inf` never does."""
    delay: float = 0.0
    """Seconds before each piece."""
    finish_reason: str | None = "stop"
    """In the last event; None leaves that event out."""
    usage: bool = True
    """Whether the usage is told at the end: ten prompt tokens, and one for each piece."""
    ending: Literal["done", "hang", "close", "garbage", "error"] = "done"
    """What follows the pieces. `done`: the end as it should be. `hang`: silence. `close`: the
    connection breaks in mid-event. `garbage`: an event that is no JSON. `error`: an error event."""
    status: int = 200
    """Another status is answered at once, with `body` and without pieces."""
    body: str | Mapping[str, Any] = field(
        default_factory=lambda: {"error": {"message": "scripted failure", "type": "server_error"}}
    )
    """What goes with another status: text as it is, anything else as JSON."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Further headers of the answer."""


@dataclass(slots=True)
class RecordedRequest:
    """A request as the engine got it. Times are those of `time.monotonic()`, in seconds."""

    body: dict[str, Any]
    headers: Mapping[str, str]
    received_at: float = field(default_factory=time.monotonic)
    pieces_sent: int = 0
    finished_at: float | None = None
    """When the engine had done all that its script says."""
    disconnected_at: float | None = None
    """When the caller went away before that."""


class ScriptedEngine:
    """An OpenAI-compatible engine on a free loopback port, whose answers a test writes.

    It runs in the event loop of the `async with` block, and takes any number of requests at a time.

    Args:
        default: The answer to every request for a completion that no script is left for.
        dimensions: Numbers of an embedding. It tells of the words that a text has, whatever their order, so
            that texts with words in common are near each other; the same text has always the same one.
        longest: Words that a text may have; more are refused, as servers refuse what exceeds their context.
        base64: Whether it takes `encoding_format`, which some servers do not.
    """

    def __init__(
        self,
        default: ScriptedAnswer | None = None,
        *,
        dimensions: int = 64,
        longest: int | None = None,
        base64: bool = True,
    ) -> None:
        self.default = default or ScriptedAnswer()
        self.embedding_requests: list[RecordedRequest] = []
        """Likewise, of what was asked to be embedded or reranked."""
        self.refuse_texts: deque[ScriptedAnswer] = deque()
        """Answers to the next of these requests, each with a status that is not 200."""
        self._dimensions, self._longest, self._base64 = dimensions, longest, base64
        self.requests: list[RecordedRequest] = []
        """What was asked, oldest first."""
        self._scripts: deque[ScriptedAnswer] = deque()
        self._runner = web.AppRunner(
            self._application(), handler_cancellation=True, shutdown_timeout=STOP_SECONDS, access_log=None
        )
        self._stopping = False
        self._port = 0

    async def __aenter__(self) -> "ScriptedEngine":
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self._port = self._runner.addresses[0][1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stopping = True
        await self._runner.cleanup()

    @property
    def url(self) -> str:
        """The base URL for `[models.NAME] url`."""
        return f"http://127.0.0.1:{self._port}/v1"

    def script(self, *answers: ScriptedAnswer) -> None:
        """Add answers for the requests to come, each for one."""
        self._scripts.extend(answers)

    def _application(self) -> web.Application:
        application = web.Application()
        application.router.add_post("/v1/chat/completions", self._complete)
        application.router.add_post("/v1/embeddings", self._embed)
        application.router.add_post("/v1/rerank", self._rerank)
        application.router.add_get("/v1/models", self._list_models)
        return application

    async def _embed(self, request: web.Request) -> web.Response:
        body = await self._texts_asked(request)
        if isinstance(body, web.Response):
            return body
        as_base64 = body.get("encoding_format") == "base64"
        if as_base64 and not self._base64:
            return _error(400, "unknown parameter: encoding_format")
        texts = [body["input"]] if isinstance(body["input"], str) else body["input"]
        if self._longest and any(len(text.split()) > self._longest for text in texts):
            return _error(400, f"This model's maximum context length is {self._longest} tokens")
        vectors = [_bag_of_words(text, self._dimensions) for text in texts]
        data = [
            {"object": "embedding", "index": index, "embedding": _base64(vector) if as_base64 else vector}
            for index, vector in enumerate(vectors)
        ]
        tokens = sum(len(text.split()) for text in texts)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return web.json_response({"object": "list", "model": "scripted", "data": data, "usage": usage})

    async def _rerank(self, request: web.Request) -> web.Response:
        body = await self._texts_asked(request)
        if isinstance(body, web.Response):
            return body
        asked = set(body["query"].lower().split())
        scores = [len(asked & set(text.lower().split())) / max(1, len(asked)) for text in body["documents"]]
        ranked = sorted(enumerate(scores), key=lambda scored: -scored[1])
        results = [{"index": index, "relevance_score": score} for index, score in ranked]
        return web.json_response({"model": "scripted", "results": results[: body.get("top_n")]})

    async def _texts_asked(self, request: web.Request) -> Any:
        """The body of a request about texts, or the refusal that a test wants."""
        recorded = RecordedRequest(msgspec.json.decode(await request.read()), dict(request.headers))
        self.embedding_requests.append(recorded)
        if self.refuse_texts:
            script = self.refuse_texts.popleft()
            await _wait(script.headers_delay)
            return _refusal(script)
        return recorded.body

    async def _list_models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "scripted", "object": "model"}]})

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        recorded = RecordedRequest(msgspec.json.decode(await request.read()), dict(request.headers))
        self.requests.append(recorded)
        script = self._scripts.popleft() if self._scripts else self.default
        try:
            answer = await self._play(script, request, recorded)
        except (asyncio.CancelledError, ConnectionResetError):
            if not self._stopping:
                recorded.disconnected_at = time.monotonic()
            raise
        recorded.finished_at = time.monotonic()
        return answer

    async def _play(
        self, script: ScriptedAnswer, request: web.Request, recorded: RecordedRequest
    ) -> web.StreamResponse:
        await _wait(script.headers_delay)
        if script.status != 200:
            return _refusal(script)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", **script.headers})
        await response.prepare(request)
        await response.write(_chunk({"role": "assistant", "content": ""}))
        for piece in script.pieces:
            await _wait(script.delay)
            await response.write(_chunk({"content": piece}))
            recorded.pieces_sent += 1
        await self._end(script, request, response)
        return response

    async def _end(self, script: ScriptedAnswer, request: web.Request, response: web.StreamResponse) -> None:
        match script.ending:
            case "hang":
                await _wait(float("inf"))
            case "close":
                await response.write(_chunk({"content": "cut"})[:25])
                if request.transport:
                    request.transport.close()
            case "garbage":
                await response.write(b"data: <html>this is no JSON\n\n")
            case "error":
                await response.write(_event({"error": {"message": "scripted failure", "code": 500}}))
            case "done":
                await response.write(_last_events(script))


async def _wait(seconds: float) -> None:
    if seconds == float("inf"):
        await asyncio.Event().wait()  # whoever cancels it ends it
    await asyncio.sleep(seconds)


def _bag_of_words(text: str, dimensions: int) -> list[float]:
    """A vector of length 1 that has a number for the words of a text, each hashed to one of its places."""
    vector = [0.0] * dimensions
    for word in re.findall(r"\w+", text.lower()) or [text]:
        vector[zlib.crc32(word.encode()) % dimensions] += 1.0
    length = math.hypot(*vector)
    return [number / length for number in vector]


def _base64(vector: list[float]) -> str:
    return b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def _error(status: int, message: str) -> web.Response:
    return web.json_response({"error": {"message": message}}, status=status)


def _refusal(script: ScriptedAnswer) -> web.Response:
    if isinstance(script.body, str):
        return web.Response(status=script.status, text=script.body, headers=script.headers)
    return web.json_response(dict(script.body), status=script.status, headers=script.headers)


def _last_events(script: ScriptedAnswer) -> bytes:
    events = b""
    if script.finish_reason is not None:
        events += _chunk({}, script.finish_reason)
    if script.usage:
        tokens = len(script.pieces)
        usage = {
            "prompt_tokens": PROMPT_TOKENS,
            "completion_tokens": tokens,
            "total_tokens": PROMPT_TOKENS + tokens,
        }
        events += _event(_CHUNK | {"choices": [], "usage": usage})
    return events + b"data: [DONE]\n\n"


_CHUNK = {"id": "chatcmpl-scripted", "object": "chat.completion.chunk", "created": 0, "model": "scripted"}


def _chunk(delta: Mapping[str, str], finish_reason: str | None = None) -> bytes:
    return _event(_CHUNK | {"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]})


def _event(data: object) -> bytes:
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


@asynccontextmanager
async def running_server(settings: Settings) -> AsyncIterator[Running]:
    """The real server in this process, on a free port, until the end of the block.

    Args:
        settings: Its settings, of which the port does not count. Give it a `data_dir` of its own.

    Yields:
        Its `address`, its first `chatbot`, and the `key` that was made (None where the settings or
        the data folder's earlier server had one).

    Raises:
        StartupError: It cannot start; says why.
    """
    async with server_in_this_process(replace(settings, port=0)) as running:
        yield running
