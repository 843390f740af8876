"""The models by name."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

from upchatty.engines.client import EngineClient
from upchatty.engines.download import Progress
from upchatty.engines.embedding import EmbeddingModel, Reranker
from upchatty.engines.files import ModelFiles
from upchatty.engines.gguf import least_memory
from upchatty.engines.llama import LlamaServer
from upchatty.engines.loader import Loader, Memory
from upchatty.engines.model import Model
from upchatty.engines.replica import Replica
from upchatty.errors import EngineFailed
from upchatty.metrics import Metrics, ModelMetrics
from upchatty.settings import MINILM, ModelSettings, Settings

PROBE_SECONDS = 2.0


class Pool:
    """Every model that the settings name.

    Args:
        settings: The settings.
        models: The models, the default among them.
        files: The model files of this machine.
    """

    def __init__(self, settings: Settings, models: dict[str, Model], files: ModelFiles) -> None:
        self._default = settings.default_model
        self.models = models
        self.embedding = (
            EmbeddingModel(models[settings.embedding_model], files) if settings.embedding_model else None
        )
        """What makes vectors of texts; None: documents are searched by their words only."""
        self.reranker = Reranker(models[settings.reranker]) if settings.reranker else None
        """What puts passages into their final order; None: nothing does."""

    @classmethod
    async def open(
        cls, settings: Settings, files: ModelFiles, metrics: Metrics, progress: Progress | None = None
    ) -> "Pool":
        """Find or fetch every model's file. No engine is started yet.

        Args:
            settings: The settings.
            files: The model files of this machine.
            metrics: Counts what happens to the models.
            progress: Shows downloads.

        Raises:
            ModelFileError, DownloadError, ConfigurationError: A model cannot be had, or takes more memory
                than it may; says why.
        """
        models, memory = {}, Memory(settings.models_memory_bytes)
        for name, model in settings.model_settings.items():
            models[name] = opened = open_model(
                name, model, metrics.of(name), memory=memory, files=files, progress=progress
            )
            # The built-in embedding model is fetched for the first document: many servers never have one.
            if opened.loader and model is not MINILM:
                await opened.loader.fetch()
                if name in settings.models or name == settings.default_model:
                    opened.loader.check_size()  # of what somebody wants
        return cls(settings, models, files)

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

    def with_fallbacks(self, model: Model) -> list[Model]:
        """A model, then those that answer where it cannot."""
        models = [model]
        while (name := models[-1].settings.fallback) and (following := self.models[name]) not in models:
            models.append(following)
        return models

    async def start(self) -> None:
        """Load the default model, if it runs here; the others are loaded when they are asked."""
        await self.model(None).start()

    def preload(self) -> None:
        """Load in the background what searches need, so that the first one does not wait for it."""
        for model in (self.embedding, self.reranker):
            if model:
                model.preload()

    async def stop(self) -> None:
        """Stop every engine that runs here."""
        await asyncio.gather(*(model.stop() for model in self.models.values()))

    def measure(self, metrics: Metrics) -> None:
        """Set the gauges to what holds at this moment."""
        for name, model in self.models.items():
            metrics.running.labels(name).set(model.running)
            metrics.waiting.labels(name).set(model.waiting)
            metrics.engine_restarts.labels(name).set(model.restarts)
            if model.local:
                metrics.loaded.labels(name).set(model.local.runs)
            for replica in model.replicas:
                metrics.replica_running.labels(name, replica.name).set(replica.running)
                metrics.replica_open.labels(name, replica.name).set(replica.is_set_aside)

    async def ready(self) -> bool:
        """Whether the default engine answers, or will once it is loaded again for a request."""
        return await self.model(None).answers(PROBE_SECONDS)


@asynccontextmanager
async def open_embedding(
    settings: Settings, files: ModelFiles, *, background: bool = False, progress: Progress | None = None
) -> AsyncIterator[EmbeddingModel | None]:
    """The embedding model alone, for a process that needs no other; None where the settings name none.
    Its engine is started when it is asked.

    Args:
        settings: The settings.
        files: The model files of this machine.
        background: Whether an engine that runs here gives way to everything else on the machine.
        progress: Shows a download.

    Raises:
        ModelFileError, DownloadError, ConfigurationError: Its file cannot be had; says why.
    """
    if not (name := settings.embedding_model):
        yield None
        return
    model = open_model(
        name,
        settings.model_settings[name],
        ModelMetrics(),
        memory=Memory(0),
        files=files,
        progress=progress,
        background=background,
    )
    try:
        if model.loader:
            await model.loader.fetch()
        yield EmbeddingModel(model, files)
    finally:
        await model.stop()


def open_model(
    name: str,
    settings: ModelSettings,
    metrics: ModelMetrics,
    *,
    memory: Memory,
    files: ModelFiles,
    progress: Progress | None = None,
    background: bool = False,
) -> Model:
    """A model with its replicas; its file may have to be fetched yet.

    Args:
        name: Its name in the settings.
        settings: How it is run.
        metrics: Counts what happens to it.
        memory: What it shares with the others.
        files: The model files of this machine.
        progress: Shows a download.
        background: Whether an engine that runs here gives way to everything else on the machine.

    Raises:
        ConfigurationError: The settings name no file, or no key.
    """
    model = Model(name, settings, metrics)
    if path := files.cached(settings):

        async def fetch() -> int:
            file = await files.ensure(name, settings, progress)
            tokens = settings.context * settings.local_slots if settings.task == "chat" else 0
            return await asyncio.to_thread(least_memory, file, tokens) if memory.limit else 0

        server = LlamaServer(name, settings, path, background=background)
        model.loader = Loader(name, settings, server, memory, fetch)
    model.replicas = _replicas(model)
    return model


def _replicas(model: Model) -> list[Replica]:
    settings, name = model.settings, model.name
    if model.local:
        return [Replica("local", model.local, settings.local_slots, on_change=model.serve_queue)]
    return [
        Replica(
            urlsplit(server.url).netloc.rpartition("@")[2],
            EngineClient(
                server.url, server.model or name, server.api_key(f"models.{name}"), settings.timeout_seconds
            ),
            server.slots or 1,
            weight=server.weight,
            requests_per_minute=server.requests_per_minute,
            on_change=model.serve_queue,
        )
        for server in settings.servers
    ]
