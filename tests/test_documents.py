"""Documents: how they are added, read, read again and deleted, over HTTP and from the terminal."""

import asyncio
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from sqlalchemy import Update
from sqlalchemy.ext.asyncio import create_async_engine

from tests.support import Server, assert_error
from tests.test_management import UNKNOWN, eventually, rows
from upchatty.storage.tables import document_contents, documents, jobs, passages, staged_embeddings

MOST_BYTES = 300_000
SECONDS = 90  # for reading, on a machine that has other things to do


class Web:
    """An embedding engine that counts what it embeds, and a site whose pages can be changed."""

    def __init__(self) -> None:
        self.embedded: list[str] = []
        self.delay = 0.0
        self.pages: dict[str, str] = {}
        self.asked: list[str] = []
        web = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                texts = body["input"]
                web.embedded += texts
                time.sleep(web.delay * len(texts))
                data = [
                    {"index": index, "embedding": [len(text), *text.encode()[:7].ljust(7)]}
                    for index, text in enumerate(texts)
                ]
                self.answer(200, json.dumps({"data": data}), "application/json")

            def do_GET(self) -> None:
                web.asked.append(self.path)
                page = web.pages.get(self.path)
                if page is not None and self.headers["If-None-Match"] == web.etag(page):
                    self.answer(304, "", "text/html")
                elif page is not None:
                    self.answer(200, page, "application/xml" if page.startswith("<?xml") else "text/html")
                else:
                    self.answer(404, "", "text/plain")

            def answer(self, status: int, text: str, media_type: str) -> None:
                body = text.encode()
                self.send_response(status)
                self.send_header("Content-Type", media_type)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("ETag", web.etag(text))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @staticmethod
    def etag(text: str) -> str:
        return f'"{hash(text)}"'

    def page(self, path: str, *paragraphs: str, links: tuple[str, ...] = ()) -> None:
        """Make or change a page."""
        texts = "".join(f"<p>{text}</p>" for text in paragraphs)
        list_of_links = "".join(f'<li><a href="{link}">{link}</a></li>' for link in links)
        self.pages[path] = (
            f"<!doctype html><html><head><title>Page {path}</title></head>"
            f"<body><main><h1>Page {path}</h1>{texts}<ul>{list_of_links}</ul></main></body></html>"
        )

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(scope="module")
def web() -> Iterator[Web]:
    started = Web()
    yield started
    started.close()


@pytest.fixture(scope="module")
def settings(web: Web) -> dict[str, str]:
    models = {
        "default": {"url": "http://127.0.0.1:9/v1"},
        "embedding": {"task": "embedding", "url": web.url + "/v1"},
    }
    return {
        "UPCHATTY_MODELS": json.dumps(models),
        "UPCHATTY_FETCH_NETWORKS": "127.0.0.0/8",
        "UPCHATTY_MAX_DOCUMENT_BYTES": str(MOST_BYTES),
    }


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def server(request, new_database, tmp_path_factory, settings) -> Iterator[Server]:  # type: ignore[no-untyped-def]
    url = new_database(request.param)
    environment = settings | ({"UPCHATTY_DATABASE_URL": url} if url else {})
    with Server(tmp_path_factory.mktemp("documents"), **environment) as running:
        yield running


class Bot:
    """A chatbot of a test's own, and its documents."""

    def __init__(self, client: httpx.Client) -> None:
        self.client = client
        self.id = client.post("/chatbots", json={"name": "A test's own"}).json()["id"]
        self.path = f"/chatbots/{self.id}/documents"

    def add(self, **fields: Any) -> str:
        response = self.client.post(self.path, json=fields)
        assert response.status_code == 202, response.text
        assert response.json()["status"] in ("pending", "reading", "ready")
        document_id: str = response.json()["id"]
        return document_id

    def upload(self, name: str, content: bytes, **fields: str) -> str:
        response = self.client.post(self.path, files={"file": (name, content)}, data=fields)
        assert response.status_code == 202, response.text
        document_id: str = response.json()["id"]
        return document_id

    def get(self, document_id: str) -> dict[str, Any]:
        found: dict[str, Any] = self.client.get(f"{self.path}/{document_id}").json()
        return found

    def read(self, document_id: str) -> dict[str, Any]:
        """The document once it is read, or has failed."""

        def ended() -> dict[str, Any] | None:
            document = self.get(document_id)
            return document if document["status"] in ("ready", "failed") else None

        document: dict[str, Any] = eventually(ended, SECONDS)
        return document

    def again(self, document_id: str) -> dict[str, Any]:
        assert self.client.post(f"{self.path}/{document_id}/read").status_code == 202
        return self.read(document_id)

    def list(self, **query: Any) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.client.get(self.path, params={"limit": 100} | query).json()["data"]
        return found


@pytest.fixture
def bot(server: Server) -> Iterator[Bot]:
    with server.client() as client:
        made = Bot(client)
        yield made
        client.delete(f"/chatbots/{made.id}")


def paragraphs(count: int, about: str = "things") -> str:
    """A text that is split into at least so many passages."""
    filling = "and they are described at some length, so that each of them is a passage of its own. " * 6
    return "\n\n".join(
        f"# Section {i}\n\nParagraph {i} is about {about} {i}, {filling}" for i in range(count)
    )


def stored(server: Server, document_id: str) -> list[str]:
    """The texts of a document's passages."""
    query = passages.select().where(passages.c.document_id == document_id).order_by(passages.c.position)
    return [row.text for row in rows(server, query)]


def worker_of(server: Server) -> psutil.Process:
    """The server's worker."""
    assert server.process

    def find() -> psutil.Process | None:
        children = psutil.Process(server.process.pid).children()  # type: ignore[union-attr]
        return next((child for child in children if "worker" in child.cmdline()), None)

    found: psutil.Process = eventually(find, SECONDS)
    return found


def write(server: Server, statement: Update) -> None:
    """Change the server's database."""

    async def run() -> None:
        url = server.environment.get("UPCHATTY_DATABASE_URL", "").replace(
            "postgresql:", "postgresql+asyncpg:"
        )
        engine = create_async_engine(url or f"sqlite+aiosqlite:///{server.data_dir / 'upchatty.db'}")
        async with engine.begin() as connection:
            await connection.execute(statement)
        await engine.dispose()

    asyncio.run(run())


# Kinds


def test_every_kind_is_read(bot: Bot, server: Server, web: Web) -> None:
    web.page("/one", "The moon is made of rock.")
    added = {
        "text": bot.add(text="# Cheese\n\nBrie is soft."),
        "titled": bot.add(title="Wines", text="Wine is made of grapes."),
        "question": bot.add(question="When is it open?", answer="From nine to five."),
        "url": bot.add(url=web.url + "/one"),
        "file": bot.upload("Größe.md", "# Größe\n\nSie ist groß.".encode()),
    }
    read = {name: bot.read(document_id) for name, document_id in added.items()}
    assert {name: document["reason"] for name, document in read.items()} == dict.fromkeys(added)
    for name, document in read.items():
        assert document["object"] == "document" and document["passages"] >= 1 and document["tokens"] >= 1
        assert document["progress"]["done"] == document["progress"]["total"] == document["passages"]
        assert abs(document["read_at"] - time.time()) < 120 and document["bytes"] > 10
        assert stored(server, added[name])
    assert read["titled"]["title"] == "Wines" and read["question"]["title"] == "When is it open?"
    assert read["url"]["url"] == web.url + "/one" and "Page /one" in read["url"]["title"]
    assert "From nine to five." in stored(server, added["question"])[0]
    assert [document["id"] for document in bot.list()] == list(added.values())
    first = bot.client.get(bot.path, params={"limit": 2}).json()
    assert first["has_more"] and [document["id"] for document in first["data"]] == list(added.values())[:2]
    rest = bot.list(after=first["data"][1]["id"])
    assert [document["id"] for document in rest] == list(added.values())[2:]
    assert bot.list(status="failed") == []


def test_same_is_one_document(bot: Bot, web: Web) -> None:
    text = bot.add(title="A", text="Some text.")
    assert bot.add(title="A", text="Some text.") == text != bot.add(title="A", text="Some other text.")
    question = bot.add(question="Why?", answer="Because.")
    url = bot.add(url=web.url + "/none")
    assert bot.add(url=web.url.replace("http", "HTTP") + "/none#part") == url
    file = bot.upload("a.txt", b"First content.")
    assert bot.upload("folder/b.txt", b"First content.") == file, "the same bytes"
    assert bot.read(file)["passages"] == 1
    assert bot.upload("../a.txt", b"Second content.") == file, "the same name"
    assert bot.add(question="Why?", answer="Just so.") == question
    assert len(bot.list()) == 5


def test_new_version_takes_the_place_of_the_old_one_at_once(bot: Bot, server: Server, web: Web) -> None:
    text = paragraphs(40)
    document_id = bot.upload("manual.md", text.encode())
    before = bot.read(document_id)
    web.embedded.clear()
    assert bot.again(document_id)["passages"] == before["passages"]
    assert not web.embedded, "nothing has changed"
    web.delay = 0.05
    changed = paragraphs(40, "creatures").replace("creatures 7,", "things 7,")
    assert bot.upload("manual.md", changed.encode()) == document_id
    old = stored(server, document_id)
    while (document := bot.get(document_id))["status"] != "ready":
        assert document["passages"] == before["passages"], "the old version answers"
        assert stored(server, document_id) in (old, None) or bot.get(document_id)["status"] == "ready"
    web.delay = 0
    new = stored(server, document_id)
    assert not set(old) & {text for text in new if "creatures" in text}
    assert any("things 7," in text for text in new)
    assert not [text for text in web.embedded if "things 7," in text], "what stays is not embedded again"


@pytest.mark.any_database
def test_failures_say_why(bot: Bot, server: Server, web: Web) -> None:
    web.page("/goes", "It will go.")
    gone = bot.add(url=web.url + "/goes")
    expected = {
        bot.upload("broken.pdf", b"%PDF-1.7 and no more"): "",
        bot.upload("broken.docx", b"PK\x03\x04nothing"): "",
        bot.add(url=web.url + "/none"): "404",
        bot.add(url="http://10.1.2.3/"): "private",
        bot.add(sitemap=web.url + "/none.xml"): "404",
    }
    for document_id, words in expected.items():
        document = bot.read(document_id)
        assert document["status"] == "failed" and words in document["reason"], document
        assert len(document["reason"]) > 10 and document["passages"] == 0
    assert bot.read(gone)["passages"] == 1
    del web.pages["/goes"]
    document = bot.again(gone)
    assert document["status"] == "failed" and "404" in document["reason"]
    assert document["passages"] == 0 and stored(server, gone) == []
    failed = {document["id"] for document in bot.list(status="failed")}
    assert failed == {*expected, gone}


# Sites


def test_site_is_read_again(bot: Bot, server: Server, web: Web) -> None:
    web.page("/docs/", "Welcome to the documents.", links=("/docs/a", "/docs/b", "/docs/missing"))
    web.page("/docs/a", "Apples are red, and they grow on trees.")
    web.page("/docs/b", "Bananas are yellow, and they grow on plants.")
    site = bot.add(site=web.url + "/docs/", refresh_seconds=3600)
    document = bot.read(site)
    assert document["status"] == "ready" and document["pages"] == 3, document
    assert document["progress"] == {"done": 3, "total": 3} and document["refresh_seconds"] == 3600
    pages = {page["url"].removeprefix(web.url): page for page in bot.list(parent=site)}
    assert set(pages) == {"/docs/", "/docs/a", "/docs/b"}
    assert all(page["status"] == "ready" and page["parent"] == site for page in pages.values())
    assert rows(server, document_contents.select()) == [
        row for row in rows(server, document_contents.select()) if row.document_id not in pages
    ]
    web.page("/docs/", "Welcome to the documents.", links=("/docs/a", "/docs/c"))
    web.page("/docs/a", "Apples are green, and they grow on trees.")
    web.page("/docs/c", "Cherries are small.")
    web.embedded.clear()
    assert bot.again(site)["pages"] == 3
    after = {page["url"].removeprefix(web.url): page for page in bot.list(parent=site)}
    assert set(after) == {"/docs/", "/docs/a", "/docs/c"}
    assert after["/docs/a"]["id"] == pages["/docs/a"]["id"]
    assert any("green" in text for text in stored(server, after["/docs/a"]["id"]))
    assert stored(server, pages["/docs/b"]["id"]) == []
    assert not any("yellow" in text for text in web.embedded)
    assert bot.client.delete(f"{bot.path}/{site}").status_code == 204
    assert bot.list() == [] and stored(server, after["/docs/a"]["id"]) == []


@pytest.mark.any_database
def test_schedule_reads_again(bot: Bot, server: Server, web: Web) -> None:
    web.page("/news", "Old news.")
    document_id = bot.add(url=web.url + "/news", refresh_seconds=60)
    bot.read(document_id)
    [row] = rows(server, documents.select().where(documents.c.id == document_id))
    assert 50_000 < row.read_again_at - time.time() * 1000 < 70_000
    web.page("/news", "New news.")
    write(server, documents.update().where(documents.c.id == document_id).values(read_again_at=1))
    eventually(lambda: "New news." in " ".join(stored(server, document_id)), SECONDS)


# Deaths


def test_goes_on_after_a_kill(bot: Bot, server: Server, web: Web) -> None:
    web.embedded.clear()
    web.delay = 0.05
    document_id = bot.add(title="Long", text=paragraphs(120))
    eventually(lambda: bot.get(document_id)["progress"]["done"] >= 40, SECONDS)
    worker = worker_of(server)
    os.kill(worker.pid, signal.SIGKILL)
    worker.wait()
    staged = rows(server, staged_embeddings.select().where(staged_embeddings.c.document_id == document_id))
    assert len(staged) >= 40
    assert stored(server, document_id) == [] and bot.get(document_id)["passages"] == 0
    embedded_before = len(web.embedded)
    web.delay = 0
    document = bot.read(document_id)
    assert document["status"] == "ready" and document["passages"] == len(stored(server, document_id)) >= 120
    assert len(web.embedded) - embedded_before <= document["passages"] - len(staged)
    assert rows(server, staged_embeddings.select()) == []


def test_deleted_while_it_is_read(bot: Bot, server: Server, web: Web) -> None:
    web.delay = 0.05
    document_id = bot.add(title="Doomed", text=paragraphs(60))
    eventually(lambda: bot.get(document_id)["status"] == "reading", SECONDS)
    assert bot.client.delete(f"{bot.path}/{document_id}").status_code == 204
    web.delay = 0
    assert bot.read(bot.add(text="The next one is read."))["status"] == "ready"
    assert_error(bot.client.get(f"{bot.path}/{document_id}"), 404, document_id)
    assert stored(server, document_id) == []
    eventually(lambda: not rows(server, jobs.select()), SECONDS)


def test_every_job_is_done_once(bot: Bot, server: Server, web: Web) -> None:
    """By two workers, which claim what the other has not."""
    assert bot.read(bot.add(text="The worker is there."))["status"] == "ready"
    first = worker_of(server)
    first.suspend()
    web.embedded.clear()
    web.delay = 0.1
    ids = [bot.add(text=f"Text number {number} of many.") for number in range(40)]
    second = psutil.Popen(server.command("worker", "--once"), env=server.environment)
    eventually(lambda: [job for job in rows(server, jobs.select()) if job.worker], SECONDS)
    first.resume()
    assert second.wait(SECONDS) == 0
    web.delay = 0
    assert {bot.read(document_id)["status"] for document_id in ids} == {"ready"}
    assert len(web.embedded) == len(set(web.embedded)) == 40


# Bad input


@pytest.mark.any_database
def test_bad_documents(bot: Bot) -> None:
    def post(**options: Any) -> httpx.Response:
        return bot.client.post(bot.path, **options)

    file = ("a.txt", b"Some text.")
    assert_error(post(json={}), 400, "exactly one of")
    assert_error(post(json={"url": "https://example.org", "text": "x"}), 400, "exactly one of")
    assert_error(post(json=[]), 400, "exactly one of")
    assert_error(post(json={"question": "Why?"}), 400, "answer")
    assert_error(post(json={"text": "x", "colour": 1}), 400, "colour")
    assert_error(post(json={"text": " \n"}), 400, "text")
    assert_error(post(json={"text": "a\0b"}), 400, "text", "NUL")
    assert_error(post(json={"text": "x", "title": ""}), 400, "title")
    for url in ("ftp://example.org", "example.org", "http://", "http://a b/", "http://u:p@example.org/"):
        assert_error(post(json={"url": url}), 400, "url")
    assert_error(post(json={"url": "http://example.org:99999"}), 400, "url")
    assert_error(post(json={"site": "http://example.org/", "refresh_seconds": 59}), 400, "refresh_seconds")
    assert_error(post(json={"site": "http://example.org/", "pages": 0}), 400, "pages")
    assert_error(post(content=b"x", headers={"Content-Type": "text/plain"}), 415, "multipart/form-data")
    assert_error(post(files={"other": file}), 400, "file")
    assert_error(post(files={"file": ("a.txt", b"")}), 400, "file", "empty")
    assert_error(post(files={"file": file}, data={"colour": "red"}), 400, "colour")
    assert_error(post(files={"file": file}, data={"url": "no URL"}), 400, "url")
    assert_error(post(files={"file": file}, data={"url": ""}), 400, "url")
    assert_error(post(files=[("file", file), ("file", file)]), 400, "file", "twice")
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    assert_error(
        post(content=b'--x\r\nContent-Disposition: form-data; name="file"', headers=form), 400, "body"
    )
    assert_error(post(content=b"x", headers={"Content-Type": "multipart/form-data"}), 400, "boundary")
    too_large = ("a.txt", b"x" * (MOST_BYTES + 1))
    assert_error(post(files={"file": too_large}), 413, str(MOST_BYTES))
    assert_error(post(files={"file": ("a.txt", b"x" * 3 * MOST_BYTES)}), 413, str(MOST_BYTES))
    assert bot.list() == []


def test_unknown_documents(bot: Bot, server: Server) -> None:
    theirs = Bot(bot.client)
    document_id = theirs.add(text="Not yours.")
    for unknown in (document_id, "doc_" + "0" * 32, "x", "%00"):
        path = f"{bot.path}/{unknown}"
        assert_error(bot.client.get(path), 404, "document")
        assert_error(bot.client.delete(path), 404, "document")
        assert_error(bot.client.post(path + "/read"), 404, "document")
    assert_error(bot.client.get(f"/chatbots/{UNKNOWN}/documents"), 404, UNKNOWN)
    assert_error(bot.client.post(f"/chatbots/{UNKNOWN}/documents", json={"text": "x"}), 404, UNKNOWN)
    assert bot.client.delete(f"/chatbots/{theirs.id}").status_code == 204
    assert not rows(server, documents.select().where(documents.c.id == document_id))


# The terminal


@pytest.mark.any_database
def test_terminal_with_a_server(bot: Bot, server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "manual"
    (folder / "part").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    for name in ("a.md", "part/a.md", ".hidden/b.md", "program.exe"):
        (folder / name).write_text(f"# Title of {name}\n\nThis is the text of {name}.")
    added = server.run("knowledge", "add", bot.id, str(folder), "--json")
    assert added.returncode == 0, added.stderr
    found = json.loads(added.stdout)
    assert [document["status"] for document in found] == ["ready", "ready"]
    (folder / "a.md").write_text("# Title\n\nThis is another text.")
    sources = (str(folder / "*.md"), str(folder / "part"), "no/such/file")
    again = server.run("knowledge", "add", bot.id, *sources)
    assert again.returncode == 1 and "no/such/file" in again.stderr, again.stderr
    assert again.stdout.count("ready") == 2 and "Title" in again.stdout
    listed = json.loads(server.run("knowledge", "list", bot.id, "--json").stdout)
    assert listed == bot.list() and [each["id"] for each in listed] == [each["id"] for each in found]
    shown = server.run("knowledge", "show", bot.id, found[0]["id"])
    assert "ready" in shown.stdout and "progress" in shown.stdout
    assert server.run("knowledge", "remove", bot.id, found[0]["id"], found[1]["id"]).returncode == 0
    assert bot.list() == []


# What ends the server that the tests above share


@pytest.mark.any_database
def test_workers_end_with_the_server_and_give_back(server: Server, web: Web) -> None:
    with server.client() as client:
        bot = Bot(client)
        web.delay = 0.05
        document_id = bot.add(title="Long", text=paragraphs(40))
        eventually(lambda: bot.get(document_id)["progress"]["done"] >= 1, SECONDS)
        worker = worker_of(server)
        started = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - started < 15 and not worker.is_running()
    [job] = rows(server, jobs.select())
    assert job.worker is None and job.attempts == 0
    web.delay = 0
    server.start()
    with server.client() as client:
        bot.client = client
        assert bot.read(document_id)["status"] == "ready"
        worker = worker_of(server)
        server.kill()
        eventually(lambda: not worker.is_running())


def test_terminal_without_a_server(tmp_path: Path) -> None:
    """The command reads by itself, here with the default embedding model."""
    server = Server(tmp_path)
    chatbot = json.loads(server.run("chatbots", "create", "Cats", "--json").stdout)["id"]
    file = tmp_path / "a.txt"
    file.write_text("Cats sleep for most of the day.")
    added = server.run(
        "knowledge", "add", chatbot, str(file), "--question", "Why?", "--answer", "So.", "--json"
    )
    assert added.returncode == 0, added.stderr
    found = json.loads(added.stdout)
    assert [document["status"] for document in found] == ["ready", "ready"]
    assert "ready" in added.stderr
    assert all(stored(server, document["id"]) for document in found) and not rows(server, jobs.select())
