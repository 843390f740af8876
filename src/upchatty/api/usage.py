"""What was used, over HTTP, for owners."""

from typing import Annotated

from litestar import get
from litestar.params import Parameter

from upchatty.api.body import NO_NUL
from upchatty.api.errors import with_errors
from upchatty.api.paging import DEFAULT_PAGE_SIZE, After, Page, PageSize
from upchatty.api.services import Services
from upchatty.chat.usage import LAST_SECOND, UsageFigures, report, selection
from upchatty.storage.usage import By

TIME_SCHEMA = {
    "one_of": None,  # instead of what Litestar makes of the annotation
    "any_of": [
        {"type": "integer", "minimum": 0, "maximum": LAST_SECOND},
        {"type": "string", "format": "date-time"},
        {"type": "string", "format": "date"},
    ],
}
From = Annotated[
    str | None,
    Parameter(
        query="from",
        description="The beginning: unix seconds, RFC 3339, or a day of UTC; absent: 30 days before `to`",
        schema_extra=TIME_SCHEMA,
    ),
]
To = Annotated[
    str | None,
    Parameter(
        query="to",
        description="The end, itself excluded, in the same formats; a plain day is included; absent: now",
        schema_extra=TIME_SCHEMA,
    ),
]
GroupedBy = Annotated[By, Parameter(description="What the rows are")]
OnlyChatbot = Annotated[
    str, Parameter(description="Only what this chatbot answered", pattern=NO_NUL, max_length=64)
]
OnlyKey = Annotated[
    str, Parameter(description="Only what this key asked, by its id", pattern=NO_NUL, max_length=64)
]
OnlyModel = Annotated[
    str, Parameter(description="Only what this model answered", pattern=NO_NUL, max_length=200)
]


class UsagePage(Page[UsageFigures], kw_only=True):
    """A page of rows, and the sum of the whole range."""

    total: UsageFigures


@get("/usage", responses=with_errors(404))
async def get_usage(
    services: Services,
    *,
    from_: From = None,
    to: To = None,
    by: GroupedBy = "day",
    chatbot: OnlyChatbot = "",
    key: OnlyKey = "",
    model: OnlyModel = "",
    limit: PageSize = DEFAULT_PAGE_SIZE,
    after: After = "",
) -> UsagePage:
    """What was used: requests, tokens, errors and latency. A row for each day of the range, or for each
    chatbot or key that was used in it."""
    selected = selection(from_, to, chatbot=chatbot, key=key, model=model)
    found = await report(services.database, by, selected, after=after, limit=limit)
    return UsagePage(data=found.rows, has_more=found.has_more, total=found.total)
