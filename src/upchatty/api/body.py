"""Reading JSON bodies strictly, with errors that name the parameter.

Refused besides what the types refuse: duplicate keys (two readers would read two things), NaN and
infinities, also as 1e999, lone surrogates, NUL characters, which neither engines nor PostgreSQL can hold.
"""

import json
import math
import re
from typing import Any, TypeVar

import msgspec
from litestar import Request
from litestar.datastructures import State
from litestar.exceptions.http_exceptions import RequestEntityTooLarge
from litestar.types import Receive
from msgspec import inspect
from msgspec.inspect import type_info

from upchatty.auth import Caller
from upchatty.errors import BodyTooLarge, InvalidRequest, UnsupportedMediaType

Body = TypeVar("Body")

NO_NUL = "^[^\\x00]*$"  # what a JSON schema says of a text without NUL
QUOTED = 80  # characters of a caller's text in an error
WORDS = {
    "str": "a string",
    "int": "an integer",
    "float": "a number",
    "bool": "a boolean",
    "array": "an array",
    "object": "an object",
    "null": "null",
    "datetime": "a date and time by RFC 3339",
}


class JSONRequest(Request[Caller, None, State]):
    """A request whose JSON body is read as the type that its handler names."""

    async def json(self) -> Any:
        """The body.

        Raises:
            UnsupportedMediaType: It is not declared to be JSON.
            InvalidRequest: It is not JSON, or not of the type.
        """
        check_is_json(dict(self.scope["headers"]))
        field = self.route_handler.parsed_data_field
        assert field is not None  # only handlers that take data ask for it
        return decode(await self.body(), field.annotation)

    async def body(self) -> bytes:
        """The body as it came.

        Raises:
            BodyTooLarge: It is longer than the settings allow.
        """
        try:
            return await super().body()
        except RequestEntityTooLarge:
            raise BodyTooLarge(limit=self.route_handler.resolve_request_max_body_size()) from None


def check_is_json(headers: dict[bytes, bytes]) -> None:
    """Raise UnsupportedMediaType unless a request with these headers, in lower case, declares a JSON body."""
    media_type = headers.get(b"content-type", b"nothing")
    if (
        media_type != b"application/json"
        and media_type.partition(b";")[0].strip().lower() != b"application/json"
    ):
        raise UnsupportedMediaType(got=media_type.decode("latin-1"))
    encoding = headers.get(b"content-encoding", b"").lower()
    if encoding not in (b"", b"identity"):
        raise UnsupportedMediaType(got=f"application/json in {encoding.decode('latin-1')}")


async def read_body(headers: dict[bytes, bytes], receive: Receive, most_bytes: int) -> bytes:
    """A request's body.

    Args:
        headers: The request's, in lower case.
        receive: Its ASGI channel.
        most_bytes: Its length at most.

    Raises:
        BodyTooLarge: It is longer.
        InvalidRequest: There is none, or it broke off.
    """
    body, more = b"", True
    if int(headers.get(b"content-length", b"0")) > most_bytes:
        raise BodyTooLarge(limit=most_bytes)
    while more:
        message: Any = await receive()
        if message["type"] != "http.request":
            raise InvalidRequest(parameter="body", expected="it broke off")
        body += message["body"]
        more = message["more_body"]
        if len(body) > most_bytes:
            raise BodyTooLarge(limit=most_bytes)
    if not body:
        raise InvalidRequest(parameter="body", expected="expected JSON, and there is none")
    return body


def decode(body: bytes, body_type: type[Body]) -> Body:
    """A JSON text as a value of this type.

    Args:
        body: The text, UTF-8.
        body_type: A msgspec Struct.

    Raises:
        InvalidRequest: It is not JSON, or not of the type; names the parameter.
    """
    try:
        value = msgspec.json.decode(body, type=body_type)
        _read_strictly(body.decode())
    except msgspec.ValidationError as error:
        if "got `float`" not in str(error):
            raise _explained(str(error), body_type) from None
        value = _with_plain_integers(body, body_type)
    except UnicodeDecodeError:
        raise InvalidRequest(parameter="body", expected="expected UTF-8") from None
    except RecursionError:
        raise InvalidRequest(parameter="body", expected="the JSON is nested too deeply") from None
    except (msgspec.DecodeError, ValueError) as error:
        raise InvalidRequest(parameter="body", expected=f"expected valid JSON ({error})") from None
    if b"\\u0000" in body:
        _refuse_nul(msgspec.to_builtins(value), "")
    return value


def _with_plain_integers(body: bytes, body_type: type[Body]) -> Body:
    """The same, for a text that has 1.0 somewhere, which to a JSON schema is an integer."""
    _read_strictly(body.decode())
    value = json.loads(
        body, parse_float=lambda number: int(float(number)) if float(number) % 1 == 0 else float(number)
    )
    try:
        return msgspec.convert(value, body_type)
    except msgspec.ValidationError as error:
        raise _explained(str(error), body_type) from None


def in_words(problem: str) -> str:
    """msgspec's description of a problem, with JSON's names of types instead of Python's."""
    words = re.sub(r"`([^`]+)`", lambda match: _types_in_words(match[1]), problem)
    return words[:1].lower() + words[1:]


def shortened(text: str) -> str:
    """A caller's text, short enough to be quoted in a sentence."""
    return text if len(text) <= QUOTED else text[:QUOTED] + "…"


def _read_strictly(text: str) -> None:
    """Refuse what msgspec passes over, most of all inside of what it ignores."""
    _strict_decoder.decode(text)


def _refuse_duplicates(pairs: list[tuple[str, object]]) -> None:
    if len(dict(pairs)) == len(pairs):
        return
    seen = set()
    for name, _ in pairs:
        if name in seen:
            parameter = name if name.isidentifier() else repr(name)
            raise InvalidRequest(
                parameter=shortened(parameter), expected="expected once, but it stands there twice"
            )
        seen.add(name)


def _refuse_constant(constant: str) -> None:
    raise InvalidRequest(parameter="body", expected=f"{constant} is no JSON")


def _refuse_infinity(number: str) -> None:
    if math.isinf(float(number)):
        raise InvalidRequest(parameter="body", expected=f"the number {shortened(number)} is out of range")


_strict_decoder = json.JSONDecoder(
    object_pairs_hook=_refuse_duplicates,
    parse_constant=_refuse_constant,
    parse_float=_refuse_infinity,
    parse_int=len,  # nobody needs its value, and Python refuses to read very long ones
)


def _refuse_nul(value: object, path: str) -> None:
    if isinstance(value, str) and "\0" in value:
        raise InvalidRequest(parameter=path, expected="NUL characters are not allowed")
    if isinstance(value, dict):
        for name, inner in value.items():
            _refuse_nul(name, path or "body")
            _refuse_nul(inner, f"{path}.{name}" if path else name)
    if isinstance(value, list):
        for index, inner in enumerate(value):
            _refuse_nul(inner, f"{path}[{index}]")


def _explained(message: str, body_type: type) -> InvalidRequest:
    """msgspec's message as a sentence that names the parameter."""
    problem, _, path = message.partition(" - at `$")
    parameter = re.sub(r"\[\.\.\.\]", "", path.rstrip("`")).lstrip(".")
    if missing := re.fullmatch(r"Object missing required field `(.+)`", problem):
        name = f"{parameter}.{missing[1]}" if parameter else missing[1]
        return InvalidRequest(parameter=name, expected="this parameter is required")
    if unknown := re.fullmatch(r"Object contains unknown field `(.+)`", problem):
        name = f"{parameter}.{unknown[1]}" if parameter else unknown[1]
        return InvalidRequest(parameter=name, expected="there is no such parameter")
    if wrong := re.fullmatch(r"Invalid (?:enum )?value (.+)", problem, re.DOTALL):
        names = re.sub(r"\[\d+\]", "", parameter).split(".")
        choices = " or ".join(map(repr, dict.fromkeys(_choices(type_info(body_type), names))))
        return InvalidRequest(parameter=parameter, expected=f"expected {choices}, got {shortened(wrong[1])}")
    if problem.endswith("of length <= 0"):
        return InvalidRequest(parameter=parameter, expected="expected none, this is not available")
    if problem == "Number out of range":
        return InvalidRequest(parameter=parameter or "body", expected="expected a number of at most 64 bits")
    return InvalidRequest(parameter=parameter or "body", expected=in_words(problem))


def _types_in_words(types: str) -> str:
    return " or ".join(
        WORDS.get(name, name) for name in types.split(" | ") if name != "null" or types == name
    )


def _choices(info: inspect.Type, names: list[str]) -> list[object]:
    """The values that a type allows at the end of a path of field names."""
    match info:
        case inspect.Metadata(type=inner) | inspect.ListType(item_type=inner):
            return _choices(inner, names)
        case inspect.UnionType(types=kinds):
            return [choice for kind in kinds for choice in _choices(kind, names)]
        case inspect.LiteralType(values=values) if not names:
            return list(values)
        case inspect.StructType(tag_field=tag_field, tag=tag) if names == [tag_field]:
            return [tag]
        case inspect.StructType(fields=fields) if names:
            return [
                choice
                for field in fields
                if field.encode_name == names[0]
                for choice in _choices(field.type, names[1:])
            ]
        case _:
            return []
