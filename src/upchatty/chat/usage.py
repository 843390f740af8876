"""What was used: the record of completions, summed up for owners. Days are those of UTC."""

import asyncio
import re
import time
from collections.abc import Mapping
from datetime import UTC, date, datetime, timedelta
from typing import Any, Literal, NamedTuple

import msgspec
from msgspec import UNSET, Struct, UnsetType

from upchatty.errors import InvalidRequest, NotFound
from upchatty.storage import usage as storage
from upchatty.storage.database import Database
from upchatty.storage.usage import DAY_MS, By, Selection

DEFAULT_DAYS = 30
MOST_DAYS = 3660  # of a report by day, which has a row for each: ten years
LAST_SECOND = 253_402_300_799  # of the year 9999
EPOCH = date(1970, 1, 1)
EPOCH_MOMENT = datetime(1970, 1, 1, tzinfo=UTC)
DECIMALS = 3  # of milliseconds; the two databases differ in the last bits of a percentile
COUNTS = (
    *("requests", "errors", "cancelled", "prompt_tokens", "cached_tokens", "completion_tokens"),
    *("estimated", "fallbacks", "retries"),
)
UNIX_SECONDS = re.compile(r"[0-9]{1,12}")
PLAIN_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
EXPECTED = "expected unix seconds, a date such as 2030-12-31, or RFC 3339 such as 2030-12-31T12:00:00Z"


class Percentiles(Struct, kw_only=True):
    """What half of the values, and 95 of 100, do not exceed; null where there is no value."""

    p50: float | None
    p95: float | None


class UsageFigures(Struct, kw_only=True):
    """What was used, on a `day`, of a `chatbot`, with a `key`, or in all, where it has none of the three."""

    object: Literal["usage"] = "usage"
    day: str | UnsetType = UNSET
    """A day of UTC, such as 2030-12-31."""
    chatbot: str | UnsetType = UNSET
    key: str | UnsetType = UNSET
    name: str | None | UnsetType = UNSET
    """The name of the chatbot or key, null where it is gone."""
    requests: int
    """Those that reached a model, whatever came of it."""
    errors: int
    cancelled: int
    """Those whose caller went away."""
    prompt_tokens: int
    cached_tokens: int
    """The part of the prompt tokens that an engine had in its cache."""
    completion_tokens: int
    total_tokens: int
    estimated: int
    """Requests whose tokens the engine did not tell."""
    fallbacks: int
    """Requests that another model answered."""
    retries: int
    first_token_ms: Percentiles
    """Milliseconds to the first token, of the requests that had one."""
    duration_ms: Percentiles
    """Milliseconds to the end, of all requests."""


class Report(NamedTuple):
    """A page of rows, oldest first, and the sum of the whole range."""

    rows: list[UsageFigures]
    has_more: bool
    total: UsageFigures


def milliseconds(text: str, parameter: str, *, is_end: bool = False) -> int:
    """A time as callers write it: unix seconds, RFC 3339, or a plain date, which is a day of UTC.

    Args:
        text: The time.
        parameter: Its name, for the sentence.
        is_end: Whether it is where a range ends: after a plain date's day instead of before it.

    Returns:
        Unix milliseconds, of the years 1970 to 9999: the nearest for other years.

    Raises:
        InvalidRequest: It is none of these.
    """
    try:
        if UNIX_SECONDS.fullmatch(text) and int(text) <= LAST_SECOND:
            return int(text) * 1000
        if PLAIN_DATE.fullmatch(text):
            return _within_reason((date.fromisoformat(text) - EPOCH).days * DAY_MS + is_end * DAY_MS)
        moment = msgspec.convert(text, datetime)
        if moment.tzinfo is not None:
            return _within_reason((moment - EPOCH_MOMENT) // timedelta(milliseconds=1))
    except (ValueError, msgspec.ValidationError):
        pass
    raise InvalidRequest(parameter=parameter, expected=EXPECTED)


def selection(
    start: str | None, end: str | None, *, start_name: str = "from", end_name: str = "to", **named: str
) -> Selection:
    """The completions that a caller means.

    Args:
        start: Where the range begins, as `milliseconds` reads it; None: 30 days before its end.
        end: Where it ends, itself excluded; None: now.
        start_name: The parameter, for the sentence.
        end_name: The parameter, for the sentence.
        named: `chatbot`, `key` and `model` that count alone; empty: all.

    Raises:
        InvalidRequest: One of them is no time, or the range is empty.
    """
    # One more than now: what was made in this millisecond counts.
    end_ms = time.time_ns() // 1_000_000 + 1 if end is None else milliseconds(end, end_name, is_end=True)
    start_ms = end_ms - DEFAULT_DAYS * DAY_MS if start is None else milliseconds(start, start_name)
    if start_ms >= end_ms:
        expected = f"expected a time before {'now' if end is None else end_name}"
        raise InvalidRequest(parameter=start_name, expected=expected)
    return Selection(start_ms, end_ms, **named)


async def report(
    database: Database,
    by: By,
    selected: Selection,
    *,
    after: str = "",
    limit: int | None = None,
    start_name: str = "from",
) -> Report:
    """What was used: by day with a row for each, by chatbot or key with a row for each that was used.

    Args:
        database: Where the record is.
        by: What to sum up by.
        selected: The completions that count.
        after: The day or id after which to begin.
        limit: How many rows at most.
        start_name: The parameter where the range begins, for the sentence.

    Raises:
        InvalidRequest: There are too many days in the range.
        NotFound: There is no such chatbot or key.
    """
    await _check_names(database, selected)
    most = None if limit is None else limit + 1
    if by == "day":
        groups = _days(selected, after, start_name)[:most]
    else:
        used = await storage.used(database, by, selected, after=after, limit=most)
        groups = [(row["id"], {by: row["id"], "name": row["name"]}) for row in used]
    page = groups[:limit]
    if not page:
        [total] = await storage.sums(database, None, selected)
        return Report([], False, _figures(total, {}))
    # Without bounds where there is but one page: on SQLite they would lead to an index that costs more.
    is_whole = not after and len(groups) == len(page)
    found, [total] = await asyncio.gather(
        storage.sums(database, by, selected, None if is_whole else (page[0][0], page[-1][0])),
        storage.sums(database, None, selected),
    )
    sums = {row["id"]: row for row in found}
    rows = [_figures(sums.get(group, {}), labels) for group, labels in page]
    return Report(rows, len(groups) > len(page), _figures(total, {}))


async def _check_names(database: Database, selected: Selection) -> None:
    if selected.chatbot and not await storage.chatbot_exists(database, selected.chatbot):
        raise NotFound(kind="chatbot", name=selected.chatbot[:64])
    if selected.key and not await storage.key_exists(database, selected.key):
        raise NotFound(kind="key", name=selected.key[:64])


def _days(selected: Selection, after: str, start_name: str) -> list[tuple[int, dict[str, Any]]]:
    """The days of a range: their numbers since 1970, and what they are called."""
    first, last = selected.start // DAY_MS, (selected.end - 1) // DAY_MS
    if last - first >= MOST_DAYS:
        raise InvalidRequest(
            parameter=start_name, expected=f"expected at most {MOST_DAYS} days for a report by day"
        )
    days = ((number, (EPOCH + timedelta(days=number)).isoformat()) for number in range(first, last + 1))
    return [(number, {"day": day}) for number, day in days if day > after]


def _figures(sums: Mapping[Any, Any], labels: dict[str, Any]) -> UsageFigures:
    """A row of a report; a group without completions has no sums."""
    counts = {name: sums.get(name, 0) for name in COUNTS}
    total_tokens = counts["prompt_tokens"] + counts["completion_tokens"]
    return UsageFigures(
        **labels,
        **counts,
        total_tokens=total_tokens,
        first_token_ms=_percentiles(sums, "first_token_ms"),
        duration_ms=_percentiles(sums, "duration_ms"),
    )


def _percentiles(sums: Mapping[Any, Any], time_name: str) -> Percentiles:
    values = (sums.get(f"{time_name}_{name}") for name in ("p50", "p95"))
    p50, p95 = (None if value is None else round(value, DECIMALS) for value in values)
    return Percentiles(p50=p50, p95=p95)


def _within_reason(unix_milliseconds: int) -> int:
    """The same, as far as days have names and completions were possible."""
    return min(max(unix_milliseconds, 0), (LAST_SECOND + 1) * 1000)
