"""The one client of every engine: OpenAI's chat completions over HTTP, always streamed.

Streaming also serves callers who want the answer whole: closing the stream is what stops an engine
within one token, and the tokens made until then are known.
"""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit

import msgspec

from upchatty.engines.connection import NEVER, Connection, ConnectionBroken, Silent
from upchatty.engines.dialect import Completion, CompletionReader, Message
from upchatty.engines.origin import ConnectFailed, Origin
from upchatty.errors import (
    EngineFailed,
    EngineNotReady,
    EngineRefused,
    EngineTimeout,
    InvalidRequest,
    PromptTooLong,
    QueueFull,
)

LONG_PROMPT = 1500  # characters, some hundreds of tokens
LLAMA_RANDOM_SEED = 0xFFFFFFFF  # llama.cpp has 32 bits for a seed, and this one means none
TRAILER_SECONDS = 2.0  # for the usage, after the reason why the answer has ended
LONGEST_REST = 3600.0  # however long it says
QUIET_SECONDS = 30.0  # for calls that take an engine no time
Answer = TypeVar("Answer")


class Prompt(msgspec.Struct, frozen=True):
    """What an engine is asked.

    Args:
        messages: The conversation, instructions first.
        parameters: OpenAI's sampling parameters, by their names there.
    """

    messages: list[Message]
    parameters: Mapping[str, Any] = {}


class _ErrorBody(msgspec.Struct):
    message: str | None = None
    n_prompt_tokens: int | None = None
    n_ctx: int | None = None


class _ErrorAnswer(msgspec.Struct):
    error: _ErrorBody | str | None = None
    message: str | None = None


class _Tokens(msgspec.Struct):
    tokens: list[int]


class _Rendered(msgspec.Struct):
    prompt: str


class _Properties(msgspec.Struct):
    class Settings(msgspec.Struct):
        n_ctx: int

    default_generation_settings: Settings


_encode = msgspec.json.Encoder().encode


class EngineClient:
    """Speaks to one OpenAI-compatible server.

    Args:
        base_url: Up to and with `/v1`.
        model: The model's name there.
        api_key: Sent as a bearer token.
        timeout_seconds: How long the engine may be silent.
        llama: Whether it is our own llama.cpp, which counts tokens as it goes and can tokenize.
        keep_alive: Whether a connection serves more than one request.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key: str | None,
        timeout_seconds: float,
        *,
        llama: bool = False,
        keep_alive: bool = True,
    ) -> None:
        self._base = urlsplit(base_url).path.rstrip("/")
        self._root = self._base.removesuffix("/v1")
        self.base_url = base_url
        self.model = model
        self.timeout_seconds = timeout_seconds
        self._llama = llama
        self._api_key = api_key
        self._tells_usage = True
        self.sends_base64 = True
        """Whether it can send embeddings in fewer bytes than as numbers."""
        self._origin = Origin(
            base_url,
            {"Authorization": f"Bearer {api_key}"} if api_key else {},
            keep_alive=keep_alive,
        )

    def close(self) -> None:
        """Close every connection."""
        self._origin.close()

    async def begin(
        self, prompt: Prompt, completion: Completion, deadline: float = NEVER, headers: bytes = b""
    ) -> "EngineStream":
        """Ask for a completion.

        Args:
            prompt: What is asked.
            completion: Updated while the answer comes, so that it is true at every moment.
            deadline: When the first token has to be there, by the loop's clock.
            headers: Further header lines, each with its line's end.

        Returns:
            The answer, which the engine has begun. It has to be closed.

        Raises:
            RequestError: The engine refused, broke off, or was silent for too long.
        """
        try:
            connection = await self._origin.post(
                self._base + "/chat/completions", self._body(prompt), self.timeout_seconds, deadline, headers
            )
        except (ConnectFailed, ConnectionBroken, Silent) as error:
            raise self.translated(error) from error
        if connection.status == 200:
            completion.accepted = True
            return EngineStream(self, connection, CompletionReader(completion))
        try:
            refusal = connection.status, await connection.read_all()
        except (ConnectionBroken, Silent) as error:
            raise self.translated(error) from error
        finally:
            connection.close()
        if self._tells_usage and refusal[0] in (400, 422) and b"stream_options" in refusal[1]:
            self._tells_usage = False
            return await self.begin(prompt, completion, deadline, headers)
        raise self._refused(*refusal, connection.headers, prompt)

    async def ask(self, path: str, body: object, answer: type[Answer], deadline: float = NEVER) -> Answer:
        """Ask for something that is no completion, and that is answered whole.

        Args:
            path: Below the base URL.
            body: What is sent, as JSON.
            answer: What comes back.
            deadline: Until when, by the loop's clock.

        Raises:
            RequestError: As for `begin`.
        """
        posted = self._origin.post(self._base + path, _encode(body), self.timeout_seconds, deadline)
        async with self._calling(posted) as data:
            return msgspec.json.decode(data, type=answer)

    async def count_tokens_of(self, text: str) -> int | None:
        """The length of a text in tokens, or None where the engine has no way to tell."""
        if not self._llama:
            return None
        request = {"content": text, "add_special": True, "parse_special": True}
        return len((await self._call("/tokenize", request, _Tokens)).tokens)

    async def count_tokens(self, messages: list[Message]) -> int | None:
        """The length of a prompt in tokens, or None where the engine has no way to tell."""
        if not self._llama:
            return None
        rendered = await self._call("/apply-template", {"messages": messages}, _Rendered)
        return await self.count_tokens_of(rendered.prompt)

    async def context_length(self) -> int:
        """The tokens that one conversation may take; only llama.cpp says so."""
        async with self._calling(self._origin.get(self._root + "/props", QUIET_SECONDS)) as data:
            return msgspec.json.decode(data, type=_Properties).default_generation_settings.n_ctx

    async def answers(self, seconds: float) -> bool:
        """Whether the engine is there and ready, found out within `seconds`."""
        path = self._root + "/health" if self._llama else self._base + "/models"
        try:
            async with asyncio.timeout(seconds):
                connection = await self._origin.get(path, seconds)
        except (ConnectFailed, ConnectionBroken, Silent, TimeoutError):
            return False
        connection.abort()
        return connection.status == 200 or (not self._llama and connection.status < 500)

    def _body(self, prompt: Prompt) -> bytes:
        body = {"model": self.model, "messages": prompt.messages, "stream": True, **prompt.parameters}
        if self._tells_usage:
            body["stream_options"] = {"include_usage": True}
        if self._llama:
            # Progress lets an abandoned long prompt be noticed and counted; for a short one it only costs.
            is_long = sum(len(message["content"]) for message in prompt.messages) > LONG_PROMPT
            body |= {"timings_per_token": True, "return_progress": is_long}
            if "seed" in body:
                body["seed"] %= LLAMA_RANDOM_SEED
        return _encode(body)

    async def _call(self, path: str, body: object, answer: type[Answer]) -> Answer:
        async with self._calling(
            self._origin.post(self._root + path, _encode(body), self.timeout_seconds)
        ) as data:
            return msgspec.json.decode(data, type=answer)

    @asynccontextmanager
    async def _calling(self, asked: Any) -> AsyncIterator[bytes]:
        """The body of an answer that is read whole."""
        try:
            connection = await asked
            try:
                data = await connection.read_all()
            finally:
                connection.close()
            if connection.status != 200:
                raise self._refused(connection.status, data, connection.headers, Prompt([]))
            yield data
        except (ConnectFailed, ConnectionBroken, Silent, msgspec.DecodeError) as error:
            raise self.translated(error) from error

    def translated(self, error: Exception) -> EngineFailed | EngineNotReady | EngineTimeout:
        """What a caller hears of trouble with the connection."""
        match error:
            case ConnectFailed():
                return EngineNotReady(model=self.model, problem=str(error))
            case Silent():
                return EngineTimeout(seconds=error.seconds)
            case ConnectionBroken():
                return EngineFailed(problem=str(error))
            case EngineFailed():
                return EngineFailed(problem=self.without_key(str(error.fields["problem"])))
        return EngineFailed(problem="it sent something that is not what it was asked for")

    def _refused(self, status: int, data: bytes, headers: Mapping[bytes, bytes], prompt: Prompt) -> Exception:
        """The exception for an answer that is not 200."""
        error = _error_of(data)
        message = error.message or ""
        if error.n_ctx and error.n_prompt_tokens:
            return PromptTooLong(limit=error.n_ctx, length=f"{error.n_prompt_tokens} tokens")
        if status == 400 and (limit := re.search(r"maximum context length is (\d+)", message)):
            return PromptTooLong(limit=limit[1], length="more")
        if status in (400, 422) and prompt.parameters.get("response_format"):
            return InvalidRequest(
                parameter="response_format", expected=self.without_key(message) or "the engine refused it"
            )
        if status in (429, 503):
            rest = _seconds(headers.get(b"retry-after", b""))
            if status == 503:
                return EngineNotReady(model=self.model, problem="it is loading", retry_after=rest)
            return QueueFull(model=self.model, problem="its server has too many requests", retry_after=rest)
        if status in (401, 403):  # what it says may quote the key
            return EngineFailed(problem=f"it refused the server's key with status {status}")
        kind = EngineRefused if status in (400, 413, 422) else EngineFailed
        return kind(problem=self.without_key(message) or f"it answered with status {status}")

    def without_key(self, message: str) -> str:
        """What an engine says, without the key that it was asked with."""
        return message.replace(self._api_key, "[key]") if self._api_key else message


class EngineStream:
    """An answer that an engine is making.

    Args:
        client: The engine's client.
        connection: The connection that it comes over, the head of the response read.
        reader: Reads it.
    """

    def __init__(self, client: EngineClient, connection: Connection, reader: CompletionReader) -> None:
        self._client = client
        self._connection = connection
        self._reader = reader
        self._ended = False
        self._is_whole = connection.headers.get(b"content-type", b"").startswith(b"application/json")

    @property
    def has_ended(self) -> bool:
        """Whether the engine has said that this was all, and nothing went wrong or is held back."""
        return self._reader.done and not self._reader.failure

    async def next(self) -> list[str] | None:
        """The next pieces of text, all that one network read brought; None at the end.

        Raises:
            EngineFailed: The engine broke off, or sent something that is no completion.
            EngineTimeout: It was silent for too long.
        """
        try:
            return await self._next()
        except (EngineFailed, ConnectionBroken, Silent, msgspec.DecodeError) as error:
            raise self._client.translated(error) from None

    async def _next(self) -> list[str] | None:
        reader = self._reader
        if self._is_whole and not self._ended:
            self._ended = True
            return reader.read_whole(await self._connection.read_all()) + reader.rest()
        while not self._ended:
            if reader.failure:
                raise reader.failure
            if reader.done or not (packet := await self._packet()):
                self._ended = True
                texts = reader.rest()
            else:
                texts = reader.feed(packet)
            if texts:
                return texts
        if reader.failure:
            raise reader.failure
        if not (reader.done or reader.has_finish):
            raise EngineFailed(problem="it broke off in the middle of the answer")
        return None

    async def _packet(self) -> bytes:
        """The next bytes. Once the answer is complete, all that may follow is the usage, or nothing."""
        if not self._reader.has_finish:
            return await self._connection.read()
        self._connection.deadline = min(
            self._connection.deadline, asyncio.get_running_loop().time() + TRAILER_SECONDS
        )
        try:
            return await self._connection.read()
        except (ConnectionBroken, Silent):
            return b""

    def first_token_came(self) -> None:
        """From now on only silence ends the wait."""
        self._connection.deadline = NEVER

    def close(self) -> None:
        """Stop the engine, unless the answer is complete; then the connection can be used again."""
        if self._reader.done:
            self._connection.close_soon()
        else:
            self._connection.close()


def _error_of(data: bytes) -> _ErrorBody:
    try:
        answer = msgspec.json.decode(data, type=_ErrorAnswer)
    except msgspec.DecodeError:
        return _ErrorBody()
    if isinstance(answer.error, _ErrorBody):
        return answer.error
    return _ErrorBody(message=answer.error or answer.message)


def _seconds(retry_after: bytes) -> float | None:
    """The seconds that a Retry-After header names, or that are left until its date."""
    text = retry_after.decode("latin-1")
    try:
        seconds = float(text) if text[:1].isdigit() else parsedate_to_datetime(text).timestamp() - time.time()
    except ValueError:
        return None
    return min(max(seconds, 0.0), LONGEST_REST)
