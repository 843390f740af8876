"""HTML by lxml; the main content of a web page is found by trafilatura."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from urllib.parse import urldefrag, urljoin, urlsplit

import trafilatura
from lxml import etree
from lxml.html import HtmlElement, HTMLParser, document_fromstring

from upchatty.knowledge.blocks import Block, BlockKind, Reading
from upchatty.knowledge.reading.errors import Unreadable

DEEPEST = 1000  # elements within each other
MOST_LINKS = 10_000
SKIPPED = {
    "script", "style", "noscript", "template", "head", "svg", "math", "iframe", "object", "embed", "canvas",
    "audio", "video", "button", "select", "textarea", "input",
}  # fmt: skip
BESIDE = {"nav", "aside", "footer", "form"}  # what surrounds the main content of a page
MAIN = ("main", "article")  # what says of itself that it is the main content
INLINE = {
    "a", "abbr", "acronym", "b", "bdi", "bdo", "big", "cite", "code", "data", "del", "dfn", "em", "font", "i",
    "img", "ins", "kbd", "label", "mark", "meter", "output", "q", "rp", "rt", "ruby", "s", "samp", "small",
    "span", "strike", "strong", "sub", "sup", "time", "tt", "u", "var", "wbr", "nobr",
}  # fmt: skip
HEADINGS = {f"h{level}": level for level in range(1, 7)}
STRUCTURED = {"table", "ul", "ol", "pre", *HEADINGS}  # a table around these only arranges the page
PERMALINKS = {"¶", "#", "§", "🔗", "\uf0c1"}
SPACE = re.compile(r"\s+")
AROUND_BREAK = re.compile(r" *\n *")
SPACE_RUN = re.compile(r"  +")
HIDDEN = re.compile(r"display\s*:\s*none|visibility\s*:\s*hidden", re.IGNORECASE)
LONG = 40  # characters of a text that hardly occurs twice by chance
MOSTLY = 0.9


@dataclass(frozen=True, slots=True)
class _Found:
    """A block and the element that it comes from."""

    block: Block
    element: HtmlElement


def read_html(
    text: str, *, url: str | None = None, main_content: bool = False, first_row_is_header: bool = False
) -> Reading:
    """A web page.

    Args:
        text: The page.
        url: Where it is; its links are absolute then.
        main_content: Leave out navigation and the like, unless nothing would be left.
        first_row_is_header: Of tables that do not tell their header row.

    Raises:
        Unreadable: It is nested too deeply, or has no text.
    """
    parser = HTMLParser(encoding="utf-8", huge_tree=True, remove_comments=True, remove_pis=True)
    try:
        root = document_fromstring(text.encode("utf-8", "replace"), parser=parser)
    except etree.ParserError:
        raise Unreadable(problem="there is no text in it") from None
    _check_depth(root)
    body = root.find("body")
    walker = _Walker(first_row_is_header)
    walker.walk(body if body is not None else root)
    found = walker.found
    if main_content:
        found = _main_content(text, found) or found
    return Reading(
        title=_title(root), blocks=[one.block for one in found], links=_links(root, url) if url else []
    )


def _check_depth(root: HtmlElement) -> None:
    depth = 0
    for event, _ in etree.iterwalk(root, events=("start", "end")):
        depth += 1 if event == "start" else -1
        if depth > DEEPEST:
            raise Unreadable(problem="it is nested too deeply to be read")


def _title(root: HtmlElement) -> str:
    for path in (".//title", ".//h1"):
        element = root.find(path)
        if element is not None and (title := _inline_text(element)):
            return title
    return ""


def _links(root: HtmlElement, url: str) -> list[str]:
    base = root.find(".//base[@href]")
    start = _absolute(url, base.get("href")) or url if base is not None else url
    links: dict[str, None] = {}
    for element in root.iter("a", "area"):
        if (link := _absolute(start, element.get("href"))) and len(links) < MOST_LINKS:
            links[link] = None
    return list(links)


def _absolute(base: str, reference: str | None) -> str | None:
    if reference is None:
        return None
    try:
        link = urldefrag(urljoin(base, reference.strip())).url
        parts = urlsplit(link)
    except ValueError:
        return None
    return link if parts.scheme in ("http", "https") and parts.hostname else None


def _inline_text(element: HtmlElement) -> str:
    """The text of a heading or a cell, in one line."""
    return SPACE.sub(" ", "".join(_strings(element))).strip()


def _strings(element: HtmlElement) -> Iterator[str]:
    if element.text:
        yield element.text
    for child in element:
        if _is_shown(child):
            if child.tag not in INLINE:
                yield " "
            yield from _strings(child)
            if child.tag not in INLINE:
                yield " "
        if child.tail:
            yield child.tail


def _is_shown(element: HtmlElement) -> bool:
    if not isinstance(element.tag, str) or element.tag in SKIPPED or "hidden" in element.attrib:
        return False
    if element.tag == "a" and (element.text_content().strip() in PERMALINKS):
        return False
    return not HIDDEN.search(element.get("style", ""))


class _Walker:
    """Goes through a page and collects its blocks."""

    def __init__(self, first_row_is_header: bool) -> None:
        self._first_row_is_header = first_row_is_header
        self.found: list[_Found] = []
        self._pieces: list[str] = []
        self._anchor: str | None = None
        self._lists = 0
        self._mark = ""

    def walk(self, element: HtmlElement) -> None:
        """Take an element and all that is in it."""
        self._children(element)
        self._finish(element)

    def _children(self, element: HtmlElement) -> None:
        self._text(element.text)
        for child in element:
            if _is_shown(child):
                self._element(child)
            self._text(child.tail)

    def _element(self, element: HtmlElement) -> None:
        tag = element.tag
        if tag in INLINE:
            self._children(element)
        elif tag == "br":
            self._pieces.append("\n")
        elif tag == "dd":  # in one line with its term
            self._children(element)
            self._finish(element)
        else:
            parent = element.getparent()
            self._finish(element if parent is None else parent)
            self._block(element, tag)

    def _block(self, element: HtmlElement, tag: str) -> None:
        if level := HEADINGS.get(tag):
            self._anchor = _anchor(element) or self._anchor
            self._add("heading", _inline_text(element), element, level=level)
        elif tag == "pre":
            code = element.text_content().strip("\n").rstrip()
            self._add("code", code, element)
        elif tag in ("ul", "ol"):
            self._list(element)
        elif tag == "table" and not any(inner.tag in STRUCTURED for inner in element.iterdescendants()):
            self._table(element)
        elif tag == "dt":
            self._anchor = element.get("id") or self._anchor
            self._children(element)
            self._pieces.append(": ")
        else:
            self.walk(element)

    def _list(self, element: HtmlElement) -> None:
        number = int(start) if (start := element.get("start", "1")).isdecimal() else 1
        self._lists += 1
        for child in element:
            if not _is_shown(child):
                continue
            if child.tag == "li":
                self._mark = f"{number}. " if element.tag == "ol" else "- "
                number += 1
                self.walk(child)
                self._mark = ""
            else:
                self._element(child)
                self._finish(element)
        self._lists -= 1

    def _table(self, table: HtmlElement) -> None:
        header = ""
        rows = list(table.iter("tr"))
        for caption in table.findall("caption"):
            self._add("paragraph", _inline_text(caption), caption)
        for number, row in enumerate(rows):
            cells = [cell for cell in row if cell.tag in ("td", "th")]
            text = table_row(_inline_text(cell) for cell in cells)
            if not text:
                continue
            if not header and len(rows) > 1 and self._is_header(row, cells, first=number == 0):
                header = text
            else:
                self._add("table_row", text, row, header=header)

    def _is_header(self, row: HtmlElement, cells: list[HtmlElement], *, first: bool) -> bool:
        if row.getparent().tag == "thead":
            return True
        return first and (self._first_row_is_header or all(cell.tag == "th" for cell in cells))

    def _text(self, text: str | None) -> None:
        if text:
            self._pieces.append(SPACE.sub(" ", text))

    def _finish(self, element: HtmlElement) -> None:
        """End the paragraph or item that was being collected."""
        text = SPACE_RUN.sub(" ", AROUND_BREAK.sub("\n", "".join(self._pieces))).strip().removesuffix(":\n")
        self._pieces.clear()
        if not text:
            return
        if self._lists:
            text, self._mark = self._mark + text, ""
            self._add("list_item", text, element, level=self._lists - 1)
        else:
            self._add("paragraph", text, element)

    def _add(
        self, kind: BlockKind, text: str, element: HtmlElement, *, level: int = 0, header: str = ""
    ) -> None:
        if text:
            block = Block(kind=kind, text=text, level=level, header=header, anchor=self._anchor)
            self.found.append(_Found(block, element))


def table_row(cells: Iterable[str]) -> str:
    """A table's row as text; empty where all of its cells are."""
    texts = [" ".join(cell.split()) for cell in cells]
    return " | ".join(texts) if any(texts) else ""


def _anchor(heading: HtmlElement) -> str | None:
    """The fragment that leads to a heading: its own, one inside, or that of the section it opens."""
    if own := heading.get("id"):
        return str(own)
    for inner in heading.iterdescendants():
        if found := inner.get("id") or (inner.tag == "a" and inner.get("name")):
            return str(found)
    parent = heading.getparent()
    if parent is not None and parent.tag in ("section", "article", "div") and heading.getprevious() is None:
        return parent.get("id") or None
    return None


def _main_content(text: str, found: list[_Found]) -> list[_Found]:
    """The blocks of the page's main content.

    trafilatura says which texts belong to it. The structure comes from the page itself, so that nothing of
    tables, code and anchors is lost: kept is also what stands among these texts.
    """
    extracted = trafilatura.bare_extraction(text, include_comments=False, favor_recall=True)
    if extracted is None or isinstance(extracted, dict) or extracted.body is None:
        return []
    whole = _squeezed("".join(extracted.body.itertext()))
    pieces = {_squeezed("".join(element.itertext())) for element in extracted.body.iter()}
    matched = {index for index, one in enumerate(found) if _matches(one.block, whole, pieces)}
    if not matched:
        return []
    container = _container([found[index] for index in matched])
    return [
        one
        for index, one in enumerate(found)
        if (index in matched and not _is_beside(one.element)) or _belongs(one, container)
    ]


def _squeezed(text: str) -> str:
    return SPACE.sub("", text)


def _matches(block: Block, whole: str, pieces: set[str]) -> bool:
    text = block.text.replace(" | ", "") if block.kind == "table_row" else block.text
    squeezed = _squeezed(re.sub(r"^(- |\d+\. )", "", text) if block.kind == "list_item" else text)
    return squeezed in pieces or (len(squeezed) >= LONG and squeezed in whole)


def _container(found: list[_Found]) -> HtmlElement | None:
    """The innermost element around nearly all of these blocks; None if that is the whole page."""
    total = sum(len(one.block.text) for one in found)
    weights: dict[HtmlElement, int] = {}
    for one in found:
        for element in one.element.iterancestors():
            weights[element] = weights.get(element, 0) + len(one.block.text)
    enough = [element for element, weight in weights.items() if weight >= MOSTLY * total]
    container = max(enough, key=lambda element: sum(1 for _ in element.iterancestors()))
    if container.tag not in MAIN:
        container = next(container.iterancestors(*MAIN), container)
    return None if container.tag in ("html", "body") else container


def _belongs(one: _Found, container: HtmlElement | None) -> bool:
    if container is None or _is_beside(one.element):
        return False
    if container is not one.element and container not in one.element.iterancestors():
        return False
    linked = sum(len(link.text_content()) for link in one.element.iter("a"))
    return one.block.kind == "heading" or linked <= len(one.block.text) / 2


def _is_beside(element: HtmlElement) -> bool:
    return element.tag in BESIDE or any(ancestor.tag in BESIDE for ancestor in element.iterancestors())
