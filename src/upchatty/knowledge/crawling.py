"""Find the pages of a site, by its links, or by its sitemap.

- robots.txt: RFC 9309, read by `protego`
- sitemaps: https://www.sitemaps.org/protocol.html, read by `lxml`, which also finds the links
- robots in a page: https://developers.google.com/search/docs/crawling-indexing/robots-meta-tag
"""

import asyncio
import gzip
import io
import mimetypes
import re
import time
import zlib
from collections import deque
from collections.abc import AsyncGenerator, Callable, Collection, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Literal
from urllib.parse import SplitResult, urljoin, urlsplit, urlunsplit

import lxml.etree
import lxml.html
from protego import Protego
from yarl import URL

from upchatty.errors import UpChattyError
from upchatty.knowledge.fetching import (
    LONGEST_URL,
    Fetched,
    Fetcher,
    FetchFailed,
    FetchRefused,
    UnwantedMediaType,
)

ROBOT = "UpChatty"  # what robots.txt calls us
DEPTH, PAGES = 5, 1000
AT_ONCE = 4
LONGEST_DELAY = 10.0  # seconds between two requests, whatever robots.txt asks
ROBOTS_BYTES = 512 * 1024
SITEMAP_DEPTH = 3
SITEMAPS = 500
FRUITLESS = 2  # requests for every page that may be found, so that a trap of duplicates has an end

HTML = ("text/html", "application/xhtml+xml")
READ = (*HTML, "application/pdf", "text/plain", "text/markdown")
TRACKING = ("utm_", "fbclid=", "gclid=")
DEFAULT_PORTS = {"http": 80, "https": 443}
INDEX = re.compile(r"/(index|default)\.\w+$")
GZIP_MAGIC = b"\x1f\x8b"
TYPES = mimetypes.MimeTypes()  # the built-in ones: the same on every machine

Kind = Literal["site", "sitemap"]
Validators = tuple[str | None, str | None]
"""The ETag and the Last-Modified of what the caller has."""
Known = Callable[[str], Validators | None]


@dataclass(frozen=True, slots=True)
class Page:
    """A page that was found.

    Args:
        url: What it is called: its canonical URL where it names one, else where it came from in the end.
        fetched: What came; None: it is there, but could not be fetched now.
        problem: Why not.
    """

    url: str
    fetched: Fetched | None
    problem: UpChattyError | None = None


async def crawl(
    fetcher: Fetcher,
    url: str,
    *,
    kind: Kind,
    depth: int = DEPTH,
    pages: int = PAGES,
    within: bool = False,
    known: Known = lambda _: None,
) -> AsyncGenerator[Page]:
    """Find the pages of a site, breadth first, or those of a sitemap, in its order.

    What robots.txt or a page itself asks not to be read is left out, and so is what is no HTML, PDF or
    plain text, what a link leads to in vain, and what is a page already found under another URL.

    Args:
        fetcher: Fetches.
        url: The site's first page, or the sitemap.
        kind: Which of the two.
        depth: Links from a site's first page to a page at most; 0: only that page.
        pages: How many at most.
        within: Of a site, only what is in the folder of `url`.
        known: What the caller has of a URL. A page that is still that comes as `not_modified`, unless its
            links are needed.

    Raises:
        FetchRefused, FetchFailed: The first page, the sitemap or the host's robots.txt cannot be read: then
            nothing is known about the pages.
    """
    crawler = _Crawler(fetcher, known, pages)
    found = crawler.site(url, depth, within=within) if kind == "site" else crawler.sitemap(url)
    async with aclosing(found) as found_pages:
        async for page in found_pages:
            yield page
            pages -= 1
            if pages <= 0:
                return


def normalised(url: str) -> str:
    """A URL in the form that all its spellings have: without fragment, default port and tracking.

    Raises:
        ValueError: It is no URL.
    """
    parts = urlsplit(str(URL(url.strip())))
    host, port = (parts.hostname or "").rstrip("."), parts.port
    netloc = f"[{host}]" if ":" in host else host
    if port is not None and port != DEFAULT_PORTS.get(parts.scheme):
        netloc = f"{netloc}:{port}"
    fields = parts.query.split("&") if parts.query else []
    query = "&".join(part for part in fields if not part.lower().startswith(TRACKING))
    return urlunsplit((parts.scheme, netloc, parts.path or "/", query, ""))


@dataclass(frozen=True, slots=True)
class _Markup:
    """What a page says about itself."""

    links: list[str] = field(default_factory=list)
    canonical: str | None = None
    is_read: bool = True
    """Whether it lets itself be read: no `noindex`."""


@dataclass(frozen=True, slots=True)
class _Visit:
    """What a request brought: a page, or a problem."""

    url: str
    fetched: Fetched | None = None
    problem: UpChattyError | None = None
    markup: _Markup = field(default_factory=_Markup)


class _Crawler:
    """One crawl.

    Args:
        fetcher: Fetches.
        known: As in `crawl`.
        pages: How many are wanted.
    """

    def __init__(self, fetcher: Fetcher, known: Known, pages: int) -> None:
        self._fetcher = fetcher
        self._known = known
        self._hosts = _Hosts(fetcher)
        self._left = FRUITLESS * pages + AT_ONCE
        """Requests that may still be made."""
        self._asked: set[str] = set()
        self._found: set[str] = set()

    async def site(self, start: str, depth: int, *, within: bool) -> AsyncGenerator[Page]:
        """The pages that links lead to."""
        start = _start(start)
        first = await self._first(start, links=depth > 0)
        assert first.fetched
        start = normalised(first.fetched.url)
        in_scope = _same_origin(start, within=within)
        self._asked.add(start)
        if page := self._page(first, in_scope, start):
            yield page
        level = await self._new(first.markup.links, in_scope)
        for distance in range(1, depth + 1):
            following: list[str] = []
            async with aclosing(self._visits(level, links=distance < depth)) as visits:
                async for visit in visits:
                    following += await self._new(visit.markup.links, in_scope)
                    if page := self._page(visit, in_scope, start):
                        yield page
            level = following

    async def sitemap(self, url: str) -> AsyncGenerator[Page]:
        """The pages that a sitemap names."""
        url = _start(url)
        listed = await self._listed(url)
        in_scope = _same_site(url)
        level = await self._new(listed, in_scope)
        async with aclosing(self._visits(level, links=False)) as visits:
            async for visit in visits:
                if page := self._page(visit, in_scope, start=None):
                    yield page

    async def _first(self, start: str, *, links: bool) -> _Visit:
        """Visit the first page, to whose host it may lead."""
        visit = await self._visit(start, links=links) if await self._hosts.may_read(start) else None
        if visit and visit.problem:
            raise visit.problem
        # Where it redirects to another host, that one's robots.txt counts too.
        if not visit or not (visit.fetched and await self._hosts.may_read(normalised(visit.fetched.url))):
            raise FetchRefused(url=start, problem="its host's robots.txt asks that it is not read")
        return visit

    async def _listed(self, url: str) -> list[str]:
        """The pages of a sitemap, and of those that it names."""
        in_scope = _same_site(url)
        listed: list[str] = []
        level, asked = [url], {url}
        for _ in range(SITEMAP_DEPTH + 1):
            following: list[str] = []
            for address in level:
                if len(asked) > SITEMAPS or len(listed) >= self._left:
                    return listed
                found = await self._read_sitemap(address, is_first=address == url)
                listed += found.pages
                following += [
                    nested
                    for nested in map(_tidy, found.sitemaps)
                    if nested and in_scope(nested) and nested not in asked
                ]
                asked.update(following)
            level = list(dict.fromkeys(following))
        return listed

    async def _read_sitemap(self, url: str, *, is_first: bool) -> "_Sitemap":
        await self._hosts.wait(url)
        try:
            fetched = await self._fetcher.fetch(url)
        except FetchFailed as error:
            # One that is gone is none; of one that is only not there now, nobody knows which pages it has.
            if _leads_nowhere(error) and not is_first:
                return _Sitemap()
            raise
        return await asyncio.to_thread(_sitemap, fetched, self._fetcher.max_bytes)

    async def _new(self, links: Collection[str], in_scope: "_Scope") -> list[str]:
        """Of links, those that have to be followed."""
        new = []
        for link in links:
            if self._left <= 0:
                break
            url = _tidy(link)
            if not url or url in self._asked or not in_scope(url) or not _can_be_read(url):
                continue
            self._asked.add(url)
            if await self._hosts.may_read(url):
                self._left -= 1
                new.append(url)
        return new

    async def _visits(self, urls: Collection[str], *, links: bool) -> AsyncGenerator[_Visit]:
        """Visit URLs, some at the same time; what they bring comes in their order."""
        running: deque[asyncio.Task[_Visit]] = deque()
        try:
            for url in urls:
                if len(running) == AT_ONCE:
                    yield await running.popleft()
                running.append(asyncio.create_task(self._visit(url, links=links)))
            while running:
                yield await running.popleft()
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _visit(self, url: str, *, links: bool) -> _Visit:
        await self._hosts.wait(url)
        # Where only a whole page tells its links, it has to come whole.
        needed_whole = links and _may_have_links(url)
        etag, last_modified = (None if needed_whole else self._known(url)) or (None, None)
        try:
            fetched = await self._fetcher.fetch(url, etag=etag, last_modified=last_modified, accept=READ)
        except (FetchRefused, FetchFailed) as error:
            return _Visit(url, problem=error)
        return _Visit(url, fetched, markup=await asyncio.to_thread(_markup, fetched))

    def _page(self, visit: _Visit, in_scope: "_Scope", start: str | None) -> Page | None:
        """The page that a visit found, if it is one, and a new one."""
        if visit.problem:
            return None if _leads_nowhere(visit.problem) else self._once(Page(visit.url, None, visit.problem))
        fetched, canonical = visit.fetched, _tidy(visit.markup.canonical or "")
        assert fetched
        url = normalised(fetched.url)
        if not visit.markup.is_read or not in_scope(url):
            return None
        self._asked.add(url)
        if canonical and canonical != url and in_scope(canonical) and _is_plausible(canonical, url, start):
            self._asked.add(canonical)
            # What it can be asked for with again belongs to the other URL.
            return self._once(Page(canonical, replace(fetched, etag=None, last_modified=None)))
        return self._once(Page(url, fetched))

    def _once(self, page: Page) -> Page | None:
        if page.url in self._found:
            return None
        self._found.add(page.url)
        return page


class _Host:
    """One host: what its robots.txt says, and when it may be asked again."""

    def __init__(self, rules: Protego | None) -> None:
        self._rules = rules
        self._delay = min((rules and rules.crawl_delay(ROBOT)) or 0.0, LONGEST_DELAY)
        self._next = 0.0

    def may_read(self, url: str) -> bool:
        return self._rules is None or self._rules.can_fetch(url, ROBOT)

    async def wait(self) -> None:
        """Keep the pause that it asks for between two requests."""
        now = time.monotonic()
        turn = max(now, self._next)
        self._next = turn + self._delay
        await asyncio.sleep(turn - now)


class _Hosts:
    """The hosts of a crawl, each asked for its robots.txt once."""

    def __init__(self, fetcher: Fetcher) -> None:
        self._fetcher = fetcher
        self._hosts: dict[str, _Host] = {}

    async def may_read(self, url: str) -> bool:
        """Whether robots.txt lets a URL be read.

        Raises:
            FetchRefused, FetchFailed: It is not known.
        """
        return (await self._host(url)).may_read(url)

    async def wait(self, url: str) -> None:
        """Keep the pause that robots.txt asks for.

        Raises:
            FetchRefused, FetchFailed: It is not known.
        """
        await (await self._host(url)).wait()

    async def _host(self, url: str) -> _Host:
        origin = str(URL(url).origin())
        if origin not in self._hosts:
            self._hosts[origin] = _Host(await self._rules(f"{origin}/robots.txt"))
        return self._hosts[origin]

    async def _rules(self, url: str) -> Protego | None:
        try:
            fetched = await self._fetcher.fetch(url)
        except FetchFailed as error:
            # RFC 9309, section 2.3.1: without the file everything may be read; while it is not known whether
            # there is one, nothing.
            if error.permanent and error.status is not None:
                return None
            raise
        return Protego.parse(fetched.content[:ROBOTS_BYTES].decode("utf-8-sig", errors="replace"))


_Scope = Callable[[str], bool]


def _same_origin(start: str, *, within: bool) -> _Scope:
    """Whether a URL is on the same scheme, host and port, and in the same folder if it has to be."""
    parts = urlsplit(start)
    folder = parts.path[: parts.path.rindex("/") + 1] if within else "/"

    def covers(url: str) -> bool:
        other = urlsplit(url)
        return other[:2] == parts[:2] and other.path.startswith(folder)

    return covers


def _same_site(url: str) -> _Scope:
    """Whether a URL is on the same host, with or without `www.`, and on the same port."""

    def site(parts: SplitResult) -> tuple[str, int | None]:
        return (parts.hostname or "").removeprefix("www."), parts.port

    ours = site(urlsplit(url))
    return lambda other: site(urlsplit(other)) == ours


def _start(url: str) -> str:
    try:
        return normalised(url)
    except ValueError:
        raise FetchRefused(url=url[:200], problem="it is not a valid URL") from None


def _tidy(link: str) -> str | None:
    """A link in its one form, if it is one that can be followed."""
    try:
        url = normalised(link)
    except ValueError:
        return None
    return url if url.startswith(("http://", "https://")) and len(url) <= LONGEST_URL else None


def _can_be_read(url: str) -> bool:
    """Whether a URL's file extension, if it has one that says something, is of what can be read."""
    media_type, encoding = TYPES.guess_type(urlsplit(url).path)
    return encoding is None and (media_type is None or media_type in READ)


def _may_have_links(url: str) -> bool:
    media_type, _ = TYPES.guess_type(urlsplit(url).path)
    return media_type is None or media_type in HTML


def _leads_nowhere(error: UpChattyError) -> bool:
    """Whether a link simply leads to no page that is there for everybody."""
    if isinstance(error, FetchFailed) and not isinstance(error, UnwantedMediaType):
        return error.permanent and error.status is not None
    return True


def _is_plausible(canonical: str, url: str, start: str | None) -> bool:
    """Whether a page may be what it says it is: many sites call every page by the front page's URL."""
    names, own = urlsplit(canonical), urlsplit(url)
    is_front = names.path == "/" or canonical == start
    return not is_front or INDEX.sub("/", own.path) == INDEX.sub("/", names.path)


def _markup(fetched: Fetched) -> _Markup:
    """What an HTML page says about itself and where it leads."""
    asked = set(_robots(fetched.robots))
    media_type, _, parameters = (fetched.media_type or HTML[0]).partition(";")
    if fetched.not_modified or media_type.strip() not in HTML:
        return _Markup(is_read="noindex" not in asked)
    charset = parameters.partition("charset=")[2].strip(" \"';") or None
    if charset is None and b"charset" not in fetched.content[:2048].lower():
        charset = "utf-8"
    try:
        page = lxml.html.document_fromstring(fetched.content, parser=_html_parser(charset))
    except (lxml.etree.LxmlError, ValueError):  # nothing in it
        return _Markup(is_read="noindex" not in asked)
    for meta in page.iterfind(".//meta[@name][@content]"):
        if meta.get("name").strip().lower() in ("robots", ROBOT.lower()):
            asked.update(_robots(meta.get("content")))
    base = _joined(fetched.url, page.xpath("string(//base/@href)"))
    canonical = page.xpath("string(//link[@rel='canonical']/@href)")
    return _Markup(
        links=[] if "nofollow" in asked else list(dict.fromkeys(_links(page, base))),
        canonical=_joined(base, canonical) if canonical else None,
        is_read="noindex" not in asked,
    )


def _html_parser(charset: str | None) -> lxml.html.HTMLParser:
    try:
        return lxml.html.HTMLParser(encoding=charset, no_network=True, huge_tree=False)
    except LookupError:  # no such charset
        return lxml.html.HTMLParser(no_network=True, huge_tree=False)


def _robots(value: str) -> Iterator[str]:
    """What is asked of crawlers; `agent: noindex` is asked of that agent only."""
    for part in value.lower().split(","):
        agent, _, asked = part.rpartition(":")
        if agent.strip() in ("", "robots", ROBOT.lower()):
            yield from ("noindex", "nofollow") if asked.strip() == "none" else (asked.strip(),)


def _links(page: lxml.html.HtmlElement, base: str) -> Iterator[str]:
    for element in page.iter("a", "area"):
        if href := element.get("href"):
            yield _joined(base, href)
    for meta in page.iterfind(".//meta[@http-equiv][@content]"):
        _, found, target = meta.get("content").partition("=")
        if meta.get("http-equiv").lower() == "refresh" and found:
            yield _joined(base, target.strip(" '\""))


def _joined(base: str, link: str) -> str:
    try:
        return urljoin(base, link.strip())
    except ValueError:
        return base


@dataclass(slots=True)
class _Sitemap:
    """What a sitemap names."""

    pages: list[str] = field(default_factory=list)
    sitemaps: list[str] = field(default_factory=list)


class _Locations:
    """Takes an XML sitemap's parts as they are parsed, so that no tree is built of it."""

    def __init__(self) -> None:
        self.found = _Sitemap()
        self._path: list[str] = []
        self._text: list[str] = []

    def start(self, tag: str, _: object) -> None:
        self._path.append(lxml.etree.QName(tag).localname)
        self._text = []
        if len(self._path) == 1 and self._path[0] not in ("urlset", "sitemapindex"):
            raise ValueError("another kind of document")

    def data(self, text: str) -> None:
        if self._path[-1:] == ["loc"]:
            self._text.append(text)

    def end(self, _: str) -> None:
        if self._path[1:] == ["url", "loc"]:
            self.found.pages.append("".join(self._text).strip())
        elif self._path[1:] == ["sitemap", "loc"]:
            self.found.sitemaps.append("".join(self._text).strip())
        self._path.pop()

    def doctype(self, *_: object) -> None:
        # No sitemap has one, and with it come entities.
        raise ValueError("a document type")

    def close(self) -> _Sitemap:
        return self.found


def _sitemap(fetched: Fetched, max_bytes: int) -> _Sitemap:
    """Read a sitemap: XML, or a URL on each line, compressed or not."""
    content = fetched.content
    try:
        if content.startswith(GZIP_MAGIC):
            content = _decompressed(fetched.url, content, max_bytes)
        if content.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
            # Without `huge_tree`, libxml2 bounds depth, names and texts.
            parser = lxml.etree.XMLParser(
                target=_Locations(), resolve_entities=False, no_network=True, load_dtd=False, huge_tree=False
            )
            found: _Sitemap = lxml.etree.fromstring(content.lstrip(b"\xef\xbb\xbf \t\r\n"), parser)
            return found
        lines = [line.strip() for line in content.decode("utf-8-sig").splitlines()]
    except (lxml.etree.LxmlError, ValueError, EOFError, OSError, zlib.error):
        raise _no_sitemap(fetched.url) from None
    if any(not line.startswith(("http://", "https://")) for line in lines if line):
        raise _no_sitemap(fetched.url)
    return _Sitemap(pages=[line for line in lines if line])


def _decompressed(url: str, content: bytes, max_bytes: int) -> bytes:
    with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
        plain = file.read(max_bytes + 1)
    if len(plain) > max_bytes:
        problem = f"it has more than {max_bytes:,} bytes when it is decompressed"
        raise FetchFailed(url=url, problem=problem, permanent=True)
    return plain


def _no_sitemap(url: str) -> FetchFailed:
    return FetchFailed(url=url, problem="it is no sitemap, or a broken one", permanent=True)
