"""Keys over HTTP, for owners."""

from datetime import datetime
from typing import Annotated, Literal

from litestar import delete, get, post
from msgspec import Meta, Struct

from upchatty.api.chatbots import WITHOUT_NUL, Name
from upchatty.api.errors import with_errors
from upchatty.api.limits import Moment
from upchatty.api.paging import DEFAULT_PAGE_SIZE, After, Page, PageSize, page_of
from upchatty.api.services import Services
from upchatty.auth import Key, Scope
from upchatty.limits import Limits, UnixSeconds

NamedChatbot = Annotated[str, Meta(max_length=64, extra_json_schema=WITHOUT_NUL)]


class NewKey(Struct, forbid_unknown_fields=True, kw_only=True, tag_field="scope"):
    """A key to make."""

    name: Name
    expires_at: UnixSeconds | Moment | None = None
    """Unix seconds, or RFC 3339 with a time zone."""
    limits: Limits | None = None
    """How much it may use; null: any amount."""

    @property
    def expires_at_ms(self) -> int | None:
        """Unix milliseconds."""
        if isinstance(self.expires_at, datetime):
            return int(self.expires_at.timestamp() * 1000)
        return None if self.expires_at is None else self.expires_at * 1000


class NewAdminKey(NewKey, tag="admin"):
    """A key that may do everything."""

    chatbots: Annotated[list[NamedChatbot], Meta(max_length=0)] | None = None


class NewChatKey(NewKey, tag="chat"):
    """A key that may only chat."""

    chatbots: Annotated[list[NamedChatbot], Meta(max_length=1000)] | None = None
    """The chatbots that it opens; none: all."""


class KeyView(Struct, kw_only=True):
    """A key without its secret. Times are unix seconds."""

    id: str
    object: Literal["key"] = "key"
    name: str
    scope: Scope
    chatbots: list[str]
    created_at: int
    expires_at: int | None
    limits: Limits | None


class CreatedKey(KeyView, kw_only=True):
    """A key just made, with its secret, shown this once."""

    key: str


def key_fields(key: Key) -> dict[str, object]:
    """The fields of a `KeyView`."""
    expires_at = None if key.expires_at is None else key.expires_at // 1000
    times = {"created_at": key.created_at // 1000, "expires_at": expires_at}
    return key._asdict() | {"chatbots": list(key.chatbots)} | times


@post("/keys", responses=with_errors(404, 413, 415))
async def create_key(data: NewAdminKey | NewChatKey, services: Services) -> CreatedKey:
    """Make a key. Its secret is in this answer and nowhere else."""
    scope: Scope = "admin" if isinstance(data, NewAdminKey) else "chat"
    key, secret = await services.keys.create(
        data.name, scope, tuple(data.chatbots or ()), data.expires_at_ms, data.limits
    )
    return CreatedKey(key=secret, **key_fields(key))  # type: ignore[arg-type]


@get("/keys", responses=with_errors())
async def list_keys(
    services: Services, limit: PageSize = DEFAULT_PAGE_SIZE, after: After = ""
) -> Page[KeyView]:
    """The keys that are not revoked, oldest first."""
    keys = await services.keys.page(after=after, limit=limit + 1)
    return page_of([KeyView(**key_fields(key)) for key in keys], limit)  # type: ignore[arg-type]


@delete("/keys/{key_id:str}", responses=with_errors(404))
async def revoke_key(key_id: str, services: Services) -> None:
    """Revoke a key."""
    await services.keys.revoke(key_id)
