"""Builds everything and owns start and stop; the only place that does."""

import asyncio
import gc
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, closing, contextmanager, suppress
from ctypes import CDLL
from dataclasses import dataclass
from importlib import import_module
from types import FrameType
from typing import TYPE_CHECKING, Any

import msgspec
import uvicorn
from filelock import FileLock, Timeout
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from upchatty.api.access_log import new_request_id
from upchatty.api.caller import WHEN_LOST, WhenLost
from upchatty.api.routes import build_api
from upchatty.api.services import Services
from upchatty.auth import Keys
from upchatty.chat.account import Recorder
from upchatty.chat.answer import Answering
from upchatty.chat.chatbots import Chatbot, Chatbots
from upchatty.chat.limits import Limiter
from upchatty.chat.unanswered import Unanswered
from upchatty.engines.download import Progress
from upchatty.engines.files import ModelFiles
from upchatty.engines.pool import Pool
from upchatty.errors import ConfigurationError, DataFolderInUse
from upchatty.knowledge.documents import Documents
from upchatty.knowledge.search import Search
from upchatty.knowledge.supervision import Supervisor
from upchatty.logs import configure_logs
from upchatty.metrics import Metrics
from upchatty.settings import Settings
from upchatty.storage.counters import Counters
from upchatty.storage.database import Database
from upchatty.storage.passages import any_passages

if TYPE_CHECKING:  # these are costly to import
    from upchatty.knowledge.worker import Worker
    from upchatty.tracing import Tracer

BACKLOG = 2048
GC_THRESHOLDS = (2_000, 20, 100)  # requests leave no cycles behind, so looking for them can wait
TICKS_OF_REST, RUSH = 20, 100  # 2 seconds, and connections
LOCK, ADDRESS = "server.lock", "server.address"


@dataclass(frozen=True, slots=True)
class Administration:
    """What an owner works on; needs the database only."""

    chatbots: Chatbots
    keys: Keys
    documents: Documents
    database: Database


@dataclass(frozen=True, slots=True)
class Running:
    """What there is to tell when a server has started.

    Args:
        address: Its base URL.
        chatbot: The oldest chatbot.
        key: The first key's secret, if it was just made.
    """

    address: str
    chatbot: Chatbot
    key: str | None


@asynccontextmanager
async def open_administration(settings: Settings) -> AsyncIterator[Administration]:
    """The chatbots and keys of a database, its schema up to date.

    Raises:
        ConfigurationError: The database cannot be opened.
    """
    database = Database(settings.database_url, settings.sqlite_file)
    try:
        await database.migrate()
        chatbots, documents = Chatbots(database, settings.chat_models), Documents(database, settings)
        yield Administration(chatbots, Keys(database), documents, database)
    finally:
        await database.close()


@asynccontextmanager
async def open_services(settings: Settings, progress: Progress | None = None) -> AsyncIterator[Services]:
    """Everything that answering needs. The engines are not started yet, but will be stopped.

    Raises:
        StartupError: The database or a model's file is not to be had.
    """
    async with AsyncExitStack() as stack:
        administration = await stack.enter_async_context(open_administration(settings))
        metrics, tracer = Metrics(), _tracer(settings.traces_url)
        pool = await Pool.open(settings, ModelFiles(settings.cache_dir), metrics, progress)
        if tracer:
            stack.push_async_callback(tracer.close)
        recorder = Recorder(administration.database, metrics)
        stack.push_async_callback(recorder.close)
        stack.push_async_callback(pool.stop)
        recorder.start()
        limiter = Limiter(_counters(settings.limits_url), administration.database, metrics)
        stack.push_async_callback(limiter.close)
        workers = Supervisor(settings, administration.database)
        stack.push_async_callback(workers.stop)
        documents = Documents(administration.database, settings, workers.wake)
        search = Search(administration.database, pool.embedding, pool.reranker, settings)
        unanswered = Unanswered(administration.database, pool.embedding)
        stack.push_async_callback(unanswered.close)
        answering = Answering(
            administration.chatbots,
            pool,
            recorder,
            limiter,
            search=search,
            unanswered=unanswered,
            metrics=metrics,
        )
        yield Services(
            settings,
            metrics,
            administration.keys,
            administration.chatbots,
            pool,
            answering,
            administration.database,
            documents,
            search,
            unanswered,
            workers,
            tracer,
        )


@asynccontextmanager
async def open_worker(settings: Settings, progress: Progress | None = None) -> AsyncIterator["Worker"]:
    """What reads documents, which has an embedding engine of its own. Imported here only: a server leaves
    reading to other processes, and need not hold what that takes.

    Raises:
        StartupError: The database or the embedding model's file is not to be had.
    """
    async with AsyncExitStack() as stack:
        administration = await stack.enter_async_context(open_administration(settings))
        files = ModelFiles(settings.cache_dir)
        module = import_module("upchatty.knowledge.worker")
        worker = module.open_worker(settings, administration.database, files, progress)
        yield await stack.enter_async_context(worker)


def _tracer(url: str | None) -> "Tracer | None":
    """What makes traces, where there is a collector for them.

    Imported here only: it takes half a second or more and 8 MiB, which a server without a collector is
    spared.
    """
    return import_module("upchatty.tracing").Tracer(url) if url else None


def _counters(url: str) -> Counters:
    """Where limits are counted. Redis' client is imported here only: it takes half a second and 25 MiB."""
    if not url:
        return Counters()
    counters: Counters = import_module("upchatty.storage.shared_counters").SharedCounters(url)
    return counters


async def run_server(settings: Settings, announce: Callable[[Running], None], progress: Progress) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        settings: The settings.
        announce: Called once the server answers.
        progress: Shows downloads.

    Raises:
        StartupError: It cannot start; says why.
    """
    configure_logs(settings)
    with _data_folder_to_itself(settings), _listening_socket(settings) as listener:
        async with open_services(settings, progress) as services:
            await _serve(_SignalledServer(_uvicorn_config(services)), services, listener, announce)


@asynccontextmanager
async def server_in_this_process(settings: Settings) -> AsyncIterator[Running]:
    """The server as `run_server` runs it, until the end of the block; the process keeps its own
    signal handlers and logs.

    Args:
        settings: The settings.

    Raises:
        StartupError: It cannot start; says why.
    """
    with _data_folder_to_itself(settings), _listening_socket(settings) as listener:
        async with open_services(settings) as services:
            server = _HTTPServer(_uvicorn_config(services))
            running: asyncio.Future[Running] = asyncio.get_running_loop().create_future()
            serving = asyncio.create_task(_serve(server, services, listener, running.set_result))
            try:
                await asyncio.wait((serving, running), return_when=asyncio.FIRST_COMPLETED)
                if not running.done():
                    await serving  # raises what went wrong
                yield await running
            finally:
                server.stop()
                await serving


async def _serve(
    server: "_HTTPServer", services: Services, listener: socket.socket, announce: Callable[[Running], None]
) -> None:
    async with services.database.one_at_a_time():
        chatbot = await services.chatbots.make_first()
        if fixed := services.settings.admin_key:
            await services.keys.make_first(fixed)
    starting = asyncio.create_task(_start(services, chatbot, listener, announce))
    starting.add_done_callback(lambda task: server.stop() if _has_failed(task) else None)
    await server.serve([listener])
    starting.cancel()
    with suppress(asyncio.CancelledError):
        await starting


async def _start(
    services: Services, chatbot: Chatbot, listener: socket.socket, announce: Callable[[Running], None]
) -> None:
    await services.pool.start()
    if await any_passages(services.database):  # else nobody may ever search
        services.pool.preload()
    # A key that is made is shown this once, so it is made when nothing can go wrong any more.
    async with services.database.one_at_a_time():
        key = None if services.settings.admin_key else await services.keys.make_first("")
    gc.collect()
    gc.freeze()  # what was built so far stays, and need not be looked through between two tokens
    gc.set_threshold(*GC_THRESHOLDS)
    address = _address(listener)
    with _usable_data_folder(services.settings):
        (services.settings.data_dir / ADDRESS).write_text(address)
    services.workers.start()
    announce(Running(address, chatbot, key))


def _has_failed(task: "asyncio.Task[None]") -> bool:
    return not task.cancelled() and task.exception() is not None


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


@contextmanager
def _data_folder_to_itself(settings: Settings) -> Iterator[None]:
    with _usable_data_folder(settings):
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        lock = FileLock(settings.data_dir / LOCK).acquire(timeout=0)
    with lock:
        with _usable_data_folder(settings):
            (settings.data_dir / ADDRESS).write_text("")
        yield


@contextmanager
def _usable_data_folder(settings: Settings) -> Iterator[None]:
    try:
        yield
    except Timeout:
        raise DataFolderInUse(folder=settings.data_dir) from None
    except OSError as error:
        raise ConfigurationError(
            setting="data_dir", problem=f"{settings.data_dir} cannot be used ({error.strerror})"
        ) from None


def running_address(settings: Settings) -> str | None:
    """The address of the server that is working on this data folder, or None if there is none."""
    try:
        lock = FileLock(settings.data_dir / LOCK)
        with lock.acquire(timeout=0):
            return None
    except Timeout:
        with suppress(OSError):
            return (settings.data_dir / ADDRESS).read_text() or None
    except OSError:
        pass
    return None


@contextmanager
def _listening_socket(settings: Settings) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        listener = socket.create_server((settings.host, settings.port), family=family, backlog=BACKLOG)
    except (OSError, UnicodeError) as error:
        raise ConfigurationError(
            setting="host and port", problem=f"cannot listen on {settings.host}:{settings.port} ({error})"
        ) from None
    with closing(listener):
        # For every connection. uvloop sets it by itself, asyncio only where it has made the listener.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield listener


def _uvicorn_config(services: Services) -> uvicorn.Config:
    return uvicorn.Config(
        build_api(services),
        http=_Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=services.settings.shutdown_seconds,
    )


class _Protocol(HttpToolsProtocol):
    """uvicorn's HTTP, which tells a request at once that its caller has left, and has the contract's error
    body where a request is no HTTP at all."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._when_lost: WhenLost = set()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["state"][WHEN_LOST] = self._when_lost

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for tell in [*self._when_lost]:
            tell()

    def send_400_response(self, msg: str) -> None:
        body = msgspec.json.encode({"error": "this is not a valid HTTP request"})
        head = (
            b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\nx-request-id: %s\r\n"
            b"content-length: %d\r\nconnection: close\r\n\r\n" % (new_request_id(), len(body))
        )
        self.transport.write(head + body)
        self.transport.close()


class _HTTPServer(uvicorn.Server):
    """uvicorn, which leaves the process's signals alone, and gives back what a rush of callers has taken."""

    _most_connections = 0

    async def on_tick(self, counter: int) -> bool:
        connections = len(self.server_state.connections)
        self._most_connections = max(self._most_connections, connections)
        if counter % TICKS_OF_REST == 0 and self._most_connections - connections > RUSH:
            self._most_connections = connections
            gc.collect()
            trim = getattr(CDLL(None), "malloc_trim", None)  # glibc's; others give back by themselves
            await asyncio.to_thread(trim or int, 0)
        return await super().on_tick(counter)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def stop(self) -> None:
        """Stop accepting, and end with the answers that are running."""
        self.should_exit = True


class _SignalledServer(_HTTPServer):
    """The same, ended by SIGTERM or SIGINT with exit code 0; a second signal ends it without waiting."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.handle_exit)
        yield  # the handlers stay: what is left to do after the last answer is not to be broken off either

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit
        self.stop()
