"""The servers that are compared: how each is started, watched and stopped."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import aiohttp
import psutil

from benchmarks.clock import PreciseTimer
from benchmarks.gateway import peers
from benchmarks.gateway.load import Pool
from benchmarks.gateway.target import Question, Target

ROOT = Path(__file__).parents[2]
ADMIN_KEY = "upchatty_benchmark_key"
PEER_KEY = "sk-benchmark"
START_SECONDS = 120.0
SLOTS = 4096  # answers at once; more than any part of the benchmark opens

NGINX_CONFIGURATION = """
daemon off;
worker_processes 1;
worker_rlimit_nofile 16384;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ worker_connections 8192; }}
http {{
    access_log off;
    keepalive_requests 100000000;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    upstream mock {{ server 127.0.0.1:{upstream}; keepalive 4096; keepalive_requests 100000000; }}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location / {{
            proxy_pass http://mock;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
        }}
    }}
}}
"""


@dataclass(frozen=True)
class Place:
    """Where a server runs.

    Attributes:
        folder: Its own, for its data and its log.
        upstream: The mock upstream's port.
        port: The port to listen on.
    """

    folder: Path
    upstream: int
    port: int

    @property
    def upstream_url(self) -> str:
        """The base URL of the mock upstream."""
        return f"http://127.0.0.1:{self.upstream}/v1"


@dataclass(frozen=True)
class Launch:
    """How a server is started.

    Attributes:
        command: Program and arguments.
        target: How it is asked.
        environment: Variables besides this process's own.
        prepare: Makes what a question needs once it listens, such as a key; returns the target to ask.
    """

    command: list[str]
    target: Target
    environment: Mapping[str, str] = field(default_factory=dict)
    prepare: Callable[[Target], Awaitable[Target]] | None = None


def upchatty(place: Place) -> Launch:
    """`upchatty serve`: SQLite, the log as JSON in a file, a chat key, a record of every answer."""
    models = {"default": {"url": place.upstream_url, "slots": SLOTS}}
    environment = {
        "UPCHATTY_ADMIN_KEY": ADMIN_KEY,
        "UPCHATTY_MODELS": json.dumps(models),
        "UPCHATTY_LOG_FORMAT": "json",
    }
    command = [sys.executable, "-m", "upchatty", "serve", "--port", str(place.port)]
    command += ["--data-dir", str(place.folder / "data")]
    target = Target("UpChatty", place.port, "/api/v1/chat/completions")
    return Launch(command, target, environment, _chatbot_and_key)


async def _chatbot_and_key(target: Target) -> Target:
    """A chatbot without instructions, and a key that may chat with it and nothing else."""
    url = f"http://127.0.0.1:{target.port}/api/v1"
    headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
    async with aiohttp.ClientSession(headers=headers, raise_for_status=True) as session:
        while (await session.get(f"{url}/models", raise_for_status=False)).status != 200:  # noqa: ASYNC110
            await asyncio.sleep(0.1)  # it listens, but is not ready yet
        async with session.post(f"{url}/chatbots", json={"name": "benchmark"}) as response:
            chatbot = (await response.json())["id"]
        key = {"name": "benchmark", "scope": "chat", "chatbots": [chatbot]}
        async with session.post(f"{url}/keys", json=key) as response:
            secret = (await response.json())["key"]
    return replace(target, model=chatbot, headers={"Authorization": f"Bearer {secret}"})


def nginx(place: Place) -> Launch:
    """nginx as a plain reverse proxy: the limit of what can be had."""
    configuration = place.folder / "nginx.conf"
    configuration.write_text(
        NGINX_CONFIGURATION.format(folder=place.folder, upstream=place.upstream, port=place.port)
    )
    program = peers.program("nginx", "nginx-light")
    command = [
        program,
        "-p",
        str(place.folder),
        "-e",
        str(place.folder / "error.log"),
        "-c",
        str(configuration),
    ]
    return Launch(command, Target("nginx", place.port))


def litellm(place: Place) -> Launch:
    """LiteLLM's proxy with one worker and a master key, without a database."""
    programs = peers.python_packages("litellm", peers.LITELLM)
    # A model that it knows, since it looks up the price; the mock upstream does not care.
    parameters = {"model": "openai/gpt-4o-mini", "api_base": place.upstream_url, "api_key": PEER_KEY}
    configuration = place.folder / "config.yaml"  # JSON is YAML
    configuration.write_text(
        json.dumps(
            {
                "model_list": [{"model_name": "mock", "litellm_params": parameters}],
                "general_settings": {"master_key": PEER_KEY},
            }
        )
    )
    command = [str(programs / "litellm"), "--config", str(configuration), "--host", "127.0.0.1"]
    command += ["--port", str(place.port), "--num_workers", "1"]
    # Few connections: it is busy with four, and with more a stream would take longer than a measurement.
    environment = {
        "LITELLM_LOG": "ERROR",
        "LITELLM_MODE": "PRODUCTION",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LITELLM_TELEMETRY": "False",
    }
    return Launch(
        command,
        Target("LiteLLM", place.port, headers={"Authorization": f"Bearer {PEER_KEY}"}, connections=4),
        environment,
    )


def portkey(place: Place) -> Launch:
    """Portkey's gateway under node; it is told with every request where to go."""
    folder = peers.node_packages("portkey", peers.PORTKEY, peers.PORTKEY_OVERRIDES)
    start = folder / "node_modules/@portkey-ai/gateway/build/start-server.js"
    command = [peers.program("node", "nodejs"), str(start), f"--port={place.port}", "--headless"]
    headers = {
        "Authorization": f"Bearer {PEER_KEY}",
        "x-portkey-provider": "openai",
        "x-portkey-custom-host": place.upstream_url,
    }
    return Launch(command, Target("Portkey", place.port, headers=headers), {"NODE_ENV": "production"})


def naive(place: Place) -> Launch:
    """FastAPI and httpx, as in naive.py."""
    programs = peers.python_packages("naive", peers.NAIVE)
    command = [str(programs / "uvicorn"), "naive:app", "--app-dir", str(Path(__file__).parent)]
    command += ["--host", "127.0.0.1", "--port", str(place.port), "--log-level", "warning", "--no-access-log"]
    return Launch(command, Target("FastAPI + httpx", place.port), {"UPSTREAM": place.upstream_url})


SERVERS: dict[str, Callable[[Place], Launch]] = {
    "upchatty": upchatty,
    "nginx": nginx,
    "litellm": litellm,
    "portkey": portkey,
    "naive": naive,
}


class Process:
    """A process of the benchmark and its children.

    Args:
        command: Program and arguments.
        environment: Variables besides this process's own.
        log: The file of its output.
        cores: The cores that it may use.
    """

    def __init__(
        self, command: list[str], environment: Mapping[str, str], log: Path, cores: Iterable[int]
    ) -> None:
        self.log = log
        own = os.sched_getaffinity(0)
        os.sched_setaffinity(0, cores)  # a child inherits it
        try:
            with log.open("wb") as output:
                self._popen = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env={**os.environ, **environment},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
        finally:
            os.sched_setaffinity(0, own)
        self._process = psutil.Process(self._popen.pid)

    @property
    def ended(self) -> bool:
        """Whether it is gone."""
        return self._popen.poll() is not None

    def cpu_seconds(self) -> float:
        """CPU time taken so far, in user and in system mode."""
        times = [process.cpu_times() for process in self._all()]
        return sum((each.user + each.system for each in times), 0.0)

    def resident_bytes(self) -> int:
        """Resident memory."""
        return sum(process.memory_info().rss for process in self._all())

    def open_files(self) -> int:
        """Open file descriptors, sockets among them."""
        return sum(process.num_fds() for process in self._all())

    def stop(self) -> None:
        """End it, politely at first."""
        with contextlib.suppress(ProcessLookupError):
            self._popen.terminate()
        try:
            self._popen.wait(40)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._popen.pid, signal.SIGKILL)  # its own session, so nothing else is in it
            self._popen.wait()

    def last_words(self) -> str:
        """The end of its log, for a sentence."""
        return " / ".join(self.log.read_text(errors="replace").strip().splitlines()[-3:])[-400:]

    def _all(self) -> list[psutil.Process]:
        return [self._process, *self._process.children(recursive=True)]


@dataclass
class Server:
    """One that runs.

    Attributes:
        target: How it is asked.
        process: What is watched.
        pool: Connections to it from the load generator.
        folder: Its data and its log.
    """

    target: Target
    process: Process
    pool: Pool
    folder: Path

    def stop(self) -> None:
        """Close the connections and end it."""
        self.pool.close()
        self.process.stop()


def free_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


async def start_upstream(folder: Path, cores: Iterable[int], timer: PreciseTimer) -> Server:
    """The mock upstream, which can be asked directly like a server."""
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.upstream", str(port)]
    return await _started(Launch(command, Target("directly", port)), folder, cores, timer)


async def start(name: str, folder: Path, upstream: int, cores: Iterable[int], timer: PreciseTimer) -> Server:
    """Start a server, and see that its answers are right.

    Args:
        name: A key of `SERVERS`.
        folder: An empty folder for it.
        upstream: The mock upstream's port.
        cores: The cores that it may use.
        timer: For its pool.

    Raises:
        peers.NotToBeHad: It cannot be installed, does not start, or answers wrongly.
    """
    launch = await asyncio.to_thread(SERVERS[name], Place(folder, upstream, free_port()))
    return await _started(launch, folder, cores, timer)


async def _started(launch: Launch, folder: Path, cores: Iterable[int], timer: PreciseTimer) -> Server:
    process = Process(launch.command, launch.environment, folder / "log", cores)
    try:
        await _listening(launch.target, process)
        target = await launch.prepare(launch.target) if launch.prepare else launch.target
        pool = Pool(target, timer)
        deadline = time.monotonic() + 30
        for question in (Question(), Question(stream=True, chunks=100), Question(stream=True, each=True)):
            while problem := await pool.check(question):
                if time.monotonic() > deadline:
                    raise peers.NotToBeHad(f"{target.name} answers wrongly: {problem}")
                await asyncio.sleep(1)
    except BaseException:
        process.stop()
        raise
    return Server(target, process, pool, folder)


async def _listening(target: Target, process: Process) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", target.port)
            writer.close()
            return
        if process.ended:
            raise peers.NotToBeHad(f"{target.name} does not start: {process.last_words()}")
        if time.monotonic() > deadline:
            raise peers.NotToBeHad(f"{target.name} does not listen after {START_SECONDS:.0f} seconds")
        await asyncio.sleep(0.2)
