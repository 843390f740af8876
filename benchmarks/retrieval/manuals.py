"""How well search finds what long manuals say: fifty questions, each with the passage that answers it.

The manuals are Debian's packages of the documentation of Git and PostgreSQL, and the Debian handbook. They
are read, split and searched as a worker and a server do; vectors are kept in `.cache/`, by the text's hash.
"""

import hashlib
import shutil
import subprocess
import tempfile
import time
import tomllib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray
from sqlalchemy import insert

from upchatty.engines.embedding import EmbeddingModel
from upchatty.knowledge.blocks import Reading
from upchatty.knowledge.reading import Readers, Unreadable
from upchatty.knowledge.search import Finding, Search
from upchatty.knowledge.splitting import BUDGET, Passage, split
from upchatty.knowledge.words import terms
from upchatty.settings import Settings
from upchatty.storage.database import Database
from upchatty.storage.passages import NewPassage, publish
from upchatty.storage.tables import chatbots, documents

CACHE = Path(__file__).parents[2] / ".cache" / "manuals"
QUESTIONS = Path(__file__).with_name("questions.toml")
DEEPEST = 20  # findings that are looked at
BATCH = 64  # texts that are embedded before the cache is written


@dataclass(frozen=True, slots=True)
class Manual:
    """A manual.

    Args:
        package: Debian's package.
        folder: Where its pages are in it.
    """

    package: str
    folder: str


MANUALS = {
    "git": Manual("git-doc", "usr/share/doc/git-doc"),
    "handbook": Manual("debian-handbook", "usr/share/doc/debian-handbook/html/en-US"),
    "postgresql": Manual("postgresql-doc-15", "usr/share/doc/postgresql-doc-15/html"),
}


class Question(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A question about a manual.

    Args:
        manual: Which.
        conversation: What is asked, after the messages before.
        pages: The pages that answer it.
        answer: What a passage that answers it contains.
    """

    manual: str
    conversation: list[str]
    pages: list[str]
    answer: str


@dataclass(frozen=True, slots=True)
class Figures:
    """How well something is found, each from 0 to 1."""

    first: float
    among_five: float
    mrr: float

    @classmethod
    def of(cls, ranks: Sequence[int | None]) -> "Figures":
        """The figures of ranks from 1; None: not found."""
        count = len(ranks)
        return cls(
            sum(rank == 1 for rank in ranks) / count,
            sum(rank is not None and rank <= 5 for rank in ranks) / count,
            sum(1 / rank for rank in ranks if rank) / count,
        )

    def __str__(self) -> str:
        return f"{self.first:.2f} | {self.among_five:.2f} | {self.mrr:.3f}"


class CachedEmbedding:
    """An embedding model whose vectors are kept in files.

    Args:
        model: The model.
    """

    def __init__(self, model: EmbeddingModel) -> None:
        self._model = model
        self.fingerprint = model.fingerprint
        self._file = CACHE / f"vectors-{self.fingerprint}.npz"
        self._vectors: dict[str, NDArray[np.float32]] = {}
        if self._file.exists():
            with np.load(self._file) as kept:
                self._vectors = dict(zip(kept["keys"].tolist(), kept["vectors"], strict=True))

    async def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """The vectors of texts, (n, d)."""
        keys = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
        new = {key: text for key, text in zip(keys, texts, strict=True) if key not in self._vectors}
        todo = list(new.items())
        for start in range(0, len(todo), BATCH):
            batch = todo[start : start + BATCH]
            vectors = await self._model.embed([text for _, text in batch])
            self._vectors |= {key: vector for (key, _), vector in zip(batch, vectors, strict=True)}
            if start // BATCH % 20 == 19:
                self.keep()
        return np.stack([self._vectors[key] for key in keys])

    def keep(self) -> None:
        """Write the vectors to their file."""
        temporary = self._file.with_suffix(".tmp.npz")
        np.savez(temporary, keys=list(self._vectors), vectors=np.stack(list(self._vectors.values())))
        temporary.replace(self._file)


def questions() -> list[Question]:
    """All questions."""
    return msgspec.convert(tomllib.loads(QUESTIONS.read_text())["questions"], list[Question])


def pages_of(name: str) -> list[Path]:
    """The pages of a manual, which is downloaded where it is not there.

    Raises:
        SystemExit: This machine has no apt.
    """
    manual = MANUALS[name]
    unpacked = CACHE / manual.package
    if not unpacked.exists():
        if not (shutil.which("apt-get") and shutil.which("dpkg")):
            raise SystemExit(
                f"The manuals come from Debian: put {manual.package}, unpacked, into {unpacked}."
            )
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            subprocess.run(["apt-get", "download", manual.package], cwd=folder, check=True)
            [package] = Path(folder).glob("*.deb")
            subprocess.run(["dpkg", "-x", package, unpacked], check=True)
    # Some pages are links to others.
    return sorted(page for page in (unpacked / manual.folder).glob("*.html") if not page.is_symlink())


async def read(name: str) -> AsyncIterator[tuple[str, Reading]]:
    """The pages of a manual, each with its name."""
    readers = Readers()
    try:
        for page in pages_of(name):
            try:
                content = page.read_bytes()
                yield page.stem, await readers.read(content, name=page.name, media_type="text/html")
            except Unreadable as error:
                print(f"{page.name}: {error}")
    finally:
        await readers.close()


async def put(
    database: Database, chatbot: str, page: str, passages: list[Passage], embedding: CachedEmbedding
) -> None:
    """Publish a page's passages."""
    passages = list({passage.hash: passage for passage in passages}.values())
    identity = hashlib.sha256(f"{chatbot} {page}".encode()).hexdigest()
    row: dict[str, str | int] = {
        "id": f"doc_{identity[:20]}",
        "chatbot_id": chatbot,
        "kind": "file",
        "identity": identity,
    }
    async with database.transaction() as connection:
        row |= {"title": page, "status": "ready", "created_at": 0, "updated_at": 0}
        await connection.execute(insert(documents).values(row))
    vectors = await embedding.embed([passage.searched for passage in passages])
    new = [
        NewPassage(
            position=position,
            headings=passage.headings,
            page=passage.page,
            anchor=passage.anchor,
            text=passage.text,
            terms=" ".join(terms(passage.searched)),
            tokens=passage.tokens,
            hash=passage.hash,
            embedding=vector.astype("<f2").tobytes(),
        )
        for position, (passage, vector) in enumerate(zip(passages, vectors, strict=True))
    ]
    await publish(database, str(row["id"]), chatbot, passages=new, embedding_model=embedding.fingerprint)


async def fill(database: Database, name: str, embedding: CachedEmbedding, budget: int) -> int:
    """Read a manual into a chatbot of its name; returns its passages' number."""
    async with database.transaction() as connection:
        row = {"id": name, "published_version": 1, "latest_version": 1, "created_at": 0}
        await connection.execute(insert(chatbots).values(row))
    count = 0
    async for page, reading in read(name):
        passages = split(reading, title=reading.title or page, budget=budget)
        if passages:
            await put(database, name, page, passages, embedding)
        count += len(passages)
    embedding.keep()
    return count


def ranks(question: Question, found: Sequence[Finding]) -> tuple[int | None, int | None]:
    """The rank of the first passage with the answer, and of the first page of those that have it."""
    answer = _plain(question.answer)
    of_passage = next(
        (
            rank
            for rank, finding in enumerate(found, 1)
            if finding.title in question.pages and answer in _plain(finding.text)
        ),
        None,
    )
    pages = list(dict.fromkeys(finding.title for finding in found))
    of_page = next((rank for rank, page in enumerate(pages, 1) if page in question.pages), None)
    return of_passage, of_page


async def measure(url: str, model: EmbeddingModel, names: Sequence[str], budget: int = BUDGET) -> None:
    """Search the manuals in one database, and print how well.

    Args:
        url: The database; empty: SQLite.
        model: The embedding model.
        names: The manuals.
        budget: Tokens of a passage.
    """
    embedding = CachedEmbedding(model)
    with tempfile.TemporaryDirectory() as folder:
        database = Database(url, Path(folder) / "upchatty.db")
        await database.migrate()
        search = Search(database, embedding, None, Settings(data_dir=Path(folder)))  # type: ignore[arg-type]
        try:
            print(f"\n{'PostgreSQL' if url else 'SQLite'}, {budget} tokens\n")
            print("| manual | passages | passage R@1 | R@5 | MRR | page R@1 | R@5 | MRR |")
            print("|---|---|---|---|---|---|---|---|")
            together: list[tuple[int | None, int | None]] = []
            for name in names:
                started = time.monotonic()
                count = await fill(database, name, embedding, budget)
                found = [await _ask(search, question) for question in questions() if question.manual == name]
                together += found
                print(_row(name, count, found), f"({time.monotonic() - started:.0f} s)", flush=True)
            print(_row("all", 0, together))
        finally:
            await database.close()


async def _ask(search: Search, question: Question) -> tuple[int | None, int | None]:
    found = await search.search(question.manual, question.conversation, limit=DEEPEST)
    both = ranks(question, found.kept)
    if both[0] != 1:
        print(f"<!-- {both[0] or 'not found'}: {question.conversation[-1]} -->")
    return both


def _row(name: str, count: int, found: Sequence[tuple[int | None, int | None]]) -> str:
    passages, pages = zip(*found, strict=True)
    return f"| {name} | {count or ''} | {Figures.of(passages)} | {Figures.of(pages)} |"


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
