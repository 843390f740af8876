"""The one handler of everything that goes wrong: JSON with one sentence, and the fitting status."""

from http import HTTPStatus

import msgspec
import structlog
from litestar import Request, Response
from litestar.exceptions import (
    HTTPException,
    MethodNotAllowedException,
    NotFoundException,
    ValidationException,
)
from litestar.openapi.datastructures import ResponseSpec
from litestar.types import ExceptionHandlersMap, Send
from msgspec import Struct

from upchatty.api.body import in_words
from upchatty.errors import InternalError, RequestError

log = structlog.get_logger()


class ErrorBody(Struct, forbid_unknown_fields=True):
    """What went wrong, in one sentence."""

    error: str


def with_errors(*statuses: int) -> dict[int, ResponseSpec]:
    """The error responses of a route for the OpenAPI document, besides those of any that needs a key."""
    return open_errors(400, 401, 403, *statuses)


def open_errors(*statuses: int) -> dict[int, ResponseSpec]:
    """The error responses of a route that needs no key, besides those that any has."""
    return {
        status: ResponseSpec(ErrorBody, generate_examples=False, description=HTTPStatus(status).phrase)
        for status in sorted({500, 503, *statuses})
    }


SENTENCES = {413: "the body is too large", 415: "Content-Type: expected application/json"}


def error_response(
    status: int, sentence: str, headers: dict[str, str] | None = None
) -> Response[dict[str, str]]:
    """The contract's error body."""
    return Response({"error": sentence}, status_code=status, headers=headers, media_type="application/json")


async def send_error(error: RequestError, send: Send) -> None:
    """The same, without the framework.

    Args:
        error: What went wrong.
        send: The request's ASGI channel.
    """
    body = msgspec.json.encode({"error": str(error)})
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    headers += [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def on_request_error(_: Request, error: RequestError) -> Response[dict[str, str]]:  # type: ignore[type-arg]
    """Errors that we raise."""
    return error_response(error.status, str(error), error.headers)


def on_http_exception(request: Request, error: HTTPException) -> Response[dict[str, str]]:  # type: ignore[type-arg]
    """Errors that the framework raises."""
    return error_response(error.status_code, _sentence(request, error), error.headers)


def on_any_exception(request: Request, error: Exception) -> Response[dict[str, str]]:  # type: ignore[type-arg]
    """Defects."""
    log.error("internal error", path=request.url.path, exc_info=error)
    return on_request_error(request, InternalError())


def _sentence(request: Request, error: HTTPException) -> str:  # type: ignore[type-arg]
    if isinstance(error, MethodNotAllowedException):
        return f"{request.method} is not allowed on {request.url.path}"
    if isinstance(error, NotFoundException):
        return f"there is nothing at {request.url.path}"
    if isinstance(error, ValidationException) and "data" in str(error.extra):
        return "body: expected JSON, and there is none"
    if isinstance(error, ValidationException) and isinstance(error.extra, list) and error.extra:
        return "; ".join(
            f"{problem.get('key')}: {in_words(problem.get('message', ''))}" for problem in error.extra
        )
    return SENTENCES.get(error.status_code) or error.detail


EXCEPTION_HANDLERS: ExceptionHandlersMap = {
    RequestError: on_request_error,
    HTTPException: on_http_exception,
    Exception: on_any_exception,
}
