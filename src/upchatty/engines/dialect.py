"""Reading what engines send: OpenAI's chunks, in every dialect that is about.

Usage comes after the finish reason, with each chunk or not at all; reasoning comes in fields of its own, in
typed parts, or between <think> tags at the beginning; errors come inside of a stream that began with 200;
some engines answer whole although they were asked to stream. What is read here is the text, and the account
of it in a `Completion`.

Format: https://platform.openai.com/docs/api-reference/chat-streaming.
"""

import re
from collections.abc import Iterable
from typing import Any

import msgspec

from upchatty.engines.sse import EventReader
from upchatty.engines.template import ChunkTemplate
from upchatty.errors import EngineFailed

Message = dict[str, str]
"""`{"role": …, "content": …}`"""
LESSONS = 8  # events at the beginning of a stream in which a template is looked for
EVENT_END = b"\n\n"
THINK, END_THINK = "<think>", "</think>"
MESSAGE_TOKENS = 4  # what a chat template adds to each message, about
TOKEN = re.compile(r"[A-Za-z]{1,6}|\d{1,3}|[^\W\dA-Za-z]{1,2}|[^\w\s]")


class Usage(msgspec.Struct):
    """Tokens."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


class Completion(msgspec.Struct):
    """An answer as far as it has come. Its reader updates it while it streams."""

    usage: Usage = msgspec.field(default_factory=Usage)
    finish_reason: str | None = None
    accepted: bool = False
    """Whether an engine has begun to work on it."""
    estimated: bool = True
    """Whether the usage is counted here, since the engine has not told it, or not to the end."""

    def restart(self) -> None:
        """Forget what an engine told that failed before the first token."""
        self.usage, self.finish_reason, self.accepted, self.estimated = Usage(), None, False, True

    def estimate(self, messages: Iterable[Message]) -> None:
        """Fill in what the engine has not told. Completion tokens were counted as they came."""
        if self.accepted and self.estimated and not self.usage.prompt_tokens:
            self.usage.prompt_tokens = estimated_tokens(messages)


class _Part(msgspec.Struct):
    type: str = ""
    text: str | None = None


class _Delta(msgspec.Struct):
    content: str | list[_Part] | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    message: _Delta | None = None
    finish_reason: str | None = None


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _PromptDetails | None = None


class _Timings(msgspec.Struct):
    """llama.cpp's running count: https://github.com/ggml-org/llama.cpp/blob/master/tools/server/README.md"""

    cache_n: int = 0
    prompt_n: int = 0
    predicted_n: int = 0


class _Progress(msgspec.Struct):
    total: int = 0
    cache: int = 0


class _Chunk(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    timings: _Timings | None = None
    prompt_progress: _Progress | None = None
    error: Any = None
    object: str | None = None
    message: Any = None


_read_chunk = msgspec.json.Decoder(_Chunk).decode


class CompletionReader:
    """Reads one answer.

    Args:
        completion: Its account.
    """

    def __init__(self, completion: Completion) -> None:
        self._completion = completion
        self._events = EventReader()
        self._reasoning: _Reasoning | None = _Reasoning()  # None once the answer proper has begun
        self._template: ChunkTemplate | None = None
        self._lessons = LESSONS
        self.failure: EngineFailed | ValueError | None = None
        """What went wrong after the texts that were returned."""
        self.done = False
        """Whether the engine has said that this was all."""

    @property
    def has_finish(self) -> bool:
        """Whether the engine has said why the answer ended."""
        return self._completion.finish_reason is not None

    def feed(self, packet: bytes) -> list[str]:
        """Take the next bytes of a stream, and return the texts that they bring."""
        texts: list[str] = []
        try:
            while packet:
                if self._template and self._events.is_between_events:
                    plain, packet = self._template.take(packet)
                    self._count_plain(len(plain))
                    texts += plain
                packet = self._take_events(packet, texts)
        except (EngineFailed, ValueError) as error:  # of JSON, and of UTF-8
            self.failure = error
        return texts

    def read_whole(self, body: bytes) -> list[str]:
        """Take an answer that came as one JSON object."""
        text = self._take(_read_chunk(body))
        self.done = True
        return [text] if text else []

    def rest(self) -> list[str]:
        """The texts that are left when the stream has ended: of an event without an end, and what was
        held back because it might have become a tag."""
        texts = self.feed(b"\n\n")
        held = self._reasoning.rest() if self._reasoning else ""
        return [*texts, held] if held else texts

    def _take_events(self, packet: bytes, texts: list[str]) -> bytes:
        """Read a packet's events, only the first one while there is something to be learned from it; return
        the rest."""
        rest = b""
        if self._lessons and (end := packet.find(EVENT_END)) >= 0:
            self._lessons -= 1
            end += len(EVENT_END)
            packet, rest = packet[:end], packet[end:]
        for data in self._events.feed(packet):
            if data == b"[DONE]":
                self.done = True
            elif text := self._text_of(data):
                texts.append(text)
        return rest

    def _text_of(self, data: bytes) -> str | None:
        """The text of an event, its chunk parsed where that is needed."""
        if self._template and (text := self._template.text_of(data)) is not None:
            self._count_plain(bool(text))
            return text
        chunk = _read_chunk(data)
        if self._reasoning is not None or not (text := _plain_text(chunk)):
            return self._take(chunk)
        self._count_plain(1)
        if self._lessons and (template := ChunkTemplate.learned(data, text)):
            self._template, self._lessons = template, 0
        return text

    def _count_plain(self, texts: int) -> None:
        """Count texts of chunks that say nothing of usage: most engines send one for each token."""
        if texts:
            self._completion.usage.completion_tokens += texts
            self._completion.estimated = True

    def _take(self, chunk: _Chunk) -> str | None:
        if chunk.error is not None or chunk.object == "error":
            raise EngineFailed(problem=_told(chunk))
        choice = chunk.choices[0] if chunk.choices else None
        text = None
        if choice is not None:
            if choice.finish_reason:
                self._completion.finish_reason = choice.finish_reason
                if choice.finish_reason == "error":
                    raise EngineFailed(problem="it ended the answer with an error")
            if (delta := choice.delta or choice.message) is not None:
                text = delta.content
                if text.__class__ is list:
                    text = "".join(part.text or "" for part in text if part.type == "text")
        self._count(chunk, text)  # type: ignore[arg-type]
        if text and self._reasoning:
            text = self._reasoning.strip(text)  # type: ignore[arg-type]
            if self._reasoning.over:
                self._reasoning = None
        return text  # type: ignore[return-value]

    def _count(self, chunk: _Chunk, text: str | None) -> None:
        completion = self._completion
        usage = completion.usage
        if chunk.timings is not None:
            usage.cached_tokens = chunk.timings.cache_n
            usage.prompt_tokens = chunk.timings.cache_n + chunk.timings.prompt_n
            usage.completion_tokens = chunk.timings.predicted_n
            completion.estimated = False
        elif chunk.prompt_progress is not None:
            usage.prompt_tokens = chunk.prompt_progress.total
            usage.cached_tokens = chunk.prompt_progress.cache
            completion.estimated = False
        if chunk.usage is not None and chunk.usage.prompt_tokens is not None:
            usage.prompt_tokens = chunk.usage.prompt_tokens
            usage.completion_tokens = chunk.usage.completion_tokens or 0
            details = chunk.usage.prompt_tokens_details
            usage.cached_tokens = (details and details.cached_tokens) or 0
            completion.estimated = False
        elif text and chunk.timings is None:
            self._count_plain(1)


def _plain_text(chunk: _Chunk) -> str | None:
    """The text of a chunk that has nothing else, as nearly all of them; None of any other one."""
    if chunk.usage is None and chunk.timings is None and chunk.choices and chunk.error is None:
        choice = chunk.choices[0]
        if choice.finish_reason is None and choice.delta is not None and type(choice.delta.content) is str:
            return choice.delta.content
    return None


class _Reasoning:
    """Takes out what stands between <think> tags at the beginning of an answer, cut anywhere."""

    def __init__(self) -> None:
        self._held = ""
        self._inside = False
        self._had_any = False
        self.over = False

    def strip(self, text: str) -> str:
        """The next text, without what is reasoning."""
        self._held += text
        while True:
            if self._inside:
                _, tag, rest = self._held.partition(END_THINK)
                if not tag:
                    self._held = self._held[-len(END_THINK) + 1 :]
                    return ""
                self._held, self._inside = rest, False
            start = self._held.lstrip()
            if start.startswith(THINK):
                self._inside = self._had_any = True
                self._held = start[len(THINK) :]
                continue
            if THINK.startswith(start):
                return ""  # it may become a tag
            self.over = True
            return start if self._had_any else self._held

    def rest(self) -> str:
        """What was held back and has become no tag."""
        return "" if self._inside or self._had_any else self._held


def estimated_tokens(messages: Iterable[Message]) -> int:
    """About as many tokens as a tokenizer would find in these messages, for engines that do not tell."""
    return sum(MESSAGE_TOKENS + len(TOKEN.findall(message["content"])) for message in messages)


def _told(chunk: _Chunk) -> str:
    told = chunk.error if chunk.error is not None else chunk.message
    if isinstance(told, dict):
        told = told.get("message")
    return told if isinstance(told, str) and told else "it sent an error"
