"""`upchatty models …`"""

import asyncio

from cyclopts import App

from upchatty.cli.output import JSON, CommonSettings, print_json, print_table
from upchatty.cli.progress import RichProgress
from upchatty.engines.files import ModelFiles
from upchatty.errors import ConfigurationError
from upchatty.settings import Settings

app = App(name="models", help="List the models, and fetch their files.")


@app.command(name="list")
def list_all(*, json: JSON = False, settings: CommonSettings = Settings()) -> None:
    """List the models of the settings, and where their files are."""
    files = ModelFiles(settings.cache_dir)
    models = [
        {
            "name": name,
            "default": name == settings.default_model,
            "source": model.source,
            "file": str(path) if (path := files.cached(model)) else None,
            "present": bool(path and path.exists()),
        }
        for name, model in settings.model_settings.items()
    ]
    if json:
        print_json(models)
        return
    print_table(
        ["NAME", "SOURCE", "FILE"],
        [
            (
                f"{model['name']} (default)" if model["default"] else model["name"],
                model["source"],
                model["file"]
                if model["present"]
                else "at its server"
                if not model["file"]
                else "not fetched yet",
            )
            for model in models
        ],
    )


@app.command
def pull(name: str | None = None, *, settings: CommonSettings = Settings()) -> None:
    """Fetch a model's file, or every model's; an interrupted download goes on where it stopped.

    Args:
        name: The model's name in the settings.
    """
    models = settings.model_settings
    if name is not None and name not in models:
        raise ConfigurationError(
            setting=f"models.{name}", problem=f"there is none; there are {', '.join(models)}"
        )

    async def run() -> None:
        files, progress = ModelFiles(settings.cache_dir), RichProgress()
        for wanted in [name] if name else models:
            if not models[wanted].url:
                print(await files.ensure(wanted, models[wanted], progress))

    asyncio.run(run())
