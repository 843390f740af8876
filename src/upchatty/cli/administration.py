"""What commands do with the database, whether a server runs or not."""

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

from upchatty.app import Administration, open_administration
from upchatty.errors import InvalidRequest
from upchatty.logs import configure_logs
from upchatty.settings import Settings


@asynccontextmanager
async def administration(settings: Settings) -> AsyncIterator[Administration]:
    """The chatbots and keys. A database that had to be made is mentioned: perhaps another one was meant.

    Args:
        settings: The settings.

    Raises:
        ConfigurationError: The database cannot be opened.
    """
    configure_quiet_logs(settings)
    file = settings.sqlite_file
    is_new = file is not None and not file.exists()
    async with open_administration(settings) as opened:
        if file and is_new:
            print(f"upchatty: there was no database, so {file.absolute()} was made", file=sys.stderr)
        yield opened


def configure_quiet_logs(settings: Settings) -> None:
    """Set up logging for a command, whose reader wants its output and no news.

    Args:
        settings: Their format and level; `info`, the default, is too much here.
    """
    level = "warning" if settings.log_level == "info" else settings.log_level
    configure_logs(replace(settings, log_level=level))


def checked_name(name: str) -> str:
    """A name for a chatbot or a key, as the API takes it, too.

    Raises:
        InvalidRequest: It is none.
    """
    if not 1 <= len(name) <= 200 or "\0" in name:
        raise InvalidRequest(parameter="name", expected="expected 1 to 200 characters")
    return name
