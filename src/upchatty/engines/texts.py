"""How engines are asked about texts: for their embeddings, and for how well they answer a question.

Embeddings: https://platform.openai.com/docs/api-reference/embeddings. Reranking, as Jina, Cohere, vLLM and
llama.cpp have it: https://jina.ai/reranker/#apiform.
"""

import base64
import binascii
import re
from collections.abc import Mapping
from typing import TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from upchatty.engines.client import EngineClient
from upchatty.errors import EngineFailed, EngineRefused, PromptTooLong

Vector = NDArray[np.float32]
Answer = TypeVar("Answer")

HALF = 0.5
MARGIN = 0.95  # of what should fit, since tokens are not equally long
TOO_LARGE = re.compile(r"too (large|long)|input length|maximum|exceed", re.IGNORECASE)
NUMBERS = re.compile(r"\b\d+\b")


class TooLong(Exception):
    """A text is longer than the engine takes.

    Args:
        problem: What the engine says.
        share: How much of the text may fit.
    """

    def __init__(self, problem: str, share: float = HALF) -> None:
        super().__init__(problem)
        self.problem = problem
        self.share = share


class _Embedding(msgspec.Struct):
    embedding: str | list[float]
    index: int = 0


class _Embeddings(msgspec.Struct):
    data: list[_Embedding]


class _Score(msgspec.Struct):
    index: int
    relevance_score: float | None = None
    score: float | None = None


class _Scores(msgspec.Struct):
    results: list[_Score]


async def ask_for_embeddings(client: EngineClient, texts: list[str], deadline: float) -> list[Vector]:
    """The embeddings of texts, each of length 1.

    Args:
        client: The engine.
        texts: The texts.
        deadline: Until when, by the loop's clock.

    Raises:
        TooLong: One of them is too long, as far as can be told.
        RequestError: The engine cannot be asked, or failed.
    """
    body: dict[str, object] = {"model": client.model, "input": texts}
    if client.sends_base64:
        body["encoding_format"] = "base64"  # a quarter of the bytes, and a tenth of the work
    try:
        answer = await _ask(client, "/embeddings", body, _Embeddings, deadline)
    except TooLong as refused:
        if "encoding_format" not in refused.problem or not client.sends_base64:
            raise
        client.sends_base64 = False
        return await ask_for_embeddings(client, texts, deadline)
    found = sorted(answer.data, key=lambda embedding: embedding.index)
    try:
        vectors = np.stack([_numbers(embedding) for embedding in found])
    except ValueError:
        raise EngineFailed(problem="it sent embeddings that cannot be read") from None
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    if len(found) != len(texts) or not (np.isfinite(lengths) & (lengths > 0)).all():
        raise EngineFailed(problem="it sent embeddings that cannot be used")
    return list(vectors / lengths)


async def ask_for_scores(client: EngineClient, query: str, texts: list[str], deadline: float) -> list[float]:
    """How well texts answer a query, in the engine's own measure.

    Args:
        client: The engine.
        query: The query.
        texts: The texts.
        deadline: Until when, by the loop's clock.

    Raises:
        TooLong, RequestError: As for `ask_for_embeddings`.
    """
    body = {"model": client.model, "query": query, "documents": texts, "top_n": len(texts)}
    answer = await _ask(client, "/rerank", body, _Scores, deadline)
    given = {
        result.index: result.score if result.relevance_score is None else result.relevance_score
        for result in answer.results
    }
    scores = [score for index in range(len(texts)) if (score := given.get(index)) is not None]
    if len(scores) != len(texts) or not np.isfinite(scores).all():
        raise EngineFailed(problem="it sent scores that cannot be used")
    return scores


async def _ask(
    client: EngineClient, path: str, body: Mapping[str, object], answer: type[Answer], deadline: float
) -> Answer:
    """Ask, and tell what is too long from other trouble, which every engine says in words of its own."""
    try:
        return await client.ask(path, body, answer, deadline)
    except PromptTooLong as error:
        raise _too_long(f"{error.fields['limit']} {error.fields['length']}") from None
    except (EngineRefused, EngineFailed) as error:
        problem = str(error.fields["problem"])
        if isinstance(error, EngineRefused) or TOO_LARGE.search(problem):
            raise _too_long(problem) from None
        raise


def _too_long(problem: str) -> TooLong:
    """What an engine says of a text that it refuses, often with how long it is and how long it may be."""
    match [int(number) for number in NUMBERS.findall(problem)]:
        case [one, other] if one != other:
            return TooLong(problem, min(one, other) / max(one, other) * MARGIN)
    return TooLong(problem)


def _numbers(embedding: _Embedding) -> Vector:
    if isinstance(embedding.embedding, list):
        return np.array(embedding.embedding, np.float32)
    try:
        return np.frombuffer(base64.b64decode(embedding.embedding, validate=True), "<f4")
    except binascii.Error as error:
        raise ValueError(str(error)) from None
