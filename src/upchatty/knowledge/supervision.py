"""The server's workers: processes that are started when there is something to read, and end when there is
nothing for a while, since each holds an embedding engine in memory."""

import asyncio
import os
import sys
import time
from asyncio.subprocess import PIPE, Process
from contextlib import suppress
from dataclasses import fields

import msgspec
import structlog

from upchatty.errors import StorageUnavailable
from upchatty.knowledge.documents import now
from upchatty.processes import is_gone
from upchatty.settings import ENVIRONMENT_PREFIX, Settings
from upchatty.storage import jobs
from upchatty.storage.database import Database

POLL_SECONDS = 1.0  # between two looks for jobs that this server has not made itself
IDLE_SECONDS = 60.0
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds between a worker's crash and the next start
STABLE_SECONDS = 60.0  # a worker that has lived so long starts the back-off anew
STOP_SECONDS = 3.0

log = structlog.get_logger()


class Supervisor:
    """Starts workers, and ends them with the server.

    Args:
        settings: How many workers there may be; they work with the same settings.
        database: Where the jobs are.
    """

    def __init__(self, settings: Settings, database: Database) -> None:
        self._settings = settings
        self._database = database
        self._workers: dict[Process, float] = {}
        self._ending: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()
        self._pause, self._rests_until = FIRST_PAUSE, 0.0
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Look for work from now on."""
        if self._settings.workers:
            self._task = asyncio.create_task(self._supervise())

    async def stop(self) -> None:
        """End the workers; they give back what they have not done."""
        if self._task:
            self._task.cancel()
            await asyncio.wait([self._task])
        workers = list(self._workers)
        for worker in workers:
            with suppress(ProcessLookupError):
                worker.terminate()
        for worker in workers:
            try:
                await asyncio.wait_for(worker.wait(), STOP_SECONDS)
            except TimeoutError:
                worker.kill()
                await worker.wait()
        if self._ending:
            await asyncio.wait(self._ending)

    def wake(self) -> None:
        """Have what was just added read at once."""
        self._wake.set()

    async def _supervise(self) -> None:
        while True:
            self._wake.clear()
            try:
                await self._look()
            except (StorageUnavailable, OSError) as error:
                log.warning("cannot look for documents to read", problem=str(error))
            with suppress(TimeoutError):
                async with asyncio.timeout(POLL_SECONDS):
                    await self._wake.wait()

    async def _look(self) -> None:
        if gone := [name for name in await jobs.workers(self._database) if is_gone(name)]:
            await jobs.take_over(self._database, gone, now())
        if not await jobs.is_work_waiting(self._database, now()):
            return
        for worker in self._workers:
            if worker.stdin and not worker.stdin.is_closing():
                worker.stdin.write(b"\n")  # "look now"
        if len(self._workers) < self._settings.workers and time.monotonic() >= self._rests_until:
            await self._start_worker()

    async def _start_worker(self) -> None:
        worker = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "upchatty", "worker",
            "--parent", str(os.getpid()), "--idle-seconds", str(IDLE_SECONDS),
            stdin=PIPE,
            stdout=sys.stderr.fileno(),
            env=_environment(self._settings),
            start_new_session=True,  # Ctrl-C reaches the server alone, which ends the worker
        )  # fmt: skip
        self._workers[worker] = time.monotonic()
        ending = asyncio.create_task(self._wait_for(worker))
        self._ending.add(ending)
        ending.add_done_callback(self._ending.discard)

    async def _wait_for(self, worker: Process) -> None:
        code = await worker.wait()
        lived = time.monotonic() - self._workers.pop(worker)
        if code == 0 or (self._task and self._task.done()):
            self._pause = FIRST_PAUSE
            return
        if lived > STABLE_SECONDS:
            self._pause = FIRST_PAUSE
        log.error("worker died", exit_code=code, restart_in=self._pause)
        self._rests_until = time.monotonic() + self._pause
        self._pause = min(self._pause * 2, LONGEST_PAUSE)


def _environment(settings: Settings) -> dict[str, str]:
    """The environment of a worker with these settings. They are no arguments, which everybody can see."""
    names = {field.name for field in fields(Settings)}
    ours = {f"{ENVIRONMENT_PREFIX}{name.upper()}" for name in (*names, "config")}
    inherited = {name: value for name, value in os.environ.items() if name not in ours}
    defaults = Settings()
    given = {name: getattr(settings, name) for name in names - {"admin_key"}}
    return inherited | {
        f"{ENVIRONMENT_PREFIX}{name.upper()}": _as_text(value)
        for name, value in given.items()
        if value != getattr(defaults, name)
    }


def _as_text(value: object) -> str:
    return msgspec.json.encode(value).decode() if isinstance(value, dict) else str(value)
