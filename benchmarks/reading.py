"""How fast documents are read, against the engine's bare rate, and what reading costs those who ask meanwhile.

Both sides of every ratio are measured in turn in one run. The document is Git's user manual, the
site all of Git's manual, as Debian's package git-doc has them. Prints Markdown.
"""

import argparse
import asyncio
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import psutil

from benchmarks.engine import Target
from benchmarks.retrieval.manuals import _pages_of as pages_of
from benchmarks.server import KEY, Address, ServerUnderTest
from upchatty.engines.client import EngineClient
from upchatty.engines.embedding import BATCH
from upchatty.engines.files import ModelFiles
from upchatty.engines.llama import LlamaServer
from upchatty.engines.texts import ask_for_embeddings
from upchatty.knowledge.reading import Readers
from upchatty.knowledge.splitting import BUDGET, split
from upchatty.settings import EMBEDDING_MODEL, MINILM, Settings

PAGE, FIRST_PAGE = "user-manual", "git-merge-base"  # the document, and one for which everything is started
IN_FLIGHT = 2
POLL_SECONDS = 0.1
LONG = 600.0  # seconds, longer than anything here takes
ENGINE = "upchatty.engines.llama_child"
BLOCK = 5  # answers before the workers are stopped, or go on
SETTLING_SECONDS = 0.5
ROOMS = ("hall", "kitchen", "library")


@dataclass(frozen=True, slots=True)
class Load:
    """CPU seconds of a server and everything that it has started."""

    engines: float
    others: float

    @classmethod
    def of(cls, pid: int) -> "Load":
        """What has been used until now."""
        engines = others = 0.0
        for process in _tree(pid):
            times = process.cpu_times()
            others += times.children_user + times.children_system  # of those that have ended
            if ENGINE in process.cmdline():
                engines += times.user + times.system
            else:
                others += times.user + times.system
        return cls(engines, others)


class Client:
    """Adds documents.

    Args:
        session: The HTTP client.
        address: The server's.
    """

    def __init__(self, session: aiohttp.ClientSession, address: Address) -> None:
        self._session = session
        self._api = address.api
        self._headers = {"Authorization": f"Bearer {KEY}"}

    async def chatbot(self) -> str:
        """A new chatbot."""
        body = {"name": "benchmark", "instructions": "Answer in one short sentence."}
        answer = await self._post("/chatbots", json=body)
        return str(answer["id"])

    async def add(self, chatbot: str, file: Path | None = None, **body: str) -> str:
        """Add a document: a file, or what a body names."""
        form = aiohttp.FormData()
        if file:
            form.add_field("file", file.read_bytes(), filename=file.name, content_type="text/html")
        path = f"/chatbots/{chatbot}/documents"
        answer = await (self._post(path, data=form) if file else self._post(path, json=body))
        return str(answer["id"])

    async def wait(self, chatbot: str, document: str) -> int:
        """Wait until a document is ready; returns its passages."""
        url = f"{self._api}/chatbots/{chatbot}/documents/{document}"
        while True:
            async with self._session.get(url, headers=self._headers) as response:
                view = await response.json()
            if view["status"] == "failed":
                raise SystemExit(f"{document}: {view['reason']}")
            if view["status"] == "ready":
                return int(view["passages"])
            await asyncio.sleep(POLL_SECONDS)

    async def _post(self, path: str, **body: object) -> dict[str, object]:
        async with self._session.post(self._api + path, headers=self._headers, **body) as response:  # type: ignore[arg-type]
            response.raise_for_status()
            return dict(await response.json())


@asynccontextmanager
async def running_server(**settings: object) -> AsyncIterator[tuple[aiohttp.ClientSession, Address]]:
    """A server under test with an HTTP session."""
    with tempfile.TemporaryDirectory() as folder:
        async with (
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session,
            ServerUnderTest(Path(folder), settings) as address,
        ):
            yield session, address


@asynccontextmanager
async def bare_engine() -> AsyncIterator[EngineClient]:
    """The embedding engine as a worker runs it, without the worker."""
    file = await ModelFiles(Settings().cache_dir).ensure(EMBEDDING_MODEL, MINILM)
    server = LlamaServer(EMBEDDING_MODEL, MINILM, file, background=True)
    await server.start()
    try:
        yield server.client()
    finally:
        await server.stop()


async def embed(client: EngineClient, texts: Sequence[str], batch: int, in_flight: int) -> float:
    """Seconds that the engine takes for texts."""
    batches = iter([list(texts[start : start + batch]) for start in range(0, len(texts), batch)])

    async def ask() -> None:
        for some in batches:
            await ask_for_embeddings(client, some, time.monotonic() + LONG)

    started = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(in_flight):
            group.create_task(ask())
    return time.perf_counter() - started


async def passages_of(page: Path) -> list[str]:
    """What is embedded of a page."""
    readers = Readers()
    try:
        reading = await readers.read(page.read_bytes(), name=page.name, media_type="text/html")
    finally:
        await readers.close()
    passages = split(reading, title=reading.title or page.name, budget=BUDGET)
    return list({passage.hash: passage.searched for passage in passages}.values())


async def reading(rounds: int) -> None:
    """The rate of reading and embedding against that of the engine alone."""
    first, page = _page(FIRST_PAGE), _page(PAGE)
    texts = await passages_of(page)
    async with running_server() as (session, address), bare_engine() as engine:
        client = Client(session, address)
        chatbot = await client.chatbot()
        await client.wait(chatbot, await client.add(chatbot, first))
        await embed(engine, texts[:BATCH], BATCH, IN_FLIGHT)
        print("| passages/s read | by the engine alone | ratio | CPU beside the engine |\n|---|---|---|---|")
        ratios, shares = [], []
        for _ in range(rounds):
            alone = await embed(engine, texts, BATCH, IN_FLIGHT)
            chatbot = await client.chatbot()  # a new one: what it has already is not embedded again
            before, started = Load.of(address.pid), time.perf_counter()
            count = await client.wait(chatbot, await client.add(chatbot, page))
            seconds, after = time.perf_counter() - started, Load.of(address.pid)
            assert count == len(texts)
            ratios.append(alone / seconds)
            shares.append((after.others - before.others) / (after.engines - before.engines))
            row = f"{count / seconds:.1f} | {count / alone:.1f} | {ratios[-1]:.3f} | {shares[-1]:.1%}"
            print(f"| {row} |", flush=True)
    print(f"\n{len(texts)} passages; medians: ratio {statistics.median(ratios):.3f}, ", end="")
    print(f"CPU beside the engine {statistics.median(shares):.1%} of the engine's\n", flush=True)


async def answering(rounds: int) -> None:
    """Time to first token while a site is read, against that while nothing is."""
    async with (
        site() as url,
        running_server(fetch_networks="127.0.0.1/32") as (session, address),
    ):
        client = Client(session, address)
        chatbot, other = await client.chatbot(), await client.chatbot()
        for room in ROOMS:
            answer = f"The key of the {room} hangs behind the door of the porter, who is there until six."
            document = await client.add(chatbot, question=f"Where is the key of the {room}?", answer=answer)
            await client.wait(chatbot, document)
        target = Target(session, address.api, KEY, chatbot)
        for number in range(2 * len(ROOMS)):  # the passages are in the engine's cache from then on
            await target.ask(f"Who enters the {ROOMS[number % len(ROOMS)]}?", max_tokens=2)
        await client.add(other, site=url)
        await asyncio.sleep(10 * SETTLING_SECONDS)
        quiet: list[float] = []
        busy: list[float] = []
        for number in range(rounds * 4):
            firsts = busy if number % 2 else quiet
            workers = [
                process for child in psutil.Process(address.pid).children() for process in _worker(child)
            ]
            for process in workers:
                process.send_signal(signal.SIGCONT if number % 2 else signal.SIGSTOP)
            await asyncio.sleep(SETTLING_SECONDS)
            for index in range(BLOCK):
                room = ROOMS[(number // 2 * BLOCK + index) % len(ROOMS)]
                # A number, so that the engine has not seen the prompt's end before.
                asked = f"Visitor {number * BLOCK + index + 100} asks: how do I get into the {room}?"
                firsts.append((await target.ask(asked, max_tokens=8)).first * 1000)
    print("| ms to first token | median | p95 | answers |\n|---|---|---|---|")
    for name, firsts in (("nothing is read", quiet), ("a site is read", busy)):
        print(f"| {name} | {statistics.median(firsts):.0f} | {_p95(firsts):.0f} | {len(firsts)} |")
    medians = statistics.median(busy) / statistics.median(quiet)
    print(f"\nratio {medians:.2f} of the medians, {_p95(busy) / _p95(quiet):.2f} of the 95th percentiles\n")


async def question() -> None:
    """Milliseconds that the embedding of a question takes."""
    asked = [f"How do I get the key of the {room}, please, visitor {n}?" for n in range(40) for room in ROOMS]
    file = await ModelFiles(Settings().cache_dir).ensure(EMBEDDING_MODEL, MINILM)
    server = LlamaServer(EMBEDDING_MODEL, MINILM, file)
    await server.start()
    try:
        client, took = server.client(), []
        for text in asked:
            started = time.perf_counter()
            await ask_for_embeddings(client, [text], time.monotonic() + LONG)
            took.append((time.perf_counter() - started) * 1000)
    finally:
        await server.stop()
    print(f"A question's embedding: median {statistics.median(took):.1f} ms, p95 {_p95(took):.1f} ms\n")


@asynccontextmanager
async def site() -> AsyncIterator[str]:
    """Git's manual, served on a loopback port."""
    folder = pages_of("git")[0].parent
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", str(folder),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        assert process.stdout  # it is a pipe
        words = (await process.stdout.readline()).decode().split()
        yield f"http://127.0.0.1:{words[words.index('port') + 1]}/git.html"
    finally:
        process.terminate()
        await process.wait()


def _page(name: str) -> Path:
    return next(page for page in pages_of("git") if page.stem == name)


def _tree(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def _worker(process: psutil.Process) -> list[psutil.Process]:
    """A worker with its reader and its engine; none where this is none."""
    if "worker" not in process.cmdline():
        return []
    return [*process.children(recursive=True), process]


def _p95(values: Sequence[float]) -> float:
    return statistics.quantiles(values, n=20)[-1]


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help="of reading, answering, question; none: all")
    parser.add_argument("--rounds", type=int, default=3, help="readings, and tens of answers of each kind")
    given = parser.parse_args()
    parts = given.parts or ["reading", "answering", "question"]
    if "reading" in parts:
        await reading(given.rounds)
    if "answering" in parts:
        await answering(given.rounds)
    if "question" in parts:
        await question()


if __name__ == "__main__":
    asyncio.run(main())
