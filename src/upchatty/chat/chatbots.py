"""Chatbots and their versions. A version never changes: every change makes the next one."""

import re
import time
from collections.abc import Collection
from typing import Any, Literal, NamedTuple

from async_lru import alru_cache
from sqlalchemy import RowMapping
from uuid_utils import uuid7

from upchatty.errors import InvalidRequest, NotFound
from upchatty.limits import ChatbotLimits, chatbot_limits, to_json
from upchatty.storage import chatbots as storage
from upchatty.storage.database import Database

CACHE_SECONDS = 0.5  # a change made on another server is seen here within a second
LONGEST_REFERENCE = 64  # of what a sentence quotes
CHATBOT_ID = re.compile(r"bot_[0-9a-f]{32}")
REFERENCE = re.compile(r"(bot_[0-9a-f]{32})(?:@([1-9][0-9]{0,8}))?", re.ASCII)

DEFAULT_INSTRUCTIONS = "You are a helpful assistant. Answer briefly and truthfully."
DEFAULT_TEMPERATURE = 0.7
DEFAULT_MAX_TOKENS = 1024
DEFAULT_FALLBACK_MESSAGE = "I am sorry, I have found nothing about that in what I know."

Policy = Literal["open", "grounded"]


class Chatbot(NamedTuple):
    """One version of a chatbot. Times are unix milliseconds."""

    id: str
    version: int
    published_version: int
    name: str
    instructions: str
    model: str | None
    """The model behind it; None: the server's default."""
    temperature: float
    max_tokens: int
    """Tokens of an answer at most."""
    keep_text: bool
    """Whether the record of a completion keeps what was said."""
    limits: ChatbotLimits | None
    """How much all callers together may use. Those of the published version hold for every version."""
    policy: Policy
    """`open`: what its documents say helps. `grounded`: without anything in them that fits, it says that it
    does not know, and no model is asked."""
    threshold: float | None
    """The score, 0 to 1, that passages have to reach; None: the search's own."""
    fallback_message: str | None
    """What a grounded chatbot says when it does not know; None: `DEFAULT_FALLBACK_MESSAGE`."""
    passages: int | None
    """How many passages an answer is given at most; None: the search's own number."""
    known_passages: int
    """How many its documents have."""
    known_terms: int
    """Their words, all together."""
    created_at: int
    updated_at: int


DEFAULTS: dict[str, Any] = {
    "instructions": DEFAULT_INSTRUCTIONS,
    "model": None,
    "temperature": DEFAULT_TEMPERATURE,
    "max_tokens": DEFAULT_MAX_TOKENS,
    "keep_text": True,
    "limits": None,
    "policy": "open",
    "threshold": None,
    "fallback_message": None,
    "passages": None,
}
"""What holds for a field that is not given, or given as null."""


class Chatbots:
    """The chatbots of one database.

    Args:
        database: Where they are kept.
        models: The names of the models that they may use.
    """

    def __init__(self, database: Database, models: Collection[str]) -> None:
        self._database = database
        self._models = models
        self._known = alru_cache(maxsize=10_000, ttl=CACHE_SECONDS)(self._look_up)

    async def get(self, reference: str) -> Chatbot:
        """A chatbot by its id, `bot_…`: the published version; or by `bot_…@3`: that one.

        Raises:
            NotFound: There is no such chatbot or version.
        """
        return await self._known(reference)

    async def limits(self, chatbot: Chatbot) -> ChatbotLimits | None:
        """The limits that hold for a version: the published one's, since nobody is to get round them by
        asking for an earlier version."""
        if chatbot.version == chatbot.published_version:
            return chatbot.limits
        return (await self.get(chatbot.id)).limits

    async def _look_up(self, reference: str) -> Chatbot:
        match = REFERENCE.fullmatch(reference)
        row = match and await storage.get_chatbot(
            self._database, match[1], int(match[2]) if match[2] else None
        )
        if not row:
            raise NotFound(kind="chatbot", name=reference[:LONGEST_REFERENCE])
        return _chatbot(row)

    async def page(
        self, *, after: str = "", limit: int | None = None, only: frozenset[str] | None = None
    ) -> list[Chatbot]:
        """The published versions of the chatbots, oldest chatbot first."""
        rows = await storage.list_chatbots(self._database, after=after, limit=limit, only=only)
        return [_chatbot(row) for row in rows]

    async def versions(self, chatbot_id: str, *, after: int = 0, limit: int | None = None) -> list[Chatbot]:
        """A chatbot's versions, oldest first.

        Raises:
            NotFound: There is no such chatbot.
        """
        await self.get(_checked_id(chatbot_id))
        rows = await storage.list_versions(self._database, chatbot_id, after=after, limit=limit)
        return [_chatbot(row) for row in rows]

    async def create(self, name: str, **given: Any) -> Chatbot:
        """Make a chatbot.

        Args:
            name: For people.
            given: Other fields of `Chatbot` that an owner sets; None means the default.

        Raises:
            InvalidRequest: There is no such model.
        """
        fields = self._checked(given)
        chatbot_id, now = f"bot_{uuid7().hex}", _now()
        await storage.add_chatbot(
            self._database,
            {"id": chatbot_id, "published_version": 1, "latest_version": 1, "created_at": now},
            {"chatbot_id": chatbot_id, "version": 1, "name": name, "created_at": now} | DEFAULTS | fields,
        )
        return await self.get(chatbot_id)

    async def change(self, chatbot_id: str, **given: Any) -> Chatbot:
        """Make the next version, which differs from the published one by what is given, and publish it.

        Args:
            chatbot_id: Which chatbot.
            given: The fields to change; None means the default again. Without any there is no new version.

        Raises:
            NotFound: There is no such chatbot.
            InvalidRequest: There is no such model.
        """
        if not given:
            return await self._reread(_checked_id(chatbot_id))
        if not await storage.add_version(
            self._database, _checked_id(chatbot_id), self._checked(given), _now()
        ):
            raise NotFound(kind="chatbot", name=chatbot_id)
        return await self._reread(chatbot_id)

    async def publish(self, chatbot_id: str, version: int) -> Chatbot:
        """Make an existing version the one that answers to the plain id.

        Raises:
            NotFound: There is no such chatbot or version.
        """
        if not await storage.publish_version(self._database, _checked_id(chatbot_id), version):
            raise NotFound(kind="chatbot", name=f"{chatbot_id}@{version}")
        return await self._reread(chatbot_id)

    async def delete(self, chatbot_id: str) -> None:
        """Delete a chatbot with all it owns.

        Raises:
            NotFound: There is no such chatbot.
        """
        if not await storage.delete_chatbot(self._database, _checked_id(chatbot_id)):
            raise NotFound(kind="chatbot", name=chatbot_id)
        self._known.cache_clear()

    async def make_first(self) -> Chatbot:
        """The oldest chatbot; one is made where there is none."""
        first = await self.page(limit=1)
        return first[0] if first else await self.create("My first chatbot")

    async def _reread(self, chatbot_id: str) -> Chatbot:
        self._known.cache_clear()
        return await self.get(chatbot_id)

    def _checked(self, given: dict[str, Any]) -> dict[str, Any]:
        if (model := given.get("model")) is not None and model not in self._models:
            raise InvalidRequest(
                parameter="model", expected=f"expected one of the server's models ({', '.join(self._models)})"
            )
        fields = {field: DEFAULTS[field] if value is None else value for field, value in given.items()}
        return fields | {"limits": to_json(fields["limits"])} if "limits" in fields else fields


def _checked_id(chatbot_id: str) -> str:
    """The same id, once it is sure that it is one: PostgreSQL takes no NUL."""
    if not CHATBOT_ID.fullmatch(chatbot_id):
        raise NotFound(kind="chatbot", name=chatbot_id[:LONGEST_REFERENCE])
    return chatbot_id


def _chatbot(row: RowMapping) -> Chatbot:
    return Chatbot(**dict(row) | {"limits": chatbot_limits(row["limits"])})


def _now() -> int:
    return time.time_ns() // 1_000_000
