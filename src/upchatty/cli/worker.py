"""`upchatty worker`: reads documents, beside a server or started by it."""

import asyncio
import signal
from typing import Annotated

import uvloop
from cyclopts import Parameter

from upchatty.app import open_worker
from upchatty.cli.output import CommonSettings
from upchatty.cli.progress import RichProgress
from upchatty.logs import configure_logs
from upchatty.processes import die_with, give_way
from upchatty.settings import Settings

NICENESS = 10  # reading documents gives way to answering
Hidden = Parameter(show=False)


def worker(
    *,
    once: Annotated[bool, Parameter(negative="")] = False,
    parent: Annotated[int | None, Hidden] = None,
    idle_seconds: Annotated[float | None, Hidden] = None,
    settings: CommonSettings = Settings(),
) -> None:
    """Read documents, until SIGTERM or Ctrl-C. The server does so by itself; workers beside it, on this
    machine or on others with the same PostgreSQL, read more at a time.

    Args:
        once: End when nothing is left to read.
        parent: The server that has started it, and wakes it through standard input.
        idle_seconds: End when there was nothing to read for so long.
    """
    configure_logs(settings)
    give_way(NICENESS)
    uvloop.run(_work(settings, parent, 0.0 if once else idle_seconds))


async def _work(settings: Settings, parent: int | None, idle_seconds: float | None) -> None:
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task  # this is one
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, task.cancel)
    try:
        async with open_worker(settings, RichProgress()) as opened:
            if parent is not None:
                die_with(parent, lambda: loop.call_soon_threadsafe(opened.wake))
            await opened.run(idle_seconds)
    except asyncio.CancelledError:
        pass  # as it was told to
