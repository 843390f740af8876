"""Vectors that are made once: the same texts are embedded in every run."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from upchatty.engines.embedding import EmbeddingModel

CACHE = Path(__file__).parents[2] / ".cache" / "manuals"
BATCH = 256  # texts that are embedded before the file is written


class CachedEmbedding:
    """An embedding model whose vectors are kept in a file, by the hash of their text.

    Args:
        model: The model.
    """

    def __init__(self, model: EmbeddingModel) -> None:
        self._model = model
        self.fingerprint = model.fingerprint
        self._file = CACHE / f"vectors-{self.fingerprint}.npz"
        self._vectors = self._kept()

    async def embed(self, texts: Sequence[str], *, seconds: float | None = None) -> NDArray[np.float32]:
        """The vectors of texts, (n, d).

        Raises:
            RequestError: The engine failed.
        """
        keys = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
        todo = [
            *{key: text for key, text in zip(keys, texts, strict=True) if key not in self._vectors}.items()
        ]
        for start in range(0, len(todo), BATCH):
            batch = todo[start : start + BATCH]
            vectors = await self._model.embed([text for _, text in batch])
            self._vectors |= {key: vector for (key, _), vector in zip(batch, vectors, strict=True)}
            if len(batch) == BATCH:
                print(f"{start + BATCH} of {len(todo)} new passages embedded", flush=True)
                self.keep()
        return np.stack([self._vectors[key] for key in keys])

    def keep(self) -> None:
        """Write the vectors to their file, beside those that another run has put there meanwhile."""
        CACHE.mkdir(parents=True, exist_ok=True)
        self._vectors = self._kept() | self._vectors
        temporary = self._file.with_suffix(".tmp.npz")
        np.savez(temporary, keys=list(self._vectors), vectors=np.stack(list(self._vectors.values())))
        temporary.replace(self._file)

    def _kept(self) -> dict[str, NDArray[np.float32]]:
        if not self._file.exists():
            return {}
        with np.load(self._file) as kept:
            return dict(zip(kept["keys"].tolist(), kept["vectors"], strict=True))
