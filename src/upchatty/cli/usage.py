"""`upchatty usage`"""

import asyncio
import sys
from collections.abc import Sequence
from typing import Annotated, NamedTuple

from cyclopts import Parameter
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from upchatty.api.usage import UsagePage
from upchatty.chat.usage import Percentiles, Report, UsageFigures, report, selection
from upchatty.cli.administration import administration
from upchatty.cli.output import JSON, CommonSettings, print_json
from upchatty.settings import Settings
from upchatty.storage.usage import By

FROM, TO = "--from", "--to"
LEAST_BAR, MOST_BAR = 10, 50  # cells
LONGEST_NAME = 30  # cells of a name, where there is a chart
GAP = 2
EIGHTHS = " ▏▎▍▌▋▊▉"


def usage(
    *,
    start: Annotated[str | None, Parameter(name=FROM)] = None,
    end: Annotated[str | None, Parameter(name=TO)] = None,
    by: By = "day",
    chatbot: Annotated[str, Parameter(show_default=False)] = "",
    key: Annotated[str, Parameter(show_default=False)] = "",
    model: Annotated[str, Parameter(show_default=False)] = "",
    chart: Annotated[bool | None, Parameter(show_default=False)] = None,
    json: JSON = False,
    settings: CommonSettings = Settings(),
) -> None:
    """Show what was used: requests, errors, tokens, and how long answers took.

    FIRST and DURATION are the seconds to the first token and to the end, which half of the requests and 95 of
    100 did not exceed. --json has more figures.

    Args:
        start: The beginning: 2030-12-31, a day of UTC; 2030-12-31T12:00:00Z; or unix seconds. Absent: 30 days
            before the end.
        end: The end, itself excluded, in the same formats; a plain day is included. Absent: now.
        by: What the rows are.
        chatbot: Only what this chatbot answered, bot_…
        key: Only what this key asked, by its id, key_…
        model: Only what this model answered.
        chart: Draw the tokens of each row as a bar, beside as many columns as there is room for. Without
            either flag: on a terminal, but not into a pipe, which gets every column.
    """
    selected = selection(start, end, start_name=FROM, end_name=TO, chatbot=chatbot, key=key, model=model)

    async def run() -> Report:
        async with administration(settings) as opened:
            return await report(opened.database, by, selected, start_name=FROM)

    found = asyncio.run(run())
    if json:
        print_json(UsagePage(data=found.rows, has_more=False, total=found.total))
        return
    console = Console(highlight=False)
    if console.is_terminal if chart is None else chart:
        _print(_charted(found, by, console))
    else:
        _print(_columns(found, by))


class _Column(NamedTuple):
    """A column of the table; the cells end with the total's."""

    title: str
    cells: Sequence[str]
    rank: int = 0
    """The columns of the highest rank are left out first where there is no room; never those of rank 0."""
    is_number: bool = True

    @property
    def width(self) -> int:
        return max(map(cell_len, (self.title, *self.cells)))


def _columns(found: Report, by: By) -> list[_Column]:
    rows = [*found.rows, found.total]
    return [
        *_labels(found.rows, by),
        _Column("REQUESTS", [str(row.requests) for row in rows]),
        _Column("ERRORS", [str(row.errors) for row in rows], rank=1),
        _Column("CANCELLED", [str(row.cancelled) for row in rows], rank=5),
        _Column("PROMPT", [str(row.prompt_tokens) for row in rows], rank=4),
        _Column("CACHED", [str(row.cached_tokens) for row in rows], rank=7),
        _Column("COMPLETION", [str(row.completion_tokens) for row in rows], rank=4),
        _Column("FIRST", [_seconds(row.first_token_ms) for row in rows], rank=2),
        _Column("DURATION", [_seconds(row.duration_ms) for row in rows], rank=3),
        _Column("TOKENS", [str(row.total_tokens) for row in rows]),
    ]


def _labels(rows: Sequence[UsageFigures], by: By) -> list[_Column]:
    if by == "day":
        return [_Column("DAY", [*(str(row.day) for row in rows), "total"], is_number=False)]
    ids = [str(row.chatbot or row.key) for row in rows]
    names = [_printable(row.name or "-") for row in rows]
    return [
        _Column("NAME", [*names, "total"], is_number=False),
        _Column("ID", [*ids, "-"], rank=6, is_number=False),
    ]


def _printable(name: str) -> str:
    return "".join(character if character.isprintable() else " " for character in name)


def _seconds(times: Percentiles) -> str:
    """The median and the 95th percentile."""
    if times.p50 is None or times.p95 is None:
        return "-"
    return f"{times.p50 / 1000:.2f}/{times.p95 / 1000:.2f}"


def _charted(found: Report, by: By, console: Console) -> list[_Column]:
    """The columns that fit beside a chart, and the chart."""
    columns = [_shortened(column) if column.title == "NAME" else column for column in _columns(found, by)]
    while _room(columns, console.width) < LEAST_BAR and (rank := max(column.rank for column in columns)):
        columns = [column for column in columns if column.rank != rank]
    cells = min(max(_room(columns, console.width), LEAST_BAR), MOST_BAR)
    tokens = [row.total_tokens for row in found.rows]
    most = max(tokens, default=0)
    bars = [
        _bar(cells * count / most if most else 0.0, ascii_only=console.options.ascii_only) for count in tokens
    ]
    return [*columns, _Column("", [*bars, ""], is_number=False)]


def _shortened(column: _Column) -> _Column:
    cells = []
    for cell in column.cells:
        text = Text(cell)
        text.truncate(LONGEST_NAME, overflow="ellipsis")
        cells.append(text.plain)
    return column._replace(cells=cells)


def _room(columns: Sequence[_Column], width: int) -> int:
    """The cells that are left beside the columns."""
    return width - sum(column.width + GAP for column in columns)


def _bar(cells: float, *, ascii_only: bool) -> str:
    """A bar of so many cells, to an eighth of one; what is not nothing can be seen."""
    if ascii_only:
        return "#" * max(round(cells), cells > 0)
    whole, eighths = divmod(max(round(cells * 8), cells > 0), 8)
    return ("█" * whole + EIGHTHS[eighths]).rstrip()


def _print(columns: Sequence[_Column]) -> None:
    """Print the table, each row on a line of its own whatever the terminal's width, numbers to the right."""
    table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0))
    for column in columns:
        table.add_column(column.title, justify="right" if column.is_number else "left", no_wrap=True)
    for row in zip(*(column.cells for column in columns), strict=True):
        table.add_row(*map(Text, row))
    console = Console(highlight=False, width=sum(column.width + GAP for column in columns))
    with console.capture() as captured:
        console.print(table)
    encoding = sys.stdout.encoding or "utf-8"
    for line in captured.get().splitlines():
        print(line.rstrip().encode(encoding, "replace").decode(encoding))
