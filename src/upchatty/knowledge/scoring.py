"""How well a passage fits a question, from 0 to 1, the same for every database.

Three parts, each from 0 to 1 by itself, so that scores of different questions can be compared:

- BM25 as a share of what a passage could reach that has each of the question's terms ever so often: the
  weight of rare terms is in it, and that a term is missing everywhere lowers it;
- the cosine of the embeddings;
- the share of the question's neighbouring terms that are neighbours in the passage, weighted likewise.

Words and meaning count the same, neighbours a little: on questions of three kinds (an encyclopedia, Python's
documentation, aeronautics) neither more nor less of one of them was better throughout, and the sum was better
than each of them and than their ranks fused.
"""

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from upchatty.storage.passages import term_codes

K1, B = 1.2, 0.75  # BM25's usual constants
LEXICAL, VECTOR, NEIGHBOURS = 0.42, 0.42, 0.16
NO_TERM = bytes(4)
CODE_BYTES = len(NO_TERM)

Numbers = NDArray[np.float64]


class Weights:
    """The terms of a question, by how much they tell.

    Args:
        terms: The terms that are looked for, with what they count: 1 for the question's own.
        sequences: The question's terms in their order, little words included, with what they count.
        passages: How many passages there are.
        length: Terms of all passages.
        occurs_in: In how many passages a term occurs.
    """

    def __init__(
        self,
        terms: dict[str, float],
        sequences: Iterable[tuple[list[str], float]],
        *,
        passages: int,
        length: int,
        occurs_in: dict[str, int],
    ) -> None:
        self._passages, self._occurs_in = passages, occurs_in
        self._mean_length = max(length / max(passages, 1), 1.0)
        weighted = {term: self.rarity(term) * count for term, count in terms.items()}
        self._most = sum(weighted.values()) * (K1 + 1)
        self.found = {term: weight for term, weight in weighted.items() if occurs_in.get(term)}
        self._pairs: dict[tuple[str, str], float] = {}
        self._most_pairs = 0.0
        for sequence, count in sequences:
            self._add_pairs(sequence, count, terms)

    def rarity(self, term: str) -> float:
        """BM25's inverse document frequency."""
        occurs_in = self._occurs_in.get(term, 0)
        return math.log(1 + (self._passages - occurs_in + 0.5) / (occurs_in + 0.5))

    def of(self, passages: Sequence[bytes]) -> "Lexical":
        """How well the terms of passages fit.

        Args:
            passages: The term codes of each.
        """
        count = len(passages)
        lengths = np.array([len(codes) // CODE_BYTES for codes in passages])
        codes = np.frombuffer(NO_TERM.join(passages), "<u4")  # which keeps them from being neighbours
        owners = np.repeat(np.arange(count), lengths + 1)[: len(codes)]
        norms = K1 * (1 - B + B * lengths / self._mean_length)
        score, neighbours = np.zeros(count), np.zeros(count)
        for term, weight in self.found.items():
            occurs = np.bincount(owners[codes == _code(term)], minlength=count)
            score += weight * (K1 + 1) * occurs / (occurs + norms)
        for (first, second), weight in self._pairs.items():
            pairs = (codes[:-1] == _code(first)) & (codes[1:] == _code(second))
            neighbours[owners[:-1][pairs]] += weight  # once, however often it is there
        return Lexical(score, score / (self._most or 1.0), neighbours / (self._most_pairs or 1.0))

    def _add_pairs(self, sequence: list[str], count: float, looked_for: dict[str, float]) -> None:
        """Neighbours of which at least one is looked for; the other may be a little word."""
        for pair in dict.fromkeys(pairwise(sequence)):
            if not (content := [term for term in pair if term in looked_for]):
                continue
            weight = count * sum(map(self.rarity, pair)) / 2
            self._most_pairs += weight
            if max(content, key=self.rarity) in self.found:
                self._pairs[pair] = self._pairs.get(pair, 0.0) + weight


def _code(term: str) -> int:
    return int.from_bytes(term_codes([term]), "little")


class Lexical(NamedTuple):
    """How well the words of passages fit, a number for each.

    Args:
        score: BM25.
        share: It as a share of the most that there could be.
        neighbours: The share of neighbouring terms that are neighbours there, too.
    """

    score: Numbers
    share: Numbers
    neighbours: Numbers


def fused(lexical: Lexical, cosines: Numbers) -> Numbers:
    """The scores of passages from 0 to 1. Without an embedding, the words alone make it.

    Args:
        lexical: How well their words fit.
        cosines: Of the embeddings, NaN where there is none.
    """
    words = LEXICAL * lexical.share + NEIGHBOURS * lexical.neighbours
    both = words + VECTOR * np.maximum(cosines, 0.0)
    return np.minimum(np.where(np.isnan(cosines), words / (LEXICAL + NEIGHBOURS), both), 1.0)
