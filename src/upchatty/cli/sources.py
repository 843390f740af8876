"""Where settings come from besides flags: the environment, and a TOML file."""

import tomllib
from collections.abc import Iterator
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import msgspec
from cyclopts import App, Token
from cyclopts.argument import Argument, ArgumentCollection
from cyclopts.config import Env

from upchatty.errors import ConfigurationError
from upchatty.settings import ENVIRONMENT_PREFIX, Settings

SETTING_NAMES = [field.name for field in fields(Settings)]
CONFIG = "config"  # where the file is; no setting itself


class Environment(Env):
    """The environment's settings; a command's own arguments are not read from there."""

    def __init__(self) -> None:
        super().__init__(ENVIRONMENT_PREFIX, command=False)

    def __call__(self, app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
        """Give the settings their values."""
        names = (*SETTING_NAMES, CONFIG)
        settings = [argument for argument in arguments if argument.field_info.name in names]
        super().__call__(app, commands, type(arguments)(settings))


class SettingsFile:
    """A TOML file's settings, for those that nothing else names.

    The file is not left to cyclopts' own class, which skips a table that is called like a command, such
    as `models`, and takes the file's keys for a command's own arguments, too.

    Args:
        path: The file.

    Raises:
        ConfigurationError: It cannot be read, is no TOML, or has a key that is no setting.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._values = _read(path)

    def __call__(self, app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
        """Give the settings their values."""
        for argument in _unset_settings(arguments):
            if (value := self._values.get(argument.field_info.name)) is not None:
                name = f"{argument.field_info.name} in {self._path}"
                argument.append(Token(keyword=name, value=_as_text(value)))


def _unset_settings(arguments: ArgumentCollection) -> Iterator[Argument]:
    return (
        argument
        for argument in arguments
        if argument.field_info.name in SETTING_NAMES and not argument.has_tokens
    )


def _as_text(value: object) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def _read(path: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(
            setting="--config", problem=f"cannot read {path} ({error.strerror})"
        ) from None
    except ValueError as error:  # of UTF-8 and of TOML
        raise ConfigurationError(setting="--config", problem=f"{path} is not TOML ({error})") from None
    for name in values:
        if name not in SETTING_NAMES:
            raise ConfigurationError(setting=str(path), problem=_no_such_setting(name))
    return values


def _no_such_setting(name: str) -> str:
    similar = get_close_matches(name.replace("-", "_"), SETTING_NAMES, n=1)
    advice = f"did you mean {similar[0]!r}?" if similar else f"there are {', '.join(SETTING_NAMES)}"
    return f"there is no setting {name!r}; {advice}"
