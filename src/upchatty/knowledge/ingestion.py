"""From a document's bytes to its passages: read, split, embed what is new, publish all at once."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from typing import Any

import msgspec
from sqlalchemy import RowMapping

from upchatty.engines.embedding import EmbeddingModel
from upchatty.knowledge.batches import Batches, Embedded
from upchatty.knowledge.blocks import Block, Reading
from upchatty.knowledge.documents import LONGEST_TITLE, Question, now
from upchatty.knowledge.fetching import Fetcher
from upchatty.knowledge.reading import Readers, Unreadable
from upchatty.knowledge.splitting import BUDGET, Passage, split
from upchatty.knowledge.words import terms
from upchatty.storage import documents as storage
from upchatty.storage.database import Database
from upchatty.storage.jobs import Claim
from upchatty.storage.passages import NewPassage, embedded_hashes, publish

NEWS_SECONDS = 0.5  # between two notes of how far a document is, and of what was embedded
KEPT = ("file", "text", "question")  # kinds whose bytes are kept; pages are fetched again

Values = dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Source:
    """What there is to read.

    Args:
        content: Its bytes.
        values: The document's columns that follow from it.
    """

    content: bytes
    values: Values


@dataclass(slots=True)
class _Progress:
    """How far the embedding of a document is."""

    total: int
    embeddings: dict[str, bytes] = field(default_factory=dict)
    """By their passage's hash."""
    unstaged: dict[str, bytes] = field(default_factory=dict)
    """Those that a crash would lose."""
    failed: bool = False

    def note(self, passage_hash: str, embedded: Embedded) -> None:
        """Take what has been embedded; a failure is raised to whoever waits for all."""
        if embedded.cancelled() or embedded.exception():
            self.failed = True
        else:
            self.embeddings[passage_hash] = self.unstaged[passage_hash] = embedded.result()


class Ingestion:
    """Reads documents.

    Args:
        database: Where they are.
        embedding: Makes the embeddings; None: passages are found by their words only.
        batches: What leads to it.
        readers: Read files.
        fetcher: Fetches URLs.
    """

    def __init__(
        self,
        database: Database,
        embedding: EmbeddingModel | None,
        batches: Batches | None,
        readers: Readers,
        fetcher: Fetcher,
    ) -> None:
        self._database = database
        self._embedding = embedding
        self._batches = batches
        self._readers = readers
        self._fetcher = fetcher

    async def read(self, claim: Claim) -> None:
        """Read a document, and publish what is in it.

        Raises:
            Unreadable, FetchRefused, FetchFailed: There is nothing to be read; says why.
            RequestError: The engine or the database does not answer.
        """
        document = claim.document
        model = self._embedding.fingerprint if self._embedding else ""
        known = await embedded_hashes(self._database, document["id"], model)
        source = await self._source(document, is_known=bool(known))
        if source is None or (
            known and document["kind"] == "url" and source.values["content_hash"] == document["content_hash"]
        ):
            await self._note_unchanged(document, source)
        else:
            reading = await self._reading(document, source.content)
            await self._publish(document, source, reading, known, model)
        await storage.drop_working_copies(
            self._database,
            document["id"],
            keep_content=document["kind"] in KEPT,
            created_at=claim.created_at,
        )

    async def _source(self, document: RowMapping, *, is_known: bool) -> _Source | None:
        """What there is to read; None if it has not changed since it was read."""
        if content := await storage.get_content(self._database, document["id"]):
            kept = {"content_hash": sha256(content).hexdigest()}
            return _Source(content, kept | {"bytes": len(content)})
        fetched = await self._fetcher.fetch(
            document["url"],
            etag=document["etag"] if is_known else None,
            last_modified=document["last_modified"] if is_known else None,
        )
        if fetched.not_modified:
            return None
        values = {
            "content_hash": sha256(fetched.content).hexdigest(),
            "bytes": len(fetched.content),
            "media_type": fetched.media_type,
            "etag": fetched.etag,
            "last_modified": fetched.last_modified,
        }
        return _Source(fetched.content, values)

    async def _reading(self, document: RowMapping, content: bytes) -> Reading:
        if document["kind"] == "question":
            return _question(content)
        is_page = document["kind"] == "url"
        options = document["options"] or {}
        return await self._readers.read(
            content,
            name=options.get("name"),
            media_type=document["media_type"],
            url=document["url"] if is_page else None,
            main_content=is_page,
        )

    async def _note_unchanged(self, document: RowMapping, source: _Source | None) -> None:
        values = source.values if source else {}
        await storage.set_document(self._database, document["id"], values | _when_read(document))

    async def _publish(
        self, document: RowMapping, source: _Source, reading: Reading, known: set[str], model: str
    ) -> None:
        own_title = " ".join(reading.title.split())[:LONGEST_TITLE]
        is_titled = (document["options"] or {}).get("titled") or not own_title
        title = document["title"] if is_titled else own_title
        passages = await asyncio.to_thread(_split, reading, title, self._embedding)
        if not passages:
            raise Unreadable(problem="there is no text in it")
        new = {passage.hash: passage.searched for passage in passages if passage.hash not in known}
        embeddings = await self._embed(document["id"], new, model, total=len(passages))
        rows = await asyncio.to_thread(_rows, passages, embeddings)
        values = source.values | _when_read(document)
        values |= {
            "title": title,
            "pages": reading.pages,
            "passages": len(passages),
            "tokens": sum(passage.tokens for passage in passages),
            "done": len(passages),
            "total": len(passages),
        }
        await publish(
            self._database,
            document["id"],
            document["chatbot_id"],
            passages=rows,
            embedding_model=model,
            document=values,
        )

    async def _embed(
        self, document_id: str, texts: dict[str, str], model: str, *, total: int
    ) -> dict[str, bytes]:
        """The embeddings of texts by their hash; those of an earlier attempt are not made again."""
        if not self._batches or not texts:
            return {}
        progress = _Progress(total, await storage.staged(self._database, document_id, model))
        rest = {key: text for key, text in texts.items() if key not in progress.embeddings}
        embedding = asyncio.create_task(_embed_all(self._batches, rest, progress))
        try:
            while not (await asyncio.wait([embedding], timeout=NEWS_SECONDS))[0]:
                await self._stage(document_id, model, progress, left=len(texts))
            await embedding
        except BaseException:
            embedding.cancel()
            if progress.unstaged:
                await self._stage(document_id, model, progress, left=len(texts))
            raise
        return progress.embeddings

    async def _stage(self, document_id: str, model: str, progress: _Progress, *, left: int) -> None:
        unstaged, progress.unstaged = progress.unstaged, {}
        done = progress.total - left + len(progress.embeddings)
        await storage.stage(
            self._database, document_id, model, unstaged, done=min(done, progress.total), total=progress.total
        )


async def _embed_all(batches: Batches, texts: dict[str, str], progress: _Progress) -> None:
    waiting: list[Embedded] = []
    try:
        for key, text in texts.items():
            embedded = await batches.add(text)
            embedded.add_done_callback(partial(progress.note, key))
            waiting.append(embedded)
            if progress.failed:
                break
        await asyncio.gather(*waiting)
    finally:
        for embedded in waiting:
            embedded.cancel()


def _question(content: bytes) -> Reading:
    stored = msgspec.json.decode(content, type=Question)
    heading = Block(kind="heading", text=stored.question, level=1)
    paragraphs = [text.strip() for text in stored.answer.split("\n\n")]
    answer = [Block(kind="paragraph", text=text) for text in paragraphs if text]
    return Reading(title=stored.question, blocks=[heading, *answer])


def _split(reading: Reading, title: str, embedding: EmbeddingModel | None) -> list[Passage]:
    """The passages, each once."""
    longest = embedding.longest if embedding else None
    budget = min(longest, BUDGET) if longest else BUDGET
    return list({passage.hash: passage for passage in split(reading, title=title, budget=budget)}.values())


def _rows(passages: Sequence[Passage], embeddings: dict[str, bytes]) -> list[NewPassage]:
    return [
        NewPassage(
            position=position,
            headings=passage.headings,
            page=passage.page,
            anchor=passage.anchor,
            text=passage.text,
            terms=" ".join(terms(passage.searched)),
            tokens=passage.tokens,
            hash=passage.hash,
            embedding=embeddings.get(passage.hash),
        )
        for position, passage in enumerate(passages)
    ]


def _when_read(document: RowMapping) -> Values:
    moment = now()
    return {
        "status": "ready",
        "reason": None,
        "read_at": moment,
        "updated_at": moment,
        "read_again_at": next_reading(document, moment),
    }


def next_reading(document: RowMapping, moment: int) -> int | None:
    """When a document is to be read again, unix milliseconds.

    Args:
        document: Its row.
        moment: When it was read.
    """
    refresh_seconds = (document["options"] or {}).get("refresh_seconds")
    return moment + refresh_seconds * 1000 if refresh_seconds else None
