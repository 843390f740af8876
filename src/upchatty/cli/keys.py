"""`upchatty keys …`"""

import asyncio
import time
from datetime import datetime
from typing import Annotated

from cyclopts import App, Parameter

from upchatty.api.keys import CreatedKey, KeyView, key_fields
from upchatty.app import open_administration
from upchatty.auth import Scope
from upchatty.cli.output import JSON, CommonSettings, moment, print_json, print_table
from upchatty.errors import InvalidRequest
from upchatty.settings import Settings

app = App(name="keys", help="Make, list and revoke API keys.")

DAY_MS = 24 * 60 * 60 * 1000


@app.command
def create(
    name: str,
    *,
    scope: Scope = "admin",
    chatbot: Annotated[tuple[str, ...], Parameter(negative="")] = (),
    expires: datetime | None = None,
    days: float | None = None,
    json: JSON = False,
    settings: CommonSettings = Settings(),
) -> None:
    """Make a key, and print its secret, which is shown this once.

    Args:
        name: Its name, for people.
        scope: admin: everything. chat: only to call chatbots.
        chatbot: A chatbot that a chat key opens; may be repeated; none: all.
        expires: When it ends, such as 2030-12-31T12:00.
        days: In how many days it ends.
    """
    if expires is not None and days is not None:
        raise InvalidRequest(parameter="--expires", expected="expected without --days")
    expires_at = int(expires.timestamp() * 1000) if expires else None
    if days is not None:
        expires_at = int(time.time() * 1000 + days * DAY_MS)

    async def run() -> None:
        async with open_administration(settings) as administration:
            key, secret = await administration.keys.create(name, scope, chatbot, expires_at)
        if json:
            print_json(CreatedKey(key=secret, **key_fields(key)))  # type: ignore[arg-type]
        else:
            print(secret)

    asyncio.run(run())


@app.command(name="list")
def list_all(*, json: JSON = False, settings: CommonSettings = Settings()) -> None:
    """List the keys that are not revoked, without their secrets."""

    async def run() -> None:
        async with open_administration(settings) as administration:
            keys = [KeyView(**key_fields(key)) for key in await administration.keys.page()]  # type: ignore[arg-type]
        if json:
            print_json(keys)
            return
        print_table(
            ["ID", "NAME", "SCOPE", "CHATBOTS", "MADE", "EXPIRES"],
            [
                (
                    k.id,
                    k.name,
                    k.scope,
                    ", ".join(k.chatbots) or "all",
                    moment(k.created_at),
                    moment(k.expires_at),
                )
                for k in keys
            ],
        )

    asyncio.run(run())


@app.command
def revoke(key: str, *, settings: CommonSettings = Settings()) -> None:
    """Revoke a key. Running servers refuse it within a second.

    Args:
        key: The key's id, key_…, not its secret.
    """

    async def run() -> None:
        async with open_administration(settings) as administration:
            await administration.keys.revoke(key)

    asyncio.run(run())
