"""What commands print: tables for people, JSON for programs."""

import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated

import msgspec
from cyclopts import Group, Parameter
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from upchatty.settings import Settings

JSON = Annotated[
    bool, Parameter(name="--json", negative="", show_default=False, help="Print JSON, for programs.")
]
CommonSettings = Annotated[Settings, Parameter(name="*", group=Group("Settings", sort_key=9))]

# On a terminal long cells are folded to its width; for a pipe nothing is cut.
_console = Console(highlight=False, width=None if sys.stdout.isatty() else 10_000)


def print_json(value: object) -> None:
    """Print a value as indented JSON."""
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(value)).decode() + "\n")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print rows under their headings."""
    table = Table(*(Column(name, overflow="fold") for name in columns), box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(Text(_cell(value)) for value in row))  # names are no markup
    with _console.capture() as lines:
        _console.print(table)
    for line in lines.get().splitlines():
        print(line.rstrip())


def print_fields(fields: Mapping[str, object]) -> None:
    """Print one thing, a line for each of its fields."""
    width = max(map(len, fields))
    for name, value in fields.items():
        _console.print(f"{name:<{width}}  {_cell(value)}", markup=False, soft_wrap=True)


def moment(unix_seconds: int | None) -> str:
    """A time for people."""
    if unix_seconds is None:
        return "never"
    return datetime.fromtimestamp(unix_seconds, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _cell(value: object) -> str:
    return "-" if value is None else str(value)
