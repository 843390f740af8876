"""Answering: from a caller's question to the pieces of an answer, and its account."""

import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from uuid_utils import uuid7

from upchatty.auth import Caller
from upchatty.chat.account import CompletionRecord, Recorder
from upchatty.chat.chatbots import Chatbot, Chatbots
from upchatty.chat.prompt import build_prompt
from upchatty.engines.client import Completion, Message, Prompt, Usage
from upchatty.engines.pool import Model, Pool
from upchatty.errors import Forbidden
from upchatty.metrics import Metrics

FinishReason = Literal["stop", "length", "content_filter"]
FINISH_REASONS: dict[str, FinishReason] = {reason: reason for reason in get_args(FinishReason)}
CANCELLED, FAILED = "cancelled", "error"


@dataclass(frozen=True, slots=True)
class Question:
    """What a caller asks.

    Args:
        chatbot: The chatbot's id, with its version or without.
        messages: The conversation, oldest first; roles user, assistant and system.
        max_tokens: Tokens of the answer at most, None: as many as the chatbot allows.
        parameters: Sampling parameters for the engine, by OpenAI's names.
        streamed: Whether the caller gets the answer in pieces.
    """

    chatbot: str
    messages: list[Message]
    max_tokens: int | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    streamed: bool = False


class Answer:
    """An answer that is being made.

    Args:
        chatbot: Which chatbot answers.
        question: What was asked.
        asked_at: When, on the monotonic clock.
    """

    def __init__(self, chatbot: Chatbot, question: Question, asked_at: float) -> None:
        self.id = f"chatcmpl-{uuid7().hex}"
        self.created_ms = time.time_ns() // 1_000_000
        self.chatbot = chatbot
        self.question = question
        self.asked_at = asked_at
        self.queue_seconds = 0.0
        self.first_token_at: float | None = None
        self.completion = Completion()
        """The engine's account, true at every moment."""
        self.texts: AsyncGenerator[list[str]] | None = None
        """The pieces of text, as many at a time as the engine sent together; None until there is a slot."""
        self._kept: list[str] = []

    @property
    def created(self) -> int:
        """Unix seconds."""
        return self.created_ms // 1000

    @property
    def usage(self) -> Usage:
        """The tokens so far."""
        return self.completion.usage

    @property
    def finish_reason(self) -> FinishReason:
        """Why the answer ended; what OpenAI has no name for counts as a stop."""
        return FINISH_REASONS.get(self.completion.finish_reason or "", "stop")

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self._kept)

    async def pieces(self) -> AsyncIterator[list[str]]:
        """The pieces of text as they come, several at once where they came so.

        Raises:
            RequestError: The engine failed.
        """
        assert self.texts is not None
        async for texts in self.texts:
            if texts:
                if self.first_token_at is None:
                    self.first_token_at = time.monotonic()
                self._kept += texts
                yield texts


class Answering:
    """Answers questions.

    Args:
        chatbots: Who can be asked.
        pool: The engines.
        recorder: Keeps account.
        metrics: Counts.
    """

    def __init__(self, chatbots: Chatbots, pool: Pool, recorder: Recorder, metrics: Metrics) -> None:
        self._chatbots = chatbots
        self._pool = pool
        self._recorder = recorder
        self._metrics = metrics

    @asynccontextmanager
    async def answer(self, caller: Caller, question: Question) -> AsyncIterator[Answer]:
        """The answer to a question. Leaving the block early stops the engine.

        Args:
            caller: Who asks.
            question: What.

        Raises:
            NotFound: There is no such chatbot.
            Forbidden: The caller's key does not open it.
            PromptTooLong: The newest message does not fit into the context.
            Unavailable: The engine is being started, or busy.
        """
        asked_at = time.monotonic()
        chatbot = await self._chatbots.get(question.chatbot)
        if not caller.may_call(chatbot.id):
            raise Forbidden(problem="this key does not open that chatbot")
        model = self._pool.model(chatbot.model)
        prompt = await self._prompt(chatbot, question, model)
        answer, ended = Answer(chatbot, question, asked_at), CANCELLED
        try:
            async with model.slot() as slot:
                answer.queue_seconds = slot.queue_seconds
                async with aclosing(slot.client.stream(prompt, answer.completion)) as answer.texts:
                    yield answer
            ended = answer.finish_reason
        except Exception:
            ended = FAILED
            raise
        finally:
            self._account(caller, model, answer, ended)

    async def _prompt(self, chatbot: Chatbot, question: Question, model: Model) -> Prompt:
        max_tokens = min(chatbot.max_tokens, question.max_tokens or chatbot.max_tokens)
        messages = await build_prompt(
            chatbot.instructions,
            question.messages,
            limit=model.context,
            max_tokens=max_tokens,
            counter=model.client,
        )
        defaults = {"temperature": chatbot.temperature, "max_tokens": max_tokens}
        return Prompt(messages, defaults | dict(question.parameters))

    def _account(self, caller: Caller, model: Model, answer: Answer, ended: str) -> None:
        usage, chatbot = answer.usage, answer.chatbot
        record = CompletionRecord(
            id=answer.id,
            chatbot_id=chatbot.id,
            version=chatbot.version,
            key_id=caller.key_id,
            model=model.name,
            created_at=answer.created_ms,
            streamed=answer.question.streamed,
            finish_reason=ended,
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=usage.cached_tokens,
            completion_tokens=usage.completion_tokens,
            queue_ms=answer.queue_seconds * 1000,
            first_token_ms=answer.first_token_at and (answer.first_token_at - answer.asked_at) * 1000,
            duration_ms=(time.monotonic() - answer.asked_at) * 1000,
            messages=answer.question.messages if chatbot.keep_text else None,
            answer=answer.text.replace("\0", "\ufffd") if chatbot.keep_text else None,
        )
        self._recorder.add(record)
        self._count(record)

    def _count(self, record: CompletionRecord) -> None:
        metrics, model = self._metrics, record.model
        metrics.completions.labels(model, record.finish_reason).inc()
        if record.finish_reason == CANCELLED:
            metrics.cancelled.labels(model).inc()
        metrics.prompt_tokens.labels(model).inc(record.prompt_tokens)
        metrics.cached_tokens.labels(model).inc(record.cached_tokens)
        metrics.completion_tokens.labels(model).inc(record.completion_tokens)
        metrics.queue.labels(model).observe(record.queue_ms / 1000)
        metrics.duration.labels(model).observe(record.duration_ms / 1000)
        if record.first_token_ms is not None:
            metrics.first_token.labels(model).observe(record.first_token_ms / 1000)
