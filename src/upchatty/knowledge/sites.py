"""Sites and sitemaps: their pages become documents, which are read by jobs of their own."""

import asyncio
import time
from collections.abc import Mapping
from contextlib import suppress
from hashlib import sha256

from sqlalchemy import RowMapping

from upchatty.errors import InvalidRequest, StorageUnavailable, UpChattyError
from upchatty.knowledge.crawling import Page, Validators, crawl
from upchatty.knowledge.documents import LONGEST_TITLE, checked_url, new_document, now, url_identity
from upchatty.knowledge.fetching import Fetcher
from upchatty.knowledge.ingestion import NEWS_SECONDS, next_reading
from upchatty.storage import documents as storage
from upchatty.storage.database import Database

SITES = ("site", "sitemap")


class NoPages(UpChattyError):
    """A site or sitemap without a page."""

    sentence = "no page that can be read was found at {url}"


class Sites:
    """Finds the pages of sites and sitemaps.

    Args:
        database: Where the documents are.
        fetcher: Fetches URLs.
    """

    def __init__(self, database: Database, fetcher: Fetcher) -> None:
        self._database = database
        self._fetcher = fetcher
        self._changed: set[str] = set()

    def note(self, document: RowMapping) -> None:
        """Take note that a document has ended, which may be a site or a page of one."""
        site = document["id"] if document["kind"] in SITES else document["parent_id"]
        if site:
            self._changed.add(site)

    async def keep_settling(self) -> None:
        """Note how far the sites are, for ever."""
        while True:
            await asyncio.sleep(NEWS_SECONDS)
            with suppress(StorageUnavailable):
                while self._changed:
                    await self.settle(self._changed.pop())

    async def read(self, document: RowMapping) -> None:
        """Find the pages, and have those read that are new or have changed. Those that are gone are deleted,
        but only once all of them were looked for: a crawl that fails half-way deletes none.

        Raises:
            NoPages: There are none.
            FetchRefused, FetchFailed: It cannot be begun.
            StorageUnavailable: The database does not answer.
        """
        had = await storage.pages_of(self._database, document["id"])
        options = document["options"] or {}
        limits = {name: options[name] for name in ("depth", "pages") if name in options}
        if document["kind"] == "sitemap":
            limits.pop("depth", None)
        found: set[str] = set()
        noted_at = time.monotonic()
        async for page in crawl(
            self._fetcher,
            document["url"],
            kind=document["kind"],
            known=lambda url: _validators(had, url),
            **limits,
        ):
            try:
                url = checked_url(page.url, "url")
            except InvalidRequest:
                continue  # one that nobody could add either
            found.add(url)
            if not await self._put(document, url, page):
                return  # it was deleted meanwhile
            if time.monotonic() >= noted_at + NEWS_SECONDS:
                await storage.set_document(self._database, document["id"], {"pages": len(found)})
                noted_at = time.monotonic()
        if not found:
            raise NoPages(url=document["url"])
        await storage.delete_pages(
            self._database, [row["id"] for url, row in had.items() if url not in found]
        )
        moment = now()
        values = {"reason": None, "read_at": moment, "read_again_at": next_reading(document, moment)}
        await storage.set_document(self._database, document["id"], values)

    async def settle_all(self) -> None:
        """Note how far the sites are whose pages are being read."""
        for document_id in await storage.unsettled_sites(self._database):
            await self.settle(document_id)

    async def settle(self, document_id: str) -> None:
        """Note how far a site is; it is ready when each of its pages is, or has failed.

        Args:
            document_id: The site's.
        """
        sums = await storage.sum_of_pages(self._database, document_id)
        pages, failed, unfinished = sums["pages"], sums["failed"], sums["unfinished"]
        values = {name: sums[name] for name in ("pages", "bytes", "passages", "tokens")}
        values |= {"done": pages - unfinished, "total": pages}
        ended = {"status": "failed" if failed and failed == pages else "ready", "reason": _reason(sums)}
        await storage.settle_site(
            self._database, document_id, values, {} if unfinished else ended | {"updated_at": now()}
        )

    async def _put(self, document: RowMapping, url: str, page: Page) -> bool:
        """Store a page that was found; False where its site is gone."""
        fetched = page.fetched
        if fetched and fetched.not_modified:
            return True
        identity = url_identity("url", url)
        row = new_document(
            document["chatbot_id"], "url", identity, title=url[:LONGEST_TITLE], url=url, parent=document["id"]
        )
        columns = ("media_type", "etag", "last_modified")
        row |= {name: getattr(fetched, name) if fetched else None for name in columns}
        # What could not be fetched now is left to the page's own job, which tries again.
        content = fetched.content if fetched else None
        content_hash = sha256(content).hexdigest() if content is not None else None
        return await storage.put_page(self._database, row, content, content_hash=content_hash, now=now())


def _validators(had: Mapping[str, RowMapping], url: str) -> Validators | None:
    try:
        row = had.get(checked_url(url, "url"))
    except InvalidRequest:
        return None
    return (row["etag"], row["last_modified"]) if row and row["status"] == "ready" else None


def _reason(sums: RowMapping) -> str | None:
    """What is to be said of a site whose pages are done."""
    failed, pages = sums["failed"], sums["pages"]
    if not pages:
        return "each of its pages is here already, as a document of its own or as another site's page"
    if not failed:
        return None
    which = "none of its pages" if failed == pages else f"{failed} of its {pages} pages"
    verb = "could be read" if failed == pages else "could not be read"
    return f"{which} {verb}; one of them: {sums['a_reason']}"
