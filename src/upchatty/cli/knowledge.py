"""`upchatty knowledge …`"""

import asyncio
import glob
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter
from cyclopts.validators import Number
from msgspec import UNSET

from upchatty.api.documents import DocumentView
from upchatty.cli.administration import administration, checked_name
from upchatty.cli.knowledge_calibrate import calibrate
from upchatty.cli.knowledge_search import search
from upchatty.cli.knowledge_unanswered import unanswered
from upchatty.cli.output import JSON, CommonSettings, moment, print_fields, print_json, print_table
from upchatty.cli.reading import wait_for
from upchatty.errors import BodyTooLarge, InvalidRequest, UpChattyError
from upchatty.knowledge.documents import Document, Documents, Schedule, Status
from upchatty.settings import Settings

app = App(name="knowledge", help="Add, list and remove what chatbots know.")
app.command(search)
app.command(calibrate)
app.command(unanswered)

EXTENSIONS = frozenset(
    (
        *(".txt", ".text", ".md", ".markdown", ".rst", ".html", ".htm", ".xhtml"),
        *(".pdf", ".docx", ".csv", ".tsv", ".xlsx", ".json", ".jsonl", ".ndjson"),
    )
)
"""What of a folder is read."""

Chatbot = Annotated[str, Parameter(help="The chatbot's id, bot_….")]
Flag = Parameter(negative="", show_default=False)
Adding = Callable[[], Awaitable[Document]]


@dataclass
class _Added:
    """What became of the sources of one command."""

    documents: dict[str, Document] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)


@app.command
def add(
    chatbot: Chatbot,
    /,
    *sources: str,
    sitemap: Annotated[bool, Flag] = False,
    site: Annotated[bool, Flag] = False,
    text: str | None = None,
    question: str | None = None,
    answer: str | None = None,
    title: str | None = None,
    refresh: Annotated[int | None, Parameter(validator=Number(gte=60))] = None,
    depth: Annotated[int | None, Parameter(validator=Number(gte=0))] = None,
    pages: Annotated[int | None, Parameter(validator=Number(gte=1))] = None,
    no_wait: Annotated[bool, Flag] = False,
    json: JSON = False,
    settings: CommonSettings = Settings(),
) -> None:
    """Add files, folders, URLs, a text, or a question with its answer, and wait until they are read.

    What is there already is brought up to date: a file that has changed is read again, and a URL always,
    of which only the passages that have changed are embedded.

    Args:
        sources: Files, folders, patterns such as '*.pdf', and URLs.
        sitemap: The URLs are sitemaps, whose pages are read.
        site: The URLs are first pages of sites, whose pages are found by their links.
        text: A text.
        question: A question …
        answer: … and its answer.
        title: The title, if it is not to be the document's own.
        refresh: Seconds after which a URL is read again, and so on.
        depth: Links from a site's first page to a page at most.
        pages: Pages of a site or sitemap at most.
        no_wait: Do not wait until the documents are read: a server or `upchatty worker` reads them.
    """
    if (question is None) != (answer is None):
        raise InvalidRequest(parameter="--question", expected="a question and its --answer belong together")
    if not sources and text is None and question is None:
        raise InvalidRequest(parameter="SOURCES", expected="say what to add: files, folders or URLs")
    if sitemap and site:
        raise InvalidRequest(parameter="--site", expected="expected either --site or --sitemap")
    kind: Literal["url", "sitemap", "site"] = "sitemap" if sitemap else "site" if site else "url"
    schedule = Schedule(
        refresh_seconds=UNSET if refresh is None else refresh,
        depth=UNSET if depth is None else depth,
        pages=UNSET if pages is None else pages,
    )
    named = title and checked_name(title)

    async def run() -> _Added:
        async with administration(settings) as opened:
            bot, documents, added = (await opened.chatbots.get(chatbot)).id, opened.documents, _Added()
            if text is not None:
                await _note(added, "text", documents.add_text(bot, text, title=named))
            if question is not None and answer is not None:
                await _note(added, "question", documents.add_question(bot, question, answer, title=named))
            for source in sources:
                if source.lower().startswith(("http://", "https://")):
                    web = documents.add_web(bot, kind, source, title=named, schedule=schedule)
                    await _note(added, source, web)
                else:
                    await _add_files(added, documents, bot, source, title=named, settings=settings)
            if not no_wait:
                await wait_for(opened, bot, added.documents, settings)
            return added

    _tell(asyncio.run(run()), json)


@app.command(name="list")
def list_all(
    chatbot: Chatbot,
    /,
    *,
    status: Status | None = None,
    parent: str | None = None,
    json: JSON = False,
    settings: CommonSettings = Settings(),
) -> None:
    """List a chatbot's documents.

    Args:
        status: Only those with this status.
        parent: Only the pages of this site or sitemap.
    """

    async def run() -> list[Document]:
        async with administration(settings) as opened:
            bot = await opened.chatbots.get(chatbot)
            return await opened.documents.page(bot.id, status=status, parent=parent)

    documents = asyncio.run(run())
    if json:
        print_json([DocumentView.of(document) for document in documents])
    elif documents:
        _print_table(documents)
    else:
        print("There is no such document; add some with: upchatty knowledge add CHATBOT FILES…")


@app.command
def show(
    chatbot: Chatbot, document: str, /, *, json: JSON = False, settings: CommonSettings = Settings()
) -> None:
    """Show a document, and how far its reading is.

    Args:
        document: Its id, doc_….
    """

    async def run() -> Document:
        async with administration(settings) as opened:
            bot = await opened.chatbots.get(chatbot)
            return await opened.documents.get(bot.id, document)

    view = DocumentView.of(asyncio.run(run()))
    if json:
        print_json(view)
        return
    fields: dict[str, object] = {
        name: getattr(view, name) for name in view.__struct_fields__ if name != "object"
    }
    times = {name: moment(getattr(view, name)) for name in ("created_at", "updated_at", "read_at")}
    total = "?" if view.progress.total is None else view.progress.total
    print_fields(fields | times | {"progress": f"{view.progress.done}/{total}"})


@app.command
def remove(chatbot: Chatbot, /, *documents: str, settings: CommonSettings = Settings()) -> None:
    """Remove documents with their passages; sites and sitemaps with their pages.

    Args:
        documents: Their ids, doc_….
    """
    if not documents:
        raise InvalidRequest(parameter="DOCUMENTS", expected="say which documents to remove")

    async def run() -> None:
        async with administration(settings) as opened:
            bot = await opened.chatbots.get(chatbot)
            for document in documents:
                await opened.documents.delete(bot.id, document)

    asyncio.run(run())


async def _note(added: _Added, source: str, adding: Awaitable[Document]) -> None:
    """Add one source; one that cannot be added does not keep the others from it."""
    try:
        document = await adding
    except UpChattyError as error:
        added.failures.append(f"{source}: {error}")
    else:
        added.documents[document.id] = document


async def _add_files(
    added: _Added, documents: Documents, bot: str, source: str, *, title: str | None, settings: Settings
) -> None:
    files = list(_files(source))
    if not files:
        added.failures.append(f"{source}: there is no such file, and no folder with files that can be read")
    for file in files:
        try:
            if file.stat().st_size > settings.max_document_bytes:
                raise BodyTooLarge(limit=settings.max_document_bytes)
            content = await asyncio.to_thread(file.read_bytes)
        except OSError as error:
            added.failures.append(f"{file}: cannot be read ({error.strerror})")
        except BodyTooLarge as error:
            added.failures.append(f"{file}: {error}")
        else:
            path = str(file.resolve())
            adding = documents.add_file(bot, content, name=file.name, title=title, path=path)
            await _note(added, str(file), adding)


def _files(source: str) -> Iterator[Path]:
    """The files that a path or a pattern names; of folders those that can be read, hidden ones left out."""
    path = Path(source)
    found = [path] if path.exists() else sorted(map(Path, glob.glob(source, recursive=True)))  # noqa: PTH207
    for named in found:
        if named.is_dir():
            yield from (file for file in sorted(named.rglob("*")) if _is_read(file, named))
        else:
            yield named


def _is_read(file: Path, folder: Path) -> bool:
    is_hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return not is_hidden and file.suffix.lower() in EXTENSIONS and file.is_file()


def _tell(added: _Added, json: bool) -> None:
    documents = list(added.documents.values())
    if json:
        print_json([DocumentView.of(document) for document in documents])
    elif documents:
        _print_table(documents)
    failures = added.failures + [
        f"{document.title}: {document.reason}" for document in documents if document.status == "failed"
    ]
    for failure in failures:
        print(f"upchatty: {failure}", file=sys.stderr)
    if failures:
        sys.exit(1)


def _print_table(documents: Sequence[Document]) -> None:
    print_table(
        ["ID", "KIND", "STATUS", "PASSAGES", "TITLE"],
        [(d.id, d.kind, d.status, d.passages, d.title) for d in documents],
    )
