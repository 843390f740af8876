"""Every route on one page, and the application that they make."""

from litestar import Litestar, Router
from litestar.connection import ASGIConnection
from litestar.di import Provide
from litestar.handlers import BaseRouteHandler
from litestar.openapi import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin
from litestar.openapi.spec import Components, SecurityScheme
from litestar.types import ASGIApp, Receive, Scope, Send

from upchatty import __version__
from upchatty.api import chatbots, completions, keys, operations
from upchatty.api.access_log import AccessLog
from upchatty.api.body import JSONRequest
from upchatty.api.errors import EXCEPTION_HANDLERS
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
    keys.create_key,
    keys.list_keys,
    keys.revoke_key,
]
FOR_EVERYBODY = [operations.live, operations.ready, operations.metrics]


def build_api(services: Services) -> ASGIApp:
    """The HTTP application.

    Args:
        services: What its routes work with.
    """
    litestar = Litestar(
        [
            Router(BASE_PATH, route_handlers=FOR_ANY_KEY),
            Router(BASE_PATH, route_handlers=FOR_ADMIN_KEYS, guards=[_admins_only]),
            *FOR_EVERYBODY,
        ],
        dependencies={"services": Provide(lambda: services, sync_to_thread=False)},
        middleware=[_authentication(services)],
        request_class=JSONRequest,
        request_max_body_size=services.settings.max_body_bytes,
        exception_handlers=EXCEPTION_HANDLERS,
        openapi_config=_openapi(),
        logging_config=None,
    )
    return AccessLog(litestar, services.metrics)


def _authentication(services: Services):  # type: ignore[no-untyped-def]
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


def _openapi() -> OpenAPIConfig:
    return OpenAPIConfig(
        title="UpChatty",
        version=__version__,
        path="/schema",
        render_plugins=[JsonRenderPlugin(path="/openapi.json")],
        components=Components(
            security_schemes={"key": SecurityScheme(type="http", scheme="bearer", description="An API key")}
        ),
        security=[{"key": []}],
    )
