"""How well a file of questions finds its paragraphs: by words, by meaning, by their ranks fused, and by the search.

The file is JSON: `paragraphs` of `id`, `title` and `text`, and `questions` of `question`, `paragraph` and
`answerable`. Each paragraph is a document. The three plain ways are taken over all paragraphs, from the same
terms and embeddings as the search has.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from sqlalchemy import insert

from upchatty.engines.embedding import EmbeddingModel
from upchatty.knowledge.scoring import Weights
from upchatty.knowledge.search import Search
from upchatty.knowledge.words import question_terms, terms
from upchatty.settings import Settings
from upchatty.storage.database import Database
from upchatty.storage.passages import NewPassage, publish, term_codes
from upchatty.storage.tables import chatbots, documents

CHATBOT = "bot_squad"
CUTOFF = 20  # places of the search that are looked at
RRF = 60  # https://doi.org/10.1145/1571941.1572114


@dataclass(frozen=True, slots=True)
class Quality:
    """How well a way of searching finds the right paragraph.

    Args:
        name: The way.
        places: The right paragraph's place for each question, from 1; 0 where it was not found.
    """

    name: str
    places: list[int]

    def row(self) -> str:
        """A line of a Markdown table: R@1, R@5 and MRR."""
        shares = [fmean(0 < place <= limit for place in self.places) for limit in (1, 5)]
        mrr = fmean(1 / place if place else 0.0 for place in self.places)
        return f"| {self.name} | {shares[0]:.3f} | {shares[1]:.3f} | {mrr:.3f} |"


async def measure(
    file: Path, database: Database, embedding: EmbeddingModel, *, answerable: bool
) -> list[Quality]:
    """Measure a file on an empty database.

    Args:
        file: The questions.
        database: Where the paragraphs are put, its schema up to date.
        embedding: The embedding model.
        answerable: Whether questions that their paragraph does not answer are left out.
    """
    sample = json.loads(file.read_text())
    paragraphs = sample["paragraphs"]
    questions = [q for q in sample["questions"] if q["answerable"] or not answerable]
    await _fill(database, embedding, paragraphs)
    search = Search(database, embedding, None, Settings())
    found = []
    for question in questions:
        findings = await search.search(CHATBOT, [question["question"]], limit=CUTOFF)
        ids = [finding.document_id for finding in findings.passages]
        right = _document(question["paragraph"])
        found.append(ids.index(right) + 1 if right in ids else 0)
    return [*await _baselines(embedding, paragraphs, questions), Quality("search", found)]


async def _fill(database: Database, embedding: EmbeddingModel, paragraphs: list[dict[str, Any]]) -> None:
    row: dict[str, Any] = {"id": CHATBOT, "published_version": 1, "latest_version": 1, "created_at": 0}
    async with database.transaction() as connection:
        await connection.execute(insert(chatbots).values(row))
    vectors = (await embedding.embed([paragraph["text"] for paragraph in paragraphs])).astype("<f2")
    for paragraph, vector in zip(paragraphs, vectors, strict=True):
        text, document = paragraph["text"], _document(paragraph["id"])
        row = {"id": document, "chatbot_id": CHATBOT, "kind": "text", "title": paragraph["title"]}
        row |= {"identity": document, "status": "ready", "created_at": 0, "updated_at": 0}
        async with database.transaction() as connection:
            await connection.execute(insert(documents).values(row))
        passage = NewPassage(
            position=0,
            headings=[],
            page=None,
            anchor=None,
            text=text,
            terms=" ".join(terms(text)),
            tokens=len(text) // 4,
            hash=hashlib.sha256(text.encode()).hexdigest(),
            embedding=vector.tobytes(),
        )
        model = embedding.fingerprint
        await publish(database, document, CHATBOT, passages=[passage], embedding_model=model)


async def _baselines(
    embedding: EmbeddingModel, paragraphs: list[dict[str, Any]], questions: list[dict[str, Any]]
) -> list[Quality]:
    indexed = [terms(paragraph["text"]) for paragraph in paragraphs]
    occurs_in: dict[str, int] = {}
    for passage in indexed:
        for term in set(passage):
            occurs_in[term] = occurs_in.get(term, 0) + 1
    length, codes = sum(map(len, indexed)), [term_codes(passage) for passage in indexed]
    passages = await embedding.embed([paragraph["text"] for paragraph in paragraphs])
    asked = await embedding.embed([question["question"] for question in questions])
    by_words = np.empty((len(questions), len(paragraphs)))
    for number, question in enumerate(questions):
        own = {term.term: 1.0 for term in question_terms(question["question"]) if not term.is_alternative}
        weights = Weights(own, [], passages=len(indexed), length=length, occurs_in=occurs_in)
        by_words[number] = weights.of(codes).score
    by_meaning = asked @ passages.T
    fused = 1 / (RRF + _ranks(by_words)) + 1 / (RRF + _ranks(by_meaning))
    right = [[p["id"] for p in paragraphs].index(question["paragraph"]) for question in questions]
    ways = {"BM25": by_words, "embedding": by_meaning, "their ranks fused": fused}
    return [
        Quality(name, [int(rank[place]) for rank, place in zip(_ranks(scores), right, strict=True)])
        for name, scores in ways.items()
    ]


def _ranks(scores: Any) -> Any:
    """The place of each column in its row, from 1."""
    return np.argsort(np.argsort(-scores, axis=1, kind="stable"), axis=1) + 1


def _document(paragraph: int) -> str:
    return f"doc_{paragraph:032x}"
