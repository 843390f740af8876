"""The figures as Markdown."""

import math
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Goal:
    """Something that was to be reached.

    Attributes:
        what: In words.
        wanted: The bound.
        measured: What was measured.
        least: Whether the bound is a lower one.
        unit: Of both.
    """

    what: str
    wanted: float
    measured: float
    least: bool
    unit: str = ""

    @property
    def met(self) -> bool:
        """Whether it was reached; never when there is no figure."""
        return self.measured >= self.wanted if self.least else self.measured <= self.wanted

    def cells(self) -> list[str]:
        """A row of the table."""
        sign = "≥" if self.least else "≤"
        wanted, measured = (f"{number(value)} {self.unit}".strip() for value in (self.wanted, self.measured))
        return [self.what, f"{sign} {wanted}", measured, "yes" if self.met else "no"]


def number(value: float) -> str:
    """A number with as many digits as it is worth."""
    if math.isnan(value):
        return "–"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, with an empty line after it."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def machine() -> str:
    """The machine in a few words."""
    model = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.split(":", 1)[1] for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0].strip() if names else model
    return f"{len(os.sched_getaffinity(0))} cores ({model}), Python {platform.python_version()}"
