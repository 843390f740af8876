"""Wait until documents are read, and show how far they are."""

import asyncio
import time
from contextlib import suppress

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from upchatty.app import Administration, open_worker, running_address
from upchatty.cli.progress import RichProgress
from upchatty.knowledge.documents import Document
from upchatty.settings import Settings
from upchatty.storage import jobs

LOOK_SECONDS = 0.3
PATIENCE_SECONDS = 5.0  # with a server, before the command reads the documents itself
ENDED = ("ready", "failed")


async def wait_for(
    opened: Administration, chatbot_id: str, documents: dict[str, Document], settings: Settings
) -> None:
    """Wait until documents are read. Where nobody else does, this process reads them.

    Args:
        opened: The database.
        chatbot_id: Whose documents they are.
        documents: The documents by id; brought up to date.
        settings: The settings.
    """
    has_server = settings.data_dir.is_dir() and running_address(settings) is not None
    patience_ends = time.monotonic() + (PATIENCE_SECONDS if has_server else 0.0)
    worker: asyncio.Task[None] | None = None
    view = _View()
    try:
        while unread := [key for key, document in documents.items() if document.status not in ENDED]:
            if worker is None and time.monotonic() >= patience_ends:
                if await jobs.workers(opened.database):
                    patience_ends = time.monotonic() + PATIENCE_SECONDS  # somebody reads
                else:
                    worker = asyncio.create_task(_work(settings))
            if worker and worker.done():
                await worker  # raises what went wrong
            await asyncio.sleep(LOOK_SECONDS)
            found = {each.id: each for each in await opened.documents.some(chatbot_id, unread)}
            for key in unread:
                if document := found.get(key):
                    documents[key] = document
                    view.show(document)
                else:
                    del documents[key]  # somebody has removed it
    finally:
        view.close()
        if worker:
            worker.cancel()
            with suppress(asyncio.CancelledError):
                await worker


async def _work(settings: Settings) -> None:
    async with open_worker(settings, RichProgress()) as worker:
        await worker.run()


class _View:
    """A bar for each document that is being read, on a terminal; elsewhere a line when it is read."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
        self._progress = Progress(*columns, console=self._console, transient=True)
        self._tasks: dict[str, TaskID] = {}
        if self._console.is_terminal:
            self._progress.start()

    def show(self, document: Document) -> None:
        """Show how far a document is."""
        if document.status in ENDED:
            told = f"{document.passages} passages" if document.status == "ready" else document.reason
            line = f"{document.title}: {document.status}, {told}"
            self._progress.console.print(line, markup=False, soft_wrap=True)
            if document.id in self._tasks:
                self._progress.remove_task(self._tasks.pop(document.id))
        elif document.status == "reading" and self._console.is_terminal:
            if document.id not in self._tasks:
                self._tasks[document.id] = self._progress.add_task(document.title[:40], total=None)
            self._progress.update(
                self._tasks[document.id], completed=document.done, total=document.total or None
            )

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._console.is_terminal:
            self._progress.stop()
