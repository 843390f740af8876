"""`upchatty models …`"""

import asyncio

from cyclopts import App
from msgspec import Struct

from upchatty.cli.output import JSON, CommonSettings, print_json, print_table
from upchatty.cli.progress import RichProgress
from upchatty.engines.files import ModelFiles
from upchatty.errors import ConfigurationError
from upchatty.settings import Settings

app = App(name="models", help="List the models, and fetch their files.")


class _ModelView(Struct, kw_only=True):
    name: str
    default: bool
    source: str
    file: str | None
    """None: it is at somebody else's server."""
    present: bool

    @property
    def whereabouts(self) -> str:
        if self.file is None:
            return "at its server"
        if self.present:
            return self.file
        return "missing" if self.file == self.source else "not fetched yet; upchatty models pull"


@app.command(name="list")
def list_all(*, json: JSON = False, settings: CommonSettings = Settings()) -> None:
    """List the models of the settings, and where their files are."""
    files = ModelFiles(settings.cache_dir)
    models = [
        _ModelView(
            name=name,
            default=name == settings.default_model,
            source=model.source,
            file=str(file) if (file := files.cached(model)) else None,
            present=bool(file and file.exists()),
        )
        for name, model in settings.model_settings.items()
    ]
    if json:
        print_json(models)
        return
    print_table(
        ["NAME", "SOURCE", "FILE"],
        [(f"{m.name} (default)" if m.default else m.name, m.source, m.whereabouts) for m in models],
    )


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
            if not models[wanted].url:
                print(await files.ensure(wanted, models[wanted], progress))

    asyncio.run(run())
