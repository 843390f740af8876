"""`POST /chat/completions`: OpenAI's request in, an answer out, whole or streamed.

It stands before the framework, whose layers cost time that every answer would have to spend.

Protocol: https://platform.openai.com/docs/api-reference/chat
"""

from typing import Literal

import msgspec
import structlog
from litestar import post
from litestar.types import Receive, Scope, Send
from msgspec import UNSET, Struct, UnsetType

from upchatty.api.body import check_is_json, decode, read_body
from upchatty.api.caller import CallerLeft, CallerWatch
from upchatty.api.completion_request import ChatCompletionRequest
from upchatty.api.errors import send_error, with_errors
from upchatty.api.openapi import StreamedOperation
from upchatty.api.services import Services
from upchatty.api.stream import Chunks, EventStream
from upchatty.chat.answer import Answer, FinishReason
from upchatty.engines.dialect import Usage
from upchatty.errors import InternalError, InvalidRequest, RequestError

SCORE_DECIMALS = 4

log = structlog.get_logger()


class CitedURL(Struct):
    """What a range of the answer's text refers to."""

    url: str
    title: str
    start_index: int
    """The first character; the whole answer where it cites nothing by itself."""
    end_index: int
    """The one behind the last."""


class Annotation(Struct, kw_only=True):
    """OpenAI's `url_citation`."""

    type: Literal["url_citation"] = "url_citation"
    url_citation: CitedURL


class Source(Struct):
    """A passage that the model was given."""

    document_id: str
    title: str
    url: str | None
    text: str
    score: float
    """How well it fits the question, 0 to 1."""


class AssistantAnswer(Struct, kw_only=True):
    """The message that answers."""

    role: Literal["assistant"] = "assistant"
    content: str
    annotations: list[Annotation] | UnsetType = UNSET
    """Where the answer comes from, as far as that has URLs."""


class Choice(Struct, kw_only=True):
    """The one answer."""

    index: int = 0
    message: AssistantAnswer
    finish_reason: FinishReason


class TokenUsage(Struct):
    """Tokens, counted by the engine's own tokenizer."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, usage: Usage) -> "TokenUsage":
        """The engine's account as the contract has it."""
        prompt, completion = usage.prompt_tokens, usage.completion_tokens
        return cls(prompt, completion, prompt + completion)


class ChatCompletion(Struct, kw_only=True):
    """A whole answer."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: TokenUsage
    sources: list[Source] | UnsetType = UNSET
    """The passages that the model was given, in the order of their numbers; absent where there were none."""


class Completions:
    """The ASGI application that answers.

    Args:
        services: What it works with.
    """

    def __init__(self, services: Services) -> None:
        self._keys = services.keys
        self._answering = services.answering
        self._most_bytes = services.settings.max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        watch = CallerWatch(scope)
        events = EventStream(send)
        try:
            with watch:
                await self._answer(scope, receive, send, events)
        except RequestError as error:
            await _tell(error, events, send)
        except CallerLeft:
            pass
        except Exception as error:
            log.error("internal error", path=scope["path"], exc_info=error)
            await _tell(InternalError(), events, send)
        finally:
            events.close()

    async def _answer(self, scope: Scope, receive: Receive, send: Send, events: EventStream) -> None:
        headers = dict(scope["headers"])
        scope["user"] = caller = await self._keys.identify(
            headers.get(b"authorization", b"").decode("latin-1")
        )
        scope["auth"] = caller.key_id
        body = await read_body(headers, receive, self._most_bytes)
        check_is_json(headers)
        request = decode(body, ChatCompletionRequest)
        question = request.question(_patience(headers))
        if question.streamed:
            events.open()
        async with self._answering.answer(caller, question, scope["state"].get("trace")) as answer:
            if question.streamed:
                await self._stream(answer, request, events)
                return
            async for _ in answer.pieces():
                pass
            answer.close()  # the account is complete
            body = msgspec.json.encode(_completion(answer))
        length = (b"content-length", b"%d" % len(body))
        own = [(b"content-type", b"application/json"), length, *answer.headers]
        if answer.completion.estimated:
            own.append((b"x-upchatty-usage", b"estimated"))
        await send({"type": "http.response.start", "status": 200, "headers": own})
        await send({"type": "http.response.body", "body": body, "more_body": False})

    async def _stream(self, answer: Answer, request: ChatCompletionRequest, events: EventStream) -> None:
        chunks = Chunks(answer.id, answer.created, request.model)
        unsent = chunks.role()
        events.headers += answer.headers
        async for texts in answer.pieces():
            unsent += chunks.contents(texts)
            if not answer.has_ended:  # else the rest goes out in the same packet
                await events.send(unsent)
                unsent = b""
        answer.close()  # the account is complete
        if answer.sources:
            origin = msgspec.json.encode(_sources(answer)), msgspec.json.encode(_annotations(answer))
            last = chunks.finish_with_sources(answer.finish_reason, *origin)
        else:
            last = chunks.finish(answer.finish_reason)
        if request.stream_options and request.stream_options.include_usage:
            last += chunks.usage(msgspec.json.encode(TokenUsage.of(answer.usage)))
        await events.finish(unsent + last)


@post(
    "/chat/completions",
    status_code=200,
    operation_class=StreamedOperation,
    responses=with_errors(404, 413, 415, 429, 502, 504),
)
async def create_completion(data: ChatCompletionRequest) -> ChatCompletion:
    """Ask a chatbot. With `stream`, the answer comes as server-sent events."""
    raise AssertionError("Completions stands before this handler, which describes it")


async def _tell(error: RequestError, events: EventStream, send: Send) -> None:
    """Tell the caller what went wrong, in the way that is still open."""
    if events.started:
        await events.fail(str(error))
    else:
        await send_error(error, send)


def _patience(headers: dict[bytes, bytes]) -> float | None:
    """Seconds that the caller waits for the first token, by X-Request-Timeout."""
    if (value := headers.get(b"x-request-timeout")) is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise InvalidRequest(parameter="X-Request-Timeout", expected="expected a number of seconds above 0")
    return seconds


def _completion(answer: Answer) -> ChatCompletion:
    message = AssistantAnswer(content=answer.text)
    completion = ChatCompletion(
        id=answer.id,
        created=answer.created,
        model=answer.question.chatbot,
        choices=[Choice(message=message, finish_reason=answer.finish_reason)],
        usage=TokenUsage.of(answer.usage),
    )
    if answer.sources:
        message.annotations = _annotations(answer) or UNSET
        completion.sources = _sources(answer)
    return completion


def _sources(answer: Answer) -> list[Source]:
    return [
        Source(found.document_id, found.title, found.url, found.text, round(found.score, SCORE_DECIMALS))
        for found in answer.sources
    ]


def _annotations(answer: Answer) -> list[Annotation]:
    """What the answer cites, or everything that it may come from where it cites nothing."""
    cited = [
        (number, citation.start, citation.end) for citation in answer.citations for number in citation.numbers
    ]
    if not cited:
        cited = [(number, 0, len(answer.text)) for number in range(1, len(answer.sources) + 1)]
    return [
        Annotation(url_citation=CitedURL(found.url, found.title, start, end))
        for number, start, end in cited
        if (found := answer.sources[number - 1]).url
    ]
