"""The OpenAPI document: Litestar's list of the operations, with msgspec's schemas.

Litestar's own schemas lose a bound of 0, patterns, and every bound inside a union. msgspec describes
exactly what it accepts, so that tests and generated clients can rely on the document.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, get_origin

import msgspec
from litestar import Request, Response, Router
from litestar.exceptions import NotFoundException
from litestar.handlers import HTTPRouteHandler
from litestar.openapi import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin
from litestar.openapi.spec import (
    Components,
    OpenAPIMediaType,
    OpenAPIResponse,
    Operation,
    Schema,
    SecurityScheme,
)
from litestar.plugins import OpenAPISchemaPlugin
from litestar.status_codes import HTTP_404_NOT_FOUND
from litestar.typing import FieldDefinition
from msgspec import Struct

from upchatty import __version__

REFERENCE = "#/components/schemas/{name}"
DESCRIPTION = (
    'Chatbots behind an OpenAI-compatible API. Every error is `{"error": "one sentence"}`. '
    "Every response has an `X-Request-ID`, which is the caller's own if it sent one."
)


@dataclass
class OpenOperation(Operation):
    """An operation that needs no key."""

    def __post_init__(self) -> None:
        self.security = []


@dataclass
class StreamedOperation(Operation):
    """An operation that answers with server-sent events if it is asked to."""

    def __post_init__(self) -> None:
        answer = (self.responses or {})["200"]
        assert isinstance(answer, OpenAPIResponse) and answer.content is not None
        answer.content["text/event-stream"] = OpenAPIMediaType(
            schema=Schema(description="Chunks as `data: JSON`, at the end `data: [DONE]`")
        )


@dataclass(eq=False)
class _StructSchema(Schema):
    """To Litestar a schema like any; in the document a reference to msgspec's."""

    struct: Any = None

    def to_schema(self) -> dict[str, Any]:
        """The reference."""
        [reference], _ = msgspec.json.schema_components([self.struct], ref_template=REFERENCE)
        return reference


@dataclass(eq=False)
class _PlainSchema(Schema):
    """To Litestar a schema like any; in the document just what is given."""

    document: Any = None

    def to_schema(self) -> dict[str, Any]:
        """What is given."""
        schema: dict[str, Any] = self.document
        return schema


def one_of(*structs: type[Struct]) -> Schema:
    """The schema of a body that is one of several structs, which have no structs inside."""
    _, schemas = msgspec.json.schema_components(structs)
    return _PlainSchema(document={"oneOf": list(schemas.values())})


def fields_of(struct: type[Struct], **others: dict[str, Any]) -> Schema:
    """The schema of a form: a struct's fields, and others that are required."""
    _, schemas = msgspec.json.schema_components([struct])
    [schema] = schemas.values()
    return _PlainSchema(
        document=schema | {"properties": others | schema["properties"], "required": [*others]}
    )


class Structs(OpenAPISchemaPlugin):
    """Has Litestar leave the schemas of structs to msgspec."""

    def __init__(self) -> None:
        self.found: dict[Any, None] = {}

    @staticmethod
    def is_plugin_supported_type(value: Any) -> bool:
        """Whether it is a struct."""
        value = get_origin(value) or value
        return isinstance(value, type) and issubclass(value, Struct)

    def to_openapi_schema(self, field_definition: FieldDefinition, schema_creator: Any) -> Schema:
        """A reference to the struct's schema."""
        self.found[field_definition.annotation] = None
        return _StructSchema(struct=field_definition.annotation)


class Document(JsonRenderPlugin):
    """Serves the document.

    Args:
        structs: What knows the structs in it.
        models: The names of the server's models, the only ones that a chatbot may name.
    """

    def __init__(self, structs: Structs, models: Collection[str]) -> None:
        super().__init__(path="/openapi.json", media_type="application/json")  # type: ignore[arg-type]
        self._structs = structs
        self._models = models
        self._document = b""

    def render(self, request: Request[Any, Any, Any], openapi_schema: dict[str, Any]) -> bytes:
        """The document, made when it is first asked for."""
        if not self._document:
            _, schemas = msgspec.json.schema_components(self._structs.found, ref_template=REFERENCE)
            for name in ("NewChatbot", "ChatbotChange"):
                schemas[name]["properties"]["model"] = {"enum": [*self._models, None]}
            openapi_schema["components"]["schemas"] = dict(sorted(schemas.items()))
            for operation in _operations(openapi_schema):
                _split_description(operation)
            self._document = msgspec.json.encode(openapi_schema)
        return self._document


def configuration(structs: Structs, models: Collection[str]) -> OpenAPIConfig:
    """What Litestar has to know.

    Args:
        structs: The plugin that the application has, too.
        models: The names of the server's models.
    """
    return OpenAPIConfig(
        title="UpChatty",
        version=__version__,
        description=DESCRIPTION,
        openapi_router=Router(
            "/schema", route_handlers=[], include_in_schema=False, after_request=_without_pages
        ),
        render_plugins=[Document(structs, models)],
        use_handler_docstrings=True,
        operation_id_creator=_operation_id,
        components=Components(
            security_schemes={"key": SecurityScheme(type="http", scheme="bearer", description="An API key")}
        ),
        security=[{"key": []}],
    )


def _without_pages(response: Response[Any]) -> Response[Any]:
    """Litestar answers every other path here with a page of HTML."""
    if response.status_code == HTTP_404_NOT_FOUND:
        raise NotFoundException
    return response


def _operation_id(handler: HTTPRouteHandler, *_: object) -> str:
    return handler.handler_name


def _operations(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    return (operation for methods in document["paths"].values() for operation in methods.values())


def _split_description(operation: dict[str, Any]) -> None:
    """A handler's docstring as OpenAPI has it: a summary, and perhaps more."""
    summary, _, more = operation.pop("description").partition(". ")
    operation["summary"] = summary.rstrip(".")
    if more:
        operation["description"] = more
