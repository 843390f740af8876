"""What was used: `GET /usage` and `upchatty usage`, on both databases."""

import asyncio
import os
import pty
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from sqlalchemy import insert

from tests.support import assert_error, question
from upchatty.app import Administration, open_administration
from upchatty.cli import main
from upchatty.settings import Settings
from upchatty.storage.tables import completions
from upchatty.testing import ScriptedAnswer, ScriptedEngine, running_server

DAY_MS = 24 * 60 * 60 * 1000
FIRST_DAY = datetime(2024, 2, 27, tzinfo=UTC)  # the 29th follows two days later
RANGE = {"from": "2024-02-27", "to": "2024-03-02"}
DAYS = ["2024-02-27", "2024-02-28", "2024-02-29", "2024-03-01", "2024-03-02"]
QUIET_DAY = DAYS[1]
NUMBERS = count()
COUNTS = {
    "requests": 0,
    "errors": 0,
    "cancelled": 0,
    "prompt_tokens": 0,
    "cached_tokens": 0,
    "completion_tokens": 0,
    "total_tokens": 0,
    "estimated": 0,
    "fallbacks": 0,
    "retries": 0,
}
NO_TIMES = {"p50": None, "p95": None}
NOTHING = COUNTS | {"object": "usage", "first_token_ms": NO_TIMES, "duration_ms": NO_TIMES}

Row = dict[str, Any]


def row(chatbot: str, key: str, moment: datetime | int, **fields: Any) -> Row:
    """A record as the server keeps it."""
    made_ms = moment if isinstance(moment, int) else round(moment.timestamp() * 1000)
    return {
        "id": f"chatcmpl-{next(NUMBERS):032}",
        "chatbot_id": chatbot,
        "version": 1,
        "key_id": key,
        "model": "default",
        "created_at": made_ms,
        "streamed": False,
        "finish_reason": "stop",
        "prompt_tokens": 3,
        "cached_tokens": 1,
        "completion_tokens": 2,
        "queue_ms": 0.0,
        "first_token_ms": 10.0,
        "duration_ms": 20.0,
        "fallback_for": None,
        "retries": 0,
        "estimated": False,
    } | fields


def history(chatbots: list[str], keys: list[str]) -> list[Row]:
    """Some hundred records of four of five days, with everything that can happen."""
    dice = random.Random(7)
    rows = []
    for _ in range(400):
        day = dice.choice([0, 2, 3, 4])
        finish_reason = dice.choices(["stop", "length", "error", "cancelled"], [70, 10, 10, 10])[0]
        rows.append(
            row(
                dice.choice(chatbots),
                dice.choice(keys),
                FIRST_DAY + timedelta(days=day, milliseconds=dice.randrange(DAY_MS)),
                model=dice.choice(["default", "big"]),
                finish_reason=finish_reason,
                prompt_tokens=dice.randrange(3000),
                cached_tokens=dice.randrange(100),
                completion_tokens=dice.randrange(500),
                first_token_ms=None if finish_reason == "error" else dice.expovariate(0.01),
                duration_ms=dice.choice([dice.expovariate(0.001), 500.0]),
                fallback_for=dice.choice([None, None, "other"]),
                retries=dice.choice([0, 0, 0, 2]),
                estimated=dice.choice([False, True]),
            )
        )
    return rows


def expected(rows: list[Row]) -> Row:
    """The figures of some records, computed here."""
    tokens = {
        name: sum(r[name] for r in rows) for name in ("prompt_tokens", "cached_tokens", "completion_tokens")
    }
    return {
        "object": "usage",
        "requests": len(rows),
        "errors": sum(r["finish_reason"] == "error" for r in rows),
        "cancelled": sum(r["finish_reason"] == "cancelled" for r in rows),
        **tokens,
        "total_tokens": tokens["prompt_tokens"] + tokens["completion_tokens"],
        "estimated": sum(r["estimated"] for r in rows),
        "fallbacks": sum(r["fallback_for"] is not None for r in rows),
        "retries": sum(r["retries"] for r in rows),
        "first_token_ms": percentiles([r["first_token_ms"] for r in rows if r["first_token_ms"] is not None]),
        "duration_ms": percentiles([r["duration_ms"] for r in rows]),
    }


def percentiles(values: list[float]) -> Row:
    if not values:
        return NO_TIMES
    cuts = statistics.quantiles(values * (2 if len(values) == 1 else 1), n=100, method="inclusive")
    return {"p50": pytest.approx(cuts[49], abs=0.002), "p95": pytest.approx(cuts[94], abs=0.002)}


def day_of(record: Row) -> str:
    return datetime.fromtimestamp(record["created_at"] / 1000, UTC).date().isoformat()


async def store(settings: Settings, rows: list[Row]) -> None:
    async with open_administration(settings) as opened:
        await store_in(opened, rows)


async def store_in(opened: Administration, rows: list[Row]) -> None:
    async with opened.database.transaction() as connection:
        await connection.execute(insert(completions), rows)


class Place:
    """A server in this process, and what a test does with it."""

    def __init__(
        self, settings: Settings, engine: ScriptedEngine, client: httpx.AsyncClient, chatbot: str
    ) -> None:
        self.settings, self.engine, self.client, self.chatbot = settings, engine, client, chatbot

    async def usage(self, **parameters: Any) -> Any:
        response = await self.client.get("/usage", params=parameters)
        assert response.status_code == 200, response.text
        body = response.json()
        assert body["object"] == "list" and isinstance(body["has_more"], bool)
        return body

    async def make(self, path: str, **fields: Any) -> Row:
        response = await self.client.post(path, json=fields)
        assert response.status_code == 201, response.text
        made: Row = response.json()
        return made

    async def total(self, requests: int, **parameters: Any) -> Row:
        """The sum, once there are so many requests: records are written behind the answers."""
        deadline = time.monotonic() + 10
        while (total := (await self.usage(**parameters))["total"])["requests"] < requests:
            assert time.monotonic() < deadline, total
            await asyncio.sleep(0.05)
        assert total["requests"] == requests
        return dict(total)


@pytest.fixture(params=["sqlite", "postgresql"])
def settings(request: pytest.FixtureRequest, new_database: Callable[[str], str], tmp_path: Path) -> Settings:
    """Settings with an empty database."""
    return Settings(data_dir=tmp_path / "data", database_url=new_database(request.param))


@pytest.fixture
async def place(settings: Settings) -> AsyncIterator[Place]:
    async with ScriptedEngine() as engine:
        given = Settings(
            data_dir=settings.data_dir,
            database_url=settings.database_url,
            models={"default": {"url": engine.url}},
        )
        async with (
            running_server(given) as server,
            httpx.AsyncClient(
                verify=False,
                base_url=server.address + "/api/v1",
                headers={"Authorization": f"Bearer {server.key}"},
            ) as client,
        ):
            yield Place(given, engine, client, server.chatbot.id)


# Over HTTP


async def test_nothing_used(place: Place) -> None:
    by_day = await place.usage()
    today = datetime.now(UTC).date()
    days = [(today - timedelta(days=ago)).isoformat() for ago in range(30, -1, -1)]
    assert by_day["data"] == [NOTHING | {"day": day} for day in days[:20]]
    assert by_day["has_more"] is True
    rest = await place.usage(after=days[19], limit=11)
    assert [item["day"] for item in rest["data"]] == days[20:] and rest["has_more"] is False
    for by in ("chatbot", "key"):
        page = await place.usage(by=by)
        assert page == {"object": "list", "data": [], "has_more": False, "total": NOTHING}


async def test_real_requests(place: Place) -> None:
    chat = await place.make("/keys", name="web site", scope="chat")
    place.engine.script(
        ScriptedAnswer(pieces=["a", "b", "c"]),
        ScriptedAnswer(pieces=["a", "b"]),
        ScriptedAnswer(pieces=["a"], ending="garbage"),
        ScriptedAnswer(pieces=["a", "b"], ending="hang"),
    )
    headers = {"Authorization": f"Bearer {chat['key']}"}
    body = question(place.chatbot)
    assert (await place.client.post("/chat/completions", json=body)).status_code == 200
    answered = await place.client.post("/chat/completions", json=body, headers=headers)
    assert answered.status_code == 200
    assert (await place.client.post("/chat/completions", json=body, headers=headers)).status_code == 502
    streamed = place.client.stream("POST", "/chat/completions", json=body | {"stream": True}, headers=headers)
    async with streamed as response:
        async for line in response.aiter_lines():
            if '"b"' in line:
                break
    refused = await place.client.post("/chat/completions", json=body | {"temperature": 7})
    assert refused.status_code == 400

    total = await place.total(4)
    assert (total["errors"], total["cancelled"]) == (1, 1)
    assert total["total_tokens"] == total["prompt_tokens"] + total["completion_tokens"]
    assert total["completion_tokens"] >= 3 + 2
    assert 0 < total["first_token_ms"]["p50"] <= total["duration_ms"]["p95"]
    [today] = [item for item in (await place.usage(after=day_ago(1)))["data"] if item["requests"]]
    assert today == total | {"day": datetime.now(UTC).date().isoformat()}
    [chatbot] = (await place.usage(by="chatbot"))["data"]
    assert chatbot == total | {"chatbot": place.chatbot, "name": "My first chatbot"}
    first, second = (await place.usage(by="key"))["data"]
    assert (first["name"], first["requests"], first["completion_tokens"]) == ("first", 1, 3)
    assert (second["key"], second["name"], second["requests"]) == (chat["id"], "web site", 3)
    assert (second["errors"], second["cancelled"]) == (1, 1)
    assert (await place.usage(key=chat["id"]))["total"]["requests"] == 3


def day_ago(days: int) -> str:
    return (datetime.now(UTC) - timedelta(days=days + 1)).date().isoformat()


async def test_sums_and_percentiles(place: Place) -> None:
    """Each grouping and filter against the same figures computed here."""
    bots = [place.chatbot, (await place.make("/chatbots", name="second"))["id"]]
    keys = [(await place.make("/keys", name=f"key {n}", scope="chat"))["id"] for n in range(3)]
    rows = history(bots, keys)
    await store(place.settings, rows)

    by_day = await place.usage(**RANGE)
    assert by_day["has_more"] is False
    assert by_day["total"] == expected(rows)
    assert [item["day"] for item in by_day["data"]] == DAYS
    for item in by_day["data"]:
        assert item == expected([r for r in rows if day_of(r) == item["day"]]) | {"day": item["day"]}
    assert by_day["data"][1] == NOTHING | {"day": QUIET_DAY}

    for by, column, names in (
        ("chatbot", "chatbot_id", dict(zip(bots, ["My first chatbot", "second"], strict=True))),
        ("key", "key_id", {key: f"key {number}" for number, key in enumerate(keys)}),
    ):
        page = await place.usage(by=by, **RANGE)
        groups: dict[str, list[Row]] = {}
        for record in rows:
            groups.setdefault(record[column], []).append(record)
        assert page["data"] == [
            expected(group) | {by: name, "name": names[name]} for name, group in sorted(groups.items())
        ]
        assert page["total"] == by_day["total"]

    for filters, chosen in (
        ({"chatbot": bots[1]}, [r for r in rows if r["chatbot_id"] == bots[1]]),
        ({"key": keys[2]}, [r for r in rows if r["key_id"] == keys[2]]),
        ({"model": "big"}, [r for r in rows if r["model"] == "big"]),
        (
            {"chatbot": bots[0], "key": keys[0]},
            [r for r in rows if (r["chatbot_id"], r["key_id"]) == (bots[0], keys[0])],
        ),
        ({"model": "unheard of"}, []),
    ):
        for by in ("day", "chatbot", "key"):
            page = await place.usage(by=by, **RANGE, **filters)
            assert page["total"] == expected(chosen)
            assert sum(item["requests"] for item in page["data"]) == len(chosen)


async def test_few_values(place: Place) -> None:
    """Percentiles of one, two and three values, which leave little to interpolate."""
    key = (await place.make("/keys", name="a key", scope="chat"))["id"]
    values = {"2024-02-27": [7.0], "2024-02-28": [1.0, 2.0], "2024-02-29": [3.0, 1.0, 2.0]}
    await store(
        place.settings,
        [
            row(
                place.chatbot,
                key,
                datetime.fromisoformat(day + "T12:00Z"),
                first_token_ms=None,
                duration_ms=v,
            )
            for day, day_values in values.items()
            for v in day_values
        ],
    )
    found = {item["day"]: item for item in (await place.usage(**RANGE))["data"]}
    assert found["2024-02-27"]["duration_ms"] == {"p50": 7.0, "p95": 7.0}
    assert found["2024-02-28"]["duration_ms"] == {"p50": 1.5, "p95": 1.95}
    assert found["2024-02-29"]["duration_ms"] == {"p50": 2.0, "p95": 2.9}
    assert found["2024-02-29"]["first_token_ms"] == NO_TIMES


@pytest.mark.parametrize("by", ["day", "chatbot", "key"])
async def test_pages(place: Place, by: str) -> None:
    bots = [(await place.make("/chatbots", name=f"bot {n}"))["id"] for n in range(5)]
    keys = [(await place.make("/keys", name=f"key {n}", scope="chat"))["id"] for n in range(5)]
    await store(place.settings, history(bots, keys))
    whole = await place.usage(by=by, **RANGE)
    assert len(whole["data"]) == 5 and whole["has_more"] is False
    seen: list[Row] = []
    for more in (True, True, False):
        page = await place.usage(by=by, limit=2, after=seen[-1][by] if seen else "", **RANGE)
        seen += page["data"]
        assert page["has_more"] is more
        assert page["total"] == whole["total"]
    assert seen == whole["data"]
    assert (await place.usage(by=by, after=seen[-1][by], **RANGE))["data"] == []
    assert len((await place.usage(by=by, limit=5, **RANGE))["data"]) == 5


async def test_midnight(place: Place) -> None:
    """A day is one of UTC: from its first millisecond to its last."""
    midnight = round(datetime(2024, 2, 29, tzinfo=UTC).timestamp() * 1000)
    offsets = (-1, 0, DAY_MS - 1, DAY_MS)
    await store(place.settings, [row(place.chatbot, "key_gone", midnight + offset) for offset in offsets])

    async def requests(start: object, end: object) -> dict[str, int]:
        page = await place.usage(**{"from": start, "to": end})
        assert page["total"]["requests"] == sum(item["requests"] for item in page["data"])
        return {item["day"]: item["requests"] for item in page["data"]}

    seconds = midnight // 1000
    only = {"2024-02-29": 2}
    assert await requests("2024-02-29", "2024-02-29") == only
    assert await requests(seconds, seconds + 86400) == only
    assert await requests("2024-02-29T00:00:00Z", "2024-03-01T00:00:00Z") == only
    assert await requests("2024-02-29T01:30:00+01:30", "2024-02-29T15:00:00-09:00") == only
    assert await requests("2024-02-29T00:00:00.001Z", "2024-02-29T23:59:59.999Z") == {"2024-02-29": 0}
    assert await requests("2024-02-28T23:59:59.999Z", "2024-02-29T00:00:00Z") == {"2024-02-28": 1}
    assert await requests("2024-02-28", "2024-03-01") == {
        "2024-02-28": 1,
        "2024-02-29": 2,
        "2024-03-01": 1,
    }


async def test_defaults(place: Place) -> None:
    now = round(time.time() * 1000)
    ages_ms = (1000, 29 * DAY_MS, 31 * DAY_MS)
    await store(place.settings, [row(place.chatbot, "key_gone", now - age) for age in ages_ms])
    assert (await place.usage())["total"]["requests"] == 2
    before = datetime.fromtimestamp((now - 20 * DAY_MS) / 1000, UTC).isoformat()
    assert (await place.usage(to=before, by="chatbot"))["total"]["requests"] == 2
    assert (await place.usage(**{"from": before}))["total"]["requests"] == 1


async def test_what_is_gone(place: Place) -> None:
    """A revoked key keeps its name; a deleted chatbot takes its records along; an unknown key has no name."""
    bot = (await place.make("/chatbots", name="short-lived"))["id"]
    await place.client.patch(f"/chatbots/{bot}", json={"name": "renamed"})
    key = (await place.make("/keys", name="revoked", scope="chat"))["id"]
    other = "key_" + "f" * 32
    await store(
        place.settings,
        [
            row(bot, key, FIRST_DAY),
            row(place.chatbot, key, FIRST_DAY),
            row(place.chatbot, other, FIRST_DAY),
        ],
    )
    assert [item["name"] for item in (await place.usage(by="chatbot", **RANGE))["data"]] == [
        "My first chatbot",
        "renamed",
    ]
    assert (await place.client.delete(f"/keys/{key}")).status_code == 204
    assert (await place.client.delete(f"/chatbots/{bot}")).status_code == 204
    by_key = await place.usage(by="key", **RANGE)
    assert [(item["key"], item["name"], item["requests"]) for item in by_key["data"]] == [
        (key, "revoked", 1),
        (other, None, 1),
    ]
    [chatbot] = (await place.usage(by="chatbot", **RANGE))["data"]
    assert (chatbot["chatbot"], chatbot["requests"]) == (place.chatbot, 2)
    assert (await place.usage(key=key, **RANGE))["total"]["requests"] == 1
    assert_error(await place.client.get("/usage", params={"chatbot": bot}), 404, bot)
    assert_error(await place.client.get("/usage", params={"key": "key_x"}), 404, "key_x")


async def test_admin_keys_only(place: Place) -> None:
    key = (await place.make("/keys", name="chat", scope="chat"))["key"]
    refused = await place.client.get("/usage", headers={"Authorization": f"Bearer {key}"})
    assert_error(refused, 403, "admin")
    assert_error(await place.client.get("/usage", headers={"Authorization": ""}), 401)


BAD_TIMES = (
    *("", "x", "now", "-1", "1.5", "1e9", " 1", "٣", "9" * 12, "9" * 30, "true", "null", "\0"),
    *("2024-02-30", "2023-02-29", "2024-13-01", "0000-01-01", "2024-2-1", "2024-02"),
    *("2024-02-01T00:00:00", "2024-02-01T25:00:00Z", "2024-02-01T00:00:00 02:00", "2024-02-01Z"),
)


async def test_bad_input(place: Place) -> None:
    bad: list[tuple[str, dict[str, object]]] = [
        *((name, {name: value}) for name in ("from", "to") for value in BAD_TIMES),
        *(("by", {"by": value}) for value in ("", "x", "Day", "model", "day,key", "\0")),
        *(("limit", {"limit": value}) for value in ("0", "101", "x", "", "1.5")),
        *(("after", {"after": value}) for value in ("\0", "x" * 65)),
        *((name, {name: value}) for name in ("chatbot", "key") for value in ("\0", "x" * 65)),
        *(("model", {"model": value}) for value in ("\0", "x" * 201)),
        ("from", {"from": "2024-02-02", "to": "2024-02-01"}),
        ("from", {"from": 5, "to": 5}),
        ("from", {"from": "2024-02-02", "to": "2024-02-02T00:00:00Z", "by": "key"}),
        ("from", {"from": "9999-12-31"}),
        ("from", {"from": "2010-01-01", "to": "2020-01-09"}),
        ("from", {"from": 0}),
    ]
    for name, parameters in bad:
        response = await place.client.get("/usage", params=parameters)  # type: ignore[arg-type]
        assert response.status_code == 400, parameters
        assert_error(response, 400, f"{name}: ")
        assert len(response.content) < 300


async def test_far_ranges(place: Place) -> None:
    ten_years = {"from": "2010-01-01", "to": "2020-01-08"}  # 3,660 days
    last = await place.usage(limit=1, after="2020-01-07", **ten_years)
    assert [item["day"] for item in last["data"]] == ["2020-01-08"] and not last["has_more"]
    await store(place.settings, [row(place.chatbot, "key_gone", FIRST_DAY)])
    for start in ("0001-01-01T00:00:00+23:59", "0001-01-01", 0):
        for end in ("9999-12-31", "9999-12-31T23:59:59.999999-23:59", 253_402_300_799):
            page = await place.usage(**{"from": start, "to": end, "by": "chatbot"})
            assert page["total"]["requests"] == 1
    for end in (0, "0001-01-01", "9999-12-31"):
        assert (await place.usage(to=end))["total"]["requests"] == 0


# The command


class Result:
    """What a command printed, and its exit code."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err
        self.lines = out.splitlines()


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], settings: Settings
) -> Iterator[Callable[..., Result]]:
    """Runs `upchatty usage` in this process."""
    for name in [name for name in os.environ if name.startswith("UPCHATTY_")]:
        monkeypatch.delenv(name)
    for name, value in environment(settings).items():
        monkeypatch.setenv(name, value)

    def command(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["upchatty", "usage", *arguments])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        return Result(code, *capsys.readouterr())

    return command


def environment(settings: Settings) -> dict[str, str]:
    return {
        "UPCHATTY_DATA_DIR": str(settings.data_dir),
        "UPCHATTY_DATABASE_URL": settings.database_url,
        "COLUMNS": "100",
    }


@pytest.fixture
def filled(settings: Settings) -> tuple[list[str], list[str], list[Row]]:
    """Two chatbots, two keys, and what they were used for."""

    async def fill() -> tuple[list[str], list[str], list[Row]]:
        async with open_administration(settings) as opened:
            bots = [(await opened.chatbots.create(name)).id for name in ("Ünïcode [red]bot[/red]", "plain")]
            keys = [(await opened.keys.create(name, "chat"))[0].id for name in ("one", "two")]
            rows = history(bots, keys)
            await store_in(opened, rows)
            return bots, keys, rows

    return asyncio.run(fill())


def test_table(run: Callable[..., Result], filled: tuple[list[str], list[str], list[Row]]) -> None:
    bots, keys, rows = filled
    by_day = run("--from", "2024-02-27", "--to", "2024-03-02")
    assert (by_day.code, by_day.err) == (0, "")
    heading, *days, total = [line.split() for line in by_day.lines]
    assert heading == [
        *("DAY", "REQUESTS", "ERRORS", "CANCELLED", "PROMPT", "CACHED", "COMPLETION"),
        *("FIRST", "DURATION", "TOKENS"),
    ]
    assert [day[0] for day in days] == DAYS
    assert days[1] == [QUIET_DAY, "0", "0", "0", "0", "0", "0", "-", "-", "0"]
    sums = expected(rows)
    assert [total[0], total[1], total[-1]] == ["total", "400", str(sums["total_tokens"])]
    assert re.fullmatch(r"\d+\.\d\d/\d+\.\d\d", total[-2])
    assert not re.search("[█#]", by_day.out)

    by_chatbot = run("--from", "2024-02-27", "--to", "2024-03-02", "--by", "chatbot").lines
    assert len(by_chatbot) == 4 and len({len(line) for line in by_chatbot}) == 1
    assert "Ünïcode [red]bot[/red]" in by_chatbot[1] and bots[0] in by_chatbot[1]
    one = [r for r in rows if r["key_id"] == keys[0] and r["chatbot_id"] == bots[1]]
    chosen = run("--from", "2024-02-27", "--by=key", "--key", keys[0], "--chatbot", bots[1]).lines
    assert len(chosen) == 3 and chosen[1].split()[:3] == ["one", keys[0], str(len(one))]


def test_json_is_as_over_http(
    run: Callable[..., Result], filled: tuple[list[str], list[str], list[Row]]
) -> None:
    *_, rows = filled
    printed = msgspec.json.decode(run("--from", "2024-01-01", "--to", "2024-03-02", "--json").out)
    assert printed["total"] == expected(rows)
    assert (printed["object"], printed["has_more"], len(printed["data"])) == ("list", False, 62)
    assert printed["data"][-1] == expected([r for r in rows if day_of(r) == DAYS[-1]]) | {"day": DAYS[-1]}


@pytest.mark.parametrize("columns", [30, 60, 80, 140])
@pytest.mark.any_database
def test_chart_fits(
    run: Callable[..., Result],
    filled: tuple[list[str], list[str], list[Row]],
    monkeypatch: pytest.MonkeyPatch,
    columns: int,
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    *_, rows = filled
    lines = run("--chart", "--from", "2024-02-27", "--to", "2024-03-02").lines
    assert [line.split()[0] for line in lines] == ["DAY", *DAYS, "total"]
    assert {"REQUESTS", "TOKENS"} <= set(lines[0].split())
    tokens = [expected([r for r in rows if day_of(r) == day])["total_tokens"] for day in DAYS]
    bars = [line.count("█") for line in lines[1:-1]]
    assert bars[1] == 0 and bars[tokens.index(max(tokens))] == max(bars) >= 10
    for bar, used in zip(bars, tokens, strict=True):
        assert bar == pytest.approx(used / max(tokens) * max(bars), abs=1)
    if columns >= 60:
        assert max(map(len, lines)) <= columns
    names = run("--chart", "--from", "2024-02-27", "--by", "chatbot").lines
    assert "plain" in names[2] and len(names) == 4


def test_empty(run: Callable[..., Result]) -> None:
    assert len(run("--chart").lines) == 1 + 31 + 1
    nobody = run("--by", "key").lines
    assert len(nobody) == 2 and nobody[1].split()[:3] == ["total", "-", "0"]


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (["--from", "yesterday"], 2, "--from"),
        (["--to", "2024-02-30"], 2, "--to"),
        (["--from", "2024-02-02", "--to", "2024-02-01"], 2, "--from"),
        (["--from", "1970-01-01"], 2, "--from"),
        (["--by", "model"], 2, "--by"),
        (["--chatbot", "bot_1"], 4, "bot_1"),
        (["--key", "key_1"], 4, "key_1"),
    ],
)
@pytest.mark.any_database
def test_wrong_usage(
    run: Callable[..., Result], settings: Settings, arguments: list[str], code: int, word: str
) -> None:
    run()
    result = run(*arguments)
    assert (result.code, result.out) == (code, "")
    assert word in result.err and "Traceback" not in result.err


@pytest.mark.any_database
def test_terminal_and_pipe(settings: Settings, filled: tuple[list[str], list[str], list[Row]]) -> None:
    """On a terminal a chart, in ASCII where it has nothing else; into a pipe every column and no chart."""
    command = [sys.executable, "-m", "upchatty", "usage", "--from", "2024-02-27", "--to", "2024-03-02"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("UPCHATTY_")}
    clean |= environment(settings) | {"TERM": "xterm"}

    def on_terminal(*arguments: str, **variables: str) -> str:
        controller, terminal = pty.openpty()
        with subprocess.Popen([*command, *arguments], stdout=terminal, env=clean | variables) as process:
            os.close(terminal)
            text = b""
            while part := read(controller):
                text += part
            assert process.wait(30) == 0
        os.close(controller)
        return text.decode()

    unicode = on_terminal(PYTHONIOENCODING="utf-8")
    assert "█" in unicode and "#" not in unicode
    ascii_only = on_terminal("--by", "chatbot", PYTHONIOENCODING="ascii")
    assert "####" in ascii_only and ascii_only.isascii()
    assert "█" not in on_terminal("--no-chart", PYTHONIOENCODING="utf-8")
    piped = subprocess.run(command, env=clean, capture_output=True, check=True).stdout
    assert b"CACHED" in piped and piped.isascii() and b"#" not in piped


def read(terminal: int) -> bytes:
    """What a terminal has to show; nothing at its end, which Linux says with an error."""
    try:
        return os.read(terminal, 4096)
    except OSError:
        return b""
