"""`upchatty keys …`"""

import asyncio
from datetime import datetime
from typing import Annotated

from cyclopts import App, Parameter

from upchatty.api.keys import CreatedKey, KeyView, key_fields
from upchatty.auth import Scope
from upchatty.cli.administration import administration, checked_name
from upchatty.cli.limits import Days, LimitFlags, Limiting, end
from upchatty.cli.output import JSON, CommonSettings, moment, print_json, print_table
from upchatty.limits import Limits
from upchatty.settings import Settings

app = App(name="keys", help="Make, list and revoke API keys.")


@app.command
def create(
    name: str,
    /,
    *,
    scope: Scope = "admin",
    chatbot: Annotated[tuple[str, ...], Parameter(negative="", show_default=False)] = (),
    expires: datetime | None = None,
    days: Days = None,
    limits: Limiting = LimitFlags(),
    json: JSON = False,
    settings: CommonSettings = Settings(),
) -> None:
    """Make a key, and print its secret, which is shown this once.

    Args:
        name: Its name, for people.
        scope: admin: everything. chat: only to call chatbots.
        chatbot: A chatbot that a chat key opens; may be repeated; none: all.
        expires: When it ends, such as 2030-12-31T12:00, in this machine's time zone; absent: never.
        days: In how many days it ends.
    """
    expires_at = end(expires, days)

    async def run() -> None:
        async with administration(settings) as opened:
            key, secret = await opened.keys.create(
                checked_name(name), scope, chatbot, expires_at, Limits(**limits.given)
            )
        if json:
            print_json(CreatedKey(key=secret, **key_fields(key)))  # type: ignore[arg-type]
        else:
            print(secret)

    asyncio.run(run())


@app.command(name="list")
def list_all(*, json: JSON = False, settings: CommonSettings = Settings()) -> None:
    """List the keys that are not revoked, without their secrets."""

    async def run() -> None:
        async with administration(settings) as opened:
            keys = [KeyView(**key_fields(key)) for key in await opened.keys.page()]  # type: ignore[arg-type]
        if json:
            print_json(keys)
            return
        print_table(
            ["ID", "NAME", "SCOPE", "CHATBOTS", "MADE", "EXPIRES", "LIMITS"],
            [
                (
                    k.id,
                    k.name,
                    k.scope,
                    ", ".join(k.chatbots) or "all",
                    moment(k.created_at),
                    moment(k.expires_at),
                    k.limits and k.limits.text,
                )
                for k in keys
            ],
        )

    asyncio.run(run())


@app.command
def revoke(key: str, /, *, settings: CommonSettings = Settings()) -> None:
    """Revoke a key. Running servers refuse it within a second.

    Args:
        key: The key's id, key_…, not its secret.
    """

    async def run() -> None:
        async with administration(settings) as opened:
            await opened.keys.revoke(key)

    asyncio.run(run())
