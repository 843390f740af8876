"""The threshold of a grounded chatbot, from examples: questions of which its owner knows whether its
documents answer them."""

import csv
import io
import tomllib
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import msgspec

from upchatty.errors import InvalidRequest

FEWEST = 8  # examples of each kind from which on a threshold means something
SEPARATES = 0.7  # balanced accuracy below which it does not
STEPS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.7, 0.8)
YES = frozenset({"yes", "y", "true", "1", "ja", "oui", "si", "sí"})
NO = frozenset({"no", "n", "false", "0", "nein", "non"})
EXPECTED = (
    "expected questions with whether they can be answered: CSV with the columns question and answerable, "
    'JSON lines such as {"question": "…", "answerable": true}, or TOML with [[examples]]'
)


class Example(NamedTuple):
    """A question, and whether the documents answer it."""

    question: str
    answerable: bool


class Outcome(NamedTuple):
    """What a threshold does to the examples."""

    threshold: float
    false_answers: int
    """Questions that are answered although the documents have no answer."""
    false_refusals: int
    """Questions that are refused although they have."""
    balanced_accuracy: float
    """The mean of the shares that are right among those with an answer and among those without."""


class Calibration(NamedTuple):
    """What the examples say."""

    best: Outcome
    others: list[Outcome]
    answerable: int
    unanswerable: int
    warnings: list[str]


def read_examples(name: str, content: bytes) -> list[Example]:
    """The examples of a file.

    Args:
        name: The file's name, whose ending tells the format; without one it is CSV.
        content: What is in it.

    Raises:
        InvalidRequest: It is none of the formats.
    """
    try:
        text = content.decode("utf-8-sig")
        if name.endswith(".toml"):
            rows = tomllib.loads(text)["examples"]
        elif name.endswith((".jsonl", ".json", ".ndjson")):
            if text.lstrip().startswith("["):
                rows = msgspec.json.decode(text)
            else:
                rows = [msgspec.json.decode(line) for line in text.splitlines() if line.strip()]
        else:
            rows = list(csv.DictReader(io.StringIO(text)))
        return [_example(row) for row in rows]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidRequest(parameter=name, expected=f"{EXPECTED} ({_cause(error)})") from None


def calibrate(examples: Sequence[Example], scores: Sequence[float]) -> Calibration:
    """The threshold that separates the examples best.

    Args:
        examples: The questions.
        scores: The score of each one's best passage.

    Raises:
        InvalidRequest: There are examples of one kind only.
    """
    answered = [score for example, score in zip(examples, scores, strict=True) if example.answerable]
    refused = [score for example, score in zip(examples, scores, strict=True) if not example.answerable]
    if not answered or not refused:
        raise InvalidRequest(
            parameter="examples", expected="expected questions with an answer and questions without one"
        )
    found = sorted({0.0, *scores})
    between = [(low + high) / 2 for low, high in pairwise(found)]
    outcomes = [_outcome(threshold, answered, refused) for threshold in (*between, found[-1])]
    most = max(outcome.balanced_accuracy for outcome in outcomes)
    # Of several that are as good, the one in the middle is the farthest from being wrong.
    as_good = [outcome for outcome in outcomes if outcome.balanced_accuracy == most]
    chosen = as_good[len(as_good) // 2]
    best = _outcome(round(chosen.threshold, 4), answered, refused)
    warnings = []
    if min(len(answered), len(refused)) < FEWEST:
        warnings.append(
            f"these are few examples: with at least {FEWEST} of each kind the threshold means more "
            f"(there are {len(answered)} with an answer and {len(refused)} without)"
        )
    if best.balanced_accuracy < SEPARATES:
        warnings.append(
            "no threshold separates these examples: either the documents lack answers that they are said to "
            "have, or the questions without an answer are too much like those with one"
        )
    others = [_outcome(threshold, answered, refused) for threshold in STEPS]
    return Calibration(best, others, len(answered), len(refused), warnings)


def _outcome(threshold: float, answered: list[float], refused: list[float]) -> Outcome:
    false_refusals = sum(score < threshold for score in answered)
    false_answers = sum(score >= threshold for score in refused)
    accuracy = (2 - false_refusals / len(answered) - false_answers / len(refused)) / 2
    return Outcome(threshold, false_answers, false_refusals, accuracy)


def _example(row: dict[str, object]) -> Example:
    question, answerable = row["question"], row["answerable"]
    if not isinstance(question, str) or not question.strip():
        raise ValueError("a question is empty")
    if isinstance(answerable, str):
        word = answerable.strip().casefold()
        if word not in YES | NO:
            raise ValueError(f"answerable is {answerable!r}, neither yes nor no")
        answerable = word in YES
    if not isinstance(answerable, bool):
        raise ValueError("answerable is neither true nor false")
    return Example(question.strip(), answerable)


def _cause(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)
