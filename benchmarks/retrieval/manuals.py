"""How well search finds what long manuals say: fifty questions, each with the passages that answer it.

The manuals are Debian's packages of the documentation of Git and PostgreSQL, and the Debian handbook. They
are read, split, embedded and searched as a worker and a server do.
"""

import shutil
import subprocess
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from benchmarks.retrieval.chatbots import add_chatbot, add_document, open_search
from benchmarks.retrieval.plain import Figures, plain_orders
from benchmarks.retrieval.vectors import CACHE, CachedEmbedding
from upchatty.knowledge.blocks import Reading
from upchatty.knowledge.reading import Readers, Unreadable
from upchatty.knowledge.splitting import Passage, split
from upchatty.storage.database import Database

QUESTIONS = Path(__file__).with_name("questions.toml")
DEEPEST = 20  # places that are looked at


@dataclass(frozen=True, slots=True)
class Manual:
    """A manual.

    Args:
        package: Debian's package.
        folder: Where its pages are in it.
        part: Beside the pages that answer a question, one in so many is read.
    """

    package: str
    folder: str
    part: int = 1


MANUALS = {
    "handbook": Manual("debian-handbook", "usr/share/doc/debian-handbook/html/en-US"),
    "git": Manual("git-doc", "usr/share/doc/git-doc"),
    "postgresql": Manual("postgresql-doc-15", "usr/share/doc/postgresql-doc-15/html", part=5),
}


class Question(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A question about a manual.

    Args:
        manual: Which.
        conversation: What is asked, after the messages before.
        answers: The pages that answer it, each with strings of which a passage that does so has one.
    """

    manual: str
    conversation: list[str]
    answers: dict[str, list[str]]

    def is_answered_by(self, page: str, text: str) -> bool:
        """Whether a passage of a page answers it."""
        return any(_plain(answer) in _plain(text) for answer in self.answers.get(page, ()))


@dataclass(frozen=True, slots=True)
class Place:
    """Where a passage is from, and what it says."""

    page: str
    text: str


def questions_about(name: str) -> list[Question]:
    """The questions about a manual."""
    questions = msgspec.convert(tomllib.loads(QUESTIONS.read_text())["questions"], list[Question])
    return [question for question in questions if question.manual == name]


async def measure(
    name: str, databases: Mapping[str, Database], embedding: CachedEmbedding, budget: int, *, misses: bool
) -> None:
    """Print how well questions find what answers them in a manual.

    Args:
        name: The manual.
        databases: Where it is put, by their names.
        embedding: The embedding model.
        budget: Tokens of a passage.
        misses: Whether to say which questions are not answered by the first passage.

    Raises:
        SystemExit: The manual is not there, or is another one than the questions are about.
    """
    questions = questions_about(name)
    pages = await _read(name, questions)
    split_pages = {
        page: passages
        for page, reading in pages.items()
        if (passages := split(reading, title=reading.title or page, budget=budget))
    }
    count = sum(map(len, split_pages.values()))
    _check(questions, split_pages)
    await embedding.embed([passage.searched for passages in split_pages.values() for passage in passages])
    embedding.keep()
    found = await _plain_ways(split_pages, questions, embedding)
    for kind, database in databases.items():
        chatbot = f"{name}-{budget}"
        await add_chatbot(database, chatbot)
        for page, passages in split_pages.items():
            await add_document(database, chatbot, page, passages, embedding)
        search = open_search(database, embedding)
        found[f"search, {kind}"] = [
            [
                Place(finding.title, finding.text)
                for finding in (await search.search(chatbot, question.conversation, limit=DEEPEST)).kept
            ]
            for question in questions
        ]
    print(f"\n{name}: {len(split_pages)} pages, {count} passages of at most {budget} tokens\n")
    print("| way | passage R@1 | R@5 | MRR | page R@1 | R@5 | MRR |\n|---|---|---|---|---|---|---|")
    for way, places in found.items():
        print(_row(way, questions, places))
    searched = [places for way, places in found.items() if way.startswith("search")]
    same = sum(all(places == every[0] for places in every) for every in zip(*searched, strict=True))
    print(f"\nThe first {DEEPEST} are the same on all databases for {same} of {len(questions)} questions.")
    if misses and searched:
        for question, places in zip(questions, searched[0], strict=True):
            if (rank := _rank(question, places)) != 1:
                print(f"- {rank or 'not found'}: {question.conversation[-1]}")


def _check(questions: Sequence[Question], pages: Mapping[str, Sequence[Passage]]) -> None:
    """Stop where a manual no longer says what answers a question."""
    for question in questions:
        for page, answers in question.answers.items():
            text = _plain(" ".join(passage.text for passage in pages.get(page, ())))
            for answer in answers:
                if _plain(answer) not in text:
                    raise SystemExit(f"questions.toml: the page {page} does not say “{answer}”.")


async def _plain_ways(
    pages: Mapping[str, Sequence[Passage]], questions: Sequence[Question], embedding: CachedEmbedding
) -> dict[str, list[list[Place]]]:
    places = [Place(page, passage.text) for page, passages in pages.items() for passage in passages]
    texts = [passage.searched for passages in pages.values() for passage in passages]
    asked = ["\n".join(question.conversation) for question in questions]
    orders = plain_orders(texts, await embedding.embed(texts), asked, await embedding.embed(asked))
    return {
        name: [[places[index] for index in row[:DEEPEST]] for row in order] for name, order in orders.items()
    }


async def _read(name: str, questions: Sequence[Question]) -> dict[str, Reading]:
    """The pages of a manual by their names."""
    answering = {page for question in questions for page in question.answers}
    readers, pages = Readers(), {}
    try:
        for number, page in enumerate(_pages_of(name)):
            if page.stem not in answering and number % MANUALS[name].part:
                continue
            try:
                content = page.read_bytes()
                pages[page.stem] = await readers.read(content, name=page.name, media_type="text/html")
            except Unreadable as error:
                print(f"{page.name}: {error}")
    finally:
        await readers.close()
    return pages


def _pages_of(name: str) -> list[Path]:
    """The files of a manual, which is downloaded where it is not there.

    Raises:
        SystemExit: It cannot be had.
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


def _row(way: str, questions: Sequence[Question], found: Sequence[Sequence[Place]]) -> str:
    both = list(zip(questions, found, strict=True))
    passages = [_rank(question, places) for question, places in both]
    pages = [_page_rank(question, places) for question, places in both]
    return f"| {way} | {Figures.of(passages)} | {Figures.of(pages)} |"


def _rank(question: Question, places: Sequence[Place]) -> int | None:
    """The rank of the first passage that answers a question."""
    ranks = (rank for rank, place in enumerate(places, 1) if question.is_answered_by(place.page, place.text))
    return next(ranks, None)


def _page_rank(question: Question, places: Sequence[Place]) -> int | None:
    """The rank of the first page that answers it, among the pages of what is found."""
    pages = dict.fromkeys(place.page for place in places)
    return next((rank for rank, page in enumerate(pages, 1) if page in question.answers), None)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
