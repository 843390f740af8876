"""The command line: `upchatty serve`, and what owners and operators do from a terminal."""

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import App, CycloptsError, Parameter

from upchatty import __version__
from upchatty.cli import chatbots, keys, knowledge, models
from upchatty.cli.chat import chat
from upchatty.cli.serve import serve
from upchatty.cli.sources import Environment, SettingsFile
from upchatty.cli.status import status
from upchatty.cli.usage import usage
from upchatty.cli.worker import worker
from upchatty.errors import ConfigurationError, UpChattyError

EXIT_CODES = "Exit codes: 0 done, 1 failed, 2 wrong usage, 3 not ready, 4 not found, 5 in use."

app = App(
    name="upchatty",
    help="Chatbots behind an OpenAI-compatible API, self-hosted. `upchatty serve` starts the server.",
    help_epilogue=EXIT_CODES,
    version=__version__,
    config=Environment(),
    default_parameter=Parameter(show_env_var=False),
    print_error=False,
    exit_on_error=False,
)
for command in (serve, chat, status, usage, worker):
    app.command(command)
for group in (chatbots, keys, knowledge, models):
    app.command(group.app)


@app.meta.default
def _launch(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    config: Annotated[Path | None, Parameter(show_env_var=True)] = None,
) -> None:
    """Run a command with the settings of a file.

    Args:
        config: A TOML file of settings; flags and the environment come before it.
    """
    app.config = (Environment(), SettingsFile(config)) if config else (Environment(),)
    app(tokens)


def main() -> None:
    """Run the command that the arguments name, and exit with its code."""
    try:
        app.meta(sys.argv[1:])
    except CycloptsError as error:
        print(f"upchatty: {_sentence(error)}", file=sys.stderr)
        sys.exit(ConfigurationError.exit_code)
    except UpChattyError as error:
        print(f"upchatty: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def _sentence(error: CycloptsError) -> str:
    error.verbose = False
    command = " ".join(["upchatty", *(error.command_chain or ())])
    return f"{error}\nupchatty: see {command} --help"
