"""Texts as vectors, and passages in the order of their use for a question: what searching asks of engines.

Both go the way of every model: one that runs here is loaded when it is asked, a replica is chosen, and
another one is tried where it fails.
"""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import TypeVar

import numpy as np
import stamina
import structlog
from numpy.typing import NDArray

from upchatty.engines.client import EngineClient
from upchatty.engines.files import CONVERTED, ModelFiles
from upchatty.engines.gguf import text_limits
from upchatty.engines.model import RETRIED, Model
from upchatty.engines.texts import TooLong, ask_for_embeddings, ask_for_scores
from upchatty.errors import EngineRefused, UpChattyError
from upchatty.settings import ModelSettings

Vectors = NDArray[np.float32]
Answer = TypeVar("Answer")

BATCH = 16  # texts in a request; more bring nothing
AT_ONCE = 2  # requests of one caller, so that the engine has the next one when it ends one
ATTEMPTS, PAUSE = 8, 0.5  # seconds; together longer than our own engine takes to start again
SHORTEST = 16  # characters; what is refused although it is so short is refused for another reason
SAMPLE = 1024 * 1024  # bytes, from both ends of a file, that tell it from others
NOTHING = "."  # instead of an empty text, which most engines refuse

log = structlog.get_logger()


class EmbeddingModel:
    """A model that makes vectors of texts, near each other where the texts mean the like.

    Args:
        model: The model.
        files: The model files of this machine.
    """

    def __init__(self, model: Model, files: ModelFiles) -> None:
        self._asked = _Asked(model)
        self.name = model.name
        self._settings = model.settings
        self._files = files
        self._fingerprint = ""
        self._dimensions: int | None = None
        self._longest: int | None = None

    @property
    def fingerprint(self) -> str:
        """Changes when the vectors of the same texts would; those of different ones cannot be compared.

        Raises:
            OSError: The model's file cannot be read.
        """
        if not self._fingerprint:
            self._fingerprint = _fingerprint(self.name, self._settings, self._files)
        return self._fingerprint

    @property
    def dimensions(self) -> int | None:
        """Numbers of a vector; None: not known before there is one."""
        self._look_into_file()
        return self._dimensions

    @property
    def longest(self) -> int | None:
        """Tokens that a text may take, of which the rest is cut off; None: not known."""
        self._look_into_file()
        return self._longest

    async def embed(self, texts: Sequence[str], *, seconds: float | None = None) -> Vectors:
        """The vectors of texts: shape (texts, dimensions), each of length 1.

        Any number of texts, of any length: what is too long is cut, and an empty one has a vector like any
        other.

        Args:
            texts: The texts.
            seconds: How long to wait at most; None: as long as the model's settings say.

        Raises:
            RequestError: The engine cannot be asked, or failed, several times: `EngineNotReady` where it is
                still loaded or started again.
        """
        clean = [_clean(text) for text in texts]
        vectors = await self._asked.in_batches(clean, self._embed, seconds)
        if not vectors:
            return np.empty((0, self.dimensions or 0), np.float32)
        self._dimensions = len(vectors[0])
        return np.stack(vectors)

    async def count_tokens(self, texts: Sequence[str]) -> list[int] | None:
        """The length of each text in the model's tokens, those at its ends included, or None where the engine
        has no way to tell.

        Raises:
            RequestError: As for `embed`.
        """

        async def count(client: EngineClient, batch: list[str], _: float) -> list[int | None]:
            return [await client.count_tokens_of(text) for text in batch]

        counts = await self._asked.in_batches([_clean(text) for text in texts], count, None)
        known = [count for count in counts if count is not None]
        return known if len(known) == len(counts) else None

    def preload(self) -> None:
        """Load the model in the background, if it runs here, so that the first one who asks need not wait.
        Trouble is logged."""
        self._asked.preload()

    async def _embed(self, client: EngineClient, texts: list[str], deadline: float) -> list[Vectors]:
        """The vectors of a batch; texts that are too long are found, and cut until they fit."""
        try:
            return await ask_for_embeddings(client, texts, deadline)
        except TooLong as too_long:
            if len(texts) > 1:
                middle = len(texts) // 2
                first = await self._embed(client, texts[:middle], deadline)
                return first + await self._embed(client, texts[middle:], deadline)
            [text] = texts
            if len(text) <= SHORTEST:
                raise EngineRefused(problem=too_long.problem) from None
            return await self._embed(client, [text[: int(len(text) * too_long.share)]], deadline)

    def _look_into_file(self) -> None:
        if self._longest or not (file := self._files.cached(self._settings)):
            return
        with suppress(OSError):  # it is not here yet
            self._dimensions, tokens = text_limits(file)
            self._longest = min(self._settings.context, tokens or self._settings.context)


class Reranker:
    """A model that says how well passages answer a question.

    Args:
        model: The model.
    """

    def __init__(self, model: Model) -> None:
        self._asked = _Asked(model)
        self.name = model.name
        self._gives_logits = model.loader is not None  # as llama.cpp does

    async def rerank(self, query: str, texts: Sequence[str], *, seconds: float | None = None) -> list[float]:
        """How well each text answers the query, from 0 to 1, in the order of the texts. What is too long is
        cut.

        Args:
            query: The query.
            texts: The texts.
            seconds: How long to wait at most; None: as long as the model's settings say.

        Raises:
            RequestError: As for `EmbeddingModel.embed`.
        """

        async def score(client: EngineClient, batch: list[str], deadline: float) -> list[float]:
            return await self._score(client, _clean(query), batch, deadline)

        scores = await self._asked.in_batches([_clean(text) for text in texts], score, seconds)
        self._gives_logits = self._gives_logits or any(not 0 <= score <= 1 for score in scores)
        return [_sigmoid(score) for score in scores] if self._gives_logits else scores

    def preload(self) -> None:
        """As for `EmbeddingModel.preload`."""
        self._asked.preload()

    async def _score(
        self, client: EngineClient, query: str, texts: list[str], deadline: float
    ) -> list[float]:
        try:
            return await ask_for_scores(client, query, texts, deadline)
        except TooLong as too_long:
            if len(texts) > 1:
                middle = len(texts) // 2
                first = await self._score(client, query, texts[:middle], deadline)
                return first + await self._score(client, query, texts[middle:], deadline)
            [text] = texts
            if max(len(text), len(query)) <= SHORTEST:
                raise EngineRefused(problem=too_long.problem) from None
            share = too_long.share
            if len(query) > len(text):
                query = query[: int(len(query) * share)]
            else:
                text = text[: int(len(text) * share)]
            return await self._score(client, query, [text], deadline)


class _Asked:
    """A model, asked about texts, and again where it fails.

    Args:
        model: The model.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._preloading: asyncio.Task[None] | None = None

    async def in_batches(
        self,
        texts: list[str],
        call: Callable[[EngineClient, list[str], float], Awaitable[list[Answer]]],
        seconds: float | None,
    ) -> list[Answer]:
        """The answers for texts of any number, in their order."""
        if len(texts) <= BATCH:
            return await self.once(lambda client, until: call(client, texts, until), seconds) if texts else []
        turns = asyncio.Semaphore(AT_ONCE)

        async def ask(batch: list[str]) -> list[Answer]:
            async with turns:
                return await self.once(lambda client, until: call(client, batch, until), seconds)

        async with asyncio.TaskGroup() as group:
            starts = range(0, len(texts), BATCH)
            asked = [group.create_task(ask(texts[start : start + BATCH])) for start in starts]
        return [answer for task in asked for answer in task.result()]

    async def once(
        self, call: Callable[[EngineClient, float], Awaitable[Answer]], seconds: float | None = None
    ) -> Answer:
        """The answer to one request, which is made again where it fails."""
        deadline = monotonic() + (self._model.settings.deadline_seconds if seconds is None else seconds)

        def pause_after(error: Exception) -> float | bool:
            if not isinstance(error, RETRIED):
                return False
            pause = max(PAUSE, error.retry_after or 0.0)
            return monotonic() + pause < deadline and pause

        async for attempt in stamina.retry_context(on=pause_after, attempts=ATTEMPTS, timeout=None):
            with attempt:
                answer = await self._model.ask(call, deadline)
        return answer

    def preload(self) -> None:
        """Load the model, if it runs here, without making anybody wait."""
        if self._model.loader and not self._model.loader.loaded and self._preloading is None:
            self._preloading = asyncio.create_task(self._preload())

    async def _preload(self) -> None:
        try:
            await self._model.start()
        except (UpChattyError, OSError) as error:
            log.warning("model not preloaded", model=self._model.name, problem=str(error))
        finally:
            self._preloading = None


def _clean(text: str) -> str:
    """A text as JSON can carry it, and never empty."""
    return text.encode(errors="replace").decode().strip() or NOTHING


def _sigmoid(logit: float) -> float:
    return float(0.5 * (1.0 + np.tanh(0.5 * logit)))  # which does not overflow


def _fingerprint(name: str, settings: ModelSettings, files: ModelFiles) -> str:
    """What tells an embedding model from others: the same on every machine, whatever its name here."""
    if settings.is_converted and settings.sha256:
        told = f"{settings.sha256}{CONVERTED}"
    elif file := files.cached(settings):
        told = _sample(file)
    else:
        named = [server.model or f"{name} at {server.url}" for server in settings.servers]
        told = " ".join(sorted(set(named)))
    return hashlib.sha256(f"{told} {settings.pooling or ''}".encode()).hexdigest()[:32]


def _sample(file: Path) -> str:
    """The sum of a file's beginning and end, quickly had for gigabytes."""
    total = hashlib.sha256()
    with file.open("rb") as content:
        total.update(content.read(SAMPLE))
        size = content.seek(0, 2)
        content.seek(max(0, size - SAMPLE))
        total.update(content.read())
    return f"{size} {total.hexdigest()}"
