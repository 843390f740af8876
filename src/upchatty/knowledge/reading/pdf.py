"""PDF by pdfium: lines with their size and place become headings, paragraphs and list items."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from ctypes import byref
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

import pypdfium2
import pypdfium2.raw as pdfium

from upchatty.knowledge.blocks import Block, BlockKind, Reading
from upchatty.knowledge.reading.errors import Unreadable

MOST_PAGES = 20_000
MOST_TEXT = 50_000_000  # characters
EDGE_LINES = 2  # at the top and bottom of a page, where running headers and footers are
REPEATED = 0.3  # of the pages
FEW_PAGES = 3  # below so many nothing is told from repetition
LARGER = 1.15  # times the size of the text is a heading's
LONGEST_HEADING = 150  # characters
WIDE_GAP = 1.4  # times the usual distance of lines begins a paragraph
HYPHENS = ("-", "\u00ad", "\x02", "\ufffe", "\u2010")  # pdfium has marks of its own for one at a line's end
ITEM = re.compile(r"(?:[•▪◦‣●○■–—*-]|\(?\d{1,3}[.)]|\(?[a-z]\))\s+\S")
BULLET = re.compile(r"^[•▪◦‣●○■–—*-]\s+")
SENTENCE_ENDS = (".", "!", "?", ":", ";", "。", "！", "？", "؟", "।")
NO_TITLE = re.compile(
    r"^(untitled|microsoft word|powerpoint|document\d*$|.*\.(docx?|pdf|tex|dvi|indd|rtf)$)", re.IGNORECASE
)
DIGITS = re.compile(r"\d+")
SPACE = re.compile(r"\s+")


@dataclass(frozen=True, slots=True)
class _Line:
    """A line of text as it is printed.

    Args:
        text: Its text.
        page: Its page, from 1.
        size: Height of its letters, points.
        bottom: Where it is, points above the page's lower edge.
    """

    text: str
    page: int
    size: float
    bottom: float


def read_pdf(content: bytes) -> Reading:
    """A PDF.

    Raises:
        Unreadable: It is encrypted, damaged, far too long, or has no text.
    """
    try:
        document = pypdfium2.PdfDocument(content)
    except pypdfium2.PdfiumError as error:
        if error.err_code == pdfium.FPDF_ERR_PASSWORD:
            problem = "it is protected with a password; save it without one and add it again"
        else:
            problem = "the PDF is damaged"
        raise Unreadable(problem=problem) from None
    try:
        count = len(document)
        if count > MOST_PAGES:
            raise Unreadable(problem=f"it has {count:,} pages, and {MOST_PAGES:,} are read; split it")
        if not count:
            raise Unreadable(problem="the PDF has no pages")
        pages = list(_pages(document))
        if not any(pages):
            raise Unreadable(
                problem="it has pages but no text; it is probably scanned, "
                "and a program for text recognition (OCR) can add the text"
            )
        blocks = list(_blocks(_without_running(pages), _outline(document)))
        return Reading(title=_title(document), blocks=blocks, pages=count)
    finally:
        document.close()


def _pages(document: pypdfium2.PdfDocument) -> Iterator[list[_Line]]:
    length = 0
    for index in range(len(document)):
        try:
            page = document[index]
        except pypdfium2.PdfiumError:
            yield []  # this one is broken; the others need not be
            continue
        text = page.get_textpage()
        lines = list(_lines(text, index + 1))
        text.close()
        page.close()
        length += sum(len(line.text) for line in lines)
        if length > MOST_TEXT:
            raise Unreadable(problem=f"it has more than {MOST_TEXT:,} characters of text; split it")
        yield lines


def _lines(page: pypdfium2.PdfTextPage, number: int) -> Iterator[_Line]:
    box = pdfium.FS_RECTF()
    start = 0
    if page.count_chars() <= 0:
        return
    for raw in page.get_text_range().splitlines(keepends=True):
        text = SPACE.sub(" ", raw).strip()
        if text:
            first = start + len(raw) - len(raw.lstrip())
            pdfium.FPDFText_GetLooseCharBox(page, first, byref(box))
            yield _Line(text, number, round(abs(box.top - box.bottom), 1), box.bottom)
        start += len(raw)


def _title(document: pypdfium2.PdfDocument) -> str:
    title = document.get_metadata_value("Title").strip()
    return "" if len(title) > 300 or NO_TITLE.match(title) else title


def _outline(document: pypdfium2.PdfDocument) -> dict[tuple[int, str], int]:
    """The levels of headings, by page and text."""
    levels: dict[tuple[int, str], int] = {}
    for bookmark in document.get_toc():
        destination = bookmark.get_dest()
        index = destination.get_index() if destination else None
        if index is not None:
            levels[index + 1, _comparable(bookmark.get_title())] = min(bookmark.level + 1, 6)
    return levels


def _comparable(text: str) -> str:
    """Without what an outline and a page write differently: numbers, spaces and case."""
    return "".join(character for character in text.casefold() if character.isalpha()) or text


def _without_running(pages: list[list[_Line]]) -> list[_Line]:
    """All lines but headers, footers and page numbers."""
    if len(pages) < FEW_PAGES:
        return [line for page in pages for line in page]
    counts = Counter(key for page in pages for key in {DIGITS.sub("#", line.text) for line in _edges(page)})
    often = max(FEW_PAGES, REPEATED * len(pages))
    running = {key for key, count in counts.items() if count >= often}
    lines: list[_Line] = []
    for page in pages:
        dropped = {id(line) for line in _edges(page) if DIGITS.sub("#", line.text) in running}
        lines += [line for line in page if id(line) not in dropped]
    return lines


def _edges(page: list[_Line]) -> list[_Line]:
    return page[:EDGE_LINES] + page[EDGE_LINES:][-EDGE_LINES:]


def _blocks(lines: list[_Line], outline: dict[tuple[int, str], int]) -> Iterator[Block]:
    body = _body_size(lines)
    sizes = sorted({line.size for line in lines if line.size > body * LARGER}, reverse=True)
    gap = _usual_gap(lines)
    collected: list[_Line] = []
    kind: BlockKind = "paragraph"
    level = 0
    for line in lines:
        line_kind, line_level = _kind(line, body, sizes, outline)
        previous = collected[-1] if collected else None
        goes_on = previous is not None and (
            _same_heading(previous, line, level, line_level, gap)
            if line_kind == "heading" or kind == "heading"
            else line_kind == "paragraph" and _goes_on(previous, line, gap)
        )
        if not goes_on:
            yield from _finish(kind, level, collected)
            collected, kind, level = [], line_kind, line_level
        collected.append(line)
    yield from _finish(kind, level, collected)


def _body_size(lines: Iterable[_Line]) -> float:
    weights: Counter[float] = Counter()
    for line in lines:
        weights[line.size] += len(line.text)
    return weights.most_common(1)[0][0] if weights else 0.0


def _usual_gap(lines: list[_Line]) -> float:
    gaps = [above.bottom - below.bottom for above, below in pairwise(lines)]
    return median([gap for gap in gaps if gap > 1] or [0.0])


def _kind(
    line: _Line, body: float, sizes: list[float], outline: dict[tuple[int, str], int]
) -> tuple[BlockKind, int]:
    if level := outline.get((line.page, _comparable(line.text))):
        return "heading", level
    if line.size > body * LARGER and len(line.text) <= LONGEST_HEADING and any(map(str.isalpha, line.text)):
        return "heading", min(sizes.index(line.size) + 1, 6)
    return ("list_item" if ITEM.match(line.text) else "paragraph"), 0


def _same_heading(above: _Line, below: _Line, level: int, below_level: int, gap: float) -> bool:
    """Whether a heading goes on in the next line."""
    near = 0 < above.bottom - below.bottom <= max(gap, 1.5 * above.size)
    return level == below_level and above.size == below.size and above.page == below.page and near


def _goes_on(above: _Line, below: _Line, gap: float) -> bool:
    if above.page != below.page or below.bottom > above.bottom + 1:  # the next page or column
        return not above.text.endswith(SENTENCE_ENDS) and not below.text[:1].isupper()
    return abs(above.size - below.size) <= 1 and above.bottom - below.bottom <= gap * WIDE_GAP


def _finish(kind: BlockKind, level: int, lines: list[_Line]) -> Iterator[Block]:
    if not lines:
        return
    text = lines[0].text
    for line in lines[1:]:
        if text.endswith(HYPHENS) and line.text[:1].islower():
            text = text[:-1] + line.text
        else:
            text = f"{text} {line.text}"
    if kind == "list_item":
        text = BULLET.sub("- ", text)
    # What is left of hyphens inside a line is pdfium's mark.
    yield Block(
        kind=kind, text=text.replace("\x02", "").replace("\ufffe", ""), level=level, page=lines[0].page
    )
