"""What callers and operators see when something breaks: the engine, the server, files, other engines."""

import asyncio
import json
import shutil
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.faults import PATIENCE, engine_of, eventually, open_stream, record
from tests.support import Server, assert_error, events, question
from upchatty.errors import DataFolderInUse
from upchatty.settings import Settings
from upchatty.testing import ScriptedAnswer, ScriptedEngine, running_server

LONG = "Write a long story about a whale."
NEVER = float("inf")

# The real engine dies, hangs, and ends with its server.


@pytest.fixture(scope="module")
def lasting(model_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server for these tests alone, since its engine has a hard time."""
    models = {"default": {"path": str(model_file)}}
    with Server(tmp_path_factory.mktemp("own"), UPCHATTY_MODELS=json.dumps(models)) as server:
        yield server


@pytest.fixture
def own(lasting: Server) -> Server:
    """The same, started again where a test has left it ended."""
    assert lasting.process
    if lasting.process.poll() is not None:
        lasting.start()
    return lasting


def long_question(server: Server, max_tokens: int = 1000) -> dict[str, Any]:
    """A question whose answer takes a while."""
    return question(server.chatbot, LONG, max_tokens=max_tokens, temperature=0)


def ask(server: Server) -> httpx.Response:
    """A short question."""
    with server.client() as client:
        return client.post("/chat/completions", json=question(server.chatbot, max_tokens=2))


def pid_of(server: Server) -> int:
    """The server's process id."""
    assert server.process
    return server.process.pid


def test_engine_killed_in_mid_answer(own: Server) -> None:
    engine = engine_of(pid_of(own))
    restarts = own.metric("upchatty_engine_restarts")
    with (
        ThreadPoolExecutor(1) as threads,
        own.client() as client,
        open_stream(client, long_question(own), pieces=3) as stream,
    ):
        whole = threads.submit(client.post, "/chat/completions", json=long_question(own))
        eventually(lambda: own.metric("upchatty_completions_running") == 2)
        engine.kill()
        last = stream.rest()[-1]
        assert_error(whole.result(), 502, "engine failed")
        meanwhile = client.post("/chat/completions", json=question(own.chatbot))
    assert list(json.loads(last)) == ["error"]
    assert_error(meanwhile, 503, "not ready")
    assert int(meanwhile.headers["retry-after"]) >= 1
    assert meanwhile.elapsed.total_seconds() < 5
    kept = record(own, stream.id)
    assert kept["finish_reason"] == "error"
    assert kept["completion_tokens"] >= 3
    eventually(lambda: ask(own).status_code == 200)
    assert own.metric("upchatty_engine_restarts") == restarts + 1
    assert engine_of(pid_of(own)).pid != engine.pid
    assert "engine died" in own.log()


def test_engine_hangs(model_file: Path, tmp_path: Path) -> None:
    models = {"default": {"path": str(model_file), "timeout_seconds": 2}}
    with Server(tmp_path, UPCHATTY_MODELS=json.dumps(models)) as server:
        engine = engine_of(pid_of(server))
        engine.suspend()
        try:
            assert_error(ask(server), 504, "2 seconds")
            assert_error(httpx.get(server.address + "/health/ready", timeout=30), 503)
            assert httpx.get(server.address + "/health/live").status_code == 200
        finally:
            engine.resume()
        eventually(lambda: ask(server).status_code == 200)
        assert httpx.get(server.address + "/health/ready", timeout=30).status_code == 200


def test_sigterm_lets_a_stream_finish(own: Server) -> None:
    engine = engine_of(pid_of(own))
    with own.client() as client, open_stream(client, long_question(own, max_tokens=20)) as stream:
        assert own.process
        own.process.send_signal(signal.SIGTERM)
        eventually(lambda: refuses_connections(own.address))
        assert stream.rest()[-1] == "[DONE]"
    assert own.stop() == 0
    kept = record(own, stream.id)
    assert kept["finish_reason"] in ("length", "stop")
    assert not engine.is_running()


def refuses_connections(address: str) -> bool:
    """Whether nobody listens there any more."""
    try:
        httpx.get(address + "/health/live")
    except httpx.ConnectError:
        return True
    except httpx.TransportError:  # it came just before the end
        return False
    return False


def test_sigterm_of_an_idle_server(own: Server) -> None:
    started = time.monotonic()
    assert own.stop() == 0
    assert time.monotonic() - started < 10


def test_engine_ends_with_a_killed_server(own: Server) -> None:
    engine = engine_of(pid_of(own))
    own.kill()
    eventually(lambda: has_ended(engine))
    own.start()
    assert ask(own).status_code == 200


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_engine_ends_with_a_server_that_is_ended_while_it_loads(
    number: signal.Signals, model_file: Path, tmp_path: Path
) -> None:
    models = {"default": {"path": str(model_file)}}
    server = Server(tmp_path, UPCHATTY_MODELS=json.dumps(models))
    command = server.command("serve", "--port", "0")
    with subprocess.Popen(
        command, env=server.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        engine = engine_of(process.pid)
        process.send_signal(number)
        output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == (0 if number == signal.SIGTERM else -number)
    assert b"answers at" not in output
    eventually(lambda: has_ended(engine))


def has_ended(process: psutil.Process) -> bool:
    """Whether a process is gone; one that nobody has waited for is."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


# What keeps the server from starting is told in a sentence.


def assert_does_not_start(
    server: Server, code: int, *words: str, flags: tuple[str, ...] = ("--port", "0")
) -> None:
    """`serve` ends with this exit code and a sentence that has these words, and no traceback."""
    ended = server.run("serve", *flags, timeout=60)
    assert ended.returncode == code, ended.stderr
    assert "Traceback" not in ended.stderr
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("upchatty: ")
    for word in words:
        assert word in last


def test_second_server_on_the_same_folder(own: Server) -> None:
    assert_does_not_start(own, 5, "another UpChatty server", str(own.data_dir))
    assert ask(own).status_code == 200


def test_port_in_use(own: Server, tmp_path: Path) -> None:
    port = own.address.rpartition(":")[2]
    assert_does_not_start(Server(tmp_path), 2, port, flags=("--port", port))


def test_data_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file, where a folder should be")
    assert_does_not_start(Server(tmp_path), 2, "data_dir", str(tmp_path / "data"))


def test_data_folder_that_cannot_be_written() -> None:
    if not Path("/proc/self").exists():
        pytest.skip("needs Linux's /proc, which not even root can write")
    server = Server(Path("/proc/self"))
    assert_does_not_start(server, 2, "data_dir", "/proc/self/data")


@pytest.mark.parametrize("share", [0.5, 0.001])
def test_truncated_model_file(share: float, model_file: Path, tmp_path: Path) -> None:
    file = tmp_path / "half.gguf"
    file.write_bytes(model_file.read_bytes()[: int(model_file.stat().st_size * share)])
    assert_does_not_start(with_model(tmp_path, file), 1, str(file))


def test_corrupt_model_file(model_file: Path, tmp_path: Path) -> None:
    content = bytearray(model_file.read_bytes())
    content[24:4096] = b"\xff" * (4096 - 24)
    file = tmp_path / "corrupt.gguf"
    file.write_bytes(content)
    assert_does_not_start(with_model(tmp_path, file), 1, str(file))


def test_model_file_with_the_wrong_sum(model_file: Path, tmp_path: Path) -> None:
    file = tmp_path / "other.gguf"
    shutil.copy(model_file, file)
    with file.open("r+b") as content:
        content.seek(-1, 2)
        content.write(b"\x55")
    assert_does_not_start(with_model(tmp_path, file, sha256="0" * 64), 1, str(file), "SHA-256")


def test_missing_model_file(tmp_path: Path) -> None:
    assert_does_not_start(with_model(tmp_path, tmp_path / "none.gguf"), 1, "none.gguf")


def with_model(folder: Path, file: Path, **settings: str) -> Server:
    """A server that is to load this file."""
    return Server(folder, UPCHATTY_MODELS=json.dumps({"default": {"path": str(file), **settings}}))


# Faults of an engine behind a URL, which no real one has at will.


@dataclass(frozen=True)
class Scripted:
    """A server before a scripted engine."""

    engine: ScriptedEngine
    client: httpx.AsyncClient
    chatbot: str

    async def ask(self, *scripts: ScriptedAnswer, stream: bool = False) -> httpx.Response:
        """Ask a question that the engine answers so."""
        self.engine.script(*scripts)
        return await self.client.post("/chat/completions", json=question(self.chatbot, stream=stream))

    async def metric(self, name: str) -> float:
        """A gauge's value."""
        text = (await self.client.get(str(self.client.base_url.join("/metrics")))).text
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name + "{"))


@pytest.fixture
async def scripted(tmp_path: Path) -> AsyncIterator[Scripted]:
    """A server before a scripted engine, with little patience and a short queue."""
    async with ScriptedEngine() as engine:
        model = {
            "url": engine.url, "timeout_seconds": 0.5, "slots": 1, "queue": 1, "queue_seconds": 0.5,
        }  # fmt: skip
        async with running_server(Settings(data_dir=tmp_path, models={"default": model})) as server:
            headers = {"Authorization": f"Bearer {server.key}"}
            async with httpx.AsyncClient(
                verify=False, base_url=server.address + "/api/v1", headers=headers, timeout=30
            ) as client:
                yield Scripted(engine, client, server.chatbot.id)


async def test_scripted_answer(scripted: Scripted) -> None:
    body = (await scripted.ask(ScriptedAnswer(pieces=["Good ", "day", "."]))).json()
    assert body["choices"][0]["message"]["content"] == "Good day."
    assert body["usage"] == {"prompt_tokens": 10, "completion_tokens": 3, "total_tokens": 13}
    [request] = scripted.engine.requests
    assert request.body["messages"][-1] == {"role": "user", "content": "How are you?"}
    assert request.finished_at
    assert request.disconnected_at is None


async def test_pieces_pass_through_as_they_come(scripted: Scripted) -> None:
    scripted.engine.script(ScriptedAnswer(pieces=["slow"] * 3, delay=0.3))
    body = question(scripted.chatbot, stream=True)
    async with scripted.client.stream("POST", "/chat/completions", json=body) as response:
        arrivals = [time.monotonic() async for line in response.aiter_lines() if "slow" in line]
    assert len(arrivals) == 3
    assert arrivals[2] - arrivals[0] > 0.3


async def test_tokens_are_counted_where_the_engine_does_not(scripted: Scripted) -> None:
    response = await scripted.ask(ScriptedAnswer(pieces=["a", "b"], usage=False))
    usage = response.json()["usage"]
    assert usage["completion_tokens"] == 2
    assert 15 <= usage["prompt_tokens"] <= 40  # of the instructions and "How are you?", with their template
    assert usage["total_tokens"] == usage["prompt_tokens"] + 2
    assert response.headers["x-upchatty-usage"] == "estimated"


TOO_LONG = {"error": {"message": "This model's maximum context length is 512 tokens. However, …"}}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("script", "status", "words"),
    [
        (ScriptedAnswer(status=400, body=TOO_LONG), 400, "maximum context length is 512 tokens"),
        (ScriptedAnswer(status=400), 502, "scripted failure"),
        (ScriptedAnswer(status=401), 502, "engine"),
        (ScriptedAnswer(status=404), 502, "engine"),
        (ScriptedAnswer(status=429), 503, "too many requests"),
        (ScriptedAnswer(status=500), 502, "scripted failure"),
        (ScriptedAnswer(status=500, body="<html>no JSON</html>"), 502, "500"),
        (ScriptedAnswer(status=503), 503, "not ready"),
        (ScriptedAnswer(headers_delay=NEVER), 504, "0.5 seconds"),
    ],
)
async def test_failure_before_the_first_byte(
    scripted: Scripted, script: ScriptedAnswer, status: int, words: str, stream: bool
) -> None:
    response = await scripted.ask(script, stream=stream)
    assert_error(response, status, words)
    assert ("retry-after" in response.headers) == (status == 503)
    assert "html" not in response.text
    assert (await scripted.ask()).status_code == 200


@pytest.mark.parametrize(
    ("script", "status", "words"),
    [
        (ScriptedAnswer(ending="hang"), 504, "0.5 seconds"),
        (ScriptedAnswer(ending="close"), 502, "closed the connection"),
        (ScriptedAnswer(ending="garbage"), 502, "not what it was asked for"),
        (ScriptedAnswer(ending="error"), 502, "scripted failure"),
    ],
)
async def test_failure_in_mid_answer(
    scripted: Scripted, script: ScriptedAnswer, status: int, words: str
) -> None:
    assert_error(await scripted.ask(script), status, words)
    streamed = events(await scripted.ask(script, stream=True))
    assert "".join(
        choice["delta"].get("content", "")
        for event in streamed[:-1]
        for choice in json.loads(event)["choices"]
    ) == "".join(script.pieces)
    assert list(json.loads(streamed[-1])) == ["error"]
    assert words in json.loads(streamed[-1])["error"]
    assert (await scripted.ask()).status_code == 200


async def test_no_engine_there(scripted: Scripted) -> None:
    await scripted.engine.__aexit__()
    response = await scripted.ask()
    assert_error(response, 503, "does not accept connections")
    assert "retry-after" in response.headers


async def test_leaving_reaches_the_engine(scripted: Scripted) -> None:
    for stream in (False, True):
        scripted.engine.script(ScriptedAnswer(pieces=["x"] * 1000, delay=0.05))
        body = question(scripted.chatbot, stream=stream)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await scripted.client.post("/chat/completions", json=body)
        request = scripted.engine.requests[-1]
        await until(lambda request=request: request.disconnected_at)
        assert request.pieces_sent < 100


async def test_abandoned_streams_leave_no_task_behind(scripted: Scripted) -> None:
    await scripted.ask()
    scripted.engine.default = ScriptedAnswer(pieces=["x"] * 1000, delay=0.01)
    body = question(scripted.chatbot, stream=True)
    tasks = len(asyncio.all_tasks())
    for number in range(100):
        async with scripted.client.stream("POST", "/chat/completions", json=body) as response:
            assert response.status_code == 200
            lines = response.aiter_lines()
            for _ in range(number % 4):
                await anext(lines)
    await until(lambda: len(asyncio.all_tasks()) <= tasks)
    assert await scripted.metric("upchatty_completions_running") == 0
    assert await scripted.metric("upchatty_completions_waiting") == 0
    assert all(request.disconnected_at for request in scripted.engine.requests[1:])


async def test_full_queue_and_its_deadline(scripted: Scripted) -> None:
    busy = ScriptedAnswer(pieces=["x"] * 40, delay=0.1)  # four seconds
    running = asyncio.create_task(scripted.ask(busy))
    await until(lambda: scripted.engine.requests)
    waiting = asyncio.create_task(scripted.ask())
    await asyncio.sleep(0.1)
    refused = await scripted.ask()
    assert_error(refused, 503, "busy")
    assert refused.elapsed.total_seconds() < 0.5
    assert "retry-after" in refused.headers
    late = await waiting
    assert_error(late, 503, "0.5 seconds")
    assert "retry-after" in late.headers
    assert (await running).status_code == 200
    assert len(scripted.engine.requests) == 1


async def until(true: Any) -> None:
    """Wait until a function returns something true."""
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


async def test_keep_alive_while_nothing_comes(tmp_path: Path) -> None:
    scripts = [
        ScriptedAnswer(pieces=["late"], headers_delay=11.0),
        ScriptedAnswer(pieces=["late"], delay=11.0),
    ]
    async with ScriptedEngine() as engine:
        engine.script(*scripts)
        settings = Settings(data_dir=tmp_path, models={"default": {"url": engine.url}})
        async with running_server(settings) as server, httpx.AsyncClient(verify=False, timeout=30) as client:
            url, headers = (
                server.address + "/api/v1/chat/completions",
                {"Authorization": f"Bearer {server.key}"},
            )
            body = question(server.chatbot.id, stream=True)
            responses = await asyncio.gather(*(client.post(url, headers=headers, json=body) for _ in scripts))
    for response in responses:
        assert response.status_code == 200
        assert [line for line in response.iter_lines() if line.startswith(":")] == [": keep-alive"]
        assert events(response)[-1] == "[DONE]"


async def test_running_server_says_why_it_does_not_start(tmp_path: Path) -> None:
    async with ScriptedEngine() as engine:
        settings = Settings(data_dir=tmp_path, models={"default": {"url": engine.url}})
        async with running_server(settings):
            with pytest.raises(DataFolderInUse):
                async with running_server(settings):
                    pass


def test_signals_of_this_process_stay_as_they_were(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)

    async def look() -> object:
        async with ScriptedEngine() as engine:
            settings = Settings(data_dir=tmp_path, models={"default": {"url": engine.url}})
            async with running_server(settings):
                return signal.getsignal(signal.SIGTERM)

    with ThreadPoolExecutor(1) as threads:  # where no signal handler can be set at all
        assert threads.submit(asyncio.run, look()).result() == before
