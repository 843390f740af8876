"""Traces: what a collector gets of a completion, and what it never gets."""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from tests.support import question
from upchatty.app import Running
from upchatty.errors import ConfigurationError
from upchatty.settings import Settings
from upchatty.testing import ScriptedAnswer, ScriptedEngine, running_server

COMPLETIONS = "/api/v1/chat/completions"
CALLER_TRACE, CALLER_SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{CALLER_TRACE}-{CALLER_SPAN}-01"
BROKEN = ScriptedAnswer(status=500)
NOBODY = "http://127.0.0.1:9"


class Collector:
    """An OpenTelemetry collector on a free loopback port.

    Args:
        hangs: Whether it takes requests and never answers.
    """

    def __init__(self, *, hangs: bool = False) -> None:
        self.bodies: list[bytes] = []
        self.asked = asyncio.Event()
        self._hangs = hangs
        application = web.Application()
        application.router.add_post("/v1/traces", self._take)
        self._runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)

    async def __aenter__(self) -> "Collector":
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    async def _take(self, request: web.Request) -> web.Response:
        self.bodies.append(await request.read())
        self.asked.set()
        if self._hangs:
            await asyncio.Event().wait()
        return web.Response()

    @property
    def batches(self) -> list[Any]:
        requests = [ExportTraceServiceRequest.FromString(body) for body in self.bodies]
        return [batch for request in requests for batch in request.resource_spans]

    @property
    def spans(self) -> list[Span]:
        """Everything that was sent, oldest first."""
        spans = [span for batch in self.batches for scope in batch.scope_spans for span in scope.spans]
        return sorted(spans, key=lambda span: span.start_time_unix_nano)

    @property
    def resource(self) -> dict[str, Any]:
        return values(self.batches[0].resource)

    def one(self, name: str) -> Span:
        found = [span for span in self.spans if span.name == name]
        assert len(found) == 1, [span.name for span in self.spans]
        return found[0]

    @property
    def request(self) -> Span:
        return self.one(f"POST {COMPLETIONS}")

    @property
    def attempts(self) -> list[Span]:
        return [span for span in self.spans if span.kind == Span.SPAN_KIND_CLIENT]


def values(described: Any) -> dict[str, Any]:
    """The attributes of a span, an event or a resource."""

    def plain(value: Any) -> Any:
        kind = value.WhichOneof("value")
        return (
            [plain(one) for one in value.array_value.values]
            if kind == "array_value"
            else getattr(value, kind)
        )

    return {attribute.key: plain(attribute.value) for attribute in described.attributes}


def url_of(engine: ScriptedEngine) -> dict[str, Any]:
    return {"url": engine.url, "model": "scripted-model"}


@asynccontextmanager
async def traced(
    folder: Path, collector: Collector, model: dict[str, Any], **settings: Any
) -> AsyncIterator[tuple[Running, httpx.AsyncClient]]:
    """A server with a collector; when the block has ended, the collector has every span."""
    given = {"otlp_endpoint": collector.url, "models": {"default": model}} | settings
    async with running_server(Settings(data_dir=folder / "data", **given)) as server:
        headers = {"Authorization": f"Bearer {server.key}"}
        async with httpx.AsyncClient(
            verify=False, base_url=server.address, headers=headers, timeout=20
        ) as client:
            yield server, client


@pytest.fixture
async def collector() -> AsyncIterator[Collector]:
    async with Collector() as running:
        yield running


@pytest.fixture
async def engine() -> AsyncIterator[ScriptedEngine]:
    async with ScriptedEngine() as running:
        yield running


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_spans_of_a_completion(
    tmp_path: Path, collector: Collector, engine: ScriptedEngine, stream: bool
) -> None:
    async with traced(tmp_path, collector, url_of(engine)) as (server, client):
        body = question(server.chatbot.id, stream=stream, temperature=0.5)
        answer = await client.post(COMPLETIONS, json=body, headers={"User-Agent": "a test"})
        assert answer.status_code == 200

    request, queue, attempt = collector.request, collector.one("queue"), collector.one("chat scripted-model")
    assert len(collector.spans) == 3
    assert {span.trace_id for span in collector.spans} == {request.trace_id}
    assert not request.parent_span_id
    assert queue.parent_span_id == attempt.parent_span_id == request.span_id
    assert request.kind == Span.SPAN_KIND_SERVER and attempt.kind == Span.SPAN_KIND_CLIENT
    for inner in (queue, attempt):
        assert request.start_time_unix_nano <= inner.start_time_unix_nano
        assert inner.start_time_unix_nano <= inner.end_time_unix_nano <= request.end_time_unix_nano
    assert {span.status.code for span in collector.spans} == {Status.STATUS_CODE_UNSET}

    told = values(request)
    assert (
        told.items()
        >= {
            "http.request.method": "POST",
            "http.route": COMPLETIONS,
            "url.path": COMPLETIONS,
            "url.scheme": "http",
            "http.response.status_code": 200,
            "http.response.header.x-request-id": [answer.headers["x-request-id"]],
            "user_agent.original": "a test",
            "gen_ai.agent.id": server.chatbot.id,
            "upchatty.finish_reason": "stop",
        }.items()
    )
    assert told["gen_ai.response.id"] in answer.text
    told = values(attempt)
    assert (
        told.items()
        >= {
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": "openai",
            "gen_ai.request.model": "scripted-model",
            "gen_ai.request.max_tokens": 16,
            "gen_ai.request.temperature": 0.5,
            "gen_ai.response.finish_reasons": ["stop"],
            "gen_ai.usage.input_tokens": 10,
            "gen_ai.usage.output_tokens": 4,
            "server.address": "127.0.0.1",
            "server.port": int(engine.url.split(":")[2].removesuffix("/v1")),
            "upchatty.model": "default",
        }.items()
    )
    assert [event.name for event in attempt.events] == ["first_token"]
    seconds = (attempt.end_time_unix_nano - attempt.start_time_unix_nano) / 1e9
    assert 0 < told["gen_ai.response.time_to_first_chunk"] <= seconds
    assert collector.resource.items() >= {"service.name": "upchatty"}.items()


async def test_the_callers_trace_goes_on_and_the_engine_can_continue_it(
    tmp_path: Path, collector: Collector, engine: ScriptedEngine
) -> None:
    async with traced(tmp_path, collector, url_of(engine)) as (server, client):
        headers = {"traceparent": TRACEPARENT, "tracestate": "vendor=opaque"}
        await client.post(COMPLETIONS, json=question(server.chatbot.id), headers=headers)

    request, (attempt,) = collector.request, collector.attempts
    assert request.trace_id.hex() == CALLER_TRACE and request.parent_span_id.hex() == CALLER_SPAN
    got = {name.lower(): value for name, value in engine.requests[0].headers.items()}
    assert got["traceparent"] == f"00-{CALLER_TRACE}-{attempt.span_id.hex()}-01"
    assert got["tracestate"] == "vendor=opaque"


@pytest.mark.parametrize("traceparent", ["nonsense", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "9" * 5000])
async def test_a_traceparent_that_is_none_begins_a_new_trace(
    tmp_path: Path, collector: Collector, engine: ScriptedEngine, traceparent: str
) -> None:
    async with traced(tmp_path, collector, url_of(engine)) as (server, client):
        headers = {"traceparent": traceparent}
        answer = await client.post(COMPLETIONS, json=question(server.chatbot.id), headers=headers)
        assert answer.status_code == 200
    assert any(collector.request.trace_id) and not collector.request.parent_span_id


async def test_a_trace_that_the_caller_does_not_sample_is_not_sent(
    tmp_path: Path, collector: Collector, engine: ScriptedEngine
) -> None:
    async with traced(tmp_path, collector, url_of(engine)) as (server, client):
        headers = {"traceparent": f"00-{CALLER_TRACE}-{CALLER_SPAN}-00"}
        await client.post(COMPLETIONS, json=question(server.chatbot.id), headers=headers)
    assert collector.spans == []
    got = {name.lower(): value for name, value in engine.requests[0].headers.items()}
    assert got["traceparent"].startswith(f"00-{CALLER_TRACE}-") and got["traceparent"].endswith("-00")


async def test_only_completions_are_traced(
    tmp_path: Path, collector: Collector, engine: ScriptedEngine
) -> None:
    async with traced(tmp_path, collector, url_of(engine)) as (_, client):
        for path in ("/health/live", "/metrics", "/api/v1/models", COMPLETIONS):
            await client.get(path)
    assert collector.spans == []


async def test_refused_request(tmp_path: Path, collector: Collector, engine: ScriptedEngine) -> None:
    async with traced(tmp_path, collector, url_of(engine)) as (server, client):
        body = question(server.chatbot.id)
        await client.post(COMPLETIONS, json=body, headers={"Authorization": "Bearer wrong"})
    assert [span.name for span in collector.spans] == [f"POST {COMPLETIONS}"]
    assert values(collector.request)["http.response.status_code"] == 401
    assert collector.request.status.code == Status.STATUS_CODE_UNSET  # the caller's mistake, not ours


async def test_a_failed_attempt_and_the_one_after_it(
    tmp_path: Path, collector: Collector, engine: ScriptedEngine
) -> None:
    async with ScriptedEngine(BROKEN) as broken:
        # The broken one has so much weight that it is asked first.
        replicas = [{"url": broken.url, "weight": 1000}, {"url": engine.url}]
        async with traced(tmp_path, collector, {"replicas": replicas}) as (server, client):
            answer = await client.post(COMPLETIONS, json=question(server.chatbot.id))
            assert answer.status_code == 200
        assert len(broken.requests) == 1

    failed, succeeded = collector.attempts
    assert failed.parent_span_id == succeeded.parent_span_id == collector.request.span_id
    assert failed.end_time_unix_nano <= succeeded.start_time_unix_nano + 1_000_000
    assert failed.status.code == Status.STATUS_CODE_ERROR
    assert values(failed)["error.type"] == "EngineFailed"
    assert [event.name for event in failed.events] == ["exception"]
    assert values(failed.events[0])["exception.type"] == "EngineFailed"
    assert succeeded.status.code == collector.request.status.code == Status.STATUS_CODE_UNSET
    assert values(failed)["server.port"] != values(succeeded)["server.port"]
    parents = [request.headers.get("traceparent") for request in (*broken.requests, *engine.requests)]
    assert [str(parent)[36:52] for parent in parents] == [failed.span_id.hex(), succeeded.span_id.hex()]


async def test_a_fallback_is_an_attempt_on_the_other_model(
    tmp_path: Path, collector: Collector, engine: ScriptedEngine
) -> None:
    async with ScriptedEngine(BROKEN) as broken:
        models = {"default": {"url": broken.url, "fallback": "small"}, "small": url_of(engine)}
        async with traced(tmp_path, collector, {}, models=models) as (server, client):
            assert (await client.post(COMPLETIONS, json=question(server.chatbot.id))).status_code == 200
    failed, succeeded = collector.attempts
    assert [values(span)["upchatty.model"] for span in (failed, succeeded)] == ["default", "small"]
    assert [span.name for span in (failed, succeeded)] == ["chat default", "chat scripted-model"]
    assert values(collector.request)["gen_ai.response.model"] == "small"
    assert collector.request.status.code == Status.STATUS_CODE_UNSET


async def test_error_answer(tmp_path: Path, collector: Collector, engine: ScriptedEngine) -> None:
    engine.default = BROKEN
    async with traced(tmp_path, collector, url_of(engine)) as (server, client):
        assert (await client.post(COMPLETIONS, json=question(server.chatbot.id))).status_code == 502
    told = values(collector.request)
    assert told["http.response.status_code"] == 502 and told["error.type"] == "502"
    assert told["upchatty.finish_reason"] == "error"
    assert collector.request.status.code == Status.STATUS_CODE_ERROR
    assert {span.status.code for span in collector.attempts} == {Status.STATUS_CODE_ERROR}


@pytest.mark.parametrize("ending", ["close", "garbage", "error"])
async def test_failure_after_the_first_token(
    tmp_path: Path, collector: Collector, engine: ScriptedEngine, ending: Any
) -> None:
    engine.default = ScriptedAnswer(ending=ending, delay=0.05)
    async with traced(tmp_path, collector, url_of(engine)) as (server, client):
        answer = await client.post(COMPLETIONS, json=question(server.chatbot.id, stream=True))
        assert answer.status_code == 200 and '{"error":' in answer.text
    (attempt,) = collector.attempts
    assert [event.name for event in attempt.events] == ["first_token", "exception"]
    assert values(attempt)["gen_ai.usage.output_tokens"] == 4
    for span in (attempt, collector.request):
        assert span.status.code == Status.STATUS_CODE_ERROR
        assert values(span)["error.type"] == "EngineFailed"
    assert values(collector.request)["http.response.status_code"] == 200


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_cancelled_by_the_caller(
    tmp_path: Path, collector: Collector, engine: ScriptedEngine, stream: bool
) -> None:
    engine.default = ScriptedAnswer(delay=0.2)
    async with traced(tmp_path, collector, url_of(engine)) as (server, client):
        body = question(server.chatbot.id, stream=stream)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.post(COMPLETIONS, json=body), 0.35)
        while not engine.requests[0].disconnected_at:
            await asyncio.sleep(0.01)
    request, (attempt,) = collector.request, collector.attempts
    assert values(attempt)["upchatty.cancelled"] is True
    assert values(request)["upchatty.finish_reason"] == "cancelled"
    assert {span.status.code for span in collector.spans} == {Status.STATUS_CODE_UNSET}
    assert ("http.response.status_code" in values(request)) == stream  # else nobody got one


async def test_the_wait_for_a_slot(tmp_path: Path, collector: Collector, engine: ScriptedEngine) -> None:
    engine.default = ScriptedAnswer(delay=0.1)
    async with traced(tmp_path, collector, url_of(engine) | {"slots": 1}) as (server, client):
        body = question(server.chatbot.id)
        await asyncio.gather(*(client.post(COMPLETIONS, json=body) for _ in range(2)))
    waits = [span for span in collector.spans if span.name == "queue"]
    lengths = sorted((span.end_time_unix_nano - span.start_time_unix_nano) / 1e9 for span in waits)
    assert len(lengths) == 2 and lengths[0] < 0.1 and lengths[1] > 0.3
    assert len({span.trace_id for span in waits}) == 2


async def test_no_slot(tmp_path: Path, collector: Collector, engine: ScriptedEngine) -> None:
    engine.default = ScriptedAnswer(delay=0.2)
    model = url_of(engine) | {"slots": 1, "queue_seconds": 0.1}
    async with traced(tmp_path, collector, model) as (server, client):
        body = question(server.chatbot.id)
        answers = await asyncio.gather(*(client.post(COMPLETIONS, json=body) for _ in range(2)))
        assert sorted(answer.status_code for answer in answers) == [200, 503]
    (failed,) = [span for span in collector.spans if span.name == "queue" and span.status.code]
    assert values(failed)["error.type"] == "QueueFull"
    assert (failed.end_time_unix_nano - failed.start_time_unix_nano) / 1e9 >= 0.09


async def test_no_text_and_no_secret_leaves(
    tmp_path: Path,
    collector: Collector,
    engine: ScriptedEngine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ENGINE_KEY", "engine-secret-9a41")
    asked, told, ordered = "walrus-question-7c", "heron-answer-51", "lynx-instructions-88"
    quoting = ScriptedAnswer(status=500, body={"error": {"message": f"cannot answer {asked} {ordered}"}})
    engine.script(ScriptedAnswer(pieces=[told, told]), quoting, ScriptedAnswer(pieces=[told], ending="error"))
    model = url_of(engine) | {"api_key_env": "ENGINE_KEY"}
    async with traced(tmp_path, collector, model) as (server, client):
        made = await client.post("/api/v1/chatbots", json={"name": "secretive", "instructions": ordered})
        body = question(made.json()["id"], asked, stop=["stop-walrus"], user="walrus-user")
        for stream in (False, False, True):
            await client.post(f"{COMPLETIONS}?token=query-secret", json=body | {"stream": stream})
        await client.post(COMPLETIONS, json=body, headers={"Authorization": "Bearer header-secret"})
        secrets = [server.key, "engine-secret", "header-secret", "query-secret", "Bearer", "uthorization"]
    sent = b"".join(collector.bodies)
    assert len(collector.attempts) == 3
    for secret in [*secrets, asked, told, ordered, "walrus", "secretive", "scripted failure"]:
        assert str(secret).encode() not in sent, secret


async def test_a_collector_that_is_away_costs_a_few_lines_in_the_log(
    tmp_path: Path, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    away = Collector()
    away.url = NOBODY
    async with traced(tmp_path, away, url_of(engine)) as (server, client):
        for _ in range(20):
            answer = await client.post(COMPLETIONS, json=question(server.chatbot.id))
            assert answer.status_code == 200
            await asyncio.sleep(0.05)
        stopping = time.monotonic()
    assert time.monotonic() - stopping < 6
    lines = [record for record in caplog.records if record.name.startswith("opentelemetry")]
    assert 1 <= len(lines) <= 6
    assert any("export" in record.getMessage() for record in lines)


async def test_a_collector_that_hangs_delays_the_end_by_seconds_only(
    tmp_path: Path, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    async with Collector(hangs=True) as collector:
        async with traced(tmp_path, collector, url_of(engine)) as (server, client):
            await client.post(COMPLETIONS, json=question(server.chatbot.id))
            await collector.asked.wait()
            assert (await client.post(COMPLETIONS, json=question(server.chatbot.id))).status_code == 200
            stopping = time.monotonic()
        assert time.monotonic() - stopping < 8


async def test_the_standard_variables(
    tmp_path: Path, collector: Collector, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    monkeypatch.setenv("OTEL_SERVICE_NAME", "chat-of-the-shop")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=testing")
    async with traced(tmp_path, collector, url_of(engine), otlp_endpoint="") as (server, client):
        await client.post(COMPLETIONS, json=question(server.chatbot.id))
    told = {"service.name": "chat-of-the-shop", "deployment.environment.name": "testing"}
    assert collector.resource.items() >= told.items()


async def test_the_standard_sampler(
    tmp_path: Path, collector: Collector, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0")
    async with traced(tmp_path, collector, url_of(engine)) as (server, client):
        await client.post(COMPLETIONS, json=question(server.chatbot.id))
        headers = {"traceparent": TRACEPARENT}
        await client.post(COMPLETIONS, json=question(server.chatbot.id), headers=headers)
    assert {span.trace_id.hex() for span in collector.spans} == {CALLER_TRACE}


def test_which_endpoint_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def url(endpoint: str = "") -> str | None:
        return Settings(otlp_endpoint=endpoint).traces_url

    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_SDK_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    assert url() is None
    assert url("http://set:4318/") == "http://set:4318/v1/traces"
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "https://all:4318/otlp")
    assert url() == "https://all:4318/otlp/v1/traces"
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://traces/as/it/is")
    assert url() == "http://traces/as/it/is"
    assert url("http://set:4318") == "http://set:4318/v1/traces"
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert url("http://set:4318") is None


def test_an_endpoint_that_is_no_url(tmp_path: Path) -> None:
    async def start() -> None:
        async with running_server(Settings(data_dir=tmp_path, otlp_endpoint="collector:4318")):
            pass

    with pytest.raises(ConfigurationError, match=r"otlp_endpoint: .*http://collector:4318.*collector:4318"):
        asyncio.run(start())


# Litestar looks for a plugin of its own, and with it come the names of attributes; these are not costly.
COSTLY = ("opentelemetry.sdk", "opentelemetry.exporter", "opentelemetry.trace", "google.protobuf", "requests")
WITHOUT_ENDPOINT = f"""
import asyncio, json, sys
from pathlib import Path
import httpx
from upchatty.settings import Settings
from upchatty.testing import ScriptedEngine, running_server

async def main():
    async with ScriptedEngine() as engine:
        settings = Settings(data_dir=Path(sys.argv[1]), models={{"default": {{"url": engine.url}}}})
        async with running_server(settings) as server, httpx.AsyncClient(base_url=server.address) as client:
            body = {{"model": server.chatbot.id, "messages": [{{"role": "user", "content": "Hello"}}]}}
            headers = {{"Authorization": f"Bearer {{server.key}}", "traceparent": "{TRACEPARENT}"}}
            assert (await client.post("{COMPLETIONS}", json=body, headers=headers)).status_code == 200
    print(json.dumps([name for name in sys.modules if name.startswith({COSTLY})]))

asyncio.run(main())
"""


def test_without_an_endpoint_nothing_of_it_is_loaded(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_ENDPOINT, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == []
