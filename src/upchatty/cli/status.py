"""`upchatty status`"""

import asyncio
import sys

from upchatty import __version__
from upchatty.cli.administration import administration
from upchatty.cli.output import JSON, CommonSettings, print_fields, print_json
from upchatty.cli.running import RunningServer
from upchatty.settings import Settings

NOT_READY = 3


def status(*, json: JSON = False, settings: CommonSettings = Settings()) -> None:
    """Show whether the server of this data folder runs and is ready, and what it has.

    Exit code 0: ready. 3: not running, or not ready.
    """
    facts = asyncio.run(_facts(settings))
    if json:
        print_json(facts)
    else:
        lists = {name: ", ".join(value) for name, value in facts.items() if isinstance(value, list)}
        print_fields(facts | lists)
    if facts["server"] != "ready":
        sys.exit(NOT_READY)


async def _facts(settings: Settings) -> dict[str, object]:
    server = RunningServer(settings)
    chatbots, keys = await _counts(settings)
    return {
        "version": __version__,
        "server": await server.state(),
        "address": server.address,
        "data": str(settings.data_dir.absolute()),
        "database": str(settings.sqlite_file.absolute()) if settings.sqlite_file else "PostgreSQL",
        "chatbots": chatbots,
        "keys": keys,
        "models": list(settings.model_settings),
        "loaded": await server.loaded_models(),
    }


async def _counts(settings: Settings) -> tuple[int, int]:
    if settings.sqlite_file and not settings.sqlite_file.exists():  # to look is not to make one
        return 0, 0
    async with administration(settings) as opened:
        return len(await opened.chatbots.page()), len(await opened.keys.page())
