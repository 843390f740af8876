"""From a chatbot and a conversation to a prompt that fits the model's context."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

from upchatty.chat.quoting import Quotation
from upchatty.engines.dialect import Message
from upchatty.errors import PromptTooLong

TEMPLATE_TOKENS = 64  # for what a chat template adds once, and for each message: far more than any does
ANSWER_SHARE = 4  # a quarter of the context at most is kept free for the answer when turns are dropped

PASSAGES_SHARE = 2 / 3  # of what the newest turn leaves, when earlier turns want it, too
SHORTEST_PASSAGE = 80  # characters; less of one says nothing


class Fitted(NamedTuple):
    """A prompt that fits, and how many of the passages are in it."""

    messages: list[Message]
    passages: int


class TokenCounter(Protocol):
    """Whoever knows the tokenizer."""

    async def count_tokens(self, messages: list[Message]) -> int | None:
        """The length of the prompt that these messages make, or None if nobody knows."""


async def build_prompt(
    instructions: str,
    conversation: list[Message],
    *,
    limit: int | None,
    max_tokens: int,
    counter: TokenCounter,
    quotation: Quotation | None = None,
) -> Fitted:
    """The messages for the engine: the instructions, then as much of the conversation as fits.

    The newest turn stays; a turn is a user's message with what follows it. What room it leaves goes to the
    passages, the best first, but a third of it to earlier turns that need it. Whole turns are dropped, the
    oldest first. What the caller says as system or developer comes after the instructions.

    Args:
        instructions: The chatbot's own.
        conversation: Oldest message first.
        limit: The model's context in tokens, or None where only the engine knows.
        max_tokens: Tokens that the answer may take.
        counter: The engine's tokenizer.
        quotation: Passages for the question.

    Raises:
        PromptTooLong: The newest turn alone does not fit.
    """
    system, turns = _system_message(instructions, conversation), _turns(conversation)

    def from_turn(first: int) -> list[Message]:
        return system + [message for turn in turns[first:] for message in turn]

    given = len(quotation.findings) if quotation else 0
    everything = _with_passages(from_turn(0), quotation, given)
    if limit is None or _longest_possible(everything) + max_tokens <= limit:
        return Fitted(everything, given)
    room = limit - min(max_tokens, limit // ANSWER_SHARE)
    newest, count, longest = len(turns) - 1, 0, None
    if quotation:
        count, longest = await _passages_that_fit(quotation, from_turn, newest, room, counter)

    def prompt_from(first: int) -> list[Message]:
        return _with_passages(from_turn(first), quotation, count, longest)

    first = await _first_turn_that_fits(prompt_from, newest, room, counter)
    if first == newest:
        length = await counter.count_tokens(from_turn(newest))
        if length is not None and length >= limit:
            raise PromptTooLong(limit=limit, length=f"{length} tokens")
    return Fitted(prompt_from(first), count)


async def _passages_that_fit(
    quotation: Quotation,
    from_turn: Callable[[int], list[Message]],
    newest: int,
    room: int,
    counter: TokenCounter,
) -> tuple[int, int | None]:
    """How many passages have room beside the newest turn, and how many characters the last one may have."""
    turn, given = from_turn(newest), len(quotation.findings)
    base, everything = await counter.count_tokens(turn), await counter.count_tokens(from_turn(0))
    if base is None or everything is None:
        return given, None
    left = room - base
    most = max(int(left * PASSAGES_SHARE), left - (everything - base))

    async def taken(count: int, longest: int | None = None) -> int:
        length = await counter.count_tokens(quotation.quoted_in(turn, count, longest))
        return (length or 0) - base

    low, high = 0, given
    while low < high:
        middle = (low + high + 1) // 2
        if await taken(middle) <= most:
            low = middle
        else:
            high = middle - 1
    if low:
        return low, None
    # Not even the best one fits: as much of it as does.
    longest = quotation.size(0)
    while longest >= SHORTEST_PASSAGE:
        if await taken(1, longest) <= most:
            return 1, longest
        longest = longest * 2 // 3
    return 0, None


def _with_passages(
    messages: list[Message], quotation: Quotation | None, count: int, longest: int | None = None
) -> list[Message]:
    return quotation.quoted_in(messages, count, longest) if quotation else messages


async def _first_turn_that_fits(
    from_turn: Callable[[int], list[Message]], newest: int, room: int, counter: TokenCounter
) -> int:
    """The oldest turn from which on everything fits into `room` tokens; the newest if none does."""
    low, high = 0, newest
    while low < high:
        middle = (low + high) // 2
        length = await counter.count_tokens(from_turn(middle))
        if length is None or length <= room:
            high = middle
        else:
            low = middle + 1
    return low


def _system_message(instructions: str, conversation: list[Message]) -> list[Message]:
    said = [instructions, *(message["content"] for message in conversation if message["role"] == "system")]
    content = "\n\n".join(filter(None, said))
    return [{"role": "system", "content": content}] if content else []


def _turns(conversation: list[Message]) -> list[list[Message]]:
    turns: list[list[Message]] = []
    for message in conversation:
        if message["role"] == "system":
            continue
        if message["role"] == "user" or not turns:
            turns.append([])
        turns[-1].append(message)
    return turns or [[]]


def _longest_possible(messages: list[Message]) -> int:
    """More tokens than these messages can make: a token is at least one byte of UTF-8."""
    return TEMPLATE_TOKENS + sum(TEMPLATE_TOKENS + len(message["content"].encode()) for message in messages)
