"""`upchatty models …`"""

import asyncio

from cyclopts import App
from msgspec import Struct

from upchatty.cli.output import JSON, CommonSettings, print_json, print_table
from upchatty.cli.progress import RichProgress
from upchatty.cli.running import RunningServer
from upchatty.engines.files import ModelFiles
from upchatty.errors import ConfigurationError
from upchatty.settings import Settings

app = App(name="models", help="List the models, and fetch their files.")

_IN_WORDS = {None: None, True: "yes", False: "no"}


class _ModelView(Struct, kw_only=True):
    name: str
    task: str
    default: bool
    source: str
    file: str | None
    """None: it is at somebody else's server."""
    present: bool
    loaded: bool | None
    """Whether it is in memory; None: there is no server that could tell, or it is at somebody else's."""

    @property
    def whereabouts(self) -> str:
        if self.file is None:
            return "at its server"
        if self.present:
            return self.file
        return "missing" if self.file == self.source else "not fetched yet; upchatty models pull"


@app.command(name="list")
def list_all(*, json: JSON = False, settings: CommonSettings = Settings()) -> None:
    """List the models of the settings, where their files are, and which a running server has in memory."""
    files, in_memory = ModelFiles(settings.cache_dir), asyncio.run(RunningServer(settings).loaded_models())
    models = [
        _ModelView(
            name=name,
            task=model.task,
            default=name in (settings.default_model, settings.embedding_model, settings.reranker),
            source=model.source,
            file=str(file) if (file := files.cached(model)) else None,
            present=bool(file and file.exists()),
            loaded=None if in_memory is None or file is None else name in in_memory,
        )
        for name, model in settings.model_settings.items()
    ]
    if json:
        print_json(models)
        return
    columns = ["NAME", "TASK", "SOURCE", "FILE", "LOADED"]
    rows = [
        (
            f"{m.name} (default)" if m.default else m.name,
            *(m.task, m.source, m.whereabouts, _IN_WORDS[m.loaded]),
        )
        for m in models
    ]
    shown = 4 if in_memory is None else 5
    print_table(columns[:shown], [row[:shown] for row in rows])


@app.command
def pull(name: str | None = None, /, *, settings: CommonSettings = Settings()) -> None:
    """Fetch a model's file, or every model's; an interrupted download goes on where it stopped.

    Args:
        name: The model's name in the settings.
    """
    models = settings.model_settings
    if name is not None and name not in models:
        raise ConfigurationError(
            setting="NAME", problem=f"there is no model {name!r} in the settings, but {', '.join(models)}"
        )

    async def run() -> None:
        files, progress = ModelFiles(settings.cache_dir), RichProgress()
        for wanted in [name] if name else models:
            if models[wanted].is_local:
                print(await files.ensure(wanted, models[wanted], progress))

    asyncio.run(run())
