"""Which format a document has, and who reads it."""

import re
from collections.abc import Callable
from io import BytesIO
from pathlib import PurePosixPath
from zipfile import BadZipFile, ZipFile

from msgspec import structs

from upchatty.knowledge.blocks import Block, Reading
from upchatty.knowledge.reading.data import read_json, read_json_lines, read_table
from upchatty.knowledge.reading.errors import Unreadable
from upchatty.knowledge.reading.html import read_html
from upchatty.knowledge.reading.office import read_docx, read_xlsx
from upchatty.knowledge.reading.pdf import read_pdf
from upchatty.knowledge.reading.text import decode, read_markdown, read_text

MOST_TEXT = 50_000_000  # characters
READ = "text, Markdown, HTML, PDF, DOCX, CSV, XLSX and JSON are read"
OLE = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"  # the container of old and of encrypted office files: [MS-CFB]
ZIP = b"PK\x03\x04"
PDF = b"%PDF-"
PDF_WITHIN = 1024  # bytes; readers accept what precedes the header, as mail programs put it there
# What a file begins with that has no text for us.
FOREIGN = {
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
    b"GIF8": "an image",
    b"BM": "an image",
    b"II*\x00": "an image",
    b"MM\x00*": "an image",
    b"RIFF": "an image, a sound or a film",
    b"OggS": "a sound or a film",
    b"ID3": "a sound",
    b"\x7fELF": "a program",
    b"MZ": "a program",
    b"\x1f\x8b": "a compressed archive",
    b"7z\xbc\xaf": "a compressed archive",
    b"Rar!": "a compressed archive",
    b"PK\x05\x06": "an empty archive",
}
BY_MEDIA_TYPE = {
    "text/markdown": "markdown",
    "text/x-markdown": "markdown",
    "text/html": "html",
    "application/xhtml+xml": "html",
    "application/xml": "html",
    "text/xml": "html",
    "text/csv": "csv",
    "text/tab-separated-values": "csv",
    "application/json": "json",
    "application/jsonl": "jsonl",
    "application/x-ndjson": "jsonl",
}
BY_SUFFIX = {
    ".md": "markdown",
    ".markdown": "markdown",
    ".html": "html",
    ".htm": "html",
    ".xhtml": "html",
    ".xml": "html",
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
}
HTML_START = re.compile(
    r"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*(<!doctype\s+html|<html[\s>])", re.IGNORECASE | re.DOTALL
)
# Control characters but for tab and newline, halves of characters, and what is no character.
NOISE = re.compile("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff\ufffe\uffff]")

TextReader = Callable[[str], Reading]
TEXT_READERS: dict[str, TextReader] = {
    "markdown": read_markdown,
    "csv": read_table,
    "json": read_json,
    "jsonl": read_json_lines,
    "text": read_text,
}


def read_document(
    content: bytes, *, name: str | None, media_type: str | None, url: str | None, main_content: bool
) -> Reading:
    """Read a document here and now; `Readers.read` says what the arguments are.

    Raises:
        Unreadable: There is no text to be had from it.
    """
    if not content.strip(b" \t\r\n\x00"):
        raise Unreadable(problem="the file is empty")
    if _is_pdf(content):
        reading = read_pdf(content)
    elif content.startswith(OLE):
        raise Unreadable(problem=_old_office(content))
    elif content.startswith(ZIP):
        reading = _read_zip(content)
    else:
        reading = _read_text(content, name, media_type, url, main_content)
    return _cleaned(reading)


def _is_pdf(content: bytes) -> bool:
    """Texts may speak of the mark that PDFs begin with, but do not end like one."""
    if content.lstrip().startswith(PDF):
        return True
    return PDF in content[:PDF_WITHIN] and b"%%EOF" in content[-PDF_WITHIN:]


def _old_office(content: bytes) -> str:
    if "EncryptedPackage".encode("utf-16-le") in content:
        return "it is protected with a password; save it without one and add it again"
    if "WordDocument".encode("utf-16-le") in content:
        return "it is in the old Word format; save it as DOCX and add it again"
    if "Workbook".encode("utf-16-le") in content:
        return "it is in the old Excel format; save it as XLSX and add it again"
    return f"it is in an old office format, which is not read; {READ}"


def _read_zip(content: bytes) -> Reading:
    try:
        with ZipFile(BytesIO(content)) as archive:
            names = archive.namelist()
    except (BadZipFile, ValueError, NotImplementedError):
        raise Unreadable(problem="the file is damaged: it begins like an archive but is incomplete") from None
    if any(name.startswith("word/") for name in names):
        return read_docx(content)
    if any(name.startswith("xl/") for name in names):
        return read_xlsx(content)
    raise Unreadable(problem=f"it is an archive or of a type that is not read; {READ}")


def _read_text(
    content: bytes, name: str | None, media_type: str | None, url: str | None, main_content: bool
) -> Reading:
    for start, what in FOREIGN.items():
        # Two letters alone could begin a text as well.
        if content.startswith(start) and (len(start) > 2 or b"\x00" in content[:1024] or start[0] < 32):
            raise Unreadable(problem=f"it is {what}, which has no text to read; {READ}")
    if content.startswith(b"{\\rtf"):
        raise Unreadable(problem="it is in the RTF format, which is not read; save it as DOCX")
    text = decode(content, media_type)
    kind = _text_kind(text, name, media_type)
    if kind == "html":
        return read_html(text, url=url, main_content=main_content)
    return TEXT_READERS[kind](text)


def _text_kind(text: str, name: str | None, media_type: str | None) -> str:
    if HTML_START.match(text[:4096]):
        return "html"
    plain_type = (media_type or "").partition(";")[0].strip().lower()
    if kind := BY_MEDIA_TYPE.get(plain_type):
        return kind
    if plain_type.endswith("+json"):
        return "json"
    return BY_SUFFIX.get(PurePosixPath(name or "").suffix.lower(), "text")


def _cleaned(reading: Reading) -> Reading:
    """Without characters that a database refuses, and within the limit."""
    blocks = [_clean_block(block) for block in reading.blocks]
    blocks = [block for block in blocks if block.text.strip()]
    if not blocks:
        raise Unreadable(problem="there is no text in it")
    if sum(len(block.text) for block in blocks) > MOST_TEXT:
        raise Unreadable(problem=f"it has more than {MOST_TEXT:,} characters of text; split it")
    title = " ".join(NOISE.sub("", reading.title).split())[:500]
    return structs.replace(
        reading, title=title, blocks=blocks, links=[link for link in reading.links if not NOISE.search(link)]
    )


def _clean_block(block: Block) -> Block:
    fields = (block.text, block.header, block.anchor or "")
    if not any(NOISE.search(field) for field in fields):
        return block
    text, header, anchor = (NOISE.sub("", field) for field in fields)
    return structs.replace(block, text=text, header=header, anchor=anchor or None)
