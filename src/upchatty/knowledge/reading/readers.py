"""The reading process, seen from the server: started on demand, ended when a document is too much for it."""

import asyncio
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process

import psutil
from msgspec import msgpack

from upchatty.knowledge.blocks import Reading
from upchatty.knowledge.reading.errors import Unreadable
from upchatty.knowledge.reading.frames import LENGTH_BYTES, READY, Result, Task, frame

GIB = 1024**3
START_SECONDS = 60.0  # for the process, on a very busy machine
BROKEN_OFF = (asyncio.IncompleteReadError, ConnectionError)


class Readers:
    """Reads documents, one at a time, for as many callers as there are.

    Args:
        seconds: How long a document may take.
        memory: Bytes of address space that the reading process may have, where the system can limit it.
    """

    def __init__(self, *, seconds: float = 120.0, memory: int = 3 * GIB // 2) -> None:
        self._seconds = seconds
        self._memory = memory
        self._lock = asyncio.Lock()
        self._child: Process | None = None

    async def read(
        self,
        content: bytes,
        *,
        name: str | None,
        media_type: str | None,
        url: str | None = None,
        main_content: bool = False,
    ) -> Reading:
        """Read a document.

        Args:
            content: The file's bytes.
            name: The file's name, which helps to tell its type.
            media_type: What its `Content-Type` says, if anything.
            url: Where it was fetched; relative links are resolved against it.
            main_content: Leave out a web page's navigation and the like.

        Raises:
            Unreadable: There is no text to be had from it.
        """
        task = Task(content=content, name=name, media_type=media_type, url=url, main_content=main_content)
        async with self._lock:
            result = await self._run(task)
        if result.reading is None:
            raise Unreadable(problem=result.problem)
        return result.reading

    async def close(self) -> None:
        """End the process; a further document would start a new one."""
        async with self._lock:
            await self._end_child()

    async def _run(self, task: Task) -> Result:
        done = False
        try:
            child = await self._running_child()
            async with asyncio.timeout(self._seconds):
                result = await _exchange(child, task)
            done = True
        except TimeoutError:
            raise Unreadable(
                problem=f"reading it took longer than {self._seconds:g} seconds; split it into smaller files"
            ) from None
        except BROKEN_OFF:
            raise Unreadable(problem=await self._why_it_died()) from None
        finally:
            # Half a frame may be on its way; a process that has grown large would keep the next short.
            if not done or self._has_grown():
                await self._end_child()
        return result

    async def _running_child(self) -> Process:
        if self._child is None or self._child.returncode is not None:
            self._child = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "upchatty.knowledge.reading.child", str(os.getpid()), str(self._memory),
                stdin=PIPE, stdout=PIPE, stderr=DEVNULL,
                start_new_session=True,  # Ctrl-C reaches the parent alone, which ends it in its own time
            )  # fmt: skip
            assert self._child.stdout  # it is a pipe
            async with asyncio.timeout(START_SECONDS):  # its imports are not the document's fault
                await self._child.stdout.readexactly(len(READY))
        return self._child

    async def _why_it_died(self) -> str:
        code = await self._child.wait() if self._child else 0
        if code == -getattr(signal, "SIGABRT", 6):
            return "reading it takes more memory than a document may have; split it into smaller files"
        return "the program that reads it crashed over it; the file may be damaged"

    def _has_grown(self) -> bool:
        if self._child is None:
            return False
        try:
            return psutil.Process(self._child.pid).memory_info().rss > self._memory // 3
        except psutil.Error:
            return True

    async def _end_child(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        if child.returncode is None:
            try:
                child.kill()
            except ProcessLookupError:
                pass
        if child.stdin:
            child.stdin.close()
        await child.wait()


async def _exchange(child: Process, task: Task) -> Result:
    assert child.stdin and child.stdout  # they are pipes
    child.stdin.write(frame(task))
    await child.stdin.drain()
    length = int.from_bytes(await child.stdout.readexactly(LENGTH_BYTES), "big")
    return msgpack.decode(await child.stdout.readexactly(length), type=Result)
