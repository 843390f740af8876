"""The database: migrations and their snapshots, servers that share it, changes at once."""

import shutil
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy

from tests.faults import rows
from tests.support import Server, question
from upchatty.errors import ConfigurationError
from upchatty.storage import database as storage
from upchatty.storage.database import Database

AT_ONCE = 20

NEXT_MIGRATION = """
import sqlalchemy as sa
from alembic import op

revision = "later"
down_revision = "{newest}"


def upgrade() -> None:
    op.create_table("later", sa.Column("id", sa.Integer, primary_key=True))
    op.execute("UPDATE chatbots SET latest_version = 7")
    {last_step}
"""


def test_changes_at_once_make_as_many_versions(server: Server) -> None:
    with server.client() as client, ThreadPoolExecutor(AT_ONCE) as threads:
        chatbot = client.post("/chatbots", json={"name": "busy"}).json()["id"]

        def change(number: int) -> dict[str, Any]:
            answer = client.patch(f"/chatbots/{chatbot}", json={"instructions": f"number {number}"})
            assert answer.status_code == 200, answer.text
            return answer.json()  # type: ignore[no-any-return]

        list(threads.map(change, range(AT_ONCE)))
        versions = client.get(f"/chatbots/{chatbot}/versions", params={"limit": 100}).json()["data"]
        published = client.get(f"/chatbots/{chatbot}").json()
    assert [version["version"] for version in versions] == list(range(1, AT_ONCE + 2))
    changed = {version["instructions"] for version in versions[1:]}
    assert changed == {f"number {number}" for number in range(AT_ONCE)}
    assert published["version"] == AT_ONCE + 1
    assert published["instructions"] == versions[-1]["instructions"]


def test_two_servers_start_at_once_on_an_empty_database(
    new_database: Callable[[str], str], model_file: Path, tmp_path: Path
) -> None:
    url = new_database("postgresql")
    servers = [Server(tmp_path / name, UPCHATTY_DATABASE_URL=url) for name in ("one", "two")]
    with ExitStack() as stack, ThreadPoolExecutor(2) as threads:
        list(threads.map(stack.enter_context, servers))
        one, two = servers
        for table in ("alembic_version", "chatbots", "keys"):
            assert rows(one, f"SELECT count(*) AS count FROM {table}") == [{"count": 1}]
        for server in servers:
            with server.client() as client:
                for other in servers:  # what one has made, the other knows
                    answer = client.post("/chat/completions", json=question(other.chatbot, max_tokens=2))
                    assert answer.status_code == 200
        with one.client() as client:
            key = client.post("/keys", json={"name": "shared", "scope": "chat"}).json()["key"]
        with two.client(key) as client:
            assert client.get("/models").status_code == 200
        assert [server.stop() for server in servers] == [0, 0]
        assert len(rows(one, "SELECT id FROM completions")) == 4


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_database_of_a_newer_version_is_refused(
    kind: str, new_database: Callable[[str], str], tmp_path: Path
) -> None:
    url = new_database(kind)
    server = Server(tmp_path, **({"UPCHATTY_DATABASE_URL": url} if url else {}))
    assert server.run("keys", "list").returncode == 0  # makes the database
    execute(server, "UPDATE alembic_version SET version_num = 'from-the-future'")
    for command in (["serve", "--port", "0"], ["keys", "list"]):
        ended = server.run(*command, timeout=60)
        assert ended.returncode == 2, ended.stderr
        assert "newer UpChatty" in ended.stderr
        assert "from-the-future" in ended.stderr
        assert "Traceback" not in ended.stderr


def execute(server: Server, statement: str) -> None:
    """Run a statement on the server's database."""
    if "UPCHATTY_DATABASE_URL" in server.environment:
        rows(server, statement)
        return
    with closing(sqlite3.connect(server.data_dir / "upchatty.db")) as connection:
        connection.execute(statement)
        connection.commit()


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    server = Server(tmp_path)
    server.data_dir.mkdir()
    (server.data_dir / "upchatty.db").write_bytes(b"this is no database at all" * 100)
    ended = server.run("serve", "--port", "0", timeout=60)
    assert ended.returncode == 2, ended.stderr
    assert "upchatty.db" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    "url", ["postgresql://127.0.0.1:1/nothing", "mysql://127.0.0.1/x", "no URL", "postgresql://h:port/x"]
)
def test_database_that_cannot_be_reached(url: str, tmp_path: Path) -> None:
    ended = Server(tmp_path, UPCHATTY_DATABASE_URL=url).run("serve", "--port", "0", timeout=60)
    assert ended.returncode == 2, ended.stderr
    assert "database_url" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_password_of_the_database_is_not_shown(postgresql: str, tmp_path: Path) -> None:
    url = sqlalchemy.make_url(postgresql).set(password="open sesame", database="does_not_exist")
    server = Server(tmp_path, UPCHATTY_DATABASE_URL=url.render_as_string(hide_password=False))
    ended = server.run("serve", "--port", "0", timeout=60)
    assert ended.returncode == 2
    assert "does_not_exist" in ended.stderr
    assert "sesame" not in ended.stderr + ended.stdout


# A later UpChatty is this one with a migration more.


@pytest.fixture
def later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Adds a migration to this UpChatty, with this Python statement as its last step."""

    def add(last_step: str) -> None:
        folder = tmp_path / "migrations"
        newest = storage._newest_revision()
        shutil.copytree(storage.MIGRATIONS, folder)
        script = NEXT_MIGRATION.format(newest=newest, last_step=last_step)
        (folder / "versions" / "later.py").write_text(script)
        monkeypatch.setattr(storage, "MIGRATIONS", folder)

    return add


async def migrate(file: Path) -> None:
    """What every start does."""
    database = Database("", file)
    try:
        await database.migrate()
    finally:
        await database.close()


def look(file: Path, query: str) -> list[Any]:
    """What a query says about an SQLite file."""
    with closing(sqlite3.connect(file)) as connection:
        return connection.execute(query).fetchall()


TABLES = "SELECT name FROM sqlite_master WHERE type = 'table'"
REVISION = "SELECT version_num FROM alembic_version"


async def a_database(tmp_path: Path) -> tuple[Path, str]:
    """A database of this UpChatty with one chatbot, and its revision."""
    file = tmp_path / "data" / "upchatty.db"
    await migrate(file)
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("INSERT INTO chatbots VALUES ('bot_1', 1, 1, 0)")
        connection.execute(
            "INSERT INTO chatbot_versions (chatbot_id, version, name, instructions, keep_text, created_at)"
            " VALUES ('bot_1', 1, 'first', '', 1, 0)"
        )
        connection.commit()
    [(revision,)] = look(file, REVISION)
    return file, revision


async def test_snapshot_before_a_migration(tmp_path: Path, later: Callable[[str], None]) -> None:
    file, revision = await a_database(tmp_path)
    await migrate(file)
    assert not (file.parent / "snapshots").exists(), "nothing to migrate, nothing to keep"

    later("pass")
    await migrate(file)
    assert look(file, REVISION) == [("later",)]
    assert ("later",) in look(file, TABLES)
    assert look(file, "SELECT latest_version FROM chatbots") == [(7,)]
    [snapshot] = (file.parent / "snapshots").iterdir()
    assert revision in snapshot.name
    assert look(snapshot, REVISION) == [(revision,)]
    assert ("later",) not in look(snapshot, TABLES)
    assert look(snapshot, "SELECT latest_version FROM chatbots") == [(1,)]
    assert look(snapshot, "PRAGMA integrity_check") == [("ok",)]

    await migrate(file)
    assert len(list((file.parent / "snapshots").iterdir())) == 1


async def test_migration_that_fails_changes_nothing(tmp_path: Path, later: Callable[[str], None]) -> None:
    file, revision = await a_database(tmp_path)
    later("op.execute('SELECT * FROM no_such_table')")
    with pytest.raises(ConfigurationError, match="no_such_table"):
        await migrate(file)
    assert look(file, REVISION) == [(revision,)]
    assert ("later",) not in look(file, TABLES)
    assert look(file, "SELECT latest_version FROM chatbots") == [(1,)]


async def test_table_made_anew_keeps_the_rows_that_refer_to_it(
    tmp_path: Path, later: Callable[[str], None]
) -> None:
    file, _ = await a_database(tmp_path)
    later(
        "with op.batch_alter_table('chatbots', recreate='always') as b: b.add_column(sa.Column('x', sa.Text))"
    )
    await migrate(file)
    assert look(file, "SELECT id, x FROM chatbots") == [("bot_1", None)]
    assert look(file, "SELECT name FROM chatbot_versions") == [("first",)]
    assert look(file, "PRAGMA foreign_key_check") == []


async def test_snapshot_serves_an_earlier_upchatty(tmp_path: Path, later: Callable[[str], None]) -> None:
    file, _ = await a_database(tmp_path)
    later("pass")
    await migrate(file)
    [snapshot] = (file.parent / "snapshots").iterdir()
    earlier = Server(tmp_path / "earlier")
    earlier.data_dir.mkdir(parents=True)
    shutil.copy(snapshot, earlier.data_dir / "upchatty.db")
    assert earlier.run("keys", "list").returncode == 0
    newer = Server(tmp_path)
    assert "newer UpChatty" in newer.run("keys", "list").stderr
