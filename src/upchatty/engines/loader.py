"""Models that run here, in memory: loaded when they are asked, unloaded when another one needs the room."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress

import structlog

from upchatty.engines.llama import PROMPT_CACHE, LlamaServer
from upchatty.errors import ConfigurationError, EngineNotReady, QueueFull, UpChattyError
from upchatty.settings import ModelSettings

MIB = 1024 * 1024
ENGINE_MEMORY = 64 * MIB  # llama.cpp's own, beside weights and conversations
CACHE_SHARE = 8  # of the limit, one part at most is for each model's cache of prompts
FIRST_PAUSE, LONGEST_PAUSE = 5.0, 60.0  # seconds between two attempts at a file that cannot be loaded
PATIENCE = 3.0  # seconds that a model waits for others to fall idle before these take no more requests
TRY_AGAIN = 5.0  # seconds, for callers who have waited for a model in vain

log = structlog.get_logger()


class Memory:
    """What the models that run here may take together.

    Args:
        limit: Bytes; 0: any number.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.loaders: list[Loader] = []
        self._turn = asyncio.Lock()  # who makes room, and so the only one who unloads
        self._changed = asyncio.Event()
        self._trimming: asyncio.Task[None] | None = None

    @property
    def taken(self) -> int:
        """Bytes in use, or promised to a model that is being loaded."""
        return sum(loader.memory for loader in self.loaders)

    async def make_room(self, loader: "Loader") -> bool:
        """Reserve what a model needs, and unload others for it, the least recently used first.

        A model that is answering stays. Once this one has waited for long, such a model takes no more
        requests, so that a busy one cannot keep the others out for good.

        Args:
            loader: The model's.

        Returns:
            False if nobody waits for the model any more.
        """
        if not loader.reserved and self._reserve(loader):
            return True
        async with self._turn:
            patience_ends = time.monotonic() + PATIENCE
            try:
                while loader.waiting and not loader.loaded:
                    if self._reserve(loader):
                        return True
                    patience = patience_ends - time.monotonic()
                    if patience <= 0:
                        self._drain_for(loader)
                    if not await self._unload_idle():
                        await self._change(patience if patience > 0 else None)
                return loader.loaded
            finally:
                for other in self.loaders:
                    other.draining = False

    def changed(self) -> None:
        """Tell that a model may have become idle, or is not waited for any more."""
        self._changed.set()
        if self.limit and self._trimming is None and self._is_over():
            self._trimming = asyncio.create_task(self._trim())

    async def stop(self) -> None:
        """Unload nothing any more."""
        if self._trimming:
            self._trimming.cancel()
            await asyncio.wait([self._trimming])

    def _reserve(self, loader: "Loader") -> bool:
        """Reserve what a model needs if there is room for it. One that is too large for the limit gets all
        of it, for then it turns out what it really takes."""
        need = self._need_of(loader)
        if self.limit and self.taken + need > self.limit:
            return False
        loader.reserved = need
        return True

    def _need_of(self, loader: "Loader") -> int:
        need = loader.need + self.cache_for(loader)
        return min(need, self.limit) if self.limit else need

    def cache_for(self, loader: "Loader") -> int:
        """Bytes that a model may keep of prompts."""
        if not loader.keeps_prompts:
            return 0
        if not self.limit:
            return PROMPT_CACHE
        return max(0, min(PROMPT_CACHE, self.limit // CACHE_SHARE, self.limit - loader.need))

    async def _unload_idle(self) -> bool:
        """Unload the least recently used of the models that do nothing; False if there is none."""
        for loader in self._by_last_use():
            if loader.is_idle:
                await loader.unload()
                return True
        return False

    async def _change(self, seconds: float | None) -> None:
        self._changed.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()

    def _drain_for(self, loader: "Loader") -> None:
        missing = self.taken + self._need_of(loader) - self.limit
        for other in self._by_last_use():
            if missing > 0 and other.loaded:
                other.draining = True
                missing -= other.memory

    def _is_over(self) -> bool:
        loaded = [loader for loader in self.loaders if loader.loaded]
        return len(loaded) > 1 and any(loader.is_idle for loader in loaded) and self.taken > self.limit

    async def _trim(self) -> None:
        """Unload what has grown beyond the limit; the last one may stay."""
        try:
            async with self._turn:
                while self._is_over() and await self._unload_idle():
                    pass
        finally:
            self._trimming = None

    def _by_last_use(self) -> Iterable["Loader"]:
        return sorted(self.loaders, key=lambda loader: loader.used_at)


class Loader:
    """One model that runs here.

    Args:
        name: Its name in the settings.
        settings: How it is run.
        server: Its engine.
        memory: What it shares with the others.
        fetch: Finds or fetches its file, and says how many bytes weights and conversations take at least.
    """

    def __init__(
        self,
        name: str,
        settings: ModelSettings,
        server: LlamaServer,
        memory: Memory,
        fetch: Callable[[], Awaitable[int]],
    ) -> None:
        self._name = name
        self._settings = settings
        self.server = server
        self._memory = memory
        self._fetch: Callable[[], Awaitable[int]] | None = fetch
        memory.loaders.append(self)
        self.need = 0
        """Bytes that it takes without a cache of prompts: estimated, and measured once it was loaded."""
        self.reserved = 0
        """Bytes that are kept for it; 0: it is not in memory."""
        self.loaded = False
        self.draining = False
        """Whether it takes no more requests, since another model needs its room."""
        self.waiting = 0
        """Requests that wait until it is loaded."""
        self.used_at = 0.0
        self._least = 0
        self._users = 0
        self._task: asyncio.Task[None] | None = None
        self._problem = ""
        self._pause, self._rests_until = FIRST_PAUSE, 0.0
        self._was_loaded = False

    @property
    def is_idle(self) -> bool:
        """Whether nothing would be lost if it were unloaded."""
        return self.loaded and not self._users and (not self.waiting or self.draining)

    @property
    def is_away(self) -> bool:
        """Whether it is not in memory, but will be loaded when it is asked."""
        return self._was_loaded and not self.loaded and not self._problem

    @property
    def memory(self) -> int:
        """Bytes that it takes, or that are kept for it."""
        return max(self.reserved, self.server.resident_memory()) if self.reserved else 0

    @property
    def keeps_prompts(self) -> bool:
        """Whether its engine gets the quicker the more it remembers."""
        return self._settings.task == "chat"

    async def fetch(self) -> None:
        """Have the model's file, and know what it takes.

        Raises:
            ModelFileError, DownloadError, ConfigurationError: It cannot be had.
        """
        if self._fetch:
            self._least = await self._fetch()
            self.need = self._least + ENGINE_MEMORY
            self._fetch = None

    def check_size(self) -> None:
        """Raise ConfigurationError if the model certainly takes more memory than the limit allows."""
        if self._memory.limit and self._least > self._memory.limit:
            raise self._too_large(self._least)

    async def start(self) -> None:
        """Load the model.

        Raises:
            ModelFileError: llama.cpp cannot load the file.
            ConfigurationError: It takes more memory than the limit allows.
        """
        self.waiting += 1
        try:
            await asyncio.shield(self._loading())
        finally:
            self.waiting -= 1

    async def hold(self, deadline: float) -> None:
        """Wait until the model is loaded; it stays until it is released.

        Args:
            deadline: Until when, by the monotonic clock.

        Raises:
            Unavailable: It cannot be loaded, at least not until then, or too many requests wait for it.
        """
        if not self._takes_requests:
            await self._wait(deadline)
        self._users += 1
        self.used_at = time.monotonic()

    def release(self) -> None:
        """End what `hold` began."""
        self._users -= 1
        self.used_at = time.monotonic()
        if not self._users:
            self._memory.changed()

    async def unload(self) -> None:
        """End the engine, and free its memory."""
        self.loaded = False
        freed = self.server.resident_memory()
        await self.server.stop()
        self.reserved = 0
        log.info("model unloaded", model=self._name, freed_mib=freed // MIB, **self._figures())

    async def stop(self) -> None:
        """Load nothing any more."""
        if self._task:
            self._task.cancel()
            await asyncio.wait([self._task])
        await self._memory.stop()

    @property
    def _takes_requests(self) -> bool:
        return self.loaded and not self.draining

    async def _wait(self, deadline: float) -> None:
        if self.waiting + self._users >= self._settings.local_slots + self._settings.queue:
            raise QueueFull(model=self._name, problem=f"{self.waiting} requests are waiting already")
        patience = max(0.0, deadline - time.monotonic())
        self.waiting += 1
        try:
            async with asyncio.timeout(patience):
                while not self._takes_requests:
                    self._check_well()
                    with suppress(UpChattyError, OSError):  # which are told above
                        await asyncio.shield(self._loading())
        except TimeoutError:
            what = "loaded" if self.reserved else "given memory, which other models are using,"
            raise EngineNotReady(
                model=self._name,
                problem=f"it could not be {what} within {patience:.3g} seconds",
                retry_after=TRY_AGAIN,
            ) from None
        finally:
            self.waiting -= 1
            if not self.waiting:
                self._memory.changed()

    def _check_well(self) -> None:
        """Raise EngineNotReady while it is no use to load the model."""
        rest = self._rests_until - time.monotonic()
        if rest > 0:
            raise EngineNotReady(model=self._name, problem=self._problem, retry_after=rest)

    def _loading(self) -> "asyncio.Task[None]":
        """What loads the model, one for all who wait."""
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._load())
            self._task.add_done_callback(_look_at)
        return self._task

    async def _load(self) -> None:
        try:
            await self.fetch()
            self.check_size()
            if not await self._memory.make_room(self) or self.loaded:
                return
            started = time.monotonic()
            await self.server.start(self._memory.cache_for(self))
            self._measure()
        except (UpChattyError, OSError) as error:
            await self.server.stop()
            self.reserved = 0
            self._rest_after(error)
            self._memory.changed()
            raise
        self.loaded = self._was_loaded = True
        self._problem, self._pause = "", FIRST_PAUSE
        seconds = round(time.monotonic() - started, 1)
        log.info(
            "model loaded",
            model=self._name,
            seconds=seconds,
            memory_mib=self.server.resident_memory() // MIB,
            **self._figures(),
        )
        self._memory.changed()

    def _measure(self) -> None:
        limit, measured = self._memory.limit, self.server.resident_memory()
        if limit and measured > limit:
            self._least = measured  # which is not tried again
            raise self._too_large(measured)
        self.need = measured or self.need
        self.reserved = self.need + self._memory.cache_for(self)

    def _too_large(self, size: int) -> ConfigurationError:
        name = self._name
        return ConfigurationError(
            setting="models_memory",
            problem=f"the model {name!r} takes {size // MIB} MiB, and {self._memory.limit // MIB} MiB are "
            f"allowed; allow more, or lower models.{name}.slots or models.{name}.context",
        )

    def _rest_after(self, error: Exception) -> None:
        """Let the model rest after it could not be loaded."""
        said = (
            "it takes more memory than models_memory allows"
            if isinstance(error, ConfigurationError)
            else "it cannot be loaded"
        )
        self._problem = f"{said}; the server's log says more"
        self._rests_until = time.monotonic() + self._pause
        log.error("model not loaded", model=self._name, problem=str(error), again_in=self._pause)
        self._pause = min(self._pause * 2, LONGEST_PAUSE)

    def _figures(self) -> dict[str, int]:
        """Of all the models together, for the log."""
        limit = self._memory.limit
        return {"taken_mib": self._memory.taken // MIB, "limit_mib": limit // MIB} if limit else {}


def _look_at(task: "asyncio.Task[None]") -> None:
    """Take note of how a task has ended, which asyncio wants even where nobody waits for it any more."""
    if not task.cancelled():
        task.exception()
