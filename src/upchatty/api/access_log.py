"""One log line and one count for every request, and its id in every response."""

import re
import time
from typing import Any

import structlog
from litestar.enums import ScopeType
from litestar.types import ASGIApp, Receive, Scope, Send
from uuid_utils import uuid7

from upchatty.metrics import Metrics

SANE_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
CALLER_GONE = 499  # nginx's number for a caller who did not wait

log = structlog.get_logger()


class AccessLog:
    """ASGI middleware around everything else.

    Args:
        app: Everything else.
        metrics: Counts.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        assert scope["type"] == ScopeType.HTTP  # the server speaks nothing else
        started, status, request_id = time.perf_counter(), CALLER_GONE, _request_id(scope)

        async def send_with_id(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id)]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            self._metrics.requests.labels(status).inc()
            log.info(
                "request",
                id=request_id.decode(),
                method=scope["method"],
                path=scope["path"],
                status=status,
                ms=round((time.perf_counter() - started) * 1000, 1),
                key=scope.get("auth"),
            )


def _request_id(scope: Scope) -> bytes:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and SANE_ID.fullmatch(value):
            return bytes(value)
    return new_request_id()


def new_request_id() -> bytes:
    """An id for a request that brought none."""
    return uuid7().hex.encode()
