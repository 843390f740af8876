"""Noticing at once that the caller has gone away."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from types import TracebackType

from litestar.types import Receive


class CallerWatch:
    """A block that is cancelled when the caller disconnects; the cancellation ends with the block.

    Args:
        receive: The request's ASGI channel, its body read already.
        meanwhile: Called now and then while the caller is there; says in how many seconds again.
    """

    def __init__(self, receive: Receive, meanwhile: Callable[[], Awaitable[float]] | None = None) -> None:
        self._receive = receive
        self._meanwhile = meanwhile
        self._watch: asyncio.Task[None] | None = None
        self._watched: asyncio.Task[None] | None = None
        self.gone = False

    async def __aenter__(self) -> "CallerWatch":
        self._watched = asyncio.current_task()
        self._watch = asyncio.create_task(self._run())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        assert self._watch and self._watched
        self._watch.cancel()
        if not self.gone:
            return False
        self._watched.uncancel()
        return kind is asyncio.CancelledError

    async def _run(self) -> None:
        while not self.gone:
            pause = await self._meanwhile() if self._meanwhile else None
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    self.gone = (await self._receive())["type"] == "http.disconnect"
        assert self._watched
        self._watched.cancel()
