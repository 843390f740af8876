"""Traces of completions, sent to an OpenTelemetry collector in the background.

A completion is one server span; inside it are `search`, in the chatbot's documents, `queue`, the wait for
a slot, and one client span for every attempt on a replica. Names are those of OpenTelemetry's
conventions for HTTP servers (https://opentelemetry.io/docs/specs/semconv/http/http-spans/) and for
generative AI
(https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/); what these have no name for
begins with `upchatty.`. No span has a word of a conversation, a key, or the sentence of an error:
engines quote prompts in theirs.

Importing this module takes time and memory, so only a server that has a collector does it: elsewhere
it is imported for its types alone.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace import Tracer as Spans
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from upchatty import __version__

CLOSE_SECONDS = 3.0
SAME_LOG_SECONDS = 60.0
LONGEST_USER_AGENT = 256
REQUEST_PARAMETERS = ("max_tokens", "temperature", "top_p", "presence_penalty", "frequency_penalty", "seed")
DEFAULT_PORTS = {"http": 80, "https": 443}

_w3c = TraceContextTextMapPropagator()


class Attempt:
    """One request to an engine.

    Args:
        span: Its span.
    """

    def __init__(self, span: Span) -> None:
        self._span = span
        self._started = time.perf_counter()
        headers: dict[str, str] = {}
        _w3c.inject(headers, set_span_in_context(span, Context()))
        self.headers = "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode("latin-1")
        """The header lines by which the engine can continue the trace."""

    def first_token(self) -> None:
        """The first token has come."""
        self._span.add_event("first_token")
        self._span.set_attribute("gen_ai.response.time_to_first_chunk", time.perf_counter() - self._started)

    def end(
        self,
        error: BaseException | None = None,
        *,
        cancelled: bool = False,
        finish_reason: str | None = None,
        input_tokens: int = 0,
        cached_tokens: int = 0,
        output_tokens: int = 0,
    ) -> None:
        """It is over.

        Args:
            error: What ended it early.
            cancelled: Whether the caller went away.
            finish_reason: Why the answer ended, by the engine.
            input_tokens: Tokens of the prompt, 0 where the engine has not told them.
            cached_tokens: Those of them that the engine had cached.
            output_tokens: Tokens generated.
        """
        if finish_reason:
            self._span.set_attribute("gen_ai.response.finish_reasons", [finish_reason])
        if input_tokens:
            self._span.set_attribute("gen_ai.usage.input_tokens", input_tokens)
            self._span.set_attribute("gen_ai.usage.cache_read.input_tokens", cached_tokens)
        if output_tokens:
            self._span.set_attribute("gen_ai.usage.output_tokens", output_tokens)
        _mark(self._span, asyncio.CancelledError() if cancelled else error)
        self._span.end()


class Trace:
    """One request for a completion.

    Args:
        spans: Makes spans.
        span: The request's.
    """

    def __init__(self, spans: Spans, span: Span) -> None:
        self._spans = spans
        self._span = span
        self._inside = set_span_in_context(span, Context())

    def queued(self, seconds: float, error: BaseException | None = None) -> None:
        """The request has waited for a slot until now.

        Args:
            seconds: How long.
            error: Why it got none.
        """
        now = time.time_ns()
        span = self._spans.start_span("queue", self._inside, start_time=now - int(seconds * 1e9))
        _mark(span, error)
        span.end(now)

    def searched(self, seconds: float, error: BaseException | None = None) -> None:
        """The chatbot's documents have been searched until now.

        Args:
            seconds: How long it took.
            error: Why it failed.
        """
        now = time.time_ns()
        span = self._spans.start_span("search", self._inside, start_time=now - int(seconds * 1e9))
        _mark(span, error)
        span.end(now)

    def attempt(self, *, model: str, engine_model: str, url: str, parameters: Mapping[str, Any]) -> Attempt:
        """A request to an engine begins.

        Args:
            model: The model's name in the settings.
            engine_model: Its name at the engine.
            url: The engine's base URL, of which host and port are told.
            parameters: OpenAI's sampling parameters.
        """
        engine = urlsplit(url)
        attributes: dict[str, Any] = {
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": "openai",  # whose protocol every engine speaks
            "gen_ai.request.model": engine_model,
            "gen_ai.request.stream": True,
            "server.address": engine.hostname or "",
            "server.port": engine.port or DEFAULT_PORTS.get(engine.scheme, 0),
            "upchatty.model": model,
        }
        for name in REQUEST_PARAMETERS:
            if (value := parameters.get(name)) is not None:
                attributes["gen_ai.request." + name] = value
        return Attempt(
            self._spans.start_span(f"chat {engine_model}", self._inside, SpanKind.CLIENT, attributes)
        )

    def account(
        self,
        *,
        completion: str,
        chatbot: str,
        version: int,
        model: str | None,
        finish_reason: str,
        error: BaseException | None = None,
    ) -> None:
        """What the record of the completion says.

        Args:
            completion: Its id.
            chatbot: The chatbot's id.
            version: The chatbot's version.
            model: The name, in the settings, of the model that answered.
            finish_reason: The record's, `cancelled` and `error` among them.
            error: What the caller was told after the answer had begun, or instead of it.
        """
        self._span.set_attributes(
            {
                "gen_ai.response.id": completion,
                "gen_ai.response.model": model or "",
                "gen_ai.agent.id": chatbot,
                "gen_ai.agent.version": str(version),
                "upchatty.finish_reason": finish_reason,
            }
        )
        if error is not None:
            _mark(self._span, error)

    def end(self, status: int | None, request_id: str) -> None:
        """The request is over.

        Args:
            status: Of the answer, None where the caller did not wait for it.
            request_id: The `X-Request-ID` of the answer.
        """
        self._span.set_attribute("http.response.header.x-request-id", [request_id])
        if status is not None:
            self._span.set_attribute("http.response.status_code", status)
            if status >= 500:
                self._span.set_attribute("error.type", str(status))
                self._span.set_status(StatusCode.ERROR)
        self._span.end()


class Tracer:
    """Makes traces, and sends them.

    How many is decided by the standard variables OTEL_TRACES_SAMPLER and OTEL_TRACES_SAMPLER_ARG, the
    batches by OTEL_BSP_…, the way to the collector by OTEL_EXPORTER_OTLP_….

    Args:
        url: Where the collector takes traces, by OTLP over HTTP.
    """

    def __init__(self, url: str) -> None:
        ours = Resource.create({"service.name": "upchatty", "service.version": __version__})
        named = OTELResourceDetector().detect()  # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES win
        self._provider = TracerProvider(resource=ours.merge(named), shutdown_on_exit=False)
        self._exporter = OTLPSpanExporter(url)
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self._spans = self._provider.get_tracer("upchatty", __version__)
        _limit_logs()

    def begin(self, method: str, path: str, scheme: str, headers: Iterable[tuple[bytes, bytes]]) -> Trace:
        """A request has come.

        Args:
            method: HTTP's.
            path: Without the query, which is not told.
            scheme: `http` or `https`.
            headers: In lower case; `traceparent` and `tracestate` say whose trace is continued.
        """
        attributes: dict[str, Any] = {
            "http.request.method": method,
            "http.route": path,
            "url.path": path,
            "url.scheme": scheme,
        }
        carried: dict[str, list[str]] = {}
        for name, value in headers:
            if name in (b"traceparent", b"tracestate"):
                carried.setdefault(name.decode(), []).append(value.decode("latin-1"))
            elif name == b"user-agent":
                attributes["user_agent.original"] = value[:LONGEST_USER_AGENT].decode("latin-1")
        caller = _w3c.extract(carried, Context())
        return Trace(
            self._spans, self._spans.start_span(f"{method} {path}", caller, SpanKind.SERVER, attributes)
        )

    async def close(self) -> None:
        """Send what is left, within a few seconds."""
        loop, sent = asyncio.get_running_loop(), asyncio.Event()

        def send() -> None:
            self._provider.shutdown()
            with suppress(RuntimeError):  # too late: the loop has ended
                loop.call_soon_threadsafe(sent.set)

        # A daemon, unlike an executor's threads, does not keep the process when the collector hangs.
        threading.Thread(target=send, name="last traces", daemon=True).start()
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await sent.wait()
        except TimeoutError:
            self._exporter.shutdown()  # type: ignore[no-untyped-call]  # breaks off


def _mark(span: Span, error: BaseException | None) -> None:
    """Note how something ended; of an error its class only."""
    if error is None:
        return
    if isinstance(error, asyncio.CancelledError):  # the caller went away
        span.set_attribute("upchatty.cancelled", True)
        return
    kind = type(error).__name__
    span.add_event("exception", {"exception.type": kind})
    span.set_attribute("error.type", kind)
    span.set_status(StatusCode.ERROR)


class _SeldomTheSame(logging.Filter):
    """Lets a message through once a minute."""

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        now, message = time.monotonic(), str(record.msg)
        if now - self._last.get(message, -SAME_LOG_SECONDS) < SAME_LOG_SECONDS:
            return False
        self._last[message] = now
        return True


_seldom_the_same = _SeldomTheSame()


def _limit_logs() -> None:
    """A collector that is away, or callers with odd headers, must not fill the log."""
    for module in (OTLPSpanExporter, BatchSpanProcessor, TraceContextTextMapPropagator):
        logging.getLogger(module.__module__).addFilter(_seldom_the_same)
    logging.getLogger("opentelemetry.sdk._shared_internal").addFilter(_seldom_the_same)  # the batches
