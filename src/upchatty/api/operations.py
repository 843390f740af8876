"""What operators' tools ask: health and metrics, without a key."""

from litestar import Response, get
from msgspec import Struct

from upchatty import __version__
from upchatty.api.errors import error_response, open_errors
from upchatty.api.openapi import OpenOperation
from upchatty.api.services import Services
from upchatty.metrics import CONTENT_TYPE


class Health(Struct):
    """That all is well."""

    status: str
    version: str


@get("/health/live", operation_class=OpenOperation, responses=open_errors())
async def live() -> Health:
    """Whether the server runs."""
    return Health("live", __version__)


@get("/health/ready", operation_class=OpenOperation, responses=open_errors())
async def ready(services: Services) -> Response[Health]:
    """Whether the default engine answers: 200, or 503 until it does."""
    if await services.pool.ready():
        return Response(Health("ready", __version__))
    return error_response(503, "the default engine does not answer yet", {"Retry-After": "1"})  # type: ignore[return-value]


@get("/metrics", media_type="text/plain", operation_class=OpenOperation, responses=open_errors())
async def metrics(services: Services) -> Response[bytes]:
    """Prometheus metrics."""
    services.pool.measure(services.metrics)
    return Response(services.metrics.text(), headers={"content-type": CONTENT_TYPE})
