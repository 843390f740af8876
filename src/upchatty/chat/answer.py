"""Answering: from a caller's question to the pieces of an answer, and its account."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Literal, get_args

import msgspec
import structlog
from uuid_utils import uuid7

from upchatty.auth import Caller
from upchatty.chat.account import CompletionRecord, Recorder
from upchatty.chat.chatbots import DEFAULT_FALLBACK_MESSAGE, Chatbot, Chatbots
from upchatty.chat.citations import Citation, Citations
from upchatty.chat.limits import Admission, Limiter
from upchatty.chat.prompt import build_prompt
from upchatty.chat.quoting import Quotation
from upchatty.chat.unanswered import Unanswered
from upchatty.engines.client import Prompt
from upchatty.engines.dialect import Completion, Message, Usage, estimated_tokens
from upchatty.engines.model import RETRIED, Generation, Model
from upchatty.engines.pool import Pool
from upchatty.errors import EngineTimeout, Forbidden, InvalidRequest, RequestError
from upchatty.knowledge.search import DEFAULT_LIMIT, DEFAULT_THRESHOLD, Finding, Findings, Search
from upchatty.metrics import Metrics, ModelMetrics

if TYPE_CHECKING:
    from upchatty.tracing import Trace  # which is costly to import

FinishReason = Literal["stop", "length", "content_filter"]
FINISH_REASONS: dict[str, FinishReason] = {reason: reason for reason in get_args(FinishReason)}
CANCELLED, FAILED = "cancelled", "error"
LOW_BAR = 0.5  # of the threshold: what is below it is not worth its tokens
TOKENS_OF_A_TERM = 1.5  # about, with what stands around a passage
LONGEST_WAIT = 30.0  # seconds for a search, which takes milliseconds
WORTH_A_SPAN = 0.001  # seconds until a model that runs here is in memory, where it mostly is

log = structlog.get_logger()


def least_score(chatbot: Chatbot) -> float:
    """The score that a passage needs to be given to an answer of this chatbot. A grounded one holds its
    threshold against the best passage, and the others may help."""
    threshold = DEFAULT_THRESHOLD if chatbot.threshold is None else chatbot.threshold
    is_low = chatbot.policy == "grounded" or chatbot.threshold is None
    return threshold * LOW_BAR if is_low else threshold


class Question(msgspec.Struct, frozen=True):
    """What a caller asks.

    Args:
        chatbot: The chatbot's id, with its version or without.
        messages: The conversation, oldest first; roles user, assistant and system.
        max_tokens: Tokens of the answer at most, None: as many as the chatbot allows.
        parameters: Sampling parameters for the engine, by OpenAI's names.
        streamed: Whether the caller gets the answer in pieces.
        patience: Seconds that the caller waits for the first token, None: as long as the model allows.
    """

    chatbot: str
    messages: list[Message]
    max_tokens: int | None = None
    parameters: Mapping[str, Any] = {}
    streamed: bool = False
    patience: float | None = None


class Answer:
    """An answer that is being made.

    Args:
        chatbot: Which chatbot answers.
        question: What was asked.
        model: Which model answers; another one, should it come to that.
        asked_at: When, on the monotonic clock.
        trace: Of the request, where it is traced.
    """

    def __init__(
        self,
        chatbot: Chatbot,
        question: Question,
        model: Model,
        asked_at: float,
        trace: "Trace | None" = None,
    ) -> None:
        self.id = f"chatcmpl-{uuid7().hex}"
        self.created_ms = time.time_ns() // 1_000_000
        self.chatbot = chatbot
        self.question = question
        self.asked_at = asked_at
        self.trace = trace
        self.first_token_at: float | None = None
        self.completion = Completion()
        """The engine's account, true at every moment."""
        self.headers: list[tuple[bytes, bytes]] = []
        """What the caller is told beside the answer."""
        self.model = model
        self.fallback_for: str | None = None
        """The model that should have."""
        self.queue_seconds = 0.0
        self.retries = 0
        self.sources: list[Finding] = []
        """The passages in the prompt, by their numbers."""
        self._citations: Citations | None = None
        self._said = ""
        self._prompt: Prompt | None = None
        self._held: Model | None = None
        self._generation: Generation | None = None
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
    def has_ended(self) -> bool:
        """Whether there are no more pieces than were taken."""
        return self._generation is None or self._generation.has_ended

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self._kept)

    @property
    def citations(self) -> list[Citation]:
        """The passages that it cites, and where in its text."""
        return self._citations.found if self._citations else []

    def give(self, sources: list[Finding], *, citing: bool) -> None:
        """Passages that are in the prompt.

        Args:
            sources: The passages, by their numbers.
            citing: Whether the answer may cite them in its text, which is checked then.
        """
        self.sources = sources
        self._citations = Citations(len(sources)) if sources and citing else None

    def say(self, text: str) -> None:
        """Answer with this, without asking a model."""
        self._said = text

    async def hold(self, model: Model, deadline: float) -> None:
        """Have a model in memory, if it runs here, until the answer is closed.

        Args:
            model: The model.
            deadline: Until when to wait, by the monotonic clock.

        Raises:
            RequestError: It cannot be loaded. Another one may be asked then.
        """
        asked_at, refusal = time.monotonic(), None
        self.model = model
        self._let_go()
        try:
            await model.hold(deadline)
            self._held = model
        except BaseException as error:
            refusal = error
            raise
        finally:
            waited = time.monotonic() - asked_at
            self.queue_seconds += waited
            if self.trace and waited > WORTH_A_SPAN:
                self.trace.queued(waited, refusal)

    async def begin(self, model: Model, prompt: Prompt, deadline: float) -> None:
        """Have a model begin to answer.

        Args:
            model: The model.
            prompt: What it is asked.
            deadline: When the first token has to be there, by the monotonic clock.

        Raises:
            RequestError: It cannot. Another one may be asked then.
        """
        self.model, self._prompt = model, prompt
        self.completion.restart()
        generation = self._generation = Generation(model, self.completion, self.trace)
        try:
            await generation.begin(prompt, self.chatbot.id, deadline)
        except RequestError:
            self.close()
            raise
        finally:
            self.queue_seconds += generation.queue_seconds

    async def pieces(self) -> AsyncIterator[list[str]]:
        """The pieces of text as they come, several at once where they came so.

        Raises:
            RequestError: The engine failed.
        """
        if self._said:
            self.first_token_at = time.monotonic()
            self._kept.append(self._said)
            yield [self._said]
            return
        assert self._generation
        between_tokens, came_at = self.model.metrics.between_tokens, 0.0
        while (texts := await self._generation.next()) is not None:
            now = time.monotonic()
            if self.first_token_at is None:
                self.first_token_at = now
            else:
                between_tokens.observe(now - came_at)
            came_at = now
            if self._citations:
                texts = [*filter(None, map(self._citations.check, texts))]
                if not texts:
                    continue
            self._kept += texts
            yield texts
        if self._citations and (rest := self._citations.rest()):
            self._kept.append(rest)
            yield [rest]

    def close(self) -> None:
        """Stop the engine unless it has ended, and complete the account."""
        if self._generation:
            self._generation.close()
            self.retries += self._generation.retries
            self._generation = None
        self._let_go()
        if self._prompt:
            self.completion.estimate(self._prompt.messages)

    def _let_go(self) -> None:
        if self._held:
            self._held.let_go()
            self._held = None


class Answering:
    """Answers questions.

    Args:
        chatbots: Who can be asked.
        pool: The engines.
        recorder: Keeps account.
        limiter: Refuses what is beyond the limits.
        search: Finds what the chatbots' documents say.
        unanswered: Keeps the questions to which they say nothing.
        metrics: Count the searches.
    """

    def __init__(
        self,
        chatbots: Chatbots,
        pool: Pool,
        recorder: Recorder,
        limiter: Limiter,
        *,
        search: Search,
        unanswered: Unanswered,
        metrics: Metrics,
    ) -> None:
        self._search = search
        self._unanswered = unanswered
        self._metrics = metrics
        self._chatbots = chatbots
        self._pool = pool
        self._recorder = recorder
        self._limiter = limiter

    @asynccontextmanager
    async def answer(
        self, caller: Caller, question: Question, trace: "Trace | None" = None
    ) -> AsyncIterator[Answer]:
        """The answer to a question. Leaving the block early stops the engine.

        Args:
            caller: Who asks.
            question: What.
            trace: Of the request, where it is traced.

        Raises:
            NotFound: There is no such chatbot.
            Forbidden: The caller's key does not open it, or it has expired.
            RateLimited: A limit of the key or of the chatbot is reached.
            PromptTooLong: The newest message does not fit into the context.
            Unavailable: The engine is being started, or busy; or the documents of a grounded chatbot cannot
                be searched.
        """
        asked_at = time.monotonic()
        chatbot = await self._chatbots.get(question.chatbot)
        if not caller.may_call(chatbot.id):
            raise Forbidden(problem="this key does not open that chatbot")
        wanted = self._pool.model(chatbot.model)
        if admission := await self._admit(caller, chatbot, question, wanted):
            question = msgspec.structs.replace(question, max_tokens=admission.max_tokens)
        answer = Answer(chatbot, question, wanted, asked_at, trace)
        if admission and question.streamed:  # whose headers go out before it is known what it takes
            answer.headers += admission.headers
        ended: str | None = CANCELLED
        failure: Exception | None = None
        try:
            await self._start(answer, wanted)
            yield answer
            ended = answer.finish_reason
        except InvalidRequest:
            ended = None  # no engine was asked
            raise
        except Exception as error:
            ended, failure = FAILED, error
            raise
        finally:
            answer.close()
            if admission:
                admission.settle(answer.usage.prompt_tokens + answer.usage.completion_tokens)
                if not question.streamed:
                    answer.headers += admission.headers
            if ended:
                self._account(caller, answer, ended)
                if trace:
                    trace.account(
                        completion=answer.id,
                        chatbot=chatbot.id,
                        version=chatbot.version,
                        model=answer.model.name,
                        finish_reason=ended,
                        error=failure,
                    )

    async def _admit(
        self, caller: Caller, chatbot: Chatbot, question: Question, model: Model
    ) -> Admission | None:
        """What the limits allow; None where there are none."""
        limits = await self._chatbots.limits(chatbot)
        if caller.limits is None and limits is None:
            return None
        prompt = estimated_tokens([{"role": "system", "content": chatbot.instructions}, *question.messages])
        if chatbot.known_passages:
            # Of an average passage: searching comes after this, so that who is refused costs no search.
            terms = chatbot.known_terms / chatbot.known_passages
            count = min(chatbot.passages or DEFAULT_LIMIT, chatbot.known_passages)
            prompt += int(count * terms * TOKENS_OF_A_TERM)
        return await self._limiter.admit(
            caller,
            chatbot.id,
            limits,
            prompt_tokens=min(prompt, model.context or prompt),
            max_tokens=min(chatbot.max_tokens, question.max_tokens or chatbot.max_tokens),
        )

    async def _start(self, answer: Answer, wanted: Model) -> None:
        """Have the answer begun: by a model that is given what the documents say, or with the fallback."""
        chatbot, quotation = answer.chatbot, None
        if chatbot.known_passages or chatbot.policy == "grounded":
            quotation = await self._quotation(answer, wanted)
        if quotation or chatbot.policy == "open":
            await self._begin(answer, wanted, quotation)

    async def _quotation(self, answer: Answer, wanted: Model) -> Quotation | None:
        """The passages for a question. Where a grounded chatbot has none, its answer is the fallback."""
        chatbot, question = answer.chatbot, answer.question
        asked = [message["content"] for message in question.messages if message["role"] == "user"]
        threshold = DEFAULT_THRESHOLD if chatbot.threshold is None else chatbot.threshold
        is_grounded = chatbot.policy == "grounded"
        bar = least_score(chatbot)
        found = Findings([], [], 0.0)
        if asked and chatbot.known_passages:
            found = await self._found(answer, asked, bar, wanted)
        kept = found.kept
        if is_grounded and (not kept or found.score < threshold):
            answer.say(chatbot.fallback_message or DEFAULT_FALLBACK_MESSAGE)
            self._metrics.unanswered.inc()
            if asked and chatbot.keep_text:
                self._unanswered.add(chatbot.id, asked[-1], found.score)
            return None
        return Quotation(kept, citing=_may_cite(question)) if kept else None

    async def _found(self, answer: Answer, asked: list[str], bar: float, wanted: Model) -> Findings:
        chatbot, started = answer.chatbot, time.monotonic()
        seconds = min(answer.question.patience or LONGEST_WAIT, wanted.settings.deadline_seconds)
        failure: RequestError | None = None
        try:
            async with asyncio.timeout(seconds):
                return await self._search.search(chatbot.id, asked, chatbot.passages, bar)
        except TimeoutError:
            failure = EngineTimeout(seconds=seconds)
        except RequestError as error:
            failure = error
        finally:
            taken = time.monotonic() - started
            self._metrics.search.observe(taken)
            if answer.trace:
                answer.trace.searched(taken, failure)
        if chatbot.policy == "grounded":
            raise failure
        log.warning("answered without documents", chatbot=chatbot.id, problem=str(failure))
        return Findings([], [], 0.0)

    async def _begin(self, answer: Answer, wanted: Model, quotation: Quotation | None) -> None:
        """Have the chatbot's model begin to answer, or one that takes its place."""
        longest = wanted.settings.deadline_seconds
        deadline = answer.asked_at + min(longest, answer.question.patience or longest)
        failure: RequestError | None = None
        for model in self._pool.with_fallbacks(wanted):
            try:
                await answer.hold(model, deadline)
                prompt = await self._prompt(answer, model, quotation)
                await answer.begin(model, prompt, deadline)
                break
            except RequestError as error:
                if failure is None and not isinstance(error, RETRIED):
                    raise  # it is the question, which no other model would answer either
                failure = failure or error
            if time.monotonic() >= deadline:
                raise failure
        else:
            assert failure
            raise failure
        if answer.model is not wanted:
            wanted.metrics.fallbacks[answer.model.name] += 1
            answer.fallback_for = wanted.name
            answer.headers.append((b"x-upchatty-fallback", answer.model.name.encode()))

    async def _prompt(self, answer: Answer, model: Model, quotation: Quotation | None) -> Prompt:
        chatbot, question = answer.chatbot, answer.question
        max_tokens = min(chatbot.max_tokens, question.max_tokens or chatbot.max_tokens)
        messages, passages = await build_prompt(
            chatbot.instructions,
            question.messages,
            limit=model.context,
            max_tokens=max_tokens,
            counter=model,
            quotation=quotation,
        )
        if quotation:
            answer.give(quotation.findings[:passages], citing=_may_cite(question))
        defaults = {"temperature": chatbot.temperature, "max_tokens": max_tokens}
        return Prompt(messages, defaults | dict(question.parameters))

    def _account(self, caller: Caller, answer: Answer, ended: str) -> None:
        usage, chatbot, model = answer.usage, answer.chatbot, answer.model
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
            messages=_as_json(answer.question.messages) if chatbot.keep_text else None,
            answer=answer.text.replace("\0", "\ufffd") if chatbot.keep_text else None,
            fallback_for=answer.fallback_for,
            retries=answer.retries,
            estimated=answer.completion.accepted and answer.completion.estimated,
        )
        self._recorder.add(record)
        _count(model.metrics, record)


def _may_cite(question: Question) -> bool:
    """Whether the answer is prose: in JSON, [1] is a list."""
    return "response_format" not in question.parameters


def _as_json(messages: list[Message]) -> str:
    return msgspec.json.encode(messages).decode()


def _count(metrics: ModelMetrics, record: CompletionRecord) -> None:
    metrics.completions[record.finish_reason] += 1
    metrics.cancelled += record.finish_reason == CANCELLED
    metrics.prompt_tokens += record.prompt_tokens
    metrics.cached_tokens += record.cached_tokens
    metrics.completion_tokens += record.completion_tokens
    metrics.queue.observe(record.queue_ms / 1000)
    metrics.duration.observe(record.duration_ms / 1000)
    if record.first_token_ms is not None:
        metrics.first_token.observe(record.first_token_ms / 1000)
