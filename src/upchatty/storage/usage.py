"""Queries that sum up the record of completions, by day (UTC), by chatbot, by key, or as a whole."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from sqlalchemy import (
    CTE,
    BigInteger,
    ColumnElement,
    Float,
    FromClause,
    RowMapping,
    Select,
    case,
    exists,
    func,
    literal_column,
    select,
    true,
)

from upchatty.storage.database import Database
from upchatty.storage.tables import chatbot_versions, chatbots, completions, keys

By = Literal["day", "chatbot", "key"]

DAY_MS = 24 * 60 * 60 * 1000
TIMES = (completions.c.first_token_ms, completions.c.duration_ms)
PERCENTILES = {"p50": 0.5, "p95": 0.95}
GROUPS: Mapping[By, ColumnElement[Any]] = {
    # A literal: PostgreSQL would not see that a parameter of SELECT and one of GROUP BY are the same.
    "day": completions.c.created_at // literal_column(str(DAY_MS), BigInteger),
    "chatbot": completions.c.chatbot_id,
    "key": completions.c.key_id,
}


class Selection(NamedTuple):
    """Which completions count: those made from `start` until before `end`, unix milliseconds, and of
    one chatbot, key or model where it is named."""

    start: int
    end: int
    chatbot: str = ""
    key: str = ""
    model: str = ""

    @property
    def conditions(self) -> list[ColumnElement[bool]]:
        """The same for a WHERE."""
        columns = completions.c
        named = ((columns.chatbot_id, self.chatbot), (columns.key_id, self.key), (columns.model, self.model))
        return [
            columns.created_at >= self.start,
            columns.created_at < self.end,
            *(column == value for column, value in named if value),
        ]


async def chatbot_exists(database: Database, chatbot_id: str) -> bool:
    """Whether there is a chatbot of this id."""
    return await _exists(database, chatbots.c.id == chatbot_id)


async def key_exists(database: Database, key_id: str) -> bool:
    """Whether there is or was a key of this id: revoked and expired ones included."""
    return await _exists(database, keys.c.id == key_id)


async def _exists(database: Database, condition: ColumnElement[bool]) -> bool:
    async with database.transaction() as connection:
        return bool((await connection.execute(select(exists().where(condition)))).scalar())


async def used(
    database: Database,
    by: Literal["chatbot", "key"],
    selection: Selection,
    *,
    after: str = "",
    limit: int | None = None,
) -> list[RowMapping]:
    """The chatbots or keys with completions, each with `id` and `name`, in the order of their ids.

    Args:
        database: Where to look.
        by: Which of the two.
        selection: The completions that count.
        after: The id after which to begin.
        limit: How many at most.
    """
    group = GROUPS[by]
    ids = select(group.label("id")).where(*selection.conditions, group > after)
    found = ids.distinct().order_by(group).limit(limit).subquery()
    if by == "key":
        query = select(found.c.id, keys.c.name).outerjoin(keys, keys.c.id == found.c.id)
    else:
        published = (chatbot_versions.c.chatbot_id == chatbots.c.id) & (
            chatbot_versions.c.version == chatbots.c.published_version
        )
        query = (
            select(found.c.id, chatbot_versions.c.name)
            .outerjoin(chatbots, chatbots.c.id == found.c.id)
            .outerjoin(chatbot_versions, published)
        )
    async with database.transaction() as connection:
        return list((await connection.execute(query.order_by(found.c.id))).mappings())


async def sums(
    database: Database, by: By | None, selection: Selection, only: tuple[Any, Any] | None = None
) -> list[RowMapping]:
    """The figures of each group that has completions, or with None as `by` the one row of them all.

    Counts are those of requests and tokens; `first_token_ms_p50` and the like are continuous
    percentiles, interpolated as by PostgreSQL's `percentile_cont`
    (https://www.postgresql.org/docs/current/functions-aggregate.html), None where there is no value.

    Args:
        database: Where to look.
        by: What to sum up by. A group's `id` is that of a chatbot or key, or the day's number since 1970.
        selection: The completions that count.
        only: The ids of the first and the last group that are wanted; None: all groups.
    """
    group = GROUPS[by] if by else None
    if by == "day" and only:  # said in milliseconds, of which there is an index
        start, end = max(selection.start, only[0] * DAY_MS), min(selection.end, (only[1] + 1) * DAY_MS)
        selection = selection._replace(start=start, end=end)
    conditions = selection.conditions
    if group is not None and by != "day" and only:
        conditions.append(group.between(*only))
    async with database.transaction() as connection:
        build = _on_sqlite if connection.dialect.name == "sqlite" else _on_postgresql
        return list((await connection.execute(build(group, conditions))).mappings())


def _on_postgresql(group: ColumnElement[Any] | None, conditions: list[ColumnElement[bool]]) -> Select[Any]:
    percentiles = [
        func.percentile_cont(fraction).within_group(time).label(f"{time.name}_{name}")
        for time in TIMES
        for name, fraction in PERCENTILES.items()
    ]
    return _grouped([*_counts(), *percentiles], group, conditions)


def _on_sqlite(group: ColumnElement[Any] | None, conditions: list[ColumnElement[bool]]) -> Select[Any]:
    """SQLite has no percentiles, so every time is given its place among those of its group.

    How many there are is counted beforehand: as a window function it would cost as much as the places.
    """
    values = [func.count(time).label(f"{time.name}_values") for time in TIMES]
    counts = _grouped([*_counts(), *values], group, conditions).cte("counts")
    joined: FromClause = counts
    percentiles: list[ColumnElement[Any]] = []
    for time in TIMES:
        found = _percentiles(time, group, conditions, counts).subquery()
        joined = joined.outerjoin(found, true() if group is None else found.c.id == counts.c.id)
        percentiles += (found.c[f"{time.name}_{name}"] for name in PERCENTILES)
    return select(*counts.c, *percentiles).select_from(joined)


def _percentiles(
    time: ColumnElement[float],
    group: ColumnElement[Any] | None,
    conditions: list[ColumnElement[bool]],
    counts: CTE,
) -> Select[Any]:
    place = func.row_number().over(partition_by=group, order_by=time) - 1
    columns = [time.label("time"), place.label("place")]
    if group is not None:
        columns.append(group.label("id"))
    placed = select(*columns).where(*conditions, time.is_not(None)).subquery()
    last = counts.c[f"{time.name}_values"] - 1
    sums = []
    for name, fraction in PERCENTILES.items():
        # Of the two times beside the percentile's place, the nearer one counts the more.
        distance = func.abs(placed.c.place - last * literal_column(str(fraction), Float))
        weighted = case((distance < 1, placed.c.time * (1 - distance)), else_=0.0)
        sums.append(func.sum(weighted).label(f"{time.name}_{name}"))
    if group is None:
        return select(*sums).select_from(placed.join(counts, true()))
    return (
        select(placed.c.id, *sums)
        .select_from(placed.join(counts, counts.c.id == placed.c.id))
        .group_by(placed.c.id)
    )


def _grouped(
    sums: list[ColumnElement[Any]],
    group: ColumnElement[Any] | None,
    conditions: list[ColumnElement[bool]],
) -> Select[Any]:
    if group is None:
        return select(*sums).where(*conditions)
    return select(group.label("id"), *sums).where(*conditions).group_by(group)


def _counts() -> list[ColumnElement[Any]]:
    columns = completions.c
    tokens = (columns.prompt_tokens, columns.cached_tokens, columns.completion_tokens)
    return [
        func.count().label("requests"),
        func.count().filter(columns.finish_reason == "error").label("errors"),
        func.count().filter(columns.finish_reason == "cancelled").label("cancelled"),
        *(func.coalesce(func.sum(column), 0).label(column.name) for column in tokens),
        func.count().filter(columns.estimated).label("estimated"),
        func.count(columns.fallback_for).label("fallbacks"),
        func.coalesce(func.sum(columns.retries), 0).label("retries"),
    ]
