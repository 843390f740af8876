"""Documents: what chatbots know. Adding one only notes that it has to be read; workers read it.

What makes two documents the same:

- a file: its name (in the terminal its path), or its bytes under whatever name. The same name with other
  bytes is a new version, which takes the old one's place once it is read;
- a text: its title and its text together;
- a question: the question. With another answer it is a new version;
- a URL, a sitemap, a site: the URL. A page of a site is the same document as its URL, and is the site's
  until it is deleted with it.
"""

import re
import time
import unicodedata
from collections.abc import Callable, Sequence
from hashlib import sha256
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit, urlunsplit

import msgspec
from sqlalchemy import RowMapping
from uuid_utils import uuid7

from upchatty.errors import BodyTooLarge, InvalidRequest, NotFound
from upchatty.settings import Settings
from upchatty.storage import documents as storage
from upchatty.storage.database import Database

Kind = Literal["file", "text", "question", "url", "sitemap", "site"]
Status = Literal["pending", "reading", "ready", "failed"]

DOCUMENT_ID = re.compile(r"doc_[0-9a-f]{32}")
HEX = "[0-9a-fA-F]{1,4}"
IPV6 = "|".join(  # RFC 4291, section 2.2; the shapes by where :: stands
    (
        f"({HEX}:){{7}}{HEX}|({HEX}:){{1,7}}:|:(:{HEX}){{1,7}}|::",
        *(f"({HEX}:){{1,{7 - after}}}(:{HEX}){{1,{after}}}" for after in range(1, 7)),
    )
)
URL_PATTERN = (
    r"^[hH][tT][tT][pP][sS]?://"
    rf"(\[({IPV6})\]|[^\x00-\x20\x7f/?#@\\\[\]:.][^\x00-\x20\x7f/?#@\\\[\]:]*)"
    r"(:(6553[0-5]|655[0-2][0-9]|65[0-4][0-9]{2}|6[0-4][0-9]{3}|[1-5][0-9]{4}|[0-9]{1,4}))?"
    r"([/?#][^\x00-\x20\x7f]*)?$"
)
LONGEST_URL = 2000
LONGEST_TITLE = 200
LONGEST_NAME = 255
LEAST_REFRESH = 60  # seconds
DEFAULT_PORTS = {"http": 80, "https": 443}
MARKDOWN, QUESTION = "text/markdown", "application/json"


class Document(NamedTuple):
    """A document. Times are unix milliseconds."""

    id: str
    chatbot_id: str
    kind: Kind
    title: str
    url: str | None
    parent: str | None
    """The site or sitemap that it is a page of."""
    status: Status
    reason: str | None
    """Why it failed, or why it is tried again; of a site, how many of its pages failed."""
    bytes: int
    """Of the version that answers, as are pages, passages and tokens."""
    pages: int | None
    passages: int
    tokens: int
    done: int
    """Passages embedded, of a site pages read."""
    total: int | None
    """Of how many; None: not known yet."""
    refresh_seconds: int | None
    """How often it is read again."""
    created_at: int
    updated_at: int
    read_at: int | None


class Question(msgspec.Struct):
    """A question with its answer, as it is stored."""

    question: str
    answer: str


class Schedule(msgspec.Struct, omit_defaults=True):
    """How a URL, a sitemap or a site is read. What is unset stays as it is.

    Args:
        refresh_seconds: How often it is read again; None: never.
        depth: Links from a site's first page to a page at most.
        pages: How many pages at most.
    """

    refresh_seconds: int | None | msgspec.UnsetType = msgspec.UNSET
    depth: int | msgspec.UnsetType = msgspec.UNSET
    pages: int | msgspec.UnsetType = msgspec.UNSET


NO_SCHEDULE = Schedule()


class Documents:
    """The documents of one database.

    Args:
        database: Where they are kept.
        settings: How large they may be.
        when_added: Called when there is something to read.
    """

    def __init__(
        self, database: Database, settings: Settings, when_added: Callable[[], None] = lambda: None
    ) -> None:
        self._database = database
        self._most_bytes = settings.max_document_bytes
        self._when_added = when_added

    async def add_file(
        self,
        chatbot_id: str,
        content: bytes,
        *,
        name: str,
        media_type: str | None = None,
        title: str | None = None,
        url: str | None = None,
        path: str | None = None,
    ) -> Document:
        """Add a file.

        Args:
            chatbot_id: Whose it becomes.
            content: Its bytes.
            name: Its name, which says what format it has; folders in it are ignored.
            media_type: Its format, where the name does not say it.
            title: Its title, if it is not to be the one that the document itself has.
            url: Where people find it, for its citations.
            path: What tells it from other files of its name.

        Raises:
            NotFound: There is no such chatbot.
            InvalidRequest: It is empty, or the URL is none.
            BodyTooLarge: It has more bytes than the settings allow.
        """
        if not content:
            raise InvalidRequest(parameter="file", expected="the file is empty")
        if len(content) > self._most_bytes:
            raise BodyTooLarge(limit=self._most_bytes)
        name = base_name(name)
        url = None if url is None else checked_url(url, "url")
        return await self._put(
            chatbot_id,
            "file",
            _identity("file", url or path or name),
            title=title,
            fallback_title=name,
            url=url,
            media_type=media_type,
            content=content,
            options={"name": name},
        )

    async def add_text(self, chatbot_id: str, text: str, *, title: str | None = None) -> Document:
        """Add a text, which may be Markdown.

        Args:
            chatbot_id: Whose it becomes.
            text: The text.
            title: Its title; None: its first line.

        Raises:
            NotFound: There is no such chatbot.
            InvalidRequest: There is nothing but white space.
        """
        first_line = text.strip().partition("\n")[0].lstrip("# ").strip()
        if not text.strip():
            raise InvalidRequest(parameter="text", expected="expected more than white space")
        return await self._put(
            chatbot_id,
            "text",
            _identity("text", title or "", text),
            title=title,
            fallback_title=first_line[:LONGEST_TITLE] or "Text",
            media_type=MARKDOWN,
            content=text.encode(),
        )

    async def add_question(
        self, chatbot_id: str, question: str, answer: str, *, title: str | None = None
    ) -> Document:
        """Add a question with its answer.

        Raises:
            NotFound: There is no such chatbot.
            InvalidRequest: One of them is nothing but white space.
        """
        question, answer = question.strip(), answer.strip()
        for parameter, text in (("question", question), ("answer", answer)):
            if not text:
                raise InvalidRequest(parameter=parameter, expected="expected more than white space")
        return await self._put(
            chatbot_id,
            "question",
            _identity("question", question),
            title=title,
            fallback_title=question[:LONGEST_TITLE],
            media_type=QUESTION,
            content=msgspec.json.encode(Question(question, answer)),
        )

    async def add_web(
        self,
        chatbot_id: str,
        kind: Literal["url", "sitemap", "site"],
        url: str,
        *,
        title: str | None = None,
        schedule: Schedule = NO_SCHEDULE,
    ) -> Document:
        """Add what a URL leads to: a page or file, a sitemap's pages, or a site's. One that is there already
        is read again.

        Args:
            chatbot_id: Whose it becomes.
            kind: What is at the URL.
            url: The URL; of a site its first page.
            title: Its title, if it is not to be the one that the page has.
            schedule: How far and how often it is read.

        Raises:
            NotFound: There is no such chatbot.
            InvalidRequest: The URL is none.
        """
        url = checked_url(url, kind)
        return await self._put(
            chatbot_id,
            kind,
            url_identity(kind, url),
            title=title,
            fallback_title=url[:LONGEST_TITLE],
            url=url,
            options=msgspec.to_builtins(schedule),
            anew=True,
        )

    async def page(
        self,
        chatbot_id: str,
        *,
        after: str = "",
        limit: int | None = None,
        status: Status | None = None,
        parent: str | None = None,
    ) -> list[Document]:
        """A chatbot's documents in the order of their adding.

        Args:
            chatbot_id: Whose.
            after: The id after which to begin.
            limit: How many at most.
            status: Only those with this status.
            parent: Only the pages of this site or sitemap.
        """
        rows = await storage.list_documents(
            self._database, chatbot_id, after=after, limit=limit, status=status, parent=parent
        )
        return [_document(row) for row in rows]

    async def get(self, chatbot_id: str, document_id: str) -> Document:
        """A chatbot's document.

        Raises:
            NotFound: The chatbot has no such document.
        """
        row = await storage.get_document(self._database, chatbot_id, _checked_id(document_id))
        if row is None:
            raise NotFound(kind="document", name=document_id)
        return _document(row)

    async def some(self, chatbot_id: str, document_ids: Sequence[str]) -> list[Document]:
        """Those of these documents that are there, in the order of their adding."""
        rows = await storage.get_documents(self._database, chatbot_id, document_ids)
        return [_document(row) for row in rows]

    async def delete(self, chatbot_id: str, document_id: str) -> None:
        """Delete a document with its passages; a site or sitemap with its pages.

        Raises:
            NotFound: The chatbot has no such document.
        """
        if not await storage.delete_document(self._database, chatbot_id, _checked_id(document_id)):
            raise NotFound(kind="document", name=document_id)

    async def read_again(self, chatbot_id: str, document_id: str) -> Document:
        """Have a document read again. Until that is done, what was read before answers.

        Raises:
            NotFound: The chatbot has no such document.
        """
        if not await storage.read_again(self._database, chatbot_id, _checked_id(document_id), now()):
            raise NotFound(kind="document", name=document_id)
        self._when_added()
        return await self.get(chatbot_id, document_id)

    async def _put(
        self,
        chatbot_id: str,
        kind: Kind,
        identity: str,
        *,
        title: str | None,
        fallback_title: str,
        url: str | None = None,
        media_type: str | None = None,
        content: bytes | None = None,
        options: dict[str, Any] | None = None,
        anew: bool = False,
    ) -> Document:
        title = title and title.strip()
        document = new_document(chatbot_id, kind, identity, title=title or fallback_title, url=url) | {
            "media_type": media_type,
            "options": (options or {}) | ({"titled": True} if title else {}),
            "content_hash": None if content is None else sha256(content).hexdigest(),
        }
        document_id = await storage.put_document(self._database, document, content, anew=anew, now=now())
        if document_id is None:
            raise NotFound(kind="chatbot", name=chatbot_id)
        self._when_added()
        return await self.get(chatbot_id, document_id)


def new_document(
    chatbot_id: str, kind: Kind, identity: str, *, title: str, url: str | None, parent: str | None = None
) -> dict[str, Any]:
    """The columns of a document that is not read yet."""
    moment = now()
    return {
        "id": f"doc_{uuid7().hex}",
        "chatbot_id": chatbot_id,
        "parent_id": parent,
        "kind": kind,
        "identity": identity,
        "title": title,
        "url": url,
        "status": "pending",
        "created_at": moment,
        "updated_at": moment,
    }


def url_identity(kind: Kind, url: str) -> str:
    """What makes a URL the same document, as `checked_url` has it."""
    return _identity(kind, url)


def checked_url(url: str, parameter: str) -> str:
    """A URL in the one form that all its spellings have, without its fragment.

    Args:
        url: The URL.
        parameter: Its name for the sentence.

    Raises:
        InvalidRequest: It is none with http or https, or it carries a password.
    """
    try:
        if len(url) > LONGEST_URL or not re.match(URL_PATTERN, url):
            raise ValueError
        parts = urlsplit(url)
        host, port = (parts.hostname or "").rstrip("."), parts.port
    except ValueError:
        raise InvalidRequest(
            parameter=parameter,
            expected=f"expected a URL such as https://example.org/page, of at most {LONGEST_URL} characters",
        ) from None
    scheme = parts.scheme.lower()
    netloc = f"[{host}]" if ":" in host else host
    if port is not None and port != DEFAULT_PORTS[scheme]:
        netloc = f"{netloc}:{port}"
    return urlunsplit((scheme, netloc, parts.path or "/", parts.query, ""))


def base_name(name: str) -> str:
    """A file's name without folders and control characters, composed as most systems write it."""
    name = unicodedata.normalize("NFC", re.split(r"[/\\]", name)[-1])
    name = "".join(character for character in name if character.isprintable()).strip()
    stem, dot, suffix = name.rpartition(".")
    if len(name) > LONGEST_NAME:
        name = (
            stem[: LONGEST_NAME - len(suffix) - 1] + dot + suffix if len(suffix) < 16 else name[:LONGEST_NAME]
        )
    return name if name.strip(".") else "document"


def now() -> int:
    """Unix milliseconds."""
    return time.time_ns() // 1_000_000


def _identity(*parts: str) -> str:
    return sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()


def _checked_id(document_id: str) -> str:
    """The same id, once it is sure that it is one: PostgreSQL takes no NUL."""
    if not DOCUMENT_ID.fullmatch(document_id):
        raise NotFound(kind="document", name=document_id[:64])
    return document_id


def _document(row: RowMapping) -> Document:
    columns = {field: row[field] for field in Document._fields if field in row}
    return Document(
        **columns,
        parent=row["parent_id"],
        refresh_seconds=(row["options"] or {}).get("refresh_seconds"),
    )
