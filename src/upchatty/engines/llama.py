"""llama.cpp as a supervised child process.

A crash in C++ ends the child, not the server: callers get 503 while it is started again.
"""

import asyncio
import json
import os
import secrets
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections import deque
from contextlib import suppress
from pathlib import Path

import psutil
import structlog

from upchatty.engines.client import EngineClient
from upchatty.engines.gguf import text_limits
from upchatty.errors import EngineNotReady, ModelFileError, UpChattyError
from upchatty.settings import ModelSettings

FIRST_PAUSE, LONGEST_PAUSE = 0.25, 30.0  # seconds between a crash and the next start
STABLE_SECONDS = 60.0  # a child that has lived so long starts the back-off anew
STOP_SECONDS = 5.0
MIB = 1024 * 1024
BACKGROUND_NICENESS = 5  # beyond the worker's own, 15 in all
PROMPT_CACHE = 512 * MIB  # what a model keeps of prompts at most
# How long a computing thread spins for the others before it sleeps. OpenMP's own default, milliseconds,
# brings an engine that has to share its cores to a halt; this is enough where it has them to itself.
ENVIRONMENT = {"GOMP_SPINCOUNT": "10000"}
# Embedding has nothing to gain from it, and on a busy machine it loses: 57 ms instead of 5 for a short text.
ENVIRONMENT_FOR_TEXTS = {"GOMP_SPINCOUNT": "0"}

log = structlog.get_logger()


class LlamaServer:
    """One model, run by llama.cpp.

    Args:
        name: The model's name in the settings.
        settings: How it is run.
        path: The GGUF file.
        background: Whether it gives way to everything else on the machine.
    """

    def __init__(self, name: str, settings: ModelSettings, path: Path, *, background: bool = False) -> None:
        self._name = name
        self._settings = settings
        self._path = path
        self._background = background
        self._client: EngineClient | None = None
        self._process: Process | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._complaints: deque[str] = deque(maxlen=20)
        self._prompt_cache = PROMPT_CACHE
        self.restarts = 0
        self.context: int | None = None
        """Tokens that one conversation may take: the setting, or less where the model was made for less."""

    async def start(self, prompt_cache: int = PROMPT_CACHE) -> None:
        """Load the model, and from then on keep it running.

        Args:
            prompt_cache: Bytes that it may keep of prompts.

        Raises:
            ModelFileError: llama.cpp cannot load the file.
        """
        self._prompt_cache = prompt_cache
        await self._spawn()
        self._supervisor = asyncio.create_task(self._supervise())

    async def stop(self) -> None:
        """End the child; it can be started again."""
        supervisor, self._supervisor = self._supervisor, None
        if supervisor:
            supervisor.cancel()
            with suppress(asyncio.CancelledError):
                await supervisor
        await self._end_process()

    def client(self) -> EngineClient:
        """The client of the running child.

        Raises:
            EngineNotReady: It is being started.
        """
        if self._client is None:
            raise EngineNotReady(model=self._name, problem="its engine is being started")
        return self._client

    @property
    def runs(self) -> bool:
        """Whether the model is in memory."""
        return self._client is not None

    def resident_memory(self) -> int:
        """The bytes of memory that the child has in use, its model's file among them."""
        if self._process is None or self._process.returncode is not None:
            return 0
        try:
            return int(psutil.Process(self._process.pid).memory_info().rss)
        except psutil.Error:
            return 0

    async def _spawn(self) -> None:
        token = secrets.token_urlsafe(32)
        self._complaints.clear()
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "upchatty.engines.llama_child",
            stdin=PIPE, stdout=PIPE, stderr=PIPE,
            env=(ENVIRONMENT if self._settings.task == "chat" else ENVIRONMENT_FOR_TEXTS) | os.environ,
            start_new_session=True,  # Ctrl-C reaches the server alone, which lets answers finish first
        )  # fmt: skip
        stdin, stdout, stderr = self._process.stdin, self._process.stdout, self._process.stderr
        assert stdin and stdout and stderr  # they are pipes
        listener = asyncio.create_task(self._listen(stderr))
        stdin.write(json.dumps(self._parameters(token)).encode() + b"\n")
        address = (await stdout.readline()).decode().strip()
        if not address:
            await self._process.wait()
            await listener
            raise ModelFileError(path=self._path, problem=self._complaint())
        client = EngineClient(
            address + "/v1",
            self._name,
            token,
            self._settings.timeout_seconds,
            llama=True,
            # llama.cpp keeps a thread for every idle connection, of which answers can have very many.
            keep_alive=self._settings.task != "chat",
        )
        try:
            self.context = await client.context_length()
        except BaseException:
            client.close()
            self._process.kill()  # a child that loads but does not answer
            raise
        self._client = client
        log.info("engine ready", model=self._name, pid=self._process.pid)

    def _parameters(self, token: str) -> dict[str, object]:
        return {
            "parent": os.getpid(),
            "token": token,
            "path": str(self._path),
            "threads": self._settings.threads or self._threads(),
            "nice": BACKGROUND_NICENESS if self._background else 0,
            "task": self._settings.task,
            "pooling": self._settings.pooling,
            "slots": self._settings.local_slots,
            "context": self._context(),
            "gpu_layers": self._settings.gpu_layers,
            "speculation": self._settings.speculation,
            "prompt_cache_mib": self._prompt_cache // MIB,
        }

    def _threads(self) -> int:
        """One for each core. But a question's embedding is so little work that several threads lose more on a
        busy machine (60 ms instead of 13), where they wait for each other to get a core, than they gain on an
        idle one (8.5 instead of 12.7)."""
        if self._settings.task == "embedding" and not self._background:
            return 1
        return os.cpu_count() or 1

    def _context(self) -> int:
        """Tokens to keep room for. A text is computed at once, which takes memory for the longest one."""
        wanted = self._settings.context
        if self._settings.task == "chat":
            return wanted
        return min(wanted, text_limits(self._path)[1] or wanted)

    async def _supervise(self) -> None:
        pause = FIRST_PAUSE
        while True:
            started = time.monotonic()
            assert self._process  # it was spawned before
            code = await self._process.wait()
            await self._forget_client()
            if time.monotonic() - started > STABLE_SECONDS:
                pause = FIRST_PAUSE
            log.error(
                "engine died", model=self._name, exit_code=code, restart_in=pause, said=self._complaint()
            )
            await asyncio.sleep(pause)
            pause = min(pause * 2, LONGEST_PAUSE)
            self.restarts += 1
            try:
                await self._spawn()
            except (UpChattyError, OSError) as error:
                log.error("engine does not start", model=self._name, problem=str(error))

    async def _forget_client(self) -> None:
        client, self._client = self._client, None
        if client:
            client.close()

    async def _end_process(self) -> None:
        loaded = self._client is not None
        await self._forget_client()
        if self._process is None or self._process.returncode is not None:
            return
        assert self._process.stdin
        self._process.stdin.close()  # the child ends when its pipe does, but does not notice while it loads
        if not loaded:
            self._process.kill()
        try:
            await asyncio.wait_for(self._process.wait(), STOP_SECONDS)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()

    async def _listen(self, stderr: asyncio.StreamReader) -> None:
        """Keep the last lines that the child says, for the sentence when it dies."""
        while line := await _line(stderr):
            said = line.decode(errors="replace").strip()
            self._complaints.append(said)
            log.debug("engine says", model=self._name, line=said)

    def _complaint(self) -> str:
        """The most telling of the child's last lines: the first error, without time and source."""
        errors = [line.partition("error loading model: ")[2] for line in self._complaints]
        for told in [*filter(None, errors), *reversed(self._complaints)]:
            return told
        return "llama.cpp ended without a word"


async def _line(stream: asyncio.StreamReader) -> bytes:
    """The next line, empty at the end; one that is too long to be of use is cut."""
    try:
        return await stream.readline()
    except ValueError:
        return b"...\n"
