"""What OpenAI-compatible engines send, dialect by dialect: the packets of one answer.

The protocol is https://platform.openai.com/docs/api-reference/chat-streaming in server-sent events
(https://html.spec.whatwg.org/multipage/server-sent-events.html); the dialects are what vLLM, SGLang,
Ollama, llama.cpp, Azure, OpenRouter, Mistral, DeepSeek and others make of it.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PROMPT_TOKENS = 10
THOUGHTS = ("Let me ", "think, ", "then answer.")
SPLIT_BYTES = 7  # so that an event, and a character of three or four bytes, is cut

USAGE = {
    "usage_after_finish": "as OpenAI does: the usage in a chunk of its own, after the finish reason",
    "usage_on_every_chunk": "every chunk carries the usage so far",
    "usage_with_finish": "the usage is in the chunk with the finish reason",
    "usage_null": "every chunk but the last has `usage: null`",
    "usage_details_null": "the usage's details are null",
    "usage_fields_null": "the usage has null for every number",
    "no_usage": "the usage is never told",
}
CHUNKS = {
    "content_null": "the first and the last chunk have `content: null`",
    "no_role": "no chunk has a role; the first one has text",
    "role_on_every_chunk": "every chunk repeats the role",
    "empty_choices_first": "a chunk without choices comes first",
    "bare_chunks": "chunks have neither id, object, created nor model",
    "extra_fields": "chunks have fields that OpenAI's have not, and nulls where it has nothing",
    "typed_parts": "the content is a list of typed parts",
    "empty_finish_reason": 'the finish reason is "" until the end',
    "finish_with_content": "the finish reason is in the chunk with the last piece of text",
    "finish_twice": "the chunk with the usage repeats the finish reason",
}
REASONING = {
    "reasoning_content": "thoughts come first, in `reasoning_content`",
    "reasoning": "thoughts come first, in `reasoning`, beside an empty content",
    "thinking_parts": "thoughts come first, as typed parts of the content",
    "think_tags": "thoughts come first in the content, as <think>…</think>, cut anywhere",
    "think_lines": "the same with line ends around them, which belong to the thoughts",
}
EVENTS = {
    "no_done": "the end without [DONE]",
    "crlf": "lines end with CR LF",
    "comments": "comment lines between the events",
    "event_fields": "events have lines for their name, id and retry time",
    "multi_line_data": "the JSON of an event takes several lines",
    "data_without_space": "`data:` without a space after it",
    "one_packet": "the whole answer in one packet, its head included",
    "split": "events cut into pieces of a few bytes, in the middle of characters too",
    "split_bytes": "the same with the whole answer, its head included",
    "whole_json": "one JSON completion although a stream was asked for",
}
RESPONSES = {
    "no_length": "the answer ends when the connection does, as in HTTP/1.0",
    "content_length": "the stream's length is told beforehand",
    "chunk_extensions": "HTTP chunks with extensions, and a trailer",
    "early_hints": "an informational response comes before the answer",
    "encoding_none": "`Content-Encoding: none`",
}
ERRORS = {
    "error_object": 'an event {"error": {…}} in mid-answer',
    "error_text": 'an event {"error": "…"} in mid-answer',
    "error_typed": 'an event {"object": "error", "message": …} in mid-answer',
    "error_named_event": "the same as error_object in an event named error",
    "error_with_choices": "the same in a chunk that has choices too",
    "error_then_done": "the same followed by [DONE], as if all were well",
}
"""Dialects in which every answer fails after its first pieces: ways to tell an error inside a 200."""

DIALECTS: Mapping[str, str] = USAGE | CHUNKS | REASONING | EVENTS | RESPONSES | ERRORS
"""Every dialect by name, with what it does."""

Chunk = dict[str, Any]


@dataclass(frozen=True)
class Packets:
    """A streamed answer in three parts, each a list of what is sent at a time."""

    before: list[bytes]
    pieces: list[bytes]
    end: list[bytes]


def stream(dialect: str, pieces: Sequence[str], finish_reason: str) -> Packets:
    """The events of a streamed answer.

    Args:
        dialect: One of `DIALECTS`.
        pieces: The answer's text, one token each.
        finish_reason: Why it ends.
    """
    told = _chunks(dialect, pieces, finish_reason)
    ends = [_event(chunk, dialect) for chunk in told.end]
    if dialect != "no_done":
        ends.append(_lines(["data:[DONE]" if dialect == "data_without_space" else "data: [DONE]"], dialect))
    packets = Packets(
        [_event(chunk, dialect) for chunk in told.before],
        [_event(chunk, dialect) for chunk in told.pieces],
        ends,
    )
    if dialect != "split":
        return packets
    return Packets(*(list(_cut(part)) for part in (packets.before, packets.pieces, packets.end)))


def error(dialect: str, message: str) -> bytes:
    """The event that tells an error in mid-answer."""
    details = {"message": message, "type": "server_error", "code": 500}
    match dialect:
        case "error_text":
            return _event({"error": message}, dialect)
        case "error_typed":
            return _event({"object": "error", "type": "server_error", "code": 500} | details, dialect)
        case "error_named_event":
            return b"event: error\n" + _event({"error": details}, dialect)
        case "error_with_choices":
            return _event(_chunk({"content": ""}, "error") | {"error": details}, dialect)
        case "error_then_done":
            return _event({"error": details}, dialect) + b"data: [DONE]\n\n"
        case _:
            return _event({"error": details}, dialect)


def whole(dialect: str, pieces: Sequence[str], finish_reason: str) -> bytes:
    """The JSON of an answer that is not streamed."""
    message: Chunk = {"role": "assistant", "content": "".join(pieces)}
    if dialect == "reasoning_content":
        message["reasoning_content"] = "".join(THOUGHTS)
    completion = {
        "id": "chatcmpl-faulty",
        "object": "chat.completion",
        "created": 0,
        "model": "faulty",
        "choices": [{"index": 0, "message": message, "finish_reason": finish_reason}],
    }
    return encode(completion if dialect == "no_usage" else completion | _usage(len(pieces)))


def encode(data: object, indent: int | None = None) -> bytes:
    """JSON, compact unless it is to be indented."""
    separators = None if indent else (",", ":")
    return json.dumps(data, ensure_ascii=False, indent=indent, separators=separators).encode()


@dataclass
class _Chunks:
    before: list[Chunk]
    pieces: list[Chunk]
    end: list[Chunk]

    def all(self) -> list[Chunk]:
        return [*self.before, *self.pieces, *self.end]


def _chunks(dialect: str, pieces: Sequence[str], finish_reason: str) -> _Chunks:
    chunks = _Chunks(
        [_chunk({"role": "assistant", "content": ""})],
        [_chunk({"content": piece}) for piece in pieces],
        [_chunk({}, finish_reason), _chunk() | _usage(len(pieces))],
    )
    if change := _CHANGES.get(dialect):
        change(chunks)
    return chunks


def _chunk(delta: Chunk | None = None, finish_reason: str | None = None) -> Chunk:
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish_reason}]
    return {
        "id": "chatcmpl-faulty",
        "object": "chat.completion.chunk",
        "created": 0,
        "model": "faulty",
        "choices": choices,
    }


def _usage(tokens: int) -> Chunk:
    total = PROMPT_TOKENS + tokens
    return {
        "usage": {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": tokens, "total_tokens": total},
    }


def _delta(chunk: Chunk) -> Chunk:
    delta: Chunk = chunk["choices"][0]["delta"]
    return delta


# How a dialect changes the chunks.


def _usage_on_every_chunk(chunks: _Chunks) -> None:
    for count, chunk in enumerate([*chunks.before, *chunks.pieces]):
        chunk.update(_usage(count))
    chunks.end[0] |= _usage(len(chunks.pieces))


def _usage_with_finish(chunks: _Chunks) -> None:
    finish, usage = chunks.end
    chunks.end = [finish | {"usage": usage["usage"]}]


def _usage_null(chunks: _Chunks) -> None:
    for chunk in chunks.all()[:-1]:
        chunk["usage"] = None


def _usage_details_null(chunks: _Chunks) -> None:
    chunks.end[-1]["usage"] |= {"prompt_tokens_details": None, "completion_tokens_details": None}


def _usage_fields_null(chunks: _Chunks) -> None:
    chunks.end[-1]["usage"] = dict.fromkeys(chunks.end[-1]["usage"])


def _no_usage(chunks: _Chunks) -> None:
    chunks.end.pop()


def _content_null(chunks: _Chunks) -> None:
    _delta(chunks.before[0])["content"] = None
    _delta(chunks.end[0])["content"] = None


def _no_role(chunks: _Chunks) -> None:
    chunks.before = []


def _role_on_every_chunk(chunks: _Chunks) -> None:
    for chunk in (*chunks.pieces, chunks.end[0]):
        _delta(chunk)["role"] = "assistant"
    _delta(chunks.end[0])["content"] = ""


def _empty_choices_first(chunks: _Chunks) -> None:
    chunks.before.insert(0, _chunk() | {"prompt_filter_results": [{"prompt_index": 0}]})


def _bare_chunks(chunks: _Chunks) -> None:
    for chunk in chunks.all():
        for name in ("id", "object", "created", "model"):
            del chunk[name]
        for choice in chunk["choices"]:
            del choice["index"]
            if choice["finish_reason"] is None:
                del choice["finish_reason"]


def _extra_fields(chunks: _Chunks) -> None:
    for chunk in chunks.all():
        chunk |= {"system_fingerprint": None, "service_tier": None, "provider": "faulty", "obfuscation": "x"}
        for choice in chunk["choices"]:
            choice |= {"logprobs": None, "stop_reason": None, "matched_stop": None, "token_ids": None}
            choice["delta"] |= {"refusal": None, "tool_calls": None, "function_call": None, "audio": None}


def _typed_parts(chunks: _Chunks) -> None:
    for chunk in chunks.pieces:
        _delta(chunk)["content"] = [{"type": "text", "text": _delta(chunk)["content"]}]


def _empty_finish_reason(chunks: _Chunks) -> None:
    for chunk in (*chunks.before, *chunks.pieces):
        chunk["choices"][0]["finish_reason"] = ""


def _finish_with_content(chunks: _Chunks) -> None:
    finish = chunks.end.pop(0)
    chunks.pieces[-1]["choices"][0]["finish_reason"] = finish["choices"][0]["finish_reason"]


def _finish_twice(chunks: _Chunks) -> None:
    chunks.end[1]["choices"] = chunks.end[0]["choices"]


def _thoughts(delta: Callable[[str], Chunk], thoughts: Sequence[str] = THOUGHTS) -> Callable[[_Chunks], None]:
    def change(chunks: _Chunks) -> None:
        chunks.before += [_chunk(delta(thought)) for thought in thoughts]

    return change


TAGGED = ("<th", "ink>", *THOUGHTS, "</", "think", ">")
LINES = ("<think>", "\n", *THOUGHTS, "\n</think>\n", "\n")

_CHANGES: dict[str, Callable[[_Chunks], None]] = {
    "usage_on_every_chunk": _usage_on_every_chunk,
    "usage_with_finish": _usage_with_finish,
    "usage_null": _usage_null,
    "usage_details_null": _usage_details_null,
    "usage_fields_null": _usage_fields_null,
    "no_usage": _no_usage,
    "content_null": _content_null,
    "no_role": _no_role,
    "role_on_every_chunk": _role_on_every_chunk,
    "empty_choices_first": _empty_choices_first,
    "bare_chunks": _bare_chunks,
    "extra_fields": _extra_fields,
    "typed_parts": _typed_parts,
    "empty_finish_reason": _empty_finish_reason,
    "finish_with_content": _finish_with_content,
    "finish_twice": _finish_twice,
    "reasoning_content": _thoughts(lambda text: {"content": None, "reasoning_content": text}),
    "reasoning": _thoughts(lambda text: {"content": "", "reasoning": text}),
    "thinking_parts": _thoughts(
        lambda text: {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": text}]}]}
    ),
    "think_tags": _thoughts(lambda text: {"content": text}, TAGGED),
    "think_lines": _thoughts(lambda text: {"content": text}, LINES),
}


# How it changes the events.


def _event(chunk: Chunk, dialect: str) -> bytes:
    if dialect == "multi_line_data":
        return _lines([f"data: {line}" for line in encode(chunk, indent=1).decode().splitlines()], dialect)
    data = encode(chunk).decode()
    match dialect:
        case "data_without_space":
            return _lines([f"data:{data}"], dialect)
        case "comments":
            return _lines([": PROCESSING"], dialect) + b":\n" + _lines([f"data: {data}"], dialect)
        case "event_fields":
            return _lines(["event: message", "id: 1", "retry: 3000", f"data: {data}"], dialect)
        case _:
            return _lines([f"data: {data}"], dialect)


def _lines(lines: Sequence[str], dialect: str) -> bytes:
    end = "\r\n" if dialect == "crlf" else "\n"
    return "".join(line + end for line in (*lines, "")).encode()


def _cut(packets: Sequence[bytes]) -> Iterator[bytes]:
    data = b"".join(packets)
    for start in range(0, len(data), SPLIT_BYTES):
        yield data[start : start + SPLIT_BYTES]
