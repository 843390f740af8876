"""From a chatbot and a conversation to a prompt that fits the model's context."""

from collections.abc import Callable
from typing import Protocol

from upchatty.engines.dialect import Message
from upchatty.errors import PromptTooLong

TEMPLATE_TOKENS = 64  # for what a chat template adds once, and for each message: far more than any does
ANSWER_SHARE = 4  # a quarter of the context at most is kept free for the answer when turns are dropped


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
) -> list[Message]:
    """The messages for the engine: the instructions, then as much of the conversation as fits.

    Whole turns are dropped, the oldest first; a turn is a user's message with what follows it. The
    newest one stays. What the caller says as system or developer comes after the instructions.

    Args:
        instructions: The chatbot's own.
        conversation: Oldest message first.
        limit: The model's context in tokens, or None where only the engine knows.
        max_tokens: Tokens that the answer may take.
        counter: The engine's tokenizer.

    Raises:
        PromptTooLong: The newest turn alone does not fit.
    """
    system, turns = _system_message(instructions, conversation), _turns(conversation)

    def from_turn(first: int) -> list[Message]:
        return system + [message for turn in turns[first:] for message in turn]

    everything = from_turn(0)
    if limit is None or _longest_possible(everything) + max_tokens <= limit:
        return everything
    room = limit - min(max_tokens, limit // ANSWER_SHARE)
    newest = len(turns) - 1
    first = await _first_turn_that_fits(from_turn, newest, room, counter)
    if first == newest:
        length = await counter.count_tokens(from_turn(newest))
        if length is not None and length >= limit:
            raise PromptTooLong(limit=limit, length=f"{length} tokens")
    return from_turn(first)


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
