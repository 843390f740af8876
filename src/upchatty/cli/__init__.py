"""The command line: `upchatty serve`, and what owners and operators do from a terminal."""

import sys
from dataclasses import fields
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter
from cyclopts.argument import Argument, ArgumentCollection
from cyclopts.config import Env, Toml

from upchatty import __version__
from upchatty.cli import chatbots, keys, models
from upchatty.cli.chat import chat
from upchatty.cli.serve import serve
from upchatty.cli.status import status
from upchatty.errors import UpChattyError
from upchatty.settings import ENVIRONMENT_PREFIX, Settings


class SettingsEnvironment(Env):
    """The environment's settings; a command's own arguments are not read from there."""

    def __call__(self, app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
        """Give the settings their values."""
        super().__call__(
            app, commands, type(arguments)([argument for argument in arguments if _is_setting(argument)])
        )


def _is_setting(argument: Argument) -> bool:
    return argument.field_info.name in SETTING_NAMES


ENVIRONMENT = SettingsEnvironment(ENVIRONMENT_PREFIX, command=False)
SETTING_NAMES = frozenset(field.name for field in fields(Settings))
EXIT_CODES = "Exit codes: 0 done, 1 failed, 2 wrong usage, 3 not ready, 4 not found, 5 in use."

app = App(
    name="upchatty",
    help="Chatbots behind an OpenAI-compatible API, self-hosted.",
    help_epilogue=EXIT_CODES,
    version=__version__,
    config=ENVIRONMENT,
    default_parameter=Parameter(show_env_var=False),
)
for command in (serve, chat, status):
    app.command(command)
for group in (chatbots, keys, models):
    app.command(group.app)


@app.meta.default
def _launch(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    config: Annotated[
        Path | None, Parameter(env_var=ENVIRONMENT_PREFIX + "CONFIG", show_env_var=True)
    ] = None,
) -> None:
    """Run a command with the settings of a file.

    Args:
        config: A TOML file of settings; the environment and flags come before it.
    """
    if config:
        app.config = (ENVIRONMENT, Toml(config, must_exist=True, use_commands_as_keys=False))
    app(tokens)


def main() -> None:
    """Run the command that the arguments name, and exit with its code."""
    try:
        app.meta()
    except UpChattyError as error:
        print(f"upchatty: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
