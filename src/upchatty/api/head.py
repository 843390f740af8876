"""HEAD wherever there is GET, which HTTP asks of every server: RFC 9110, section 9.1."""

from typing import Any

from litestar.enums import ScopeType
from litestar.types import ASGIApp, Receive, Scope, Send


class HeadAsGet:
    """ASGI middleware that has the application answer HEAD as GET; the server leaves the body out.

    Args:
        app: The application, which knows GET only.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        assert scope["type"] == ScopeType.HTTP  # the server speaks nothing else

        async def send_allowing_head(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [_allowing_head(*header) for header in message["headers"]]
            await send(message)

        # A copy: the server goes by the method in its own scope, the access log by the caller's key.
        inner: Any = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
        try:
            await self._app(inner, receive, send_allowing_head)
        finally:
            scope["auth"] = inner.get("auth")


def _allowing_head(name: bytes, value: bytes) -> tuple[bytes, bytes]:
    if name.lower() != b"allow":
        return name, value
    methods = {method.strip() for method in value.split(b",")}
    return name, b", ".join(sorted(methods | ({b"HEAD"} if b"GET" in methods else set())))
