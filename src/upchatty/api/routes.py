"""Every route on one page, and the application that they make."""

from collections.abc import Sequence

from litestar import Litestar, Router, route
from litestar.connection import ASGIConnection
from litestar.di import Provide
from litestar.handlers import BaseRouteHandler, HTTPRouteHandler
from litestar.types import ASGIApp, Middleware, Receive, Scope, Send

from upchatty.api import (
    chatbots,
    completions,
    documents,
    keys,
    openapi,
    operations,
    search,
    unanswered,
    usage,
)
from upchatty.api.access_log import AccessLog
from upchatty.api.body import JSONRequest
from upchatty.api.completions import Completions
from upchatty.api.errors import EXCEPTION_HANDLERS
from upchatty.api.head import HeadAsGet
from upchatty.api.services import Services
from upchatty.auth import OPEN_PATHS

BASE_PATH = "/api/v1"

FOR_ANY_KEY = [completions.create_completion, chatbots.list_models, chatbots.get_model]
FOR_ADMIN_KEYS = [
    chatbots.create_chatbot,
    chatbots.list_chatbots,
    chatbots.get_chatbot,
    chatbots.list_versions,
    chatbots.change_chatbot,
    chatbots.delete_chatbot,
    documents.add_document,
    documents.list_documents,
    documents.get_document,
    documents.delete_document,
    documents.read_document,
    search.search_passages,
    unanswered.list_unanswered,
    unanswered.clear_unanswered,
    keys.create_key,
    keys.list_keys,
    keys.revoke_key,
    usage.get_usage,
]
FOR_EVERYBODY = [operations.live, operations.ready, operations.metrics]


def build_api(services: Services) -> ASGIApp:
    """The HTTP application.

    Args:
        services: What its routes work with.
    """
    structs = openapi.Structs()
    litestar = Litestar(
        [
            Router(BASE_PATH, route_handlers=_with_options(FOR_ANY_KEY)),
            Router(BASE_PATH, route_handlers=_with_options(FOR_ADMIN_KEYS), guards=[_admins_only]),
            *FOR_EVERYBODY,
        ],
        dependencies={"services": Provide(lambda: services, sync_to_thread=False)},
        middleware=[_authentication(services)],
        request_class=JSONRequest,
        request_max_body_size=services.settings.max_body_bytes,
        exception_handlers=EXCEPTION_HANDLERS,
        openapi_config=openapi.configuration(structs, services.settings.chat_models),
        plugins=[structs],
        logging_config=None,
    )
    answers, others, [path] = Completions(services), HeadAsGet(litestar), completions.create_completion.paths
    completions_path = BASE_PATH + path

    async def api(scope: Scope, receive: Receive, send: Send) -> None:
        is_completion = scope["path"] == completions_path and scope.get("method") == "POST"
        await (answers if is_completion else others)(scope, receive, send)

    return AccessLog(api, services.metrics, services.tracer, [completions_path])


def _with_options(handlers: Sequence[HTTPRouteHandler]) -> list[HTTPRouteHandler]:
    """Handlers, and before them answers to OPTIONS: Litestar's own name only one method of a path."""
    methods: dict[str, set[str]] = {}
    for handler in handlers:
        for path in handler.paths:
            methods.setdefault(path, {"OPTIONS"}).update(handler.http_methods)
    answers = [_options(path, ", ".join(sorted(allowed))) for path, allowed in methods.items()]
    return [*answers, *handlers]


def _options(path: str, allowed: str) -> HTTPRouteHandler:
    @route(
        path,
        http_method="OPTIONS",
        status_code=204,
        response_headers={"Allow": allowed},
        include_in_schema=False,
    )
    async def options() -> None:
        """Which methods a path has."""

    return options


def _authentication(services: Services) -> Middleware:
    """Middleware that finds out who is calling; only the open paths need no key."""

    def middleware(app: ASGIApp) -> ASGIApp:
        async def authenticate(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["path"] not in OPEN_PATHS:
                authorization = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1")
                scope["user"] = caller = await services.keys.identify(authorization)
                scope["auth"] = caller.key_id
            await app(scope, receive, send)

        return authenticate

    return middleware


def _admins_only(connection: ASGIConnection, _: BaseRouteHandler) -> None:  # type: ignore[type-arg]
    connection.user.require_admin()
