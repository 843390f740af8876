"""Bad days of the engines behind a URL: what callers see of them, within what time, and that nothing leaks.

On the other end is a real process that fails on demand, and beside it one that does not where there is a
second replica.
"""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import psutil
import pytest

from tests.faults import eventually, record, records
from tests.support import ADMIN_KEY, Server, assert_error, question
from tests.test_streaming import chunks_of
from upchatty.settings import Settings
from upchatty.testing import DIALECTS, FaultyUpstream, running_server
from upchatty.testing.dialects import ERRORS

ENGINE_KEY = "engine-key-0123456789"
SILENCE = 0.5  # seconds that an engine may be silent
BUSY_MACHINE = 3.0  # seconds that everything may take besides
TEXT = "Good day, wörld 漢字 😀."
PARTIAL = "Good day, "  # what has come of it at a fault in mid-answer
USAGE = {"prompt_tokens": 10, "completion_tokens": 6, "total_tokens": 16}


@dataclass(frozen=True)
class Case:
    """A fault, and what the caller of a model with one replica sees of it."""

    details: dict[str, Any]
    status: int
    words: tuple[str, ...] = ()
    retry_after: str | None = None
    silent: bool = False
    """Whether the caller hears of it only when the engine has been silent for too long."""

    @property
    def name(self) -> str:
        """For the model's name and the test's."""
        return "-".join(str(value) for value in self.details.values() if not isinstance(value, dict))


def _status(status: int, seen: int, *words: str, **headers: str) -> Case:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    details = {"fault": "status", "status": status, "headers": named}
    return Case(details, seen, words, retry_after=headers.get("Retry_After"))


UNANSWERED = [
    Case({"fault": "refuse"}, 503, ("does not accept connections",)),
    Case({"fault": "tls"}, 502),
    Case({"fault": "hang_headers"}, 504, ("0.5 seconds",), silent=True),
    Case({"fault": "close_before_headers"}, 502, ("closed the connection",)),
    Case({"fault": "garbage"}, 502),
    Case({"fault": "html"}, 502),
    _status(401, 502, "engine"),
    _status(403, 502, "engine"),
    _status(404, 502, "engine"),
    _status(429, 503, "too many requests"),
    _status(429, 503, "too many requests", Retry_After="7"),
    _status(500, 502, "injected failure"),
    _status(503, 503),
]
"""Faults that come instead of an answer."""

BREAKS = [
    Case({"fault": "hang_midstream"}, 504, ("0.5 seconds",), silent=True),
    Case({"fault": "close_midstream"}, 502),
    Case({"fault": "close_midevent"}, 502),
    Case({"fault": "reset_midstream"}, 502, ("closed the connection",)),
    Case({"fault": "truncated_chunked"}, 502, ("closed the connection",)),
    Case({"fault": "garbage_event"}, 502, ("not what it was asked for",)),
    Case({"fault": "endless_line"}, 502, ("bytes",)),
    Case({"fault": "error_event"}, 502, ("injected failure",)),
]
"""Faults that an answer meets on its way."""

BEFORE = UNANSWERED + [
    Case(case.details | {"after": 0}, case.status, case.words, silent=case.silent) for case in BREAKS
]
"""All that happens before the first token."""


def names(cases: list[Case]) -> list[str]:
    """What the tests are called."""
    return [case.name + ("-told" if case.retry_after else "") for case in cases]


@dataclass(frozen=True)
class World:
    """A server with many models before a few upstreams, and one chatbot for each model."""

    server: Server
    client: httpx.Client
    one: FaultyUpstream
    two: FaultyUpstream
    mortal: FaultyUpstream
    """A third one, which tests kill."""
    tls: FaultyUpstream
    chatbots: dict[str, str] = field(default_factory=dict)

    def chatbot(self, model: str) -> str:
        """The chatbot of a model."""
        if model not in self.chatbots:
            self.chatbots[model] = self.new_chatbot(model)
        return self.chatbots[model]

    def new_chatbot(self, model: str) -> str:
        """One more."""
        return str(self.client.post("/chatbots", json={"name": model, "model": model}).json()["id"])

    def ask(
        self, model: str, *, stream: bool = False, headers: dict[str, str] | None = None, **parameters: Any
    ) -> httpx.Response:
        """Ask a question."""
        body = question(self.chatbot(model), stream=stream, **parameters)
        return self.client.post("/chat/completions", json=body, headers=headers)

    def answered(self, model: str) -> httpx.Response:
        """Ask a question that is answered."""
        response = self.ask(model)
        assert response.status_code == 200, response.text
        assert response.json()["choices"][0]["message"]["content"] == TEXT
        return response

    def metrics(self) -> str:
        """All metrics; with so many models, they take a while."""
        return self.client.get(self.server.address + "/metrics").text

    def metric(self, name: str, text: str = "", **labels: str) -> float:
        """The sum of a metric's values with these labels, now or in a text of all metrics."""
        text = text or self.metrics()
        lines = [line for line in text.splitlines() if line.startswith(name + "{")]
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        return sum(float(line.split()[-1]) for line in lines if all(label in line for label in wanted))

    def record_of(self, response: httpx.Response) -> dict[str, Any]:
        """The record of a completion that was answered."""
        return record(self.server, completion_id(response))

    def failures(self, model: str, count: int) -> list[dict[str, Any]]:
        """The records of a model's failures, as soon as there are so many."""

        def find() -> list[dict[str, Any]]:
            found = [kept for kept in records(self.server) if kept["model"] == model]
            found = [kept for kept in found if kept["finish_reason"] == "error"]
            return found if len(found) >= count else []

        return eventually(find, 10)

    @contextmanager
    def nothing_leaks(self, model: str, *upstreams: FaultyUpstream, idle: int = 1) -> Iterator[None]:
        """After the block slots, connections and file descriptors are as free as before it, but for so
        many connections to each upstream that are kept for the next requests."""
        assert self.server.process
        process = psutil.Process(self.server.process.pid)
        open_files = process.num_fds()
        connections = [upstream.stats().connections for upstream in upstreams]
        yield
        for upstream, before in zip(upstreams, connections, strict=True):
            eventually(lambda upstream=upstream: upstream.stats().running == 0, 10)
            eventually(
                lambda upstream=upstream, before=before: upstream.stats().connections <= before + idle, 10
            )
        eventually(lambda: process.num_fds() <= open_files + len(upstreams) * idle + 2, 10)
        metrics = self.metrics()
        assert self.metric("upchatty_completions_running", metrics, model=model) == 0
        assert self.metric("upchatty_completions_waiting", metrics, model=model) == 0
        assert self.metric("upchatty_replica_running", metrics, model=model) == 0


def completion_id(response: httpx.Response) -> str:
    """The id in a whole or streamed answer."""
    if response.headers["content-type"].startswith("text/event-stream"):
        return str(json.loads(data_of(response)[0])["id"])
    return str(response.json()["id"])


def data_of(response: httpx.Response) -> list[str]:
    """The data of a stream's events, cut where events end and nowhere else."""
    events = response.content.decode().split("\n\n")
    return [event.removeprefix("data: ") for event in events if event.startswith("data: ")]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with ExitStack() as stack:
        one, two, mortal = (stack.enter_context(FaultyUpstream()) for _ in range(3))
        tls = stack.enter_context(FaultyUpstream(fault="tls"))
        models = models_before(one.url, two.url, mortal.url, tls.url)
        server = stack.enter_context(
            Server(
                tmp_path_factory.mktemp("bad_days"), UPCHATTY_MODELS=json.dumps(models), ENGINE_KEY=ENGINE_KEY
            )
        )
        client = stack.enter_context(server.client())
        client.timeout = 15  # where a server does not keep a deadline, the tests end all the same
        yield World(server, client, one, two, mortal, tls)


def models_before(one: str, two: str, mortal: str, tls: str) -> dict[str, dict[str, Any]]:
    """The models, one for each test where an open circuit would be in another's way."""

    def single(url: str, **settings: Any) -> dict[str, Any]:
        return {"url": url, "timeout_seconds": SILENCE, **settings}

    def pair(*urls: str, **settings: Any) -> dict[str, Any]:
        return {"replicas": [{"url": url} for url in urls], "timeout_seconds": SILENCE, **settings}

    def first_choice(url: str, other: str, **settings: Any) -> dict[str, Any]:
        return pair(url, other, **settings) | {"replicas": [{"url": url, "weight": 1000}, {"url": other}]}

    models = {"default": single(two), "dialects": single(one)}
    models |= {f"single-{name}": single(one) for name in names(BEFORE)}
    models |= {f"midway-{name}": single(one) for name in names(BREAKS)}
    models |= {f"pair-{name}": first_choice(one, two) for name in names(BEFORE)}
    models |= {f"midway-pair-{name}": first_choice(one, two) for name in names(BREAKS)}
    for fault in ("hang_headers", "close_before_headers", "reset_midstream", "status"):
        models[f"many-{fault}"] = first_choice(one, two)
    models |= {f"stale-{name}": single(one) for name in STALE}
    return models | {
        "slow": single(one, timeout_seconds=30),
        "down": pair(one, two),
        "covered": single(one, fallback="cover"),
        "covered-midway": single(one, fallback="cover"),
        "cover": single(two),
        "covered-pair": pair(one, two, fallback="last"),
        "last": single(mortal),
        "nowhere": single("http://nowhere.invalid:1/v1"),
        "nowhere-pair": pair("http://nowhere.invalid:1/v1", two),
        "untrusted": single(tls),
        "mortal": single(mortal),
        "mortal-pair": first_choice(mortal, two),
        "uneven": pair(one, two, timeout_seconds=30),
        "narrow": single(one, timeout_seconds=30, slots=1, queue=1, queue_seconds=1),
        "patient": single(one, timeout_seconds=60),
        "patient-pair": first_choice(one, two, timeout_seconds=60),
        "patient-narrow": single(one, timeout_seconds=60, slots=1),
        "refusing": first_choice(one, two),
        "crowd": pair(mortal, two, timeout_seconds=30),
        "steady-0.0": pair(one, two, mortal, timeout_seconds=30),
        "steady-0.15": pair(one, two, mortal, timeout_seconds=30),
        "rationed": {"replicas": [{"url": one, "requests_per_minute": count} for count in (1, 2)]},
        "rationed-pair": {"replicas": [{"url": one, "weight": 1000, "requests_per_minute": 3}, {"url": two}]},
        "keyed": single(one, model="upstream-name", api_key_env="ENGINE_KEY"),
    }


@pytest.fixture(autouse=True)
def healthy(request: pytest.FixtureRequest) -> None:
    """No test has to do with another's fault."""
    if "world" in request.fixturenames:
        world: World = request.getfixturevalue("world")
        for upstream in (world.one, world.two, world.mortal):
            upstream.set()
        if not world.mortal.is_running:
            world.mortal.restart()


# One replica: the caller hears what is wrong, in time.


@pytest.mark.parametrize("case", BEFORE, ids=names(BEFORE))
def test_fault_before_the_first_token(world: World, case: Case) -> None:
    model = f"single-{names([case])[0]}"
    world.answered(model)
    with world.nothing_leaks(model, world.one):
        world.one.set(**case.details)
        for stream in (False, True):
            started = time.monotonic()
            response = world.ask(model, stream=stream)
            assert_in_time(started, case)
            assert_error(response, case.status, *case.words)
            assert "html" not in response.text
            assert ("retry-after" in response.headers) == (case.status == 503)
            if case.retry_after and not stream:
                assert response.headers["retry-after"] == case.retry_after
            elif case.retry_after:
                assert 1 <= int(response.headers["retry-after"]) <= int(case.retry_after)
        for kept in world.failures(model, 2):
            assert (kept["completion_tokens"], kept["retries"], kept["first_token_ms"]) == (0, 0, None)
        world.one.set()
        if case.details.get("status") != 429:  # else the replica has asked to be left alone for a while
            world.answered(model)


@pytest.mark.parametrize("case", BREAKS, ids=names(BREAKS))
@pytest.mark.parametrize("kind", ["midway", "midway-pair"])
def test_fault_in_mid_answer(world: World, kind: str, case: Case) -> None:
    model = f"{kind}-{case.name}"
    world.answered(model)
    others = world.two.stats().requests
    with world.nothing_leaks(model, world.one):
        world.one.set(**case.details)
        started = time.monotonic()
        assert_error(world.ask(model), case.status, *case.words)
        assert_in_time(started, case)
        started = time.monotonic()
        response = world.ask(model, stream=True)
        assert_in_time(started, case)
        assert response.status_code == 200
        assert_broken_off(data_of(response), PARTIAL, *case.words)
        kept = world.record_of(response)
        assert (kept["finish_reason"], kept["completion_tokens"], kept["retries"]) == ("error", 2, 0)
        assert world.two.stats().requests == others  # never twice after the first token
        world.one.set()
        world.answered(model)


def assert_in_time(started: float, case: Case) -> None:
    """Not sooner than the engine may be silent, where it was, and not much later."""
    took = time.monotonic() - started
    assert took < BUSY_MACHINE + (SILENCE if case.silent else 0)
    assert not case.silent or took > SILENCE * 0.9


def assert_broken_off(data: list[str], text: str, *words: str) -> None:
    """A stream that has brought this text, then the error event, and nothing after it."""
    *chunks, last = [json.loads(event) for event in data]
    assert list(last) == ["error"]
    assert all(word in last["error"] for word in words), last["error"]
    assert text_of(chunks) == text
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks)


def text_of(chunks: list[dict[str, Any]]) -> str:
    """The text of a stream's chunks."""
    return "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])


STALE = {
    "keepalive": {"fault": "stale_keepalive"},
    "keepalive-late": {"fault": "stale_keepalive", "idle": 0.02},
    "request": {"fault": "stale_request"},
}


@pytest.mark.parametrize("name", STALE)
def test_connection_that_the_other_side_closed(world: World, name: str) -> None:
    """Nobody notices: there is no failure, and no circuit opens."""
    model = f"stale-{name}"
    with world.nothing_leaks(model, world.one, idle=3):
        world.one.set(**STALE[name])
        for number in range(12):
            if number % 3 == 0:
                time.sleep(0.03)
            response = world.ask(model, stream=number % 2 == 1)
            assert response.status_code == 200
            assert TEXT in response.text or text_of([json.loads(x) for x in data_of(response)[:-1]]) == TEXT
        assert world.metric("upchatty_replica_open", model=model) == 0


def test_slow_engine(world: World) -> None:
    world.one.set(fault="slow", first_pause=0.7, pause=0.1)
    started = time.monotonic()
    with world.client.stream(
        "POST", "/chat/completions", json=question(world.chatbot("slow"), stream=True)
    ) as response:
        arrivals = [time.monotonic() - started for line in response.iter_lines() if '"content":"' in line]
    assert response.status_code == 200
    assert arrivals[-1] - arrivals[1] > 0.3  # the pieces came one by one
    whole = world.answered("slow")
    assert whole.elapsed.total_seconds() > 1.0
    assert 600 < world.record_of(whole)["first_token_ms"] < 700 + BUSY_MACHINE * 1000


# Two replicas: the caller notices nothing.


@pytest.mark.parametrize("case", BEFORE, ids=names(BEFORE))
def test_other_replica_answers(world: World, case: Case) -> None:
    model = f"pair-{names([case])[0]}"
    world.answered(model)
    with world.nothing_leaks(model, world.one, world.two):
        world.one.set(**case.details)
        for number, stream in enumerate((False, True), start=1):
            others = world.two.stats().requests
            started = time.monotonic()
            response = world.ask(model, stream=stream)
            assert_in_time(started, Case({}, 200))
            assert response.status_code == 200, response.text
            if stream:
                assert_contract(response, world.chatbot(model))
            else:
                assert response.json()["choices"][0]["message"]["content"] == TEXT
            assert "x-upchatty-fallback" not in response.headers
            assert world.two.stats().requests == others + 1
            if number == 1:  # the next one may go elsewhere from the start
                kept = world.record_of(response)
                assert (kept["retries"], kept["finish_reason"], kept["fallback_for"]) == (1, "stop", None)


def test_retries_are_counted(world: World) -> None:
    def retries() -> float:
        return world.metric("upchatty_retries_total", model="patient-pair")

    before = retries()
    world.one.set(fault="status", status=500, times=1)
    assert [world.ask("patient-pair").status_code for _ in range(2)] == [200, 200]
    assert retries() == before + 1


def test_all_replicas_down(world: World) -> None:
    world.answered("down")
    with world.nothing_leaks("down", world.one, world.two):
        world.one.set(fault="refuse")
        world.two.set(fault="refuse")
        for number in range(8):
            started = time.monotonic()
            response = world.ask("down", stream=number % 2 == 1)
            assert_error(response, 503)
            assert int(response.headers["retry-after"]) >= 1
            assert time.monotonic() - started < BUSY_MACHINE
        eventually(lambda: world.metric("upchatty_replica_open", model="down") == 2, 5)
        world.one.set()
        world.two.set()
        eventually(lambda: world.ask("down").status_code == 200, 10)


def test_fallback(world: World) -> None:
    world.answered("covered")
    world.one.set(fault="refuse")
    for number in range(6):  # until the circuit is open and beyond
        response = world.ask("covered", stream=number % 2 == 1)
        assert response.status_code == 200, response.text
        assert response.headers["x-upchatty-fallback"] == "cover"
        kept = world.record_of(response)
        assert (kept["model"], kept["fallback_for"], kept["finish_reason"]) == ("cover", "covered", "stop")
    assert world.metric("upchatty_fallbacks_total", model="covered", fallback="cover") == 6
    world.one.set()

    def back() -> bool:
        response = world.answered("covered")
        assert world.record_of(response)["model"] in ("covered", "cover")
        return "x-upchatty-fallback" not in response.headers

    eventually(back, 10)


def test_fallback_after_every_replica(world: World) -> None:
    world.one.set(fault="status", status=500)
    world.two.set(fault="garbage")
    response = world.ask("covered-pair")
    assert response.status_code == 200
    assert response.headers["x-upchatty-fallback"] == "last"
    kept = world.record_of(response)
    assert (kept["model"], kept["fallback_for"]) == ("last", "covered-pair")
    assert kept["retries"] == 1


def test_no_fallback_after_the_first_token(world: World) -> None:
    before = world.two.stats().requests
    world.one.set(fault="close_midstream")
    response = world.ask("covered-midway", stream=True)
    assert_broken_off(data_of(response), PARTIAL)
    assert_error(world.ask("covered-midway"), 502)
    assert world.two.stats().requests == before


def test_fallback_that_fails_as_well(world: World) -> None:
    world.one.set(fault="refuse")
    world.two.set(fault="refuse")
    started = time.monotonic()
    response = world.ask("covered")
    assert_error(response, 503)
    assert "retry-after" in response.headers
    assert time.monotonic() - started < BUSY_MACHINE
    world.one.set()
    world.two.set()
    eventually(lambda: world.ask("covered").status_code == 200, 10)


def test_requests_that_no_replica_can_mend_are_not_repeated(world: World) -> None:
    world.answered("patient-pair")
    before = world.two.stats().requests
    world.one.set(
        fault="status", status=400, message="This model's maximum context length is 512 tokens. However, …"
    )
    response = world.ask("patient-pair")
    assert_error(response, 400, "messages: prompt is too long: this model's maximum context length is 512")
    assert world.two.stats().requests == before


@pytest.mark.parametrize("fault", ["hang_headers", "close_before_headers", "reset_midstream", "status"])
def test_many_at_once_notice_nothing(world: World, fault: str) -> None:
    model = f"many-{fault}"
    chatbots = [world.new_chatbot(model) for _ in range(8)]
    with world.nothing_leaks(model, world.one, world.two, idle=48):
        world.one.set(fault=fault, after=0)
        before = world.one.stats().requests
        bodies = [question(chatbots[number % 8]) for number in range(48)]
        answers = asyncio.run(ask_at_once(world.server, bodies, at_once=24))
        assert [status for status, _ in answers] == [200] * 48
        assert 3 <= world.one.stats().requests - before < 48  # until its circuit was open


@pytest.mark.parametrize("fault", ["hang_headers", "hang_midstream"])
@pytest.mark.parametrize("stream", [False, True])
def test_caller_leaves_an_engine_that_hangs(world: World, fault: str, stream: bool) -> None:
    world.answered("patient-pair")
    with world.nothing_leaks("patient-pair", world.one, world.two):
        world.one.set(fault=fault)
        before, others = world.one.stats().aborted, world.two.stats().requests
        body = question(world.chatbot("patient-pair"), stream=stream)
        with pytest.raises(httpx.ReadTimeout):
            world.client.post("/chat/completions", json=body, timeout=0.4)
        eventually(lambda: world.one.stats().aborted == before + 1, 5)
        assert world.two.stats().requests == others


def test_requests_a_minute_of_a_replica(world: World) -> None:
    for _ in range(3):
        world.answered("rationed")
    before = world.one.stats().requests
    response = world.ask("rationed")
    assert_error(response, 503)
    assert 30 < int(response.headers["retry-after"]) <= 60
    assert world.one.stats().requests == before
    for _ in range(6):
        world.answered("rationed-pair")
    assert world.one.stats().requests == before + 3


@pytest.mark.parametrize("status", [400, 422])
def test_requests_that_an_engine_refuses_are_no_failures_of_it(world: World, status: int) -> None:
    """Else one caller's nonsense would close the model to everybody."""
    before = world.two.stats().requests
    world.one.set(fault="status", status=status, message="top_p: 7 is not below 1")
    for number in range(6):
        response = world.ask("refusing", stream=number % 2 == 1)
        assert response.status_code >= 400
        assert_error(response, response.status_code, "top_p: 7 is not below 1")
    assert world.two.stats().requests == before
    assert world.metric("upchatty_replica_open", model="refusing") == 0
    world.one.set()
    world.answered("refusing")


def test_one_replica_in_a_list(tmp_path: Path) -> None:
    models = {"default": {"replicas": [{"url": "http://127.0.0.1:1/v1"}]}}
    listed = Server(tmp_path, UPCHATTY_MODELS=json.dumps(models)).run("models", "list")
    assert "http://127.0.0.1:1/v1" in listed.stdout, listed.stderr


# Names and certificates.


def test_name_that_does_not_resolve(world: World) -> None:
    for stream in (False, True):
        started = time.monotonic()
        response = world.ask("nowhere", stream=stream)
        assert_error(response, 503, "nowhere.invalid", "resolve")
        assert "retry-after" in response.headers
        assert time.monotonic() - started < 5 + BUSY_MACHINE
    assert world.ask("nowhere-pair").status_code == 200


def test_certificate_that_nobody_trusts(world: World) -> None:
    for stream in (False, True):
        started = time.monotonic()
        response = world.ask("untrusted", stream=stream)
        assert_error(response, response.status_code, "certificate")
        assert response.status_code in (502, 503)
        assert time.monotonic() - started < BUSY_MACHINE
    stats = world.tls.stats()
    assert (stats.requests, stats.connections) == (0, 0)


# The circuit breaker.


def test_dies_and_returns(world: World) -> None:
    world.answered("mortal")
    world.mortal.kill()
    for _ in range(4):
        started = time.monotonic()
        response = world.ask("mortal")
        assert_error(response, 503)
        assert "retry-after" in response.headers
        assert time.monotonic() - started < BUSY_MACHINE
    assert world.metric("upchatty_replica_open", model="mortal") == 1
    world.mortal.restart()
    eventually(lambda: world.ask("mortal").status_code == 200, 10)
    eventually(lambda: world.metric("upchatty_replica_open", model="mortal") == 0, 5)
    for _ in range(5):
        world.answered("mortal")


def test_dies_and_returns_behind_another_replica(world: World) -> None:
    def ask_all() -> list[int]:
        return [world.ask("mortal-pair", stream=number % 2 == 1).status_code for number in range(8)]

    assert ask_all() == [200] * 8
    world.mortal.kill()
    assert ask_all() + ask_all() == [200] * 16
    eventually(lambda: world.metric("upchatty_replica_open", model="mortal-pair") == 1, 5)
    retries = world.metric("upchatty_retries_total", model="mortal-pair")
    assert ask_all() == [200] * 8
    assert (
        world.metric("upchatty_retries_total", model="mortal-pair") == retries
    )  # nobody is sent to a replica that is set aside
    world.mortal.restart()

    def has_returned() -> bool:
        assert ask_all() == [200] * 8
        time.sleep(0.2)
        return world.mortal.stats().completed > 0

    eventually(has_returned, 15)


# Choice, queue and deadlines.


def test_slow_replica_gets_less(world: World) -> None:
    world.one.set(fault="slow", first_pause=0.4, pause=0.0)
    before = [world.one.stats().requests, world.two.stats().requests]
    chatbots = [world.new_chatbot("uneven") for _ in range(10)]
    bodies = [question(chatbots[number % 10]) for number in range(100)]
    answers = asyncio.run(ask_at_once(world.server, bodies, at_once=10))
    assert [status for status, _ in answers] == [200] * 100
    slow, quick = world.one.stats().requests - before[0], world.two.stats().requests - before[1]
    assert slow + quick == 100
    assert 0 < slow < 35


async def ask_at_once(
    server: Server, bodies: list[dict[str, Any]], at_once: int
) -> list[tuple[int, dict[str, Any]]]:
    """Ask whole answers, so many at a time; their statuses and bodies."""
    headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
    gate = asyncio.Semaphore(at_once)

    async def ask(session: aiohttp.ClientSession, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        async with gate, session.post(server.api + "/chat/completions", json=body) as response:
            return response.status, await response.json()

    async with aiohttp.ClientSession(headers=headers) as session:
        return await asyncio.gather(*(ask(session, body) for body in bodies))


@pytest.mark.parametrize("first_pause", [0.0, 0.15])
def test_same_chatbot_stays_with_its_replica(world: World, first_pause: float) -> None:
    upstreams = (world.one, world.two, world.mortal)
    for upstream in upstreams:
        upstream.set(fault="slow", first_pause=first_pause, pause=0.0)
    for _ in range(4):
        chatbot = world.new_chatbot(f"steady-{first_pause}")
        before = [upstream.stats().requests for upstream in upstreams]
        for number in range(3):
            body = question(chatbot, f"Question {number}.")
            assert world.client.post("/chat/completions", json=body).status_code == 200
        grown = [upstream.stats().requests - count for upstream, count in zip(upstreams, before, strict=True)]
        assert sorted(grown) == [0, 0, 3]


def test_full_queue_and_its_deadline(world: World) -> None:
    world.one.set(fault="slow", first_pause=0.1, pause=1.0)
    body = question(world.chatbot("narrow"), stream=True)
    with world.nothing_leaks("narrow", world.one), ExitStack() as stack:
        running = stack.enter_context(world.client.stream("POST", "/chat/completions", json=body))
        assert running.status_code == 200
        threads = stack.enter_context(ThreadPoolExecutor(1))
        waiting = threads.submit(world.ask, "narrow")
        eventually(lambda: world.metric("upchatty_completions_waiting", model="narrow") == 1, 5)
        started = time.monotonic()
        refused = world.ask("narrow")
        assert time.monotonic() - started < 0.9  # less than the wait in the queue
        assert_error(refused, 503, "busy")
        assert int(refused.headers["retry-after"]) >= 1
        late = waiting.result()
        assert_error(late, 503, "1 seconds")
        assert "retry-after" in late.headers
        running.close()
        world.one.set()
        eventually(lambda: world.ask("narrow").status_code == 200, 5)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("model", ["patient", "patient-pair"])
def test_deadline_of_the_caller(world: World, model: str, stream: bool) -> None:
    world.answered(model)
    with world.nothing_leaks(model, world.one, world.two):
        world.one.set(fault="hang_headers")
        world.two.set(fault="hang_headers")
        started = time.monotonic()
        response = world.ask(model, stream=stream, headers={"X-Request-Timeout": "0.6"})
        took = time.monotonic() - started
        assert_error(response, 504, "0.6 seconds")
        assert 0.5 < took < 0.6 + BUSY_MACHINE
        world.one.set()
        world.two.set()
        world.answered(model)


def test_deadline_ends_with_the_first_token(world: World) -> None:
    world.one.set(fault="slow", first_pause=0.1, pause=0.2)
    response = world.ask("patient", stream=True, headers={"X-Request-Timeout": "0.7"})
    assert_contract(response, world.chatbot("patient"))


def test_deadline_holds_in_the_queue(world: World) -> None:
    world.one.set(fault="slow", first_pause=0.1, pause=1.0)
    body = question(world.chatbot("patient-narrow"), stream=True)
    with world.client.stream("POST", "/chat/completions", json=body) as running:
        assert running.status_code == 200
        started = time.monotonic()
        response = world.ask("patient-narrow", headers={"X-Request-Timeout": "0.5"})
        assert response.status_code in (503, 504)
        assert_error(response, response.status_code, "0.5 seconds")
        assert time.monotonic() - started < 0.5 + BUSY_MACHINE


@pytest.mark.parametrize("given", ["", "soon", "-1", "0", "nan", "inf", "1e400"])
def test_deadline_that_is_none(world: World, given: str) -> None:
    response = world.ask("patient", headers={"X-Request-Timeout": given})
    assert_error(response, 400, "X-Request-Timeout")


# A replica is killed under many streams.


def test_replica_killed_under_two_hundred_streams(world: World) -> None:
    streams, pieces = 200, [f"piece {number} " for number in range(12)]
    for upstream in (world.mortal, world.two):
        upstream.set(fault="slow", first_pause=0.05, pause=0.5, pieces=pieces)
    chatbots = [world.new_chatbot("crowd") for _ in range(20)]
    whole = "".join(pieces)
    with world.nothing_leaks("crowd", world.two, idle=streams):
        ends, lost, fresh = asyncio.run(kill_under(world, chatbots, streams))
        assert 20 <= lost <= 180, "the work was not shared"
        broken = [data for data in ends if data[-1] != "[DONE]"]
        assert len(broken) == lost
        for data in broken:
            *chunks, last = [json.loads(event) for event in data]
            assert list(last) == ["error"]
            assert whole.startswith(text_of(chunks)) and text_of(chunks)
        for data in ends:
            if data[-1] == "[DONE]":
                assert text_of([json.loads(event) for event in data[:-1]]) == whole
        assert fresh == [200] * 20


async def kill_under(
    world: World, chatbots: list[str], streams: int
) -> tuple[list[list[str]], int, list[int]]:
    """Open streams, kill a replica when all of them run, and ask more.

    Returns:
        The data of each stream's events, how many ran on the killed replica, and the later statuses.
    """
    url, headers = world.server.api + "/chat/completions", {"Authorization": f"Bearer {ADMIN_KEY}"}
    begun = 0

    async def read(session: aiohttp.ClientSession, number: int) -> list[str]:
        nonlocal begun
        data = []
        body = question(chatbots[number % len(chatbots)], stream=True)
        async with session.post(url, json=body) as response:
            assert response.status == 200
            async for line in response.content:
                if line.startswith(b"data: "):
                    data.append(line.decode().removeprefix("data: ").strip())
                    begun += len(data) == 2
        return data

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(headers=headers, connector=connector) as session:
        tasks = [asyncio.create_task(read(session, number)) for number in range(streams)]
        async with asyncio.timeout(30):
            while begun < streams:
                await asyncio.sleep(0.02)
        lost = world.mortal.stats().running
        world.mortal.kill()
        world.two.set()  # for those who come now
        answers = await ask_at_once(world.server, [question(chatbot) for chatbot in chatbots], at_once=20)
        ends = await asyncio.gather(*tasks)
    return ends, lost, [status for status, _ in answers]


# Nothing is left behind inside of the server.


async def test_no_task_is_left(tmp_path: Path) -> None:
    with FaultyUpstream() as upstream:
        model = {"url": upstream.url, "timeout_seconds": 0.3}
        cases = [case for case in BEFORE if case.retry_after is None]
        models = dict.fromkeys(["default", *names(cases)], model)
        async with running_server(Settings(data_dir=tmp_path, models=models)) as server:
            headers = {"Authorization": f"Bearer {server.key}"}
            async with httpx.AsyncClient(
                verify=False, base_url=server.address + "/api/v1", headers=headers, timeout=30
            ) as client:
                bots = {}
                for name in names(cases):
                    made = await client.post("/chatbots", json={"name": name, "model": name})
                    bots[name] = made.json()["id"]
                await client.post("/chat/completions", json=question(server.chatbot.id))
                tasks = len(asyncio.all_tasks())
                for case in cases:
                    upstream.set(**case.details)
                    bodies = [question(bots[names([case])[0]], stream=number % 2 == 0) for number in range(6)]
                    answers = await asyncio.gather(
                        *(client.post("/chat/completions", json=body) for body in bodies)
                    )
                    assert all(answer.status_code >= 500 for answer in answers)
                upstream.set()
                deadline = time.monotonic() + 15  # until the last replica was found to be well again
                while len(asyncio.all_tasks()) > tasks:
                    assert time.monotonic() < deadline, asyncio.all_tasks()
                    await asyncio.sleep(0.1)
                assert upstream.stats().running == 0


# Dialects: what the caller gets is the contract.

ESTIMATED = ("no_usage", "usage_fields_null")
SPOKEN = [dialect for dialect in DIALECTS if dialect not in ERRORS]


def assert_contract(
    response: httpx.Response, chatbot: str, text: str = TEXT, reason: str = "stop"
) -> dict[str, Any] | None:
    """The contract's stream, chunk by chunk; returns the usage, where the stream has told it."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    chunks = chunks_of(response.content)
    usage = None
    if not chunks[-1]["choices"]:
        last = chunks.pop()
        assert list(last) == ["id", "object", "created", "model", "choices", "usage"]
        usage = last["usage"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    first, *content, finish = chunks
    for chunk in chunks:
        assert list(chunk) == ["id", "object", "created", "model", "choices"]
        assert (chunk["object"], chunk["model"]) == ("chat.completion.chunk", chatbot)
        assert (chunk["id"], chunk["created"]) == (first["id"], first["created"])
        [choice] = chunk["choices"]
        assert list(choice) == ["index", "delta", "finish_reason"] and choice["index"] == 0
    assert first["id"].startswith("chatcmpl-") and type(first["created"]) is int
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    for chunk in content:
        assert list(chunk["choices"][0]["delta"]) == ["content"] and chunk["choices"][0]["delta"]["content"]
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in (first, *content))
    assert finish["choices"] == [{"index": 0, "delta": {}, "finish_reason": reason}]
    assert text_of(chunks) == text
    return usage


def assert_whole(response: httpx.Response, chatbot: str, text: str = TEXT, reason: str = "stop") -> Any:
    """The contract's whole answer; returns its usage."""
    assert response.status_code == 200, response.text
    body = response.json()
    assert list(body) == ["id", "object", "created", "model", "choices", "usage"]
    assert body["id"].startswith("chatcmpl-") and type(body["created"]) is int
    assert (body["object"], body["model"]) == ("chat.completion", chatbot)
    message = {"role": "assistant", "content": text}
    assert body["choices"] == [{"index": 0, "message": message, "finish_reason": reason}]
    usage = body["usage"]
    assert list(usage)[:3] == ["prompt_tokens", "completion_tokens", "total_tokens"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    return usage


@pytest.mark.parametrize("dialect", SPOKEN)
def test_dialect(world: World, dialect: str) -> None:
    world.one.set(dialect=dialect)
    chatbot = world.chatbot("dialects")
    whole = world.ask("dialects")
    usages = [assert_whole(whole, chatbot)]
    estimated = dialect in ESTIMATED
    assert whole.headers.get("x-upchatty-usage") == ("estimated" if estimated else None)
    assert assert_contract(world.ask("dialects", stream=True), chatbot) is None
    streamed = world.ask("dialects", stream=True, stream_options={"include_usage": True})
    usages.append(assert_contract(streamed, chatbot))
    for usage, response in zip(usages, (whole, streamed), strict=True):
        kept = world.record_of(response)
        assert kept["estimated"] == estimated
        assert usage["completion_tokens"] == kept["completion_tokens"] == 6
        assert usage["prompt_tokens"] == kept["prompt_tokens"]
        assert usage["prompt_tokens"] > 0 if estimated else usage == USAGE


def test_no_dialect_leaks(world: World) -> None:
    with world.nothing_leaks("dialects", world.one, idle=3):
        for dialect in DIALECTS:
            world.one.set(dialect=dialect)
            world.ask("dialects", stream=True)


@pytest.mark.parametrize("dialect", ERRORS)
def test_error_inside_a_stream(world: World, dialect: str) -> None:
    world.one.set(dialect=dialect)
    assert_error(world.ask("dialects"), 502, "injected failure")
    assert_broken_off(data_of(world.ask("dialects", stream=True)), PARTIAL, "injected failure")
    world.one.set()
    world.answered("dialects")
    world.one.set(dialect=dialect, after=0)
    for stream in (False, True):
        assert_error(world.ask("dialects", stream=stream), 502, "injected failure")
    world.one.set()
    world.answered("dialects")


@pytest.mark.parametrize(
    ("pieces", "text"),
    [
        ([], ""),
        (["", "a", "", "b", ""], "ab"),
        (["<", "thing> is"], "<thing> is"),
        (["<thi"], "<thi"),
        (["Say ", "<think>", "aloud", "</think>"], "Say <think>aloud</think>"),
        (["<think>never ends"], ""),
        (["<think>", "</think>", "Yes."], "Yes."),
        (["<think>a</think>Yes."], "Yes."),
        (["<think>a < b </thin", "k>Yes."], "Yes."),
        (["\n\nYes", "\n"], "\n\nYes\n"),
        (["data: [DONE]\n\n", "data: {}\n\n"], "data: [DONE]\n\ndata: {}\n\n"),
        (["a\u2028b\u2029c\x85d\x0be\r\nf\rg"], "a\u2028b\u2029c\x85d\x0be\r\nf\rg"),
        (["x" * 300_000], "x" * 300_000),
    ],
)
@pytest.mark.parametrize("dialect", ["usage_after_finish", "one_packet", "crlf"])
def test_text_arrives_as_it_is(world: World, pieces: list[str], text: str, dialect: str) -> None:
    world.one.set(dialect=dialect, pieces=pieces)
    chatbot = world.chatbot("dialects")
    assert_whole(world.ask("dialects"), chatbot, text)
    assert_contract(world.ask("dialects", stream=True), chatbot, text)


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ("stop", "stop"),
        ("length", "length"),
        ("content_filter", "content_filter"),
        ("eos", "stop"),
        ("tool_calls", "stop"),
    ],
)
def test_finish_reasons(world: World, told: str, reason: str) -> None:
    chatbot = world.chatbot("dialects")
    for dialect in ("usage_after_finish", "finish_with_content", "finish_twice", "whole_json"):
        world.one.set(finish_reason=told, dialect=dialect)
        assert_whole(world.ask("dialects"), chatbot, reason=reason)
        assert_contract(world.ask("dialects", stream=True), chatbot, reason=reason)


def test_what_the_upstream_is_asked(world: World) -> None:
    world.answered("keyed")
    stats = world.one.stats()
    assert stats.last_body["model"] == "upstream-name"
    assert stats.last_body["messages"][-1] == {"role": "user", "content": "How are you?"}
    assert stats.last_headers["authorization"] == f"Bearer {ENGINE_KEY}"


@pytest.mark.parametrize(
    "details",
    [{"fault": "status", "status": status} for status in (400, 401, 403, 404, 500)]
    + [{"fault": "error_event"}],
    ids=lambda details: str(details.get("status", "event")),
)
def test_key_of_the_engine_is_never_shown(world: World, details: dict[str, Any]) -> None:
    eventually(lambda: world.ask("keyed").status_code == 200, 10)
    world.one.set(**details, message=f"Incorrect API key provided: {ENGINE_KEY}.")
    for stream in (False, True):
        assert ENGINE_KEY not in world.ask("keyed", stream=stream).text
    assert ENGINE_KEY not in world.server.log()


# The faulty upstream itself.


def test_upstream_refuses_what_it_does_not_know() -> None:
    for details in ({"fault": "none such"}, {"dialect": "none such"}):
        with pytest.raises(ValueError, match="none such"):
            FaultyUpstream(**details)
    with pytest.raises(TypeError, match="nothing_such"):
        FaultyUpstream(nothing_such=1)


def test_upstream_returns_on_the_same_port() -> None:
    with FaultyUpstream(fault="status", status=418) as upstream:
        url = upstream.url
        upstream.kill()
        with pytest.raises(httpx.ConnectError):
            httpx.get(url + "/models")
        upstream.restart()
        assert upstream.url == url
        assert httpx.get(url + "/models").status_code == 200
        assert httpx.post(url + "/chat/completions", json={}).status_code == 418
        assert upstream.stats().requests == 1


def test_upstream_does_not_load_the_server() -> None:
    code = "import sys, upchatty.testing.upstream; sys.exit('upchatty.app' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_upstream_ends_with_whoever_started_it() -> None:
    code = "from upchatty.testing import FaultyUpstream; u = FaultyUpstream(); u.restart()"
    code += "; print(u.url, flush=True); import os; os._exit(0)"
    url = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout

    def has_ended() -> bool:
        try:
            httpx.get(url.strip() + "/models")
        except httpx.ConnectError:
            return True
        return False

    eventually(has_ended, 10)
