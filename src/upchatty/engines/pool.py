"""The models by name."""

import asyncio
from urllib.parse import urlsplit

from upchatty.engines.client import EngineClient
from upchatty.engines.download import Progress
from upchatty.engines.files import ModelFiles
from upchatty.engines.gguf import least_memory
from upchatty.engines.llama import LlamaServer
from upchatty.engines.loader import Loader, Memory
from upchatty.engines.model import Model
from upchatty.engines.replica import Replica
from upchatty.errors import EngineFailed
from upchatty.metrics import Metrics
from upchatty.settings import ModelSettings, Settings

PROBE_SECONDS = 2.0


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
            models[name] = opened = Model(name, model, metrics.of(name))
            if model.is_local:
                opened.loader = await _loader(name, model, memory, files, progress)
                if name in settings.models or name == settings.default_model:
                    opened.loader.check_size()  # of what somebody wants
            opened.replicas = _replicas(opened)
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

    def with_fallbacks(self, model: Model) -> list[Model]:
        """A model, then those that answer where it cannot."""
        models = [model]
        while (name := models[-1].settings.fallback) and (following := self.models[name]) not in models:
            models.append(following)
        return models

    async def start(self) -> None:
        """Load the default model, if it runs here; the others are loaded when they are asked."""
        await self.model(None).start()

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


async def _loader(
    name: str, settings: ModelSettings, memory: Memory, files: ModelFiles, progress: Progress | None
) -> Loader:
    file = await files.ensure(name, settings, progress)
    loader = Loader(name, settings, LlamaServer(name, settings, file), memory)
    if memory.limit:
        tokens = settings.context * settings.local_slots
        loader.expect(await asyncio.to_thread(least_memory, file, tokens))
    return loader


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
