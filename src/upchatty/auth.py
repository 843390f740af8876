"""Who is calling, and what they may do.

A key is `upchatty_` and 43 random characters, a prefix that secret scanners can look for. Only its
SHA-256 is kept: a fast hash is enough for 256 random bits, and a slow one would cost every request.
"""

import hmac
import re
import secrets
import time
from hashlib import sha256
from typing import Any, Literal, NamedTuple

from async_lru import alru_cache
from sqlalchemy import RowMapping
from uuid_utils import uuid7

from upchatty.errors import Forbidden, InvalidRequest, NotFound, Unauthenticated
from upchatty.limits import Limits, key_limits, to_json
from upchatty.storage import keys as storage
from upchatty.storage.chatbots import list_chatbots
from upchatty.storage.database import Database

KEY_PREFIX = "upchatty_"
KEY_ID = re.compile(r"key_[0-9a-f]{32}")
ENVIRONMENT_KEY_NAME = "UPCHATTY_ADMIN_KEY"
CACHE_SECONDS = 0.5  # a key that is revoked elsewhere is refused here within a second

OPEN_PATHS = ("/health/live", "/health/ready", "/metrics", "/schema/openapi.json")
"""What needs no key. Everything else does."""

Scope = Literal["admin", "chat"]


class Caller(NamedTuple):
    """Whoever holds a valid key."""

    key_id: str
    scope: Scope
    chatbots: frozenset[str]
    """The chatbots that a `chat` key names; none: all of them."""
    limits: Limits | None = None

    def require_admin(self) -> None:
        """Raise Forbidden unless this is an admin key."""
        if self.scope != "admin":
            raise Forbidden(problem="this key may only chat; an admin key is needed here")

    def may_call(self, chatbot_id: str) -> bool:
        """Whether this key opens that chatbot."""
        return self.scope == "admin" or not self.chatbots or chatbot_id in self.chatbots

    @property
    def callable_chatbots(self) -> frozenset[str] | None:
        """The chatbots that this key opens, or None for all."""
        return None if self.scope == "admin" or not self.chatbots else self.chatbots


class Key(NamedTuple):
    """A key as its owner sees it, without the secret. Times are unix milliseconds."""

    id: str
    name: str
    scope: Scope
    chatbots: tuple[str, ...]
    created_at: int
    expires_at: int | None
    limits: Limits | None = None


class Keys:
    """The keys of one database.

    Args:
        database: Where they are kept.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._known = alru_cache(maxsize=10_000, ttl=CACHE_SECONDS)(self._look_up)

    async def identify(self, authorization: str) -> Caller:
        """The caller behind an `Authorization` header.

        Raises:
            Unauthenticated: There is no valid key in it.
        """
        caller, expires_at = await self._known(_hash(_bearer_token(authorization)))
        if expires_at is not None and expires_at <= _now():
            raise Unauthenticated(problem="this key has expired")
        return caller

    async def create(
        self,
        name: str,
        scope: Scope,
        chatbots: tuple[str, ...] = (),
        expires_at: int | None = None,
        limits: Limits | None = None,
    ) -> tuple[Key, str]:
        """Make a key.

        Args:
            name: For people.
            scope: `admin`, or `chat` for the chatbots named.
            chatbots: The chatbots that it opens; none: all.
            expires_at: When it ends, unix milliseconds.
            limits: How much it may use.

        Returns:
            The key and its secret, which nobody can see again.

        Raises:
            NotFound: A chatbot named does not exist.
            InvalidRequest: An admin key names a chatbot.
        """
        await self._check_chatbots(scope, chatbots)
        secret = KEY_PREFIX + secrets.token_urlsafe(32)
        given = key_limits(to_json(limits))  # None where every field of it is
        key = Key(f"key_{uuid7().hex}", name, scope, chatbots, _now(), expires_at, given)
        await storage.add_key(self._database, _row(key, secret))
        return key, secret

    async def page(self, *, after: str = "", limit: int | None = None) -> list[Key]:
        """The keys that are not revoked, oldest first."""
        return [_key(row) for row in await storage.list_keys(self._database, after=after, limit=limit)]

    async def revoke(self, key_id: str) -> None:
        """Revoke a key: at once here, within a second on other servers.

        Raises:
            NotFound: There is no such key, or it is revoked already.
        """
        known = KEY_ID.fullmatch(key_id) and await storage.revoke_key(self._database, key_id, _now())
        if not known:
            raise NotFound(kind="key", name=key_id[:64])
        self._known.cache_clear()

    async def make_first(self, fixed: str) -> str | None:
        """Make sure that there is an admin key.

        Args:
            fixed: The key that the operator has chosen, or empty to make one at the first start.

        Returns:
            The secret of a key just made, which has to be shown now or never.
        """
        if not fixed:
            if await storage.count_keys(self._database):
                return None
            return (await self.create("first", "admin"))[1]
        await storage.revoke_keys_named(
            self._database, ENVIRONMENT_KEY_NAME, but_hash=_hash(fixed), revoked_at=_now()
        )
        key = Key(f"key_{uuid7().hex}", ENVIRONMENT_KEY_NAME, "admin", (), _now(), None)
        if not await storage.add_key(self._database, _row(key, fixed)):
            existing = await storage.find_key(self._database, _hash(fixed))
            assert existing is not None  # add_key has just seen it
            await storage.restore_key(self._database, existing["id"])
        return None

    async def _look_up(self, key_hash: str) -> tuple[Caller, int | None]:
        row = await storage.find_key(self._database, key_hash)
        if row is None or not hmac.compare_digest(row["hash"], key_hash):
            raise Unauthenticated(problem="this key is unknown")
        if row["revoked_at"] is not None:
            raise Unauthenticated(problem="this key has been revoked")
        limits = key_limits(row["limits"])
        return Caller(row["id"], row["scope"], frozenset(row["chatbots"]), limits), row["expires_at"]

    async def _check_chatbots(self, scope: Scope, chatbots: tuple[str, ...]) -> None:
        if not chatbots:
            return
        if scope == "admin":
            raise InvalidRequest(
                parameter="chatbots", expected="an admin key opens every chatbot and names none"
            )
        found = {row["id"] for row in await list_chatbots(self._database, only=frozenset(chatbots))}
        for chatbot_id in chatbots:
            if chatbot_id not in found:
                raise NotFound(kind="chatbot", name=chatbot_id)


def _bearer_token(authorization: str) -> str:
    if not authorization:
        raise Unauthenticated(problem="an API key is needed: send the header Authorization: Bearer KEY")
    scheme, _, token = authorization.partition(" ")
    token = token.strip()
    if scheme.lower() != "bearer" or not token or " " in token:
        raise Unauthenticated(problem="the Authorization header is malformed: expected Bearer KEY")
    return token


def _hash(secret: str) -> str:
    return sha256(secret.encode()).hexdigest()


def _now() -> int:
    return time.time_ns() // 1_000_000


def _row(key: Key, secret: str) -> dict[str, Any]:
    columns = {"chatbots": list(key.chatbots), "limits": to_json(key.limits), "hash": _hash(secret)}
    return key._asdict() | columns


def _key(row: RowMapping) -> Key:
    return Key(
        row["id"],
        row["name"],
        row["scope"],
        tuple(row["chatbots"]),
        row["created_at"],
        row["expires_at"],
        key_limits(row["limits"]),
    )
