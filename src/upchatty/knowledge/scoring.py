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
from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

K1, B = 1.2, 0.75  # BM25's usual constants
LEXICAL, VECTOR, NEIGHBOURS = 0.42, 0.42, 0.16


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
        self._padded = [(term, f" {term} ", weight * (K1 + 1)) for term, weight in self.found.items()]
        self._pairs: list[tuple[str, str, float]] = []
        self._most_pairs = 0.0
        for sequence, count in sequences:
            self._add_pairs(sequence, count, terms)

    def rarity(self, term: str) -> float:
        """BM25's inverse document frequency."""
        occurs_in = self._occurs_in.get(term, 0)
        return math.log(1 + (self._passages - occurs_in + 0.5) / (occurs_in + 0.5))

    def of(self, terms: str, length: int) -> "Lexical":
        """How well the terms of a passage fit.

        Args:
            terms: The passage's terms, separated by spaces.
            length: How many they are.
        """
        padded = f" {terms} "
        norm = K1 * (1 - B + B * length / self._mean_length)
        score = pairs = 0.0
        there = set()
        for term, looked_for, weight in self._padded:
            if count := padded.count(looked_for):
                score += weight * count / (count + norm)
                there.add(term)
        for rarer, pair, weight in self._pairs:
            if rarer in there and pair in padded:
                pairs += weight
        return Lexical(score, score / self._most if self._most else 0.0, pairs / (self._most_pairs or 1.0))

    def _add_pairs(self, sequence: list[str], count: float, looked_for: dict[str, float]) -> None:
        """Neighbours of which at least one is looked for; the other may be a little word."""
        for first, second in dict.fromkeys(pairwise(sequence)):
            if not (content := [term for term in (first, second) if term in looked_for]):
                continue
            weight = count * (self.rarity(first) + self.rarity(second)) / 2
            self._most_pairs += weight
            rarer = max(content, key=self.rarity)
            if rarer in self.found:
                self._pairs.append((rarer, f" {first} {second} ", weight))


class Lexical(NamedTuple):
    """How well a passage's words fit.

    Args:
        score: BM25.
        share: It as a share of the most that there could be.
        neighbours: The share of neighbouring terms that are neighbours there, too.
    """

    score: float
    share: float
    neighbours: float


def fused(lexical: Lexical, cosine: float | None) -> float:
    """The score from 0 to 1. Without an embedding, the words alone make it."""
    words = LEXICAL * lexical.share + NEIGHBOURS * lexical.neighbours
    if cosine is None:
        return words / (LEXICAL + NEIGHBOURS)
    return words + VECTOR * max(cosine, 0.0)
