"""Flags that limit a key or a chatbot."""

import time
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Annotated, Any

from cyclopts import Group, Parameter
from cyclopts.validators import Number

from upchatty.errors import InvalidRequest
from upchatty.limits import MOST

DAY_MS = 24 * 60 * 60 * 1000
MOST_DAYS = 36_500  # a hundred years

Amount = Annotated[int | None, Parameter(validator=Number(gte=1, lte=MOST))]
Days = Annotated[float | None, Parameter(validator=Number(gt=0, lte=MOST_DAYS))]


@dataclass(frozen=True, kw_only=True)
class LimitFlags:
    """How much may be used."""

    requests_per_minute: Amount = None
    """Requests in any minute."""

    tokens_per_minute: Amount = None
    """Tokens in any minute, prompts and answers together."""

    tokens_per_day: Amount = None
    """Tokens a day; days begin at midnight UTC."""

    tokens_per_month: Amount = None
    """Tokens a month."""

    concurrent_streams: Amount = None
    """Answers that are made at the same time."""

    @property
    def given(self) -> dict[str, Any]:
        """What was given, by the limits' names."""
        return {name: amount for name, amount in asdict(self).items() if amount is not None}


Limiting = Annotated[LimitFlags, Parameter(name="*", group=Group("Limits", sort_key=5))]


def end(expires: datetime | None, days: float | None) -> int | None:
    """When something ends, unix milliseconds, from the flags `--expires` and `--days`.

    Raises:
        InvalidRequest: It is past, or both flags were given.
    """
    now = time.time() * 1000
    if days is not None:
        if expires is not None:
            raise InvalidRequest(parameter="--expires", expected="expected without --days")
        return int(now + days * DAY_MS)
    if expires is None:
        return None
    if expires.timestamp() * 1000 <= now:
        raise InvalidRequest(parameter="--expires", expected=f"expected a time to come, got {expires}")
    return int(expires.timestamp() * 1000)
