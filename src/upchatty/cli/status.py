"""`upchatty status`"""

import asyncio
import sys

import aiohttp

from upchatty import __version__
from upchatty.app import running_address
from upchatty.cli.administration import administration
from upchatty.cli.output import JSON, CommonSettings, print_fields, print_json
from upchatty.settings import Settings

PROBE_SECONDS = 5.0
NOT_READY = 3


def status(*, json: JSON = False, settings: CommonSettings = Settings()) -> None:
    """Show whether the server of this data folder runs and is ready, and what it has.

    Exit code 0: ready. 3: not running, or not ready.
    """
    facts = asyncio.run(_facts(settings))
    if json:
        print_json(facts)
    else:
        print_fields(facts | {"models": ", ".join(settings.model_settings)})
    if facts["server"] != "ready":
        sys.exit(NOT_READY)


async def _facts(settings: Settings) -> dict[str, object]:
    # To look is not to make: neither the folder nor, below, a database.
    address = running_address(settings) if settings.data_dir.is_dir() else None
    chatbots, keys = await _counts(settings)
    return {
        "version": __version__,
        "server": await _state(address),
        "address": address,
        "data": str(settings.data_dir.absolute()),
        "database": str(settings.sqlite_file.absolute()) if settings.sqlite_file else "PostgreSQL",
        "chatbots": chatbots,
        "keys": keys,
        "models": list(settings.model_settings),
    }


async def _counts(settings: Settings) -> tuple[int, int]:
    if settings.sqlite_file and not settings.sqlite_file.exists():
        return 0, 0
    async with administration(settings) as opened:
        return len(await opened.chatbots.page()), len(await opened.keys.page())


async def _state(address: str | None) -> str:
    if address is None:
        return "not running"
    timeout = aiohttp.ClientTimeout(total=PROBE_SECONDS)
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.get(address + "/health/ready") as response,
        ):
            return "ready" if response.status == 200 else "not ready"
    except (aiohttp.ClientError, TimeoutError):
        return "not answering"
