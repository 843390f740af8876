"""CSV and JSON: rows with their header, and objects as lines of `key: value`."""

import csv
from collections.abc import Iterable, Iterator

import msgspec

from upchatty.knowledge.blocks import Block, Reading
from upchatty.knowledge.reading.errors import Unreadable
from upchatty.knowledge.reading.html import table_row

MOST_CELLS = 5_000_000  # of one table
SNIFFED = 16 * 1024  # characters from which a table's separator is guessed
DEEPEST_HEADING = 6
BIGGEST_CELL = 10_000_000

JSON = object  # what JSON can hold: see https://www.rfc-editor.org/rfc/rfc8259


def read_table(text: str) -> Reading:
    """CSV or TSV, whatever separates its cells; the first row is the header."""
    csv.field_size_limit(BIGGEST_CELL)
    try:
        dialect: type[csv.Dialect] = csv.Sniffer().sniff(text[:SNIFFED], delimiters=",;\t|")
    except csv.Error:
        dialect = csv.excel_tab if "\t" in text[:SNIFFED] else csv.excel
    try:
        return Reading(blocks=list(rows(csv.reader(text.splitlines(keepends=True), dialect))))
    except csv.Error as error:
        raise Unreadable(problem=f"the table is damaged: {error}") from None


def rows(table: Iterable[list[str]]) -> Iterator[Block]:
    """A table's rows, each with the first one as its header; the header itself where it is all there is."""
    header, cells, has_rows = "", 0, False
    for row in table:
        cells += len(row)
        if cells > MOST_CELLS:
            raise Unreadable(problem=f"a table of it has more than {MOST_CELLS:,} cells; split it")
        text = table_row(row)
        if not header:
            header = text
        elif text:
            has_rows = True
            yield Block(kind="table_row", text=text, header=header)
    if header and not has_rows:
        yield Block(kind="table_row", text=header)


def read_json(text: str) -> Reading:
    """JSON; several values, one a line, are taken too."""
    try:
        value: JSON = msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        try:
            return read_json_lines(text)
        except Unreadable:
            raise Unreadable(problem=f"it is not valid JSON: {error}") from None
    title = value.get("title") if isinstance(value, dict) else None
    return Reading(title=title if isinstance(title, str) else "", blocks=list(_value(value, "", 0)))


def read_json_lines(text: str) -> Reading:
    """JSON lines: https://jsonlines.org/"""
    values: list[JSON] = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                values.append(msgspec.json.decode(line))
            except msgspec.DecodeError as error:
                raise Unreadable(problem=f"line {number} is not valid JSON: {error}") from None
    return Reading(blocks=list(_value(values, "", 0)))


def _value(value: JSON, key: str, depth: int) -> Iterator[Block]:
    """The blocks of a value; its key is the heading above them."""
    if key:
        yield Block(kind="heading", text=key, level=min(depth, DEEPEST_HEADING))
    if isinstance(value, dict):
        yield from _object(value, depth)
    elif isinstance(value, list):
        yield from _array(value, key, depth)
    elif text := _scalar(value):
        yield Block(kind="paragraph", text=text)


def _object(value: dict[str, JSON], depth: int) -> Iterator[Block]:
    lines = [f"{key}: {_scalar(inner)}" for key, inner in value.items() if _is_scalar(inner)]
    if lines:
        yield Block(kind="paragraph", text="\n".join(lines))
    for key, inner in value.items():
        if not _is_scalar(inner) and inner:
            yield from _value(inner, key or '""', depth + 1)


def _array(values: list[JSON], key: str, depth: int) -> Iterator[Block]:
    objects = [value for value in values if isinstance(value, dict)]
    if len(objects) == len(values) and all(_is_scalar(cell) for one in objects for cell in one.values()):
        keys = list(dict.fromkeys(name for one in objects for name in one))
        if len(keys) * len(objects) > MOST_CELLS:
            raise Unreadable(problem=f"a table of it has more than {MOST_CELLS:,} cells; split it")
        header = table_row(keys)
        for one in objects:
            if text := table_row(_scalar(one.get(name)) for name in keys):
                yield Block(kind="table_row", text=text, header=header)
        return
    for number, value in enumerate(values, 1):
        if _is_scalar(value):
            yield Block(kind="list_item", text=f"- {_scalar(value)}")
        else:
            yield from _value(value, f"{key} {number}".strip(), depth + 1)


def _is_scalar(value: JSON) -> bool:
    return not isinstance(value, dict | list)


def _scalar(value: JSON) -> str:
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)
