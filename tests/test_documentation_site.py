"""From a documentation site to a cited answer: this project's own documentation, rendered as a site."""

import re
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt
from openai import OpenAI

from tests.support import ADMIN_KEY, Server

ROOT = Path(__file__).parent.parent
PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title} - UpChatty</title>
<link rel="stylesheet" href="/style.css"></head><body>
<header><a href="/">UpChatty</a> <input placeholder="Search the documentation"></header>
<nav><ul>{navigation}</ul></nav>
<main><article>{content}</article></main>
<footer>Subscribe to our newsletter. All rights reserved.</footer></body></html>"""


class Site:
    """A web site on a loopback port, whose pages can be changed and taken away."""

    def __init__(self) -> None:
        self.pages: dict[str, str] = {}
        """Markdown by path."""
        self.asked: list[str] = []
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site.asked.append(self.path)
                body, media_type = site.answer(self.path)
                self.send_response(200 if body else 404)
                self.send_header("Content-Type", media_type)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, path: str) -> tuple[bytes, str]:
        """Body and media type."""
        if path == "/robots.txt":
            return b"User-agent: *\nDisallow: /private/\n", "text/plain"
        if path not in self.pages:
            return b"", "text/html"
        title = self.pages[path].partition("\n")[0].lstrip("# ")
        links = "".join(f'<li><a href="{page}">{page.strip("/") or "start"}</a></li>' for page in self.pages)
        content = MarkdownIt("commonmark").enable("table").render(self.pages[path])
        html = PAGE.format(title=title, navigation=links + '<a href="/private/x">x</a>', content=content)
        return html.encode(), "text/html; charset=utf-8"


def sections(file: Path) -> Iterator[tuple[str, str]]:
    """A page for each second-level heading of a Markdown file: its path and its Markdown."""
    for section in re.split(r"(?m)^## ", file.read_text())[1:]:
        title = section.partition("\n")[0]
        yield f"/{file.stem.lower()}/" + re.sub(r"\W+", "-", title.lower()).strip("-"), f"# {section}"


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def site_server(
    request: pytest.FixtureRequest,
    new_database: Callable[[str], str],
    tmp_path_factory: pytest.TempPathFactory,
    model_file: Path,
) -> Iterator[Server]:
    environment = {"UPCHATTY_FETCH_NETWORKS": "127.0.0.0/8"}
    if url := new_database(request.param):
        environment["UPCHATTY_DATABASE_URL"] = url
    with Server(tmp_path_factory.mktemp("site"), **environment) as running:
        yield running


def wait_until_ready(server: Server, document: str) -> dict[str, Any]:
    """The document, once it and all its pages have been read."""
    deadline = time.monotonic() + 90
    with server.client() as client:
        while True:
            state: dict[str, Any] = client.get(f"/chatbots/{server.chatbot}/documents/{document}").json()
            if state["status"] in ("ready", "failed"):
                return state
            assert time.monotonic() < deadline, state
            time.sleep(0.2)


def ask(server: Server, text: str) -> tuple[str, list[dict[str, Any]]]:
    """The streamed answer and its sources, through OpenAI's client."""
    answer, sources = "", []
    with OpenAI(base_url=server.api, api_key=ADMIN_KEY, max_retries=0) as client:
        messages: Any = [{"role": "user", "content": text}]
        for chunk in client.chat.completions.create(
            model=server.chatbot, messages=messages, stream=True, temperature=0.0, max_tokens=24
        ):
            answer += chunk.choices[0].delta.content or ""
            sources = (chunk.model_extra or {}).get("sources", sources)
    return answer, sources


@pytest.mark.timeout(240)
def test_answers_follow_the_site(site_server: Server) -> None:
    server, site = site_server, Site()
    try:
        site.pages["/"] = "# UpChatty\n\nChatbots behind an OpenAI-compatible API, on your own machine."
        site.pages |= dict(sections(ROOT / "README.md"))
        site.pages["/zebra"] = (
            "# Support hours\n\nThe support desk answers the telephone from nine to five on working days."
        )
        limits = next(path for path in site.pages if "limits" in path)
        with server.client() as client:
            added = client.post(f"/chatbots/{server.chatbot}/documents", json={"site": site.url})
            assert added.status_code == 202, added.text
            document = added.json()["id"]
        state = wait_until_ready(server, document)
        assert state["status"] == "ready", state
        assert "/private/x" not in site.asked

        answer, sources = ask(server, "What happens to a request that is over its limit of tokens per day?")
        assert answer and sources[0]["url"].startswith(site.url + limits)
        assert "newsletter" not in "".join(source["text"] for source in sources)
        _, sources = ask(server, "When does the support desk answer the telephone?")
        assert sources[0]["url"].startswith(site.url + "/zebra")
        assert "nine to five" in sources[0]["text"]

        # The page changes, and the answer follows.
        site.pages["/zebra"] = site.pages["/zebra"].replace("nine to five", "seven to eleven")
        read_again(server, document)
        _, sources = ask(server, "When does the support desk answer the telephone?")
        assert sources[0]["url"].startswith(site.url + "/zebra")
        assert "seven to eleven" in sources[0]["text"]
        assert not any("nine to five" in source["text"] for source in sources)

        # The page goes, and so does the source.
        del site.pages["/zebra"]
        read_again(server, document)
        _, sources = ask(server, "When does the support desk answer the telephone?")
        assert not any("/zebra" in source["url"] for source in sources)
    finally:
        site.close()


def read_again(server: Server, document: str) -> None:
    with server.client() as client:
        again = client.post(f"/chatbots/{server.chatbot}/documents/{document}/read")
        assert again.status_code == 202, again.text
    assert wait_until_ready(server, document)["status"] == "ready"
