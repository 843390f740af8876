"""How well a file of questions finds its paragraphs.

The file is JSON: `paragraphs` of `id`, `title` and `text`, and `questions` of `question`, `paragraph` and
`answerable`. Each paragraph is a document; its title is not searched, so that all ways have the same text.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np

from benchmarks.retrieval.chatbots import add_chatbot, add_document, open_search
from benchmarks.retrieval.plain import Figures, plain_orders
from benchmarks.retrieval.vectors import CachedEmbedding
from upchatty.knowledge.splitting import Passage
from upchatty.storage.database import Database

CUTOFF = 20  # places of the search that are looked at


class Paragraph(msgspec.Struct, frozen=True):
    """A paragraph of the file."""

    id: int
    text: str


class Question(msgspec.Struct, frozen=True):
    """A question of the file, and the id of its paragraph, which may not answer it."""

    question: str
    paragraph: int
    answerable: bool


class Sample(msgspec.Struct, frozen=True):
    """The file."""

    paragraphs: list[Paragraph]
    questions: list[Question]


async def measure(file: Path, databases: Mapping[str, Database], embedding: CachedEmbedding) -> None:
    """Print how well a file's questions find their paragraphs.

    Args:
        file: The file.
        databases: Where the paragraphs are put, by their names.
        embedding: The embedding model.

    Raises:
        SystemExit: The file cannot be read.
    """
    try:
        sample = msgspec.convert(json.loads(file.read_text()), Sample)
    except (OSError, ValueError) as error:
        raise SystemExit(f"{file}: {error}") from error
    rows = await _plain(sample, embedding)
    found: dict[str, list[list[str]]] = {}
    for name, database in databases.items():
        found[name] = await _found(f"squad-{file.stem}", sample, database, embedding)
        rows[f"search, {name}"] = [
            ids.index(str(question.paragraph)) + 1 if str(question.paragraph) in ids else None
            for ids, question in zip(found[name], sample.questions, strict=True)
        ]
    _print(file, sample, rows)
    same = sum(len({tuple(ids) for ids in every}) == 1 for every in zip(*found.values(), strict=True))
    print(
        f"\nThe first {CUTOFF} are the same on all databases for {same} of {len(sample.questions)} questions."
    )


def _print(file: Path, sample: Sample, rows: Mapping[str, Sequence[int | None]]) -> None:
    answerable = [question.answerable for question in sample.questions]
    print(f"\n{file.name}: {len(sample.paragraphs)} paragraphs, {len(answerable)} questions, of which their")
    print(f"paragraphs answer {sum(answerable)}\n")
    print("| way | R@1 | R@5 | MRR | of those answered: R@1 | R@5 | MRR |\n|---|---|---|---|---|---|---|")
    for name, places in rows.items():
        answered = [place for place, is_answered in zip(places, answerable, strict=True) if is_answered]
        print(f"| {name} | {Figures.of(places)} | {Figures.of(answered)} |")


async def _found(
    chatbot: str, sample: Sample, database: Database, embedding: CachedEmbedding
) -> list[list[str]]:
    """The ids of the paragraphs that are found, best first, for each question."""
    await add_chatbot(database, chatbot)
    for paragraph in sample.paragraphs:
        hashed = hashlib.sha256(paragraph.text.encode()).hexdigest()
        passage = Passage(
            title="", headings=[], text=paragraph.text, page=None, anchor=None, tokens=0, hash=hashed
        )
        await add_document(database, chatbot, str(paragraph.id), [passage], embedding)
    search = open_search(database, embedding)
    return [
        [
            finding.title
            for finding in (await search.search(chatbot, [question.question], limit=CUTOFF)).passages
        ]
        for question in sample.questions
    ]


async def _plain(sample: Sample, embedding: CachedEmbedding) -> dict[str, list[int | None]]:
    texts = [paragraph.text for paragraph in sample.paragraphs]
    questions = [question.question for question in sample.questions]
    orders = plain_orders(texts, await embedding.embed(texts), questions, await embedding.embed(questions))
    ids = np.array([paragraph.id for paragraph in sample.paragraphs])
    return {
        name: [
            int(np.flatnonzero(ids[row] == question.paragraph)[0]) + 1
            for row, question in zip(order, sample.questions, strict=True)
        ]
        for name, order in orders.items()
    }
