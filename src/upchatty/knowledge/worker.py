"""The worker: claims jobs and has their documents read, several at the same time.

A document's embeddings are kept as they are made, so that after a crash nothing is embedded twice. Its
passages become visible all at once; until then those of the version before answer.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import structlog
from sqlalchemy.exc import IntegrityError

from upchatty.engines.download import Progress
from upchatty.engines.embedding import EmbeddingModel
from upchatty.engines.files import ModelFiles
from upchatty.engines.pool import open_embedding
from upchatty.errors import StorageUnavailable, Unavailable, UpChattyError
from upchatty.knowledge.batches import Batches
from upchatty.knowledge.documents import now
from upchatty.knowledge.fetching import Fetcher, FetchFailed, FetchRefused
from upchatty.knowledge.ingestion import KEPT, Ingestion, next_reading
from upchatty.knowledge.reading import Readers, Unreadable
from upchatty.knowledge.sites import SITES, NoPages, Sites
from upchatty.processes import is_gone, process_name
from upchatty.settings import Settings
from upchatty.storage import documents as storage
from upchatty.storage import jobs
from upchatty.storage.database import Database
from upchatty.storage.jobs import Claim
from upchatty.storage.passages import publish

AT_ONCE = 6  # documents
LEASE_SECONDS, RENEWAL_SECONDS = 30.0, 10.0
POLL_SECONDS = 1.0  # between two looks for jobs that others have made
FIRST_PAUSE, LONGEST_PAUSE = 5.0, 600.0  # seconds between two attempts
ATTEMPTS = 5
FAREWELL_SECONDS = 1.5  # for keeping what is done, and giving the jobs back
GONE = (404, 410)

log = structlog.get_logger()


@asynccontextmanager
async def open_worker(
    settings: Settings, database: Database, files: ModelFiles, progress: Progress | None = None
) -> AsyncIterator["Worker"]:
    """A worker with all that it reads with.

    Args:
        settings: The embedding model, what may be fetched, and how large a document may be.
        database: Where the documents are.
        files: The model files of this machine.
        progress: Shows a download.

    Raises:
        ModelFileError, DownloadError, ConfigurationError: The embedding model's file cannot be had.
    """
    async with AsyncExitStack() as stack:
        embedding = await stack.enter_async_context(
            open_embedding(settings, files, background=True, progress=progress)
        )
        readers = Readers()
        stack.push_async_callback(readers.close)
        fetcher = Fetcher(settings.fetch_allowed, settings.max_document_bytes)
        stack.push_async_callback(fetcher.close)
        yield Worker(database, embedding, readers, fetcher)


class Worker:
    """Reads the documents of a database.

    Args:
        database: Where they are.
        embedding: Makes the embeddings; None: passages are found by their words only.
        readers: Read files.
        fetcher: Fetches URLs.
    """

    def __init__(
        self, database: Database, embedding: EmbeddingModel | None, readers: Readers, fetcher: Fetcher
    ) -> None:
        self._database = database
        self._embedding = embedding
        self._batches = Batches(embedding) if embedding else None
        self._ingestion = Ingestion(database, embedding, self._batches, readers, fetcher)
        self._sites = Sites(database, fetcher)
        self._name = process_name()
        self._running: dict[str, asyncio.Task[None]] = {}
        self._unnoted: set[str] = set()
        """Documents whose reading has failed with the database, so that it could not be noted."""
        self._wake = asyncio.Event()
        self._is_new = True

    def wake(self) -> None:
        """Look for jobs now."""
        self._wake.set()

    async def run(self, idle_seconds: float | None = None) -> None:
        """Do jobs until there was nothing to do for so long; when cancelled, give back what is not done.

        Args:
            idle_seconds: For how long; None: for ever.
        """
        helpers = [
            asyncio.create_task(self._keep_leases()),
            asyncio.create_task(self._sites.keep_settling()),
        ]
        if self._batches:
            helpers.append(asyncio.create_task(self._batches.run()))
        try:
            await self._do_jobs(idle_seconds, helpers)
        finally:
            await self._stop([*helpers, *self._running.values()])

    async def _stop(self, tasks: list[asyncio.Task[None]]) -> None:
        for task in tasks:
            task.cancel()
        with suppress(TimeoutError, StorageUnavailable):
            async with asyncio.timeout(FAREWELL_SECONDS):
                await asyncio.wait(tasks)
                await jobs.give_back(self._database, self._name, now())

    async def _do_jobs(self, idle_seconds: float | None, helpers: list[asyncio.Task[None]]) -> None:
        idle_since = time.monotonic()
        while True:
            self._wake.clear()
            for helper in helpers:
                if helper.done():
                    helper.result()  # raises: without it nothing goes on
            try:
                if not self._running:
                    await self._look_around()
                await self._claim_jobs()
            except StorageUnavailable as error:
                log.warning("database does not answer", problem=_problem(error))
            if self._running:
                idle_since = time.monotonic()
            elif idle_seconds is not None and time.monotonic() - idle_since >= idle_seconds:
                return
            with suppress(TimeoutError):
                async with asyncio.timeout(POLL_SECONDS):
                    await self._wake.wait()

    async def _look_around(self) -> None:
        """What is to be done besides jobs: free those of workers on this machine that are gone, make those
        of schedules and of another embedding model, and end the sites whose last page was read by a worker
        that died right then."""
        if gone := [name for name in await jobs.workers(self._database) if is_gone(name)]:
            await jobs.take_over(self._database, gone, now())
        await jobs.enqueue_due(self._database, now())
        await self._sites.settle_all()
        if self._is_new and self._embedding:
            stale = await storage.embedded_otherwise(self._database, self._embedding.fingerprint)
            await jobs.enqueue_all(self._database, stale, now())
        self._is_new = False

    async def _claim_jobs(self) -> None:
        while len(self._running) < AT_ONCE:
            moment = now()
            lease_until = moment + int(LEASE_SECONDS * 1000)
            claim = await jobs.claim(self._database, self._name, moment, lease_until)
            if claim is None:
                return
            document_id: str = claim.document["id"]
            self._running[document_id] = task = asyncio.create_task(self._do(claim))
            task.add_done_callback(lambda _, done=document_id: self._end(done))  # type: ignore[misc]

    def _end(self, document_id: str) -> None:
        del self._running[document_id]
        self._wake.set()

    async def _keep_leases(self) -> None:
        """Renew the leases of what is being read; what was deleted or taken over is not read on."""
        while True:
            await asyncio.sleep(RENEWAL_SECONDS)
            reading = list(self._running)
            if not reading:
                continue
            with suppress(StorageUnavailable):
                lease_until = now() + int(LEASE_SECONDS * 1000)
                mine = await jobs.renew(self._database, self._name, reading, lease_until)
                for document_id in set(reading) - mine:
                    if task := self._running.get(document_id):
                        task.cancel()

    async def _do(self, claim: Claim) -> None:
        """Do a job, and note how it went."""
        document = claim.document
        about = {"document": document["id"], "kind": document["kind"], "attempt": claim.attempts}
        started = time.monotonic()
        try:
            await self._read(claim)
            seconds = round(time.monotonic() - started, 3)
            log.info("document read", **about, seconds=seconds)
        except StorageUnavailable as error:
            # If this cannot be noted either, the job is done again when its lease is over.
            log.warning("database does not answer", **about, problem=_problem(error))
            self._unnoted.add(document["id"])
            await self._note_failure(claim, error)
        except UpChattyError as error:
            log.warning("document not read", **about, problem=str(error))
            await self._note_failure(claim, error)
        except IntegrityError as error:
            if await storage.get_document(self._database, document["chatbot_id"], document["id"]):
                await self._note_defect(claim, error)
        except Exception as error:  # noqa: BLE001 - one document's trouble is not the others'
            await self._note_defect(claim, error)

    async def _read(self, claim: Claim) -> None:
        document = claim.document
        has_died = document["status"] == "reading" and not document["reason"]
        if claim.attempts > ATTEMPTS and has_died and document["id"] not in self._unnoted:
            raise _Deadly(times=claim.attempts - 1)
        if document["kind"] in SITES:
            await self._sites.read(document)
        else:
            await self._ingestion.read(claim)
        await jobs.finish(self._database, self._name, document["id"], claim.created_at, now())
        self._unnoted.discard(document["id"])
        self._sites.note(document)

    async def _note_defect(self, claim: Claim, error: Exception) -> None:
        log.error("document not read", document=claim.document["id"], exc_info=error)
        await self._note_failure(claim, _Defect())

    async def _note_failure(self, claim: Claim, error: UpChattyError) -> None:
        with suppress(StorageUnavailable):  # then it is done again when the lease is over
            pause = _pause(error, claim.attempts)
            if pause is None:
                await self._fail(claim, error)
                return
            await jobs.put_off(
                self._database,
                self._name,
                claim.document["id"],
                reason=str(error),
                run_at=now() + int(pause * 1000),
                now=now(),
            )

    async def _fail(self, claim: Claim, error: UpChattyError) -> None:
        """Give a document up. What was read of it before goes on answering, unless it is gone for good."""
        document, moment = claim.document, now()
        values = {
            "status": "failed",
            "reason": str(error),
            "etag": None,
            "last_modified": None,
            "read_again_at": next_reading(document, moment),
            "updated_at": moment,
        }
        if isinstance(error, FetchFailed) and error.status in GONE and document["kind"] not in SITES:
            none_left = {"passages": 0, "tokens": 0, "bytes": 0, "pages": None, "content_hash": None}
            await publish(
                self._database,
                document["id"],
                document["chatbot_id"],
                passages=[],
                embedding_model=self._embedding.fingerprint if self._embedding else "",
                document=values | none_left,
            )
        else:
            await storage.set_document(self._database, document["id"], values)
        await storage.drop_working_copies(
            self._database,
            document["id"],
            keep_content=document["kind"] in KEPT,
            created_at=claim.created_at,
        )
        await jobs.finish(self._database, self._name, document["id"], claim.created_at, moment)
        if document["parent_id"]:
            self._sites.note(document)


class _Deadly(UpChattyError):
    """A document that ends its worker."""

    sentence = "reading it has ended the worker {times} times; the log has the details"


class _Defect(UpChattyError):
    """A defect of ours."""

    sentence = "something went wrong inside the worker; its log has the details"


def _problem(error: StorageUnavailable) -> str:
    """What the database says, without the statement and its values."""
    return str(error.__cause__ or error).partition("\n")[0]


PERMANENT = (Unreadable, FetchRefused, NoPages, _Deadly)


def _pause(error: UpChattyError, attempts: int) -> float | None:
    """Seconds until a document is tried again; None: it is not.

    What only has to be waited for, such as an engine that is being started, uses up no attempts.
    """
    if isinstance(error, PERMANENT):
        return None
    if isinstance(error, FetchFailed) and error.permanent:
        return None
    if attempts >= ATTEMPTS and not isinstance(error, Unavailable):
        return None
    pause = min(FIRST_PAUSE * 2.0 ** min(attempts - 1, 10), LONGEST_PAUSE)
    asked = (error.retry_after if isinstance(error, FetchFailed | Unavailable) else None) or 0.0
    return max(pause, min(asked, LONGEST_PAUSE))
