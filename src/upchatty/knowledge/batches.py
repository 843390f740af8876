"""Texts on their way to the embedding model: of all documents together, in batches."""

import asyncio

from upchatty.engines.embedding import EmbeddingModel

BATCH = 32  # texts that the engine gets at once
IN_FLIGHT = 2  # batches that it has, so that it need not wait between two
WAITING = 4 * BATCH  # texts that wait at most: a long document does not keep the short ones from their turn

Embedded = asyncio.Future[bytes]


class Batches:
    """One queue for everything that is to be embedded.

    Args:
        model: The embedding model.
    """

    def __init__(self, model: EmbeddingModel) -> None:
        self._model = model
        self._waiting: asyncio.Queue[tuple[str, Embedded]] = asyncio.Queue(WAITING)

    async def add(self, text: str) -> Embedded:
        """Have a text embedded, as soon as there is room in the queue.

        Returns:
            What will be its embedding: float16, little-endian, of length 1.
        """
        embedded: Embedded = asyncio.get_running_loop().create_future()
        await self._waiting.put((text, embedded))
        return embedded

    async def run(self) -> None:
        """Send batches to the engine, for ever."""
        async with asyncio.TaskGroup() as senders:
            for _ in range(IN_FLIGHT):
                senders.create_task(self._send())

    async def _send(self) -> None:
        while True:
            batch = [await self._waiting.get()]
            while len(batch) < BATCH and not self._waiting.empty():
                batch.append(self._waiting.get_nowait())
            # What nobody waits for any more is left out.
            wanted = [(text, embedded) for text, embedded in batch if not embedded.done()]
            if wanted:
                await self._embed(wanted)

    async def _embed(self, batch: list[tuple[str, Embedded]]) -> None:
        try:
            vectors = await self._model.embed([text for text, _ in batch])
        except Exception as error:  # noqa: BLE001 - whoever waits for the texts tells it
            for _, embedded in batch:
                if not embedded.done():
                    embedded.set_exception(error)
            return
        for (_, embedded), vector in zip(batch, vectors.astype("<f2"), strict=True):
            if not embedded.done():
                embedded.set_result(vector.tobytes())
