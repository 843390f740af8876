"""Structured logs on standard error: JSON lines, or coloured ones on a terminal."""

import atexit
import logging
import sys
import threading
import time
from collections.abc import Callable, MutableMapping
from contextlib import suppress
from datetime import UTC, datetime
from queue import SimpleQueue
from typing import Any, BinaryIO

import msgspec
import structlog

from upchatty.settings import Settings

PAUSE_SECONDS = 0.02  # between two writes, which take what has come together
MOST_LINES = 100_000  # that wait to be written; further ones are lost
CLOSE_SECONDS = 3.0

_encode = msgspec.json.Encoder(enc_hook=str).encode


class _Background:
    """A binary file that a thread of its own writes to: a disk or a pipe that is busy must hold up nobody's
    answer. Its trouble (a full disk, a closed pipe) is nobody's trouble.

    Args:
        file: The file.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._lines: SimpleQueue[bytes | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def write(self, line: bytes) -> None:
        if self._lines.qsize() < MOST_LINES:
            self._lines.put(line)

    def flush(self) -> None:
        pass  # the thread does

    def close(self) -> None:
        """Write what is left, within a few seconds."""
        self._lines.put(None)
        self._thread.join(CLOSE_SECONDS)

    def _run(self) -> None:
        lines: list[bytes | None] = []
        while None not in lines:
            lines = [self._lines.get()]
            while not self._lines.empty():
                lines.append(self._lines.get())
            with suppress(OSError, ValueError):
                self._file.write(b"".join(filter(None, lines)))
                self._file.flush()
            time.sleep(0 if None in lines else PAUSE_SECONDS)


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
    structlog.configure(
        processors=_console() if on_terminal else [_as_json],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, settings.log_level.upper())),
        logger_factory=structlog.BytesLoggerFactory(_Background(sys.stderr.buffer)),  # type: ignore[arg-type]
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
