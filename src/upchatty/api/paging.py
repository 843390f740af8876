"""Lists as the contract has them: `{"object": "list", "data": […], "has_more": …}`."""

from collections.abc import Sequence
from typing import Annotated, Generic, Literal, TypeVar

from litestar.params import Parameter
from msgspec import Struct

from upchatty.api.body import NO_NUL

Item = TypeVar("Item")

PageSize = Annotated[int, Parameter(ge=1, le=100, description="How many at most")]
DEFAULT_PAGE_SIZE = 20
After = Annotated[str, Parameter(description="The id after which to go on", pattern=NO_NUL, max_length=64)]


class Page(Struct, Generic[Item]):
    """A page of a list."""

    data: list[Item]
    has_more: bool
    object: Literal["list"] = "list"


def page_of(items: Sequence[Item], limit: int) -> Page[Item]:
    """A page of at most `limit` items, made of one more where there are more."""
    return Page(data=list(items[:limit]), has_more=len(items) > limit)
