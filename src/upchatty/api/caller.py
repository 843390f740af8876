"""Noticing at once that the caller has gone away."""

import asyncio
from collections.abc import Callable
from types import TracebackType

from litestar.types import Scope

WhenLost = set[Callable[[], None]]
WHEN_LOST = "when_lost"
"""Under this name a request's state has the set of what the server calls when the connection is lost."""


class CallerLeft(Exception):
    """The caller has gone away."""


class CallerWatch:
    """A block that is cancelled when the caller disconnects, and then ends with CallerLeft.

    Args:
        scope: The request's.
    """

    def __init__(self, scope: Scope) -> None:
        self._when_lost: WhenLost = scope["state"][WHEN_LOST]
        self._watched: asyncio.Task[None] | None = None
        self._gone = False

    def __enter__(self) -> None:
        self._watched = asyncio.current_task()
        self._when_lost.add(self._leave)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._when_lost.discard(self._leave)
        if self._gone and self._watched:
            self._watched.uncancel()
            if kind is asyncio.CancelledError:
                raise CallerLeft from None

    def _leave(self) -> None:
        self._gone = True
        assert self._watched
        self._watched.cancel()
