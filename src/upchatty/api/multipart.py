"""A file that is uploaded as a form (RFC 7578), read as it comes: it is not held in memory as a whole."""

import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from tempfile import SpooledTemporaryFile
from typing import Any
from urllib.parse import unquote

from litestar.types import Receive
from multipart import MultipartError, MultipartSegment, PushMultipartParser

from upchatty.errors import BodyTooLarge, InvalidRequest

MULTIPART = "multipart/form-data"
BOUNDARY = re.compile(r';\s*boundary=(?:"([^"]{1,70})"|([^\s;",]{1,70}))', re.IGNORECASE)
EXTENDED_NAME = re.compile(r"filename\*\s*=\s*(utf-8|iso-8859-1)'[^']*'([^;\s]+)", re.IGNORECASE)
IN_MEMORY = 1024 * 1024  # bytes; of a larger file the rest goes to the disk
MOST_PARTS, MOST_HEADER_BYTES = 8, 8192
MOST_FIELD_BYTES = 16 * 1024
ENVELOPE = 256 * 1024  # bytes that the form may take besides its file


@dataclass(slots=True)
class Form:
    """A form with a file.

    Args:
        fields: Its other fields by name.
        file: The file's content, at its beginning; None where there is none.
        name: The file's name, as it was sent.
        media_type: The file's format, as it was declared.
    """

    fields: dict[str, str] = field(default_factory=dict)
    file: Any = None
    name: str = ""
    media_type: str | None = None

    def close(self) -> None:
        """Delete what was kept of the file."""
        if self.file:
            self.file.close()


async def read_form(content_type: str, receive: Receive, most_bytes: int) -> Form:
    """A request's form; whoever gets it closes it.

    Args:
        content_type: The request's media type with its boundary.
        receive: Its ASGI channel.
        most_bytes: The file's length at most.

    Raises:
        InvalidRequest: It is no form, or it breaks off, or a part stands there twice.
        BodyTooLarge: The file is longer.
    """
    form = Form()
    try:
        await _read(form, content_type, receive, most_bytes)
    except MultipartError as error:
        form.close()
        problem = error.args[0] if error.args else type(error).__name__
        raise InvalidRequest(
            parameter="body", expected=f"expected a valid form of {MULTIPART} ({problem})"
        ) from None
    except BaseException:
        form.close()
        raise
    return form


async def _read(form: Form, content_type: str, receive: Receive, most_bytes: int) -> None:
    if not (boundary := BOUNDARY.search(content_type)):
        raise InvalidRequest(parameter="Content-Type", expected=f"expected {MULTIPART} with its boundary")
    parser = PushMultipartParser(
        boundary[1] or boundary[2], max_segment_count=MOST_PARTS, max_header_size=MOST_HEADER_BYTES
    )
    part = _Part(form, most_bytes)
    with parser:
        async for chunk in _chunks(receive, most_bytes):
            for event in parser.parse(chunk):
                if isinstance(event, MultipartSegment):
                    part.begin(event)
                elif event:
                    part.add(event)
                else:
                    part.end()


async def _chunks(receive: Receive, most_bytes: int) -> AsyncIterator[bytes]:
    more, length = True, 0
    while more:
        message: Any = await receive()
        if message["type"] != "http.request":
            raise InvalidRequest(parameter="body", expected="it broke off")
        length += len(message["body"])
        if length > most_bytes + ENVELOPE:
            raise BodyTooLarge(limit=most_bytes)
        more = message["more_body"]
        if message["body"]:
            yield message["body"]


class _Part:
    """The part of a form that is being read."""

    def __init__(self, form: Form, most_bytes: int) -> None:
        self._form = form
        self._most_bytes = most_bytes
        self._name = ""
        self._text: bytearray | None = None

    def begin(self, segment: MultipartSegment) -> None:
        self._name = segment.name or ""
        if self._name == "file":
            self._begin_file(segment)
            return
        if segment.filename is not None or self._name in self._form.fields:
            raise InvalidRequest(
                parameter=self._name[:80] or "body", expected="expected a text, once; the file is in 'file'"
            )
        self._text = bytearray()

    def add(self, content: bytes) -> None:
        if self._text is None:
            if self._form.file.tell() + len(content) > self._most_bytes:
                raise BodyTooLarge(limit=self._most_bytes)
            self._form.file.write(content)
            return
        self._text += content
        if len(self._text) > MOST_FIELD_BYTES:
            raise InvalidRequest(
                parameter=self._name[:80], expected=f"expected at most {MOST_FIELD_BYTES} bytes"
            )

    def end(self) -> None:
        if self._text is None:
            self._form.file.seek(0)
            return
        try:
            self._form.fields[self._name] = self._text.decode()
        except UnicodeDecodeError:
            raise InvalidRequest(parameter=self._name[:80], expected="expected UTF-8") from None

    def _begin_file(self, segment: MultipartSegment) -> None:
        if self._form.file:
            raise InvalidRequest(parameter="file", expected="expected once, but it stands there twice")
        self._text = None
        self._form.file = SpooledTemporaryFile(IN_MEMORY)  # noqa: SIM115 - the form closes it
        self._form.name = _file_name(segment)
        self._form.media_type = segment.content_type


def _file_name(segment: MultipartSegment) -> str:
    """A file's name. RFC 7578 (section 4.2) knows only `filename`; for names that are not ASCII some clients
    send the `filename*` of RFC 5987 all the same."""
    disposition = segment.header("Content-Disposition") or ""
    if extended := EXTENDED_NAME.search(disposition):
        return unquote(extended[2], encoding=extended[1], errors="replace")
    return segment.filename or ""
