"""DOCX by mammoth, XLSX by calamine. Both are ZIP archives of XML: ECMA-376."""

from io import BytesIO
from zipfile import BadZipFile, ZipFile
from zlib import error as ZlibError

import mammoth
from lxml import etree
from msgspec import structs
from python_calamine import CalamineError, CalamineWorkbook, PasswordError

from upchatty.knowledge.blocks import Block, Reading
from upchatty.knowledge.reading.data import rows
from upchatty.knowledge.reading.errors import Unreadable
from upchatty.knowledge.reading.html import read_html

MIB = 1024 * 1024
MOST_BYTES = 256 * MIB  # of an archive's members, unpacked
MOST_MEMBERS = 10_000
MOST_RATIO = 200  # unpacked to packed, where it is more than the next
HARMLESS_BYTES = 10 * MIB
CHUNK = MIB
BOMB = "it unpacks to far more than its size, as files do that are made to do harm"
# Office programs write no such declarations; they only serve to blow up or to fetch.
DECLARATIONS = [
    declaration.encode(encoding)
    for declaration in ("<!DOCTYPE", "<!ENTITY")
    for encoding in ("ascii", "utf-16-le", "utf-16-be")
]
TITLE = "{http://purl.org/dc/elements/1.1/}title"


def read_docx(content: bytes) -> Reading:
    """A Word document, as the HTML that mammoth makes of it.

    Raises:
        Unreadable: It is damaged or made to do harm.
    """
    check_archive(content)
    # Images are left out: as text they would be megabytes of letters.
    no_images = mammoth.images.img_element(lambda image: {})
    html = mammoth.convert_to_html(BytesIO(content), convert_image=no_images).value
    reading = read_html(f"<html><body>{html}</body></html>", first_row_is_header=True)
    # Fragments of the HTML lead nowhere in the file.
    blocks = [structs.replace(block, anchor=None) for block in reading.blocks]
    first = next((block.text for block in blocks if block.kind == "heading"), "")
    return Reading(title=_core_title(content) or first, blocks=blocks)


def read_xlsx(content: bytes) -> Reading:
    """A workbook: each sheet under its name, and the first row as its header.

    Raises:
        Unreadable: It is protected, damaged or made to do harm.
    """
    check_archive(content)
    blocks: list[Block] = []
    try:
        workbook = CalamineWorkbook.from_object(BytesIO(content))
        for name in workbook.sheet_names:
            sheet = workbook.get_sheet_by_name(name)
            found = list(rows([_cell(cell) for cell in row] for row in sheet.iter_rows()))
            if found:
                blocks += [Block(kind="heading", text=name, level=1), *found]
    except PasswordError:
        raise Unreadable(
            problem="it is protected with a password; save it without one and add it again"
        ) from None
    except CalamineError as error:
        raise Unreadable(problem=f"the workbook is damaged: {error}") from None
    return Reading(title=_core_title(content), blocks=blocks)


def check_archive(content: bytes) -> None:
    """Unpack everything once, in small pieces, before a library does it at once.

    Raises:
        Unreadable: It is damaged, encrypted, or far larger than it looks.
    """
    total = 0
    try:
        with ZipFile(BytesIO(content)) as archive:
            if len(archive.infolist()) > MOST_MEMBERS:
                raise Unreadable(problem=BOMB)
            for member in archive.infolist():
                tail = b""
                with archive.open(member) as stream:
                    while chunk := stream.read(CHUNK):
                        total += len(chunk)
                        if total > MOST_BYTES or total > max(HARMLESS_BYTES, MOST_RATIO * len(content)):
                            raise Unreadable(problem=BOMB)
                        if member.filename.endswith((".xml", ".rels")):
                            _check_xml(tail + chunk)
                        tail = chunk[-32:]
    except (BadZipFile, ZlibError, EOFError, NotImplementedError, RuntimeError):
        raise Unreadable(problem="the file is damaged: it cannot be unpacked") from None


def _check_xml(xml: bytes) -> None:
    if any(declaration in xml for declaration in DECLARATIONS):
        raise Unreadable(problem="it has declarations of XML entities, which office files have no use for")


def _core_title(content: bytes) -> str:
    parser = etree.XMLParser(resolve_entities=False, no_network=True, load_dtd=False)
    with ZipFile(BytesIO(content)) as archive:
        try:
            properties = etree.fromstring(archive.read("docProps/core.xml"), parser)
        except (KeyError, etree.XMLSyntaxError):
            return ""
    return (properties.findtext(TITLE) or "").strip()


def _cell(value: object) -> str:
    """A cell as people see it: whole numbers come as fractions."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return str(value).lower() if isinstance(value, bool) else str(value)
