"""Structured logs on standard error: JSON lines, or coloured ones on a terminal."""

import logging
import sys
from collections.abc import Callable, MutableMapping
from datetime import UTC, datetime
from typing import Any, BinaryIO

import msgspec
import structlog

from upchatty.settings import Settings

_encode = msgspec.json.Encoder(enc_hook=str).encode


class _Unfailing:
    """A binary file whose trouble (a full disk, a closed pipe) is nobody's trouble."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def write(self, line: bytes) -> None:
        try:
            self._file.write(line)
        except (OSError, ValueError):
            pass

    def flush(self) -> None:
        pass  # nothing is buffered


class _ToStructlog(logging.Handler):
    """Passes on what libraries log."""

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info and record.exc_info[1]
        structlog.get_logger().log(record.levelno, record.getMessage(), logger=record.name, exc_info=error)


def configure_logs(settings: Settings) -> None:
    """Set up logging for the process.

    Args:
        settings: Their format and level.
    """
    on_terminal = settings.log_format == "console" or (settings.log_format == "auto" and sys.stderr.isatty())
    unbuffered = getattr(sys.stderr.buffer, "raw", sys.stderr.buffer)
    structlog.configure(
        processors=_console() if on_terminal else [_as_json],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, settings.log_level.upper())),
        logger_factory=structlog.BytesLoggerFactory(_Unfailing(unbuffered)),  # type: ignore[arg-type]
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(handlers=[_ToStructlog()], level=logging.WARNING, force=True)


def request_logger() -> Callable[..., None]:
    """What logs a line about every request: `structlog.get_logger().info`, in JSON without its layers, which
    take longer than the line."""
    processors, factory = structlog.get_config()["processors"], structlog.get_config()["logger_factory"]
    bound = structlog.get_logger().bind()
    if processors != [_as_json] or not bound.is_enabled_for(logging.INFO):
        return bound.info  # type: ignore[no-any-return]
    write = factory().msg

    def info(event: str, **fields: Any) -> None:
        write(_as_json(None, "info", {"event": event} | fields))

    return info


def _console() -> list[Any]:
    return [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", key="time"),
        structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(),
            timestamp_key="time",
            exception_formatter=structlog.dev.plain_traceback,  # others show local variables, such as keys
        ),
        lambda _logger, _method, line: line.encode(),
    ]


def _as_json(logger: Any, method: str, event: MutableMapping[str, Any]) -> bytes:
    """A line of JSON, made in one step: every request writes one."""
    if "exc_info" in event:
        event = structlog.processors.format_exc_info(logger, method, event)
    event["level"] = method
    event["time"] = datetime.now(UTC).isoformat().replace("+00:00", "Z")
    return _encode(event)
