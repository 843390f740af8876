"""`upchatty chatbots …`"""

import asyncio
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter
from cyclopts.validators import Number

from upchatty.api.chatbots import ChatbotView
from upchatty.chat.chatbots import Chatbot, Policy
from upchatty.cli.administration import administration, checked_name
from upchatty.cli.limits import Days, LimitFlags, Limiting, end
from upchatty.cli.output import JSON, CommonSettings, moment, print_fields, print_json, print_table
from upchatty.errors import ConfigurationError, InvalidRequest
from upchatty.limits import ChatbotLimits, to_json
from upchatty.settings import Settings

app = App(name="chatbots", help="Make, list and change chatbots.")

Id = Annotated[str, Parameter(help="The chatbot's id, bot_…; with @3 behind it, its version 3.")]
Instructions = Annotated[
    str | None, Parameter(help="What the chatbot is and does; @FILE reads them from a file.")
]
Model = Annotated[str | None, Parameter(help="The model behind it, by its name in the settings.")]
Temperature = Annotated[
    float | None, Parameter(validator=Number(gte=0, lte=1), help="0.0 to 1.0: how freely it chooses words.")
]
MaxTokens = Annotated[int | None, Parameter(validator=Number(gte=1), help="Tokens of an answer at most.")]
Expires = Annotated[
    datetime | None,
    Parameter(help="When it stops answering, such as 2030-12-31T12:00, in this machine's time zone."),
]
KeepText = Annotated[bool | None, Parameter(help="Whether the record of completions keeps what was said.")]

Answers = Annotated[
    Policy | None,
    Parameter(
        name="--policy", help="open: its documents help. grounded: it answers from them only, or not at all."
    ),
]
Threshold = Annotated[
    float | None,
    Parameter(validator=Number(gte=0, lte=1), help="The score that passages have to reach, 0.0 to 1.0."),
]
FallbackMessage = Annotated[str | None, Parameter(help="What a grounded one says when it does not know.")]
Passages = Annotated[
    int | None, Parameter(validator=Number(gte=1, lte=50), help="Passages that an answer is given at most.")
]


@app.command(name="list")
def list_all(*, json: JSON = False, settings: CommonSettings = Settings()) -> None:
    """List the chatbots."""

    async def run() -> None:
        async with administration(settings) as opened:
            chatbots = await opened.chatbots.page()
        if json:
            print_json([ChatbotView.of(chatbot) for chatbot in chatbots])
            return
        if not chatbots:
            print("There is no chatbot yet; make one with: upchatty chatbots create NAME")
            return
        print_table(
            ["ID", "NAME", "VERSION", "MODEL", "CHANGED"],
            [(c.id, c.name, c.version, c.model or "default", moment(c.updated_at // 1000)) for c in chatbots],
        )

    asyncio.run(run())


@app.command
def create(
    name: str,
    /,
    *,
    instructions: Instructions = None,
    model: Model = None,
    temperature: Temperature = None,
    max_tokens: MaxTokens = None,
    keep_text: KeepText = None,
    policy: Answers = None,
    threshold: Threshold = None,
    fallback_message: FallbackMessage = None,
    passages: Passages = None,
    limits: Limiting = LimitFlags(),
    expires: Expires = None,
    days: Days = None,
    json: JSON = False,
    settings: CommonSettings = Settings(),
) -> None:
    """Make a chatbot, and print it.

    Args:
        name: Its name, for people.
        days: In how many days it stops answering.
    """
    limited = limits.given | _expiry(expires, days)

    async def run() -> None:
        async with administration(settings) as opened:
            chatbot = await opened.chatbots.create(
                checked_name(name),
                instructions=_text(instructions),
                model=model,
                temperature=temperature,
                max_tokens=max_tokens,
                keep_text=keep_text,
                policy=policy,
                threshold=threshold,
                fallback_message=_checked_message(fallback_message),
                passages=passages,
                limits=ChatbotLimits(**limited),
            )
        _print(chatbot, json)

    asyncio.run(run())


@app.command
def show(chatbot: Id, /, *, json: JSON = False, settings: CommonSettings = Settings()) -> None:
    """Show a chatbot."""

    async def run() -> None:
        async with administration(settings) as opened:
            _print(await opened.chatbots.get(chatbot), json)

    asyncio.run(run())


@app.command
def edit(
    chatbot: Id,
    /,
    *,
    name: str | None = None,
    instructions: Instructions = None,
    model: Model = None,
    temperature: Temperature = None,
    max_tokens: MaxTokens = None,
    keep_text: KeepText = None,
    policy: Answers = None,
    threshold: Threshold = None,
    fallback_message: FallbackMessage = None,
    passages: Passages = None,
    limits: Limiting = LimitFlags(),
    expires: Expires = None,
    days: Days = None,
    no_limits: Annotated[bool, Parameter(negative="", show_default=False)] = False,
    publish: int | None = None,
    json: JSON = False,
    settings: CommonSettings = Settings(),
) -> None:
    """Change a chatbot, which makes and publishes its next version; or publish an earlier one.

    Args:
        name: A new name.
        days: In how many days it stops answering.
        no_limits: Take away the limits that it has, but not those given with this.
        publish: The number of the version to go back to.
    """
    given = {
        "name": name and checked_name(name),
        "instructions": _text(instructions),
        "model": model,
        "temperature": temperature,
        "max_tokens": max_tokens,
        "keep_text": keep_text,
        "policy": policy,
        "threshold": threshold,
        "fallback_message": _checked_message(fallback_message),
        "passages": passages,
    }
    changes: dict[str, Any] = {field: value for field, value in given.items() if value is not None}
    limited = limits.given | _expiry(expires, days)
    if bool(changes or limited or no_limits) == (publish is not None):
        raise InvalidRequest(
            parameter="edit", expected="say what to change, such as --name NAME; or --publish VERSION alone"
        )

    async def run() -> None:
        async with administration(settings) as opened:
            if publish is not None:
                changed = await opened.chatbots.publish(chatbot, publish)
            else:
                if limited or no_limits:
                    kept = {} if no_limits else to_json((await opened.chatbots.get(chatbot)).limits) or {}
                    changes["limits"] = ChatbotLimits(**kept | limited)
                changed = await opened.chatbots.change(chatbot, **changes)
        _print(changed, json)

    asyncio.run(run())


@app.command
def delete(
    chatbot: Id,
    /,
    *,
    yes: Annotated[bool, Parameter(name=["--yes", "-y"], negative="")] = False,
    settings: CommonSettings = Settings(),
) -> None:
    """Delete a chatbot with all it owns.

    Args:
        yes: Do not ask.
    """
    if not yes and not _confirmed(f"Delete {chatbot} with all it owns?"):
        raise InvalidRequest(parameter="delete", expected="nothing was deleted; --yes deletes without asking")

    async def run() -> None:
        async with administration(settings) as opened:
            await opened.chatbots.delete(chatbot)

    asyncio.run(run())


def _confirmed(question: str) -> bool:
    return sys.stdin.isatty() and input(f"{question} [y/N] ").strip().lower() in ("y", "yes")


def _text(given: str | None) -> str | None:
    """The text itself, or the content of the file behind an @."""
    if given is None or not given.startswith("@"):
        return given
    try:
        return Path(given[1:]).read_text(encoding="utf-8")
    except OSError as error:
        problem = error.strerror
    except UnicodeDecodeError:
        problem = "it is not UTF-8"
    raise ConfigurationError(setting="--instructions", problem=f"cannot read {given[1:]} ({problem})")


def _checked_message(message: str | None) -> str | None:
    """A fallback message as the API takes it, too."""
    if message is not None and (not 1 <= len(message) <= 10_000 or "\0" in message):
        raise InvalidRequest(parameter="fallback_message", expected="expected 1 to 10,000 characters")
    return message


def _expiry(expires: datetime | None, days: float | None) -> dict[str, Any]:
    expires_at = end(expires, days)
    return {} if expires_at is None else {"expires_at": expires_at // 1000}


def _print(chatbot: Chatbot, json: bool) -> None:
    view = ChatbotView.of(chatbot)
    if json:
        print_json(view)
        return
    fields: dict[str, Any] = {
        field: getattr(view, field) for field in view.__struct_fields__ if field != "object"
    }
    times = {"created_at": moment(view.created_at), "updated_at": moment(view.updated_at)}
    if view.limits:
        fields["limits"] = view.limits.text
        if view.limits.expires_at is not None:
            fields["expires_at"] = moment(view.limits.expires_at)
    print_fields(fields | times | {"model": view.model or "default"})
