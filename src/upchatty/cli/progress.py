"""Show a download: a bar on a terminal, a few plain lines in a log."""

import time

from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

LINE_PERCENT = 10
LINE_SECONDS = 5.0


class RichProgress:
    """Shows a download on stderr; for `upchatty.engines.download.Progress`.

    Args:
        console: Where to show it instead.
    """

    def __init__(self, console: Console | None = None) -> None:
        console = console or Console(stderr=True)
        self._view = _Bar(console) if console.is_terminal else _Lines(console)

    def start(self, total: int | None, done: int, label: str) -> None:
        self._view.start(total, done, label)

    def advance(self, n: int) -> None:
        self._view.advance(n)

    def finish(self) -> None:
        self._view.finish()


class _Bar:
    """A bar with size, speed and the time that is left."""

    def __init__(self, console: Console) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=console)
        self._task: TaskID | None = None

    def start(self, total: int | None, done: int, label: str) -> None:
        self._forget()  # begun anew: speed and time left start over, too
        self._task = self._progress.add_task(label, total=total, completed=done)
        self._progress.start()

    def advance(self, n: int) -> None:
        if self._task is not None:
            self._progress.advance(self._task, n)

    def finish(self) -> None:
        self._progress.stop()
        self._forget()

    def _forget(self) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._task = None


class _Lines:
    """A line for every tenth of the file; for every five seconds where its size is not known."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._label = ""
        self._total: int | None = None
        self._done = 0
        self._last_percent = 0
        self._last_time = 0.0

    def start(self, total: int | None, done: int, label: str) -> None:
        self._label, self._total, self._done = label, total, done
        self._print()

    def advance(self, n: int) -> None:
        self._done += n
        if self._total:
            due = self._done >= self._total or self._percent >= self._last_percent + LINE_PERCENT
        else:
            due = time.monotonic() >= self._last_time + LINE_SECONDS
        if due:
            self._print()

    def finish(self) -> None:
        pass

    @property
    def _percent(self) -> int:
        return 100 * self._done // self._total if self._total else 0

    def _print(self) -> None:
        self._last_percent, self._last_time = self._percent, time.monotonic()
        share = f"{self._percent}% of {decimal(self._total)}" if self._total else decimal(self._done)
        self._console.print(f"{self._label}: {share}", highlight=False, markup=False, soft_wrap=True)
