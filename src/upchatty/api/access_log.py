"""One log line and one count for every request, its id in every response, and the trace of a completion."""

import re
import time
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from litestar.enums import ScopeType
from litestar.types import ASGIApp, HTTPScope, Receive, Scope, Send
from uuid_utils import uuid7

from upchatty.logs import request_logger
from upchatty.metrics import Metrics

if TYPE_CHECKING:
    from upchatty.tracing import Trace, Tracer  # which are costly to import

SANE_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
CALLER_GONE = 499  # nginx's number for a caller who did not wait


class AccessLog:
    """ASGI middleware around everything else.

    Args:
        app: Everything else.
        metrics: Counts.
        tracer: Makes traces, where somebody collects them.
        traced: The paths of which requests are traced.
    """

    def __init__(
        self, app: ASGIApp, metrics: Metrics, tracer: "Tracer | None", traced: Collection[str]
    ) -> None:
        self._app = app
        self._requests = metrics.requests
        self._log = request_logger()
        self._tracer = tracer
        self._traced = traced

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        assert scope["type"] == ScopeType.HTTP  # the server speaks nothing else
        started, status, request_id = time.perf_counter(), CALLER_GONE, _request_id(scope)
        trace = self._trace(scope) if self._tracer else None

        async def send_with_id(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id)]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            self._requests[status] += 1
            if trace:
                trace.end(None if status == CALLER_GONE else status, request_id.decode())
            self._log(
                "request",
                id=request_id.decode(),
                method=scope["method"],
                path=scope["path"],
                status=status,
                ms=round((time.perf_counter() - started) * 1000, 1),
                key=scope.get("auth"),
            )

    def _trace(self, scope: HTTPScope) -> "Trace | None":
        if not self._tracer or scope["method"] != "POST" or scope["path"] not in self._traced:
            return None
        trace = self._tracer.begin(scope["method"], scope["path"], scope["scheme"], scope["headers"])
        scope["state"]["trace"] = trace  # completions go on with it
        return trace


def _request_id(scope: Scope) -> bytes:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and SANE_ID.fullmatch(value):
            return bytes(value)
    return new_request_id()


def new_request_id() -> bytes:
    """An id for a request that brought none."""
    return uuid7().hex.encode()
