"""What searches are compared with: by words, by meaning, and by their ranks fused, each as plain as it gets."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from upchatty.knowledge.scoring import Weights
from upchatty.knowledge.words import question_terms, terms
from upchatty.storage.passages import term_codes

RRF = 60  # https://doi.org/10.1145/1571941.1572114

Numbers = NDArray[np.float32] | NDArray[np.float64] | NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Figures:
    """How well something is found, each from 0 to 1.

    Args:
        first: The share that is found at the first place.
        among_five: The share that is found among the first five.
        mrr: The mean of 1 / place.
    """

    first: float
    among_five: float
    mrr: float

    @classmethod
    def of(cls, places: Sequence[int | None]) -> "Figures":
        """The figures of places from 1; None: not found."""
        return cls(
            fmean(place == 1 for place in places),
            fmean(place is not None and place <= 5 for place in places),
            fmean(1 / place if place else 0.0 for place in places),
        )

    def __str__(self) -> str:
        return f"{self.first:.3f} | {self.among_five:.3f} | {self.mrr:.3f}"


def plain_orders(
    passages: Sequence[str],
    vectors: NDArray[np.float32],
    questions: Sequence[str],
    asked: NDArray[np.float32],
) -> dict[str, NDArray[np.int64]]:
    """All passages in their order for each question, (questions, passages), by the way's name.

    Args:
        passages: Their texts.
        vectors: Their embeddings.
        questions: The questions.
        asked: Their embeddings.
    """
    indexed = [terms(text) for text in passages]
    occurs_in = Counter(chain.from_iterable(map(set, indexed)))
    length, codes = sum(map(len, indexed)), [term_codes(passage) for passage in indexed]
    by_words = np.empty((len(questions), len(passages)))
    for number, question in enumerate(questions):
        own = {term.term: 1.0 for term in question_terms(question) if not term.is_alternative}
        weights = Weights(own, [], passages=len(indexed), length=length, occurs_in=occurs_in)
        by_words[number] = weights.of(codes).score
    by_meaning = asked @ vectors.T
    fused = sum(1 / (RRF + 1 + np.argsort(_order(scores), axis=1)) for scores in (by_words, by_meaning))
    ways = {"BM25": by_words, "embedding": by_meaning, "their ranks fused": fused}
    return {name: _order(scores) for name, scores in ways.items()}


def _order(scores: Numbers) -> NDArray[np.int64]:
    return np.argsort(-scores, axis=1, kind="stable")
