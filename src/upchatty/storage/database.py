"""The connection to the database, in either dialect, and its migrations."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import URL, Connection, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from upchatty.errors import ConfigurationError, StorageUnavailable

MIGRATIONS = Path(__file__).parent / "migrations"
# No connection, a failed login, no such database, a read-only one, no resources, shutting down or starting:
# https://www.postgresql.org/docs/current/errcodes-appendix.html
UNAVAILABLE = ("08", "28", "3D", "25006", "53", "57P")
Result = TypeVar("Result")
MIGRATION_LOCK, START_LOCK = 0x75706368, 0x75706369  # any will do, if every server takes the same ones


class Database:
    """One database. Queries live in the modules beside this one.

    Args:
        url: `postgresql://…`, or empty for SQLite.
        sqlite_file: The SQLite file, used when `url` is empty.

    Raises:
        ConfigurationError: The URL names no database that UpChatty works with.
    """

    def __init__(self, url: str, sqlite_file: Path | None) -> None:
        self._sqlite_file = None if url else sqlite_file
        # Without parameters, which are what people say and what their documents say.
        self._engine = create_async_engine(
            _driver_url(url, sqlite_file), hide_parameters=True, **_pool_options(url)
        )
        if self._sqlite_file:
            event.listen(self._engine.sync_engine, "connect", _prepare_sqlite)
            self._readers = create_engine(
                URL.create("sqlite", database=str(self._sqlite_file)),
                isolation_level="AUTOCOMMIT",  # so that `_read` begins and ends transactions itself
                pool_reset_on_return=None,
                hide_parameters=True,
            )
            event.listen(self._readers, "connect", _prepare_sqlite)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncConnection]:
        """One transaction: committed at the end, rolled back on an error.

        Raises:
            StorageUnavailable: The database cannot be reached or written.
        """
        with _unavailable():
            async with self._engine.begin() as connection:
                yield connection

    async def read(self, work: Callable[[Connection], Result]) -> Result:
        """Do several queries in a row, at one moment of the database.

        On SQLite a thread does the whole work: elsewhere each of its statements goes to a thread of the
        driver's and back, several times, which takes longer than the statement.

        Args:
            work: Reads from the connection, and writes nothing.

        Returns:
            What it returns.

        Raises:
            StorageUnavailable: The database cannot be reached.
        """
        if self._sqlite_file:
            return await asyncio.to_thread(self._read, work)
        async with self.transaction() as connection:
            return await connection.run_sync(work)

    def _read(self, work: Callable[[Connection], Result]) -> Result:
        with _unavailable(), self._readers.connect() as connection:
            connection.exec_driver_sql("BEGIN")
            try:
                return work(connection)
            finally:
                connection.exec_driver_sql("ROLLBACK")  # nothing was written

    @asynccontextmanager
    async def one_at_a_time(self) -> AsyncIterator[None]:
        """A block in which only one of the servers on this database is; SQLite's has one only.

        Raises:
            StorageUnavailable: The database cannot be reached.
        """
        if self._sqlite_file:
            yield
            return
        async with self.transaction() as connection:
            await connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": START_LOCK})
            yield

    async def migrate(self) -> None:
        """Bring the schema up to date; on SQLite a snapshot of what was there is taken first.

        Raises:
            ConfigurationError: The database cannot be opened, or a newer UpChatty wrote it.
        """
        try:
            if self._sqlite_file:
                self._sqlite_file.parent.mkdir(parents=True, exist_ok=True)
            revision = await self._revision()
            if revision == _newest_revision():
                return
            if self._sqlite_file and revision:
                await self._take_snapshot(self._sqlite_file, revision)
            async with self._engine.begin() as connection:
                await connection.run_sync(_upgrade)
            await self._engine.dispose()  # the next connections check foreign keys again
        except (DBAPIError, OSError) as error:
            reason = error.orig if isinstance(error, DBAPIError) else error
            raise ConfigurationError(
                setting="database_url" if not self._sqlite_file else str(self._sqlite_file),
                problem=f"the database cannot be opened ({reason})",
            ) from error

    async def close(self) -> None:
        """Close every connection."""
        await self._engine.dispose()
        if self._sqlite_file:
            self._readers.dispose()

    async def _revision(self) -> str | None:
        async with self._engine.connect() as connection:
            revision = await connection.run_sync(
                lambda sync: MigrationContext.configure(sync).get_current_revision()
            )
        if revision and revision not in {script.revision for script in _scripts().walk_revisions()}:
            raise ConfigurationError(
                setting="database", problem=f"a newer UpChatty wrote it (schema {revision}); update this one"
            )
        return revision

    async def _take_snapshot(self, file: Path, revision: str) -> None:
        folder = file.parent / "snapshots"
        folder.mkdir(exist_ok=True)
        snapshot = folder / f"{file.stem}-{revision}-{time.strftime('%Y%m%dT%H%M%S')}.db"
        async with self._engine.connect() as connection:
            autocommit = await connection.execution_options(isolation_level="AUTOCOMMIT")
            await autocommit.execute(text("VACUUM INTO :snapshot"), {"snapshot": str(snapshot)})


@contextmanager
def _unavailable() -> Iterator[None]:
    """Tells callers of the database's absence from their own mistakes."""
    try:
        yield
    except (OperationalError, InterfaceError, PoolTimeout, OSError) as error:
        raise StorageUnavailable from error
    except DBAPIError as error:
        if error.connection_invalidated or _sqlstate(error).startswith(UNAVAILABLE):
            raise StorageUnavailable from error
        raise


def _driver_url(url: str, sqlite_file: Path | None) -> URL:
    if not url:
        return URL.create("sqlite+aiosqlite", database=str(sqlite_file))
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise ConfigurationError(setting="database_url", problem="this is not a URL") from None
    if parsed.drivername.partition("+")[0] not in ("postgresql", "postgres"):
        raise ConfigurationError(
            setting="database_url", problem="expected postgresql://…, or nothing for SQLite"
        )
    parsed = parsed.set(drivername="postgresql+asyncpg")
    if sslmode := parsed.query.get("sslmode"):  # libpq's name; the driver's is ssl
        parsed = parsed.difference_update_query(["sslmode"]).update_query_dict({"ssl": sslmode})
    return parsed


def _sqlstate(error: DBAPIError) -> str:
    """PostgreSQL's code of an error, empty where it has none."""
    return getattr(error.orig, "sqlstate", None) or ""


def _pool_options(url: str) -> dict[str, Any]:
    return {"pool_pre_ping": True, "pool_size": 10, "pool_timeout": 10} if url else {}


def _prepare_sqlite(connection: Any, _record: object) -> None:
    cursor = connection.cursor()
    # WAL with NORMAL: a commit survives the death of the process, and readers never wait for a writer.
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON", "busy_timeout=5000"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _config(connection: Connection | None = None) -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def _scripts() -> ScriptDirectory:
    return ScriptDirectory.from_config(_config())


def _newest_revision() -> str | None:
    return _scripts().get_current_head()


def _upgrade(connection: Connection) -> None:
    if connection.dialect.name == "postgresql":  # several servers may start at once
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": MIGRATION_LOCK})
    else:
        # A table that Alembic makes anew must not take the rows that refer to it along, and Python's
        # driver by itself begins no transaction before DDL, so half a migration would stay.
        connection.exec_driver_sql("PRAGMA foreign_keys=OFF")
        connection.exec_driver_sql("PRAGMA legacy_alter_table=ON")  # triggers on it may name it meanwhile
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    command.upgrade(_config(connection), "head")
