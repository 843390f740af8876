"""The one client of every engine: OpenAI's chat completions over HTTP, always streamed.

Streaming also serves callers who want the answer whole: closing the stream is what stops an engine
within one token, and the tokens made until then are known.
"""

import re
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
import msgspec

from upchatty.engines.sse import EventReader
from upchatty.errors import (
    EngineFailed,
    EngineNotReady,
    EngineTimeout,
    InvalidRequest,
    PromptTooLong,
    QueueFull,
)

CONNECT_SECONDS = 5.0
LONG_PROMPT = 1500  # characters, some hundreds of tokens
LLAMA_RANDOM_SEED = 0xFFFFFFFF  # llama.cpp has 32 bits for a seed, and this one means none
Answer = TypeVar("Answer")
Message = dict[str, str]
"""`{"role": …, "content": …}`"""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What an engine is asked.

    Args:
        messages: The conversation, instructions first.
        parameters: OpenAI's sampling parameters, by their names there.
    """

    messages: list[Message]
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Usage:
    """Tokens, counted by the engine."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


@dataclass(slots=True)
class Completion:
    """An answer as far as it has come. The client updates it while it streams."""

    usage: Usage = field(default_factory=Usage)
    finish_reason: str | None = None


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    finish_reason: str | None = None


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _PromptDetails | None = None


class _Timings(msgspec.Struct):
    """llama.cpp's running count: https://github.com/ggml-org/llama.cpp/blob/master/tools/server/README.md"""

    cache_n: int = 0
    prompt_n: int = 0
    predicted_n: int = 0


class _Progress(msgspec.Struct):
    total: int = 0
    cache: int = 0


class _ErrorBody(msgspec.Struct):
    message: str = ""
    type: str = ""
    n_prompt_tokens: int | None = None
    n_ctx: int | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    timings: _Timings | None = None
    prompt_progress: _Progress | None = None
    error: _ErrorBody | str | None = None


class _ErrorAnswer(msgspec.Struct):
    error: _ErrorBody | str = ""


class _Tokens(msgspec.Struct):
    tokens: list[int]


class _Rendered(msgspec.Struct):
    prompt: str


class _Properties(msgspec.Struct):
    class Settings(msgspec.Struct):
        n_ctx: int

    default_generation_settings: Settings


_read_chunk = msgspec.json.Decoder(_Chunk).decode
_encode = msgspec.json.Encoder().encode


class EngineClient:
    """Speaks to one OpenAI-compatible server.

    Args:
        base_url: Up to and with `/v1`.
        model: The model's name there.
        api_key: Sent as a bearer token.
        timeout_seconds: How long the engine may be silent.
        llama: Whether it is our own llama.cpp, which counts tokens as it goes and can tokenize.
    """

    def __init__(
        self, base_url: str, model: str, api_key: str | None, timeout_seconds: float, *, llama: bool = False
    ) -> None:
        self._base_url = base_url.rstrip("/")
        self._model = model
        self._timeout_seconds = timeout_seconds
        self._llama = llama
        self._session = aiohttp.ClientSession(
            # llama.cpp keeps a thread for every idle connection, and a new one on loopback costs 0.1 ms.
            connector=aiohttp.TCPConnector(limit=0, force_close=llama),
            timeout=aiohttp.ClientTimeout(
                total=None, sock_connect=CONNECT_SECONDS, sock_read=timeout_seconds
            ),
            headers={"Content-Type": "application/json"}
            | ({"Authorization": f"Bearer {api_key}"} if api_key else {}),
            proxy=None if llama else _proxy(base_url),
        )

    async def close(self) -> None:
        """Close every connection."""
        await self._session.close()

    async def stream(self, prompt: Prompt, completion: Completion) -> AsyncGenerator[list[str]]:
        """Ask for a completion.

        Args:
            prompt: What is asked.
            completion: Updated while the answer comes, so that it is true whenever the caller stops.

        Yields:
            The pieces of text that one network read brought: at once when the engine has accepted
            the prompt an empty list, then lists of one or more pieces.

        Raises:
            RequestError: The engine refused, broke off, or was silent for too long.
        """
        body = self._body(prompt)
        async with self._translated_errors(), self._post("/chat/completions", body) as response:
            if response.status != 200:
                raise _refusal(response.status, await response.read(), self._model, prompt)
            events = EventReader()
            async for packet in response.content.iter_any():
                texts, failure = _take_all(events.feed(packet), completion)
                yield texts
                if failure:
                    raise failure
        if completion.finish_reason is None:
            raise EngineFailed(problem="it broke off in the middle of the answer")

    async def count_tokens(self, messages: list[Message]) -> int | None:
        """The length of a prompt in tokens, or None where the engine has no way to tell."""
        if not self._llama:
            return None
        async with self._translated_errors():
            rendered = await self._call("/apply-template", {"messages": messages}, _Rendered)
            request = {"content": rendered.prompt, "add_special": True, "parse_special": True}
            return len((await self._call("/tokenize", request, _Tokens)).tokens)

    async def context_length(self) -> int:
        """The tokens that one conversation may take; only llama.cpp says so."""
        async with self._translated_errors(), self._session.get(self._root + "/props") as response:
            return msgspec.json.decode(
                await response.read(), type=_Properties
            ).default_generation_settings.n_ctx

    async def answers(self, seconds: float) -> bool:
        """Whether the engine is there and ready, found out within `seconds`."""
        url = self._root + "/health" if self._llama else self._base_url + "/models"
        try:
            async with self._session.get(url, timeout=aiohttp.ClientTimeout(total=seconds)) as response:
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False

    @property
    def _root(self) -> str:
        return self._base_url.removesuffix("/v1")

    def _body(self, prompt: Prompt) -> bytes:
        body = {
            "model": self._model,
            "messages": prompt.messages,
            "stream": True,
            "stream_options": {"include_usage": True},
            **prompt.parameters,
        }
        if self._llama:
            # Progress lets an abandoned long prompt be noticed and counted; for a short one it only costs.
            is_long = sum(len(message["content"]) for message in prompt.messages) > LONG_PROMPT
            body |= {"timings_per_token": True, "return_progress": is_long}
            if "seed" in body:
                body["seed"] %= LLAMA_RANDOM_SEED
        return _encode(body)

    def _post(self, path: str, body: bytes) -> Any:
        return self._session.post(self._base_url + path, data=body)

    async def _call(self, path: str, body: object, answer: type[Answer]) -> Answer:
        async with self._session.post(self._root + path, data=_encode(body)) as response:
            data = await response.read()
            if response.status != 200:
                raise EngineFailed(problem=_error_body(data).message or f"it answered {response.status}")
            return msgspec.json.decode(data, type=answer)

    @asynccontextmanager
    async def _translated_errors(self) -> AsyncGenerator[None]:
        try:
            yield
        except (aiohttp.SocketTimeoutError, TimeoutError):
            raise EngineTimeout(seconds=self._timeout_seconds) from None
        except aiohttp.ClientConnectorError:
            raise EngineNotReady(
                model=self._model, problem="its server does not accept connections"
            ) from None
        except aiohttp.ClientError as error:
            raise EngineFailed(problem="it closed the connection") from error
        except RuntimeError as error:
            if not self._session.closed:
                raise
            raise EngineFailed(problem="it has just ended") from error
        except (msgspec.DecodeError, ValueError) as error:
            raise EngineFailed(problem="it sent something that is no completion") from error


def _proxy(url: str) -> str | None:
    """The proxy that the environment names for a URL. Asked once: aiohttp's own way, trust_env, reads
    ~/.netrc in a thread at every request."""
    parts = urlsplit(url)
    return None if proxy_bypass(parts.netloc) else getproxies().get(parts.scheme)


def _take_all(events: list[bytes], completion: Completion) -> tuple[list[str], Exception | None]:
    """Read events into the completion; return their texts, and what went wrong after those."""
    texts: list[str] = []
    for data in events:
        if data == b"[DONE]":
            continue
        try:
            text = _take(data, completion)
        except (EngineFailed, msgspec.DecodeError) as error:
            return texts, error
        if text:
            texts.append(text)
    return texts, None


def _take(data: bytes, completion: Completion) -> str | None:
    """Read one event into the completion, and return its text."""
    chunk = _read_chunk(data)
    if chunk.error is not None:
        told = chunk.error if isinstance(chunk.error, str) else chunk.error.message
        raise EngineFailed(problem=told or "it sent an error")
    usage = completion.usage
    if chunk.timings is not None:
        usage.cached_tokens = chunk.timings.cache_n
        usage.prompt_tokens = chunk.timings.cache_n + chunk.timings.prompt_n
        usage.completion_tokens = chunk.timings.predicted_n
    if chunk.prompt_progress is not None:
        usage.prompt_tokens = chunk.prompt_progress.total
        usage.cached_tokens = chunk.prompt_progress.cache
    if chunk.usage is not None:
        usage.prompt_tokens = chunk.usage.prompt_tokens
        usage.completion_tokens = chunk.usage.completion_tokens
        details = chunk.usage.prompt_tokens_details
        usage.cached_tokens = (details and details.cached_tokens) or 0
    if not chunk.choices:
        return None
    choice = chunk.choices[0]
    if choice.finish_reason:
        completion.finish_reason = choice.finish_reason
    text = choice.delta.content if choice.delta else None
    if text and chunk.timings is None and chunk.usage is None:
        usage.completion_tokens += 1  # most engines count at the end only, and send an event for each token
    return text


def _error_body(data: bytes) -> _ErrorBody:
    try:
        error = msgspec.json.decode(data, type=_ErrorAnswer).error
    except msgspec.DecodeError:
        return _ErrorBody()
    return _ErrorBody(message=error) if isinstance(error, str) else error


def _refusal(status: int, data: bytes, model: str, prompt: Prompt) -> Exception:
    """The exception for an answer that is not 200."""
    error = _error_body(data)
    if error.n_ctx and error.n_prompt_tokens:
        return PromptTooLong(limit=error.n_ctx, length=f"{error.n_prompt_tokens} tokens")
    if status == 400 and (limit := re.search(r"maximum context length is (\d+)", error.message)):
        return PromptTooLong(limit=limit[1], length="more")
    if status in (400, 422) and prompt.parameters.get("response_format"):
        return InvalidRequest(parameter="response_format", expected=error.message or "the engine refused it")
    if status == 503:
        return EngineNotReady(model=model, problem="it is loading")
    if status == 429:
        return QueueFull(model=model, problem="its server has too many requests")
    return EngineFailed(problem=error.message or f"it answered with status {status}")
