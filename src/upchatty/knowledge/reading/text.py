"""Plain text and Markdown, and the encodings of all text."""

import codecs
import re

from charset_normalizer import from_bytes
from markdown_it import MarkdownIt

from upchatty.knowledge.blocks import Block, Reading
from upchatty.knowledge.reading.errors import Unreadable
from upchatty.knowledge.reading.html import read_html

# The longer ones first: UTF-32's mark begins with that of UTF-16.
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
DECLARED = re.compile(
    rb"""<meta[^>]{0,200}?charset\s*=\s*["']?\s*([\w.:-]+)|<\?xml[^>]*encoding=["']([\w.-]+)""", re.IGNORECASE
)
DECLARED_WITHIN = 4096  # bytes; the HTML standard says 1024, which pages exceed
SAMPLE = 64 * 1024  # bytes from which an encoding is guessed
BLANK_LINES = re.compile(r"\n[^\S\n]*\n\s*")
FRONT_MATTER = re.compile(r"---[ \t]*\n(.*?)\n(?:---|\.\.\.)[ \t]*\n", re.DOTALL)
FRONT_TITLE = re.compile(r"^title:[ \t]*(['\"]?)(.+?)\1[ \t]*$", re.MULTILINE)
NO_TEXT = "it is of a type that is not read: it does not look like text in any known encoding"

markdown = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def decode(content: bytes, media_type: str | None) -> str:
    """The text, with `\\n` between its lines.

    Args:
        content: The bytes.
        media_type: Its `charset` parameter is believed where the bytes fit it.

    Raises:
        Unreadable: It is no text.
    """
    return _decode(content, media_type).replace("\r\n", "\n").replace("\r", "\n")


def _decode(content: bytes, media_type: str | None) -> str:
    for mark, encoding in BYTE_ORDER_MARKS.items():
        if content.startswith(mark):
            return content.decode(encoding, "replace").removeprefix("\ufeff")
    if b"\x00" in content[:SAMPLE]:
        return _without_mark(content)
    for encoding in ("utf-8", *_declared(content, media_type)):
        try:
            return content.decode(encoding)
        except (LookupError, ValueError):
            continue
    guess = from_bytes(content[:SAMPLE]).best()
    if guess is None:
        raise Unreadable(problem=NO_TEXT)
    return content.decode(guess.encoding, "replace")


def _without_mark(content: bytes) -> str:
    """UTF-16 that does not say so has its zeros mostly on one side."""
    zeros = [content[side:SAMPLE:2].count(0) for side in (0, 1)]
    most, least = max(zeros), min(zeros)
    if len(content) % 2 == 0 and most > 10 * least and most > len(content[:SAMPLE]) / 10:
        return content.decode("utf-16-be" if zeros[0] > zeros[1] else "utf-16-le", "replace")
    raise Unreadable(problem=NO_TEXT)


def _declared(content: bytes, media_type: str | None) -> list[str]:
    names = re.findall(r"charset\s*=\s*\"?([\w.:-]+)", media_type or "", re.IGNORECASE)
    if found := DECLARED.search(content[:DECLARED_WITHIN]):
        names.append((found[1] or found[2]).decode("ascii", "replace"))
    return names


def read_text(text: str) -> Reading:
    """Plain text: what blank lines separate are its paragraphs."""
    paragraphs = [paragraph.strip("\n").rstrip() for paragraph in BLANK_LINES.split(text)]
    return Reading(blocks=[Block(kind="paragraph", text=text) for text in paragraphs if text.strip()])


def read_markdown(text: str) -> Reading:
    """Markdown: CommonMark with tables, read as the HTML that it stands for."""
    front_title = ""
    if front := FRONT_MATTER.match(text):
        text = text[front.end() :]
        if found := FRONT_TITLE.search(front[1]):
            front_title = found[2]
    reading = read_html(f"<html><head><title></title></head><body>{markdown.render(text)}</body></html>")
    first = next((block.text for block in reading.blocks if block.kind == "heading" and block.level == 1), "")
    return Reading(title=front_title or first, blocks=reading.blocks)
