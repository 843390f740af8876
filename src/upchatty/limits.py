"""How much a key or a chatbot may use, as its owner says it."""

from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

MOST = 10**12
Amount = Annotated[int, Meta(ge=1, le=MOST)]
UnixSeconds = Annotated[int, Meta(ge=0, le=253_402_300_799)]  # until the year 9999

WORDS = {
    "requests_per_minute": "requests a minute",
    "tokens_per_minute": "tokens a minute",
    "tokens_per_day": "tokens a day",
    "tokens_per_month": "tokens a month",
    "concurrent_streams": "answers at the same time",
}
TOKEN_LIMITS = ("tokens_per_minute", "tokens_per_day", "tokens_per_month")


class Limits(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one key may use at most; null: any amount. Tokens are those of prompts and answers together."""

    requests_per_minute: Amount | None = None
    tokens_per_minute: Amount | None = None
    tokens_per_day: Amount | None = None
    """Days begin at midnight UTC."""
    tokens_per_month: Amount | None = None
    """Months begin on their first day at midnight UTC."""
    concurrent_streams: Amount | None = None
    """Answers being made at the same time, whole ones and streamed ones."""

    @property
    def text(self) -> str:
        """In words, for people."""
        amounts = ((getattr(self, field), words) for field, words in WORDS.items())
        return ", ".join(f"{amount:,} {words}" for amount, words in amounts if amount is not None)


class ChatbotLimits(Limits, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What all callers of a chatbot together may use of it at most, and until when; null: no limit."""

    expires_at: UnixSeconds | None = None
    """When it stops answering, unix seconds."""


def to_json(limits: Limits | None) -> dict[str, Any] | None:
    """Limits as the database keeps them: None where nothing is limited."""
    if limits is None:
        return None
    given = {name: value for name, value in msgspec.structs.asdict(limits).items() if value is not None}
    return given or None


def key_limits(stored: dict[str, Any] | None) -> Limits | None:
    """A key's limits from the database."""
    return None if stored is None else msgspec.convert(stored, Limits)


def chatbot_limits(stored: dict[str, Any] | None) -> ChatbotLimits | None:
    """A chatbot's limits from the database."""
    return None if stored is None else msgspec.convert(stored, ChatbotLimits)
