"""The models by name: which engine answers, and who has to wait.

Every model has a number of slots, answers generated at the same time, and a bounded queue before
them with a deadline: a caller gets a slot, or hears soon that there is none.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from upchatty.engines.client import EngineClient
from upchatty.engines.download import Progress
from upchatty.engines.files import ModelFiles
from upchatty.engines.llama import LlamaServer
from upchatty.errors import EngineFailed, EngineNotReady, QueueFull
from upchatty.metrics import Metrics
from upchatty.settings import ModelSettings, Settings

PROBE_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Slot:
    """The right to have one answer generated.

    Args:
        client: The engine that generates it.
        queue_seconds: How long the caller has waited for it.
    """

    client: EngineClient
    queue_seconds: float


class Model:
    """A model with its slots and its queue.

    Args:
        name: Its name in the settings.
        settings: How it is run.
        engine: The child that runs it, or the client of the server that does.
    """

    def __init__(self, name: str, settings: ModelSettings, engine: LlamaServer | EngineClient) -> None:
        self.name = name
        self._settings = settings
        self._engine = engine
        self._slots = asyncio.Semaphore(settings.slots)
        self.waiting = 0
        self.running = 0

    @property
    def client(self) -> EngineClient:
        """The engine's client.

        Raises:
            EngineNotReady: The engine is being started.
        """
        return self._engine if isinstance(self._engine, EngineClient) else self._engine.client()

    @property
    def context(self) -> int | None:
        """The tokens that one conversation may take, or None where the engine does not say."""
        return self._engine.context if isinstance(self._engine, LlamaServer) else None

    @property
    def restarts(self) -> int:
        """How often an engine that runs here was started again."""
        return self._engine.restarts if isinstance(self._engine, LlamaServer) else 0

    async def start(self) -> None:
        """Start the engine, if it runs here. Raises ModelFileError where it cannot load its model."""
        if isinstance(self._engine, LlamaServer):
            await self._engine.start()

    async def stop(self) -> None:
        """Stop the engine, or close the connections to it."""
        if isinstance(self._engine, LlamaServer):
            await self._engine.stop()
        else:
            await self._engine.close()

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[Slot]:
        """A slot, held until the end of the block.

        Raises:
            EngineNotReady: The engine is being started.
            QueueFull: The queue is full, or the wait took too long.
        """
        _ = self.client  # no use in waiting for an engine that is not there
        asked = time.monotonic()
        await self._acquire()
        self.running += 1
        try:
            yield Slot(self.client, time.monotonic() - asked)
        finally:
            self.running -= 1
            self._slots.release()

    async def _acquire(self) -> None:
        if self._slots.locked() and self.waiting >= self._settings.queue:
            raise QueueFull(model=self.name, problem=f"{self.waiting} requests are waiting already")
        self.waiting += 1
        try:
            async with asyncio.timeout(self._settings.queue_seconds):
                await self._slots.acquire()
        except TimeoutError:
            raise QueueFull(
                model=self.name, problem=f"no slot became free in {self._settings.queue_seconds:g} seconds"
            ) from None
        finally:
            self.waiting -= 1


class Pool:
    """Every model that the settings name.

    Args:
        settings: The settings.
        models: The models, the default among them.
    """

    def __init__(self, settings: Settings, models: dict[str, Model]) -> None:
        self._default = settings.default_model
        self.models = models

    @classmethod
    async def open(cls, settings: Settings, files: ModelFiles, progress: Progress | None = None) -> "Pool":
        """Find or fetch every model's file. No engine is started yet.

        Args:
            settings: The settings.
            files: The model files of this machine.
            progress: Shows downloads.

        Raises:
            ModelFileError, DownloadError, ConfigurationError: A model cannot be had; says why.
        """
        models = {}
        for name, model in settings.model_settings.items():
            models[name] = Model(name, model, await _engine(name, model, files, progress))
        return cls(settings, models)

    def model(self, name: str | None) -> Model:
        """The model of this name, or the default one.

        Raises:
            EngineFailed: The settings name it no longer.
        """
        try:
            return self.models[name or self._default]
        except KeyError:
            raise EngineFailed(
                problem=f"this chatbot's model {name!r} is no longer among the server's models"
            ) from None

    async def start(self) -> None:
        """Start every engine that runs here, the default one first."""
        await self.model(None).start()
        await asyncio.gather(*(model.start() for name, model in self.models.items() if name != self._default))

    async def stop(self) -> None:
        """Stop every engine that runs here."""
        await asyncio.gather(*(model.stop() for model in self.models.values()))

    def measure(self, metrics: Metrics) -> None:
        """Set the gauges to what holds at this moment."""
        for name, model in self.models.items():
            metrics.running.labels(name).set(model.running)
            metrics.waiting.labels(name).set(model.waiting)
            metrics.engine_restarts.labels(name).set(model.restarts)

    async def ready(self) -> bool:
        """Whether the default engine answers."""
        try:
            return await self.model(None).client.answers(PROBE_SECONDS)
        except EngineNotReady:
            return False


async def _engine(
    name: str, model: ModelSettings, files: ModelFiles, progress: Progress | None
) -> LlamaServer | EngineClient:
    if model.url:
        return EngineClient(model.url, model.model or name, model.api_key(name), model.timeout_seconds)
    return LlamaServer(name, model, await files.ensure(name, model, progress))
