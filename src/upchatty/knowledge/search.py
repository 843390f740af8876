"""Search in a chatbot's passages: by words and by meaning, fused and explained."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan
from typing import NamedTuple

import numpy as np
import structlog
from numpy.typing import NDArray
from sqlalchemy import Connection, Row, RowMapping

from upchatty.engines.embedding import EmbeddingModel, Reranker
from upchatty.errors import RequestError
from upchatty.knowledge.follow_ups import search_texts
from upchatty.knowledge.scoring import Numbers, Weights, fused
from upchatty.knowledge.vectors import Vectors
from upchatty.knowledge.words import Asked, question_terms, terms
from upchatty.settings import Settings
from upchatty.storage.database import Database
from upchatty.storage.passages import (
    Totals,
    get_passages,
    get_scored_columns,
    lexical_candidates,
    nearest,
    statistics,
)

DEFAULT_LIMIT = 5
DEFAULT_THRESHOLD = 0.2
"""The score below which the best passage most likely has nothing to do with the question."""

CANDIDATES = 48  # that words find, and that vectors find
RERANKED = 20
EMBEDDING_SECONDS = 2.0  # a question whose embedding takes longer is searched by its words
SPARE = 10  # candidates that are read beyond the limit, since some may be the same text
EXPLAINED = 20  # findings at least, where there are so many, kept or dropped
EARLIER_COUNTS = 0.5  # a term of an earlier message, against one of the question
MOST_TERMS = 32  # that candidates are looked for by; they are the rarest
MOST_MATCHES = 2_000  # of passages by their words; terms that are in more count for what was found otherwise
EXACT_ON_POSTGRESQL = 3_000  # passages that are compared one by one rather than through the index
WEIGHT_STEPS = 1_000  # whole numbers add up to the same on every database

Vector = NDArray[np.float32]
log = structlog.get_logger()


@dataclass(slots=True)
class Finding:
    """A passage that a search came across.

    Args:
        passage_id: Its id.
        document_id: The document that it is from.
        title: The document's title.
        url: The document's URL, with the passage's anchor where it has one.
        headings: The path of headings above it.
        page: The page on which it begins.
        text: The passage.
        tokens: The embedding model's tokens of it.
        score: How well it fits the question, 0 to 1, comparable between questions: what a threshold is
            held against.
        lexical_rank: Its place by words, from 1; None where no word fits.
        lexical_score: BM25.
        vector_rank: Its place by meaning, from 1; None where it has no embedding.
        vector_score: The cosine of its embedding and the question's.
        fused_score: What findings are ordered by, unless a reranker orders them.
        reranker_score: The reranker's, where there is one.
        kept: Whether an answer is to use it.
        reason: Why, or why not.
    """

    passage_id: int
    document_id: str
    title: str
    url: str | None
    headings: list[str]
    page: int | None
    text: str
    tokens: int
    score: float
    lexical_rank: int | None
    lexical_score: float
    vector_rank: int | None
    vector_score: float | None
    fused_score: float
    reranker_score: float | None = None
    kept: bool = False
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Findings:
    """What a search has found.

    Args:
        query: What was searched for: the question last, and before it the messages that it refers to.
        passages: Those that are kept come first, best first, then those that are dropped.
        score: The best passage's; 0 where there is none.
    """

    query: list[str]
    passages: list[Finding]
    score: float

    @property
    def kept(self) -> list[Finding]:
        """The passages that an answer is to use, best first."""
        return [finding for finding in self.passages if finding.kept]


@dataclass(frozen=True, slots=True)
class _Question:
    """What is looked for.

    Args:
        texts: The question last, and before it the messages that it refers to.
        asked: The terms to look for, with what they count.
        sequences: All terms in their order, with what they count.
        vector: The embedding, and None where there is no model for it.
        model: That model's fingerprint.
    """

    texts: list[str]
    asked: list[tuple[Asked, float]]
    sequences: list[tuple[list[str], float]]
    vector: Vector | None
    model: str


class _Scored(NamedTuple):
    """A candidate with its scores and its places, as in `Finding`."""

    passage_id: int
    score: float
    lexical_score: float
    lexical_rank: int | None
    vector_score: float | None
    vector_rank: int | None


class Search:
    """Searches the passages of all chatbots of a database.

    Args:
        database: Where they are.
        embedding: The embedding model, or None: search by words only.
        reranker: What orders the best findings, or None.
        settings: `knowledge_memory`.
    """

    def __init__(
        self,
        database: Database,
        embedding: EmbeddingModel | None,
        reranker: Reranker | None,
        settings: Settings,
    ) -> None:
        self._database = database
        self._embedding = embedding
        self._reranker = reranker
        self._vectors = Vectors(settings.knowledge_memory_bytes)

    async def search(
        self,
        chatbot_id: str,
        conversation: list[str],
        limit: int | None = None,
        threshold: float | None = None,
        *,
        explain: bool = False,
        seconds: float | None = EMBEDDING_SECONDS,
    ) -> Findings:
        """The passages that fit the last message of a conversation.

        Args:
            chatbot_id: The chatbot whose passages are searched.
            conversation: What the user has said, oldest first, the question last.
            limit: How many are kept at most; None: `DEFAULT_LIMIT`.
            threshold: The score below which none is kept; None: none is dropped for its score.
            explain: Whether what is dropped is wanted, too, with the reason.
            seconds: How long to wait for the question's embedding; None: as long as the model's settings say.

        Raises:
            StorageUnavailable: The database does not answer.
        """
        texts = search_texts(conversation)
        vector, model = await self._embed(texts, seconds)
        limit = DEFAULT_LIMIT if limit is None else limit
        wanted = max(limit + EXPLAINED if explain else limit + SPARE, RERANKED if self._reranker else 0)

        def find(connection: Connection) -> list[Finding]:
            question = _Question(texts, *_asked(texts), vector, model)
            return self._find(connection, chatbot_id, question, wanted)

        found = await self._rerank(texts, await self._database.read(find))
        score = max((finding.score for finding in found), default=0.0)
        return Findings(texts, _choose(found, limit, threshold, EXPLAINED if explain else limit), score)

    async def _embed(self, texts: list[str], seconds: float | None) -> tuple[Vector | None, str]:
        """The question's embedding: where it refers to something, between itself and all together."""
        if not self._embedding:
            return None, ""
        both = [texts[-1]] if len(texts) == 1 else [texts[-1], "\n".join(texts)]
        try:
            vectors = await self._embedding.embed(both, seconds=seconds)
            model = self._embedding.fingerprint
        except (RequestError, OSError) as error:
            log.warning("question_not_embedded", reason=str(error))
            return None, ""
        total: Vector = vectors.sum(axis=0)
        return total / max(float(np.linalg.norm(total)), 1e-9), model

    def _find(
        self, connection: Connection, chatbot_id: str, question: _Question, wanted: int
    ) -> list[Finding]:
        """The best candidates, best first."""
        terms_ = {asked.term for asked, _ in question.asked}
        terms_ |= {term for sequence, _ in question.sequences for term in sequence}
        totals, occurs_in = statistics(connection, chatbot_id, sorted(terms_))
        if totals is None or not totals.passages:
            return []
        weights = Weights(
            _looked_for(question.asked, occurs_in),
            question.sequences,
            passages=totals.passages,
            length=totals.length,
            occurs_in=occurs_in,
        )
        ids = dict.fromkeys(_by_words(connection, totals, weights, occurs_in))
        if question.vector is not None:
            ids |= dict.fromkeys(self._by_meaning(connection, chatbot_id, totals, question))
        scored = _scored(get_scored_columns(connection, [*ids]), weights, question)[:wanted]
        rows = get_passages(connection, [best.passage_id for best in scored])
        return [_finding(rows[best.passage_id], best) for best in scored if best.passage_id in rows]

    def _by_meaning(
        self, connection: Connection, chatbot_id: str, totals: Totals, question: _Question
    ) -> list[int]:
        assert question.vector is not None
        if connection.dialect.name == "sqlite":
            return self._vectors.nearest(
                connection,
                chatbot_id,
                totals,
                question=question.vector,
                embedding_model=question.model,
                limit=CANDIDATES,
            )
        return nearest(
            connection,
            chatbot_id,
            question.vector.astype("<f2").tobytes(),
            question.model,
            limit=CANDIDATES,
            exact=totals.passages <= EXACT_ON_POSTGRESQL,
        )

    async def _rerank(self, texts: list[str], found: list[Finding]) -> list[Finding]:
        """The best findings in the reranker's order, before the others."""
        if not self._reranker or not found:
            return found
        best = found[:RERANKED]
        try:
            scores = await self._reranker.rerank("\n".join(texts), [_read(finding) for finding in best])
        except RequestError as error:
            log.warning("findings_not_reranked", reason=str(error))
            return found
        for finding, score in zip(best, scores, strict=True):
            finding.reranker_score = score
        return sorted(best, key=lambda f: -(f.reranker_score or 0.0)) + found[RERANKED:]


def _asked(texts: list[str]) -> tuple[list[tuple[Asked, float]], list[tuple[list[str], float]]]:
    """The terms of the question and of the messages that it refers to, with what they count."""
    asked: list[tuple[Asked, float]] = []
    sequences: list[tuple[list[str], float]] = []
    for place, text in enumerate(reversed(texts)):
        count = EARLIER_COUNTS**place
        first_word = asked[-1][0].word + 1 if asked else 0
        asked += [(term._replace(word=first_word + term.word), count) for term in question_terms(text)]
        sequences.append((terms(text), count))
    return asked, sequences


def _looked_for(asked: list[tuple[Asked, float]], occurs_in: dict[str, int]) -> dict[str, float]:
    """The terms that count: of each word those that there are, or what it would be."""
    there = {term.word for term, _ in asked if term.term in occurs_in}
    counts: dict[str, float] = {}
    for term, count in asked:
        if term.term in occurs_in or (term.word not in there and not term.is_alternative):
            counts.setdefault(term.term, count)
    return counts


def _by_words(
    connection: Connection, totals: Totals, weights: Weights, occurs_in: dict[str, int]
) -> list[int]:
    """Candidates by their words: the rarest, as long as they are in few enough passages."""
    rarest_first = sorted(weights.found, key=lambda term: (occurs_in[term], term))[:MOST_TERMS]
    chosen: dict[str, int] = {}
    matches = 0
    for term in rarest_first:
        matches += occurs_in[term]
        if chosen and matches > MOST_MATCHES:
            break
        chosen[term] = round(weights.found[term] * WEIGHT_STEPS)
    return lexical_candidates(connection, totals.number, chosen, MOST_MATCHES, CANDIDATES) if chosen else []


def _scored(
    rows: Sequence[Row[int, bytes, str, bytes | None]], weights: Weights, question: _Question
) -> list[_Scored]:
    """Scores and ranks of the candidates, best first."""
    if not rows:
        return []
    lexical, cosines = weights.of([row.term_codes for row in rows]), _cosines(rows, question)
    by_words, by_meaning = lexical.score.tolist(), [None if isnan(c) else c for c in cosines.tolist()]
    word_ranks, meaning_ranks = _ranks([score or None for score in by_words]), _ranks(by_meaning)
    ids, scores = [row.id for row in rows], fused(lexical, cosines).tolist()
    scored = map(_Scored, ids, scores, by_words, word_ranks, by_meaning, meaning_ranks)
    return sorted(scored, key=lambda best: (-best.score, best.passage_id))


def _cosines(rows: Sequence[Row[int, bytes, str, bytes | None]], question: _Question) -> Numbers:
    """NaN where a passage has no embedding of the question's model."""
    cosines = np.full(len(rows), np.nan)
    if question.vector is None:
        return cosines
    size = len(question.vector) * 2
    fitting = [
        index
        for index, (_, _, model, embedding) in enumerate(rows)
        if model == question.model and embedding and len(embedding) == size
    ]
    stored = np.frombuffer(b"".join(rows[index].embedding for index in fitting), "<f2")
    cosines[fitting] = (
        stored.astype(np.float32).reshape(len(fitting), -1 if fitting else size // 2) @ question.vector
    )
    return cosines


def _ranks(scores: Sequence[float | None]) -> list[int | None]:
    """The place of each, from 1; None for what has no score."""
    order = sorted((-score, index) for index, score in enumerate(scores) if score is not None)
    ranks: list[int | None] = [None] * len(scores)
    for rank, (_, index) in enumerate(order, 1):
        ranks[index] = rank
    return ranks


def _finding(row: RowMapping, scored: _Scored) -> Finding:
    url = row["url"]
    return Finding(
        passage_id=scored.passage_id,
        document_id=row["document_id"],
        title=row["title"],
        url=f"{url.partition('#')[0]}#{row['anchor']}" if url and row["anchor"] else url,
        headings=row["headings"],
        page=row["page"],
        text=row["text"],
        tokens=row["tokens"],
        score=scored.score,
        lexical_rank=scored.lexical_rank,
        lexical_score=scored.lexical_score,
        vector_rank=scored.vector_rank,
        vector_score=scored.vector_score,
        fused_score=scored.score,
    )


def _choose(found: list[Finding], limit: int, threshold: float | None, told: int) -> list[Finding]:
    """Findings with whether they are kept and why: those that are kept first, and `told` of them in all."""
    kept: list[Finding] = []
    dropped: list[Finding] = []
    seen: dict[str, int] = {}
    for rank, finding in enumerate(found, 1):
        text = " ".join(finding.text.casefold().split())
        if text in seen:
            finding.reason = f"dropped: the same text as the one ranked {seen[text]}"
        elif threshold is not None and finding.score < threshold:
            finding.reason = f"dropped: its score is below the threshold of {threshold:g}"
        elif len(kept) >= limit:
            finding.reason = f"dropped: ranked {rank}, beyond the limit of {limit}"
        else:
            finding.kept, finding.reason = True, f"kept: ranked {rank}"
        seen.setdefault(text, rank)
        (kept if finding.kept else dropped).append(finding)
    return kept + dropped[: max(0, told - len(kept))]


def _read(finding: Finding) -> str:
    """A passage as it was embedded."""
    return " > ".join([finding.title, *finding.headings]) + "\n" + finding.text
