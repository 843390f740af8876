"""What a document is once it has been read: its title, and its text as blocks that keep their structure."""

from typing import Literal

from msgspec import Struct

BlockKind = Literal["heading", "paragraph", "list_item", "table_row", "code"]


class Block(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A piece of a document that belongs together.

    Args:
        kind: What it is. A table's rows come one by one, each a `table_row`.
        text: Its text, without markup: of a list item with its mark, of a table's row with ` | ` between
            its cells, of code as it stands.
        level: Of a heading, 1 to 6; of a list item, how deep it is nested, from 0.
        header: Of a table's row, the table's header row, written as the row is; empty where it has none.
        page: The page it begins on, from 1, where the format has pages.
        anchor: The fragment that leads to it in its web page, without `#`.
    """

    kind: BlockKind
    text: str
    level: int = 0
    header: str = ""
    page: int | None = None
    anchor: str | None = None


class Reading(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A document that has been read.

    Args:
        title: As the document itself says it; empty where it says none.
        blocks: Its text, in reading order.
        pages: How many pages it has, where the format has pages.
        links: The absolute URLs that a web page links to, in their order, without fragments.
    """

    title: str = ""
    blocks: list[Block] = []
    pages: int | None = None
    links: list[str] = []
