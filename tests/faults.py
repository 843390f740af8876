"""What the tests of faults look at besides the answers: the records in the database, and processes."""

import asyncio
import json
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import asyncpg
import httpx
import psutil

from tests.support import Server

Found = TypeVar("Found")
PATIENCE = 60.0  # seconds; machines that run tests are busy


def records(server: Server, completion_id: str = "") -> list[dict[str, Any]]:
    """The records of completions, oldest first, read past the server; of one completion, or all."""
    query = f"SELECT * FROM completions WHERE id LIKE '{completion_id}%' ORDER BY created_at, id"
    return rows(server, query)


def rows(server: Server, query: str) -> list[dict[str, Any]]:
    """What a query says about the server's database."""
    if url := server.environment.get("UPCHATTY_DATABASE_URL"):
        return asyncio.run(_fetch(url, query))
    connection = sqlite3.connect(server.data_dir / "upchatty.db", timeout=10)
    connection.row_factory = sqlite3.Row
    try:
        return [dict(row) for row in connection.execute(query)]
    finally:
        connection.close()


async def _fetch(url: str, query: str) -> list[dict[str, Any]]:
    connection = await asyncpg.connect(url)
    try:
        return [dict(row) for row in await connection.fetch(query)]
    finally:
        await connection.close()


def eventually(look: Callable[[], Found], seconds: float = PATIENCE) -> Found:
    """The first true value that `look` returns; AssertionError where none comes."""
    deadline = time.monotonic() + seconds
    while not (value := look()):
        assert time.monotonic() < deadline, f"it did not come true in {seconds} seconds"
        time.sleep(0.02)
    return value


def record(server: Server, completion_id: str) -> dict[str, Any]:
    """The one record of a completion, as soon as it is there."""
    [found] = eventually(lambda: records(server, completion_id))
    return found


def engine_of(pid: int) -> psutil.Process:
    """The child of a server that runs llama.cpp, as soon as it is there."""

    def find() -> psutil.Process | None:
        for child in psutil.Process(pid).children():
            if "upchatty.engines.llama_child" in child.cmdline():
                return child
        return None

    return eventually(find)  # type: ignore[return-value]


def cpu_seconds(process: psutil.Process) -> float:
    """The CPU time that a process has used."""
    times = process.cpu_times()
    return float(times.user + times.system)


def assert_falls_idle(process: psutil.Process, seconds: float = PATIENCE) -> None:
    """The process soon computes nothing: less than a tenth of a core over half a second."""

    def idle() -> bool:
        before = cpu_seconds(process)
        time.sleep(0.5)
        return cpu_seconds(process) - before < 0.05

    eventually(idle, seconds)


class Stream:
    """A stream that is read piece by piece, and stays open in between.

    Args:
        response: The answer's response.
    """

    def __init__(self, response: httpx.Response) -> None:
        self._response = response
        self._lines = response.iter_lines()  # kept here: httpx closes the connection with it
        self.id = ""

    def read_pieces(self, count: int) -> None:
        """Wait for so many pieces of text."""
        for data in self._events():
            chunk = json.loads(data)
            self.id = chunk["id"]
            count -= bool(chunk["choices"][0]["delta"].get("content"))
            if count <= 0:
                return
        raise AssertionError("the stream ended too soon")

    def rest(self) -> list[str]:
        """The data of all that comes until the end."""
        return list(self._events())

    def close(self) -> None:
        """Go away."""
        self._response.close()

    def _events(self) -> Iterator[str]:
        for line in self._lines:
            if line.startswith("data: "):
                yield line.removeprefix("data: ")


@contextmanager
def open_stream(client: httpx.Client, body: dict[str, Any], pieces: int = 1) -> Iterator[Stream]:
    """A stream of which so many pieces have come."""
    with client.stream("POST", "/chat/completions", json=body | {"stream": True}) as response:
        assert response.status_code == 200, response.read()
        stream = Stream(response)
        stream.read_pieces(pieces)
        yield stream
