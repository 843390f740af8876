"""The guard for URLs that users name, and the crawl of sites, against servers of our own that misbehave."""

import asyncio
import gzip
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from ipaddress import ip_address, ip_network
from typing import Any

import pytest
import trustme
from aiohttp import web

from upchatty.errors import ConfigurationError
from upchatty.knowledge.crawling import Page, crawl
from upchatty.knowledge.fetching import Fetcher, FetchFailed, FetchRefused, UnwantedMediaType
from upchatty.settings import Settings

LOOPBACK = Settings(fetch_networks="127.0.0.1/32").fetch_allowed
MOST_BYTES = 4 * 1024 * 1024

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def serving(
    handler: Handler, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None
) -> AsyncIterator[int]:
    """A web server; its port."""
    runner = web.ServerRunner(web.Server(handler), shutdown_timeout=0.1)
    await runner.setup()
    site = web.SockSite(runner, socket.create_server((host, 0)), ssl_context=tls)
    await site.start()
    try:
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


@asynccontextmanager
async def fetching(**options: Any) -> AsyncIterator[Fetcher]:
    fetcher = Fetcher(options.pop("networks", LOOPBACK), MOST_BYTES, **options)
    try:
        yield fetcher
    finally:
        await fetcher.close()


@asynccontextmanager
async def name_server(answers: dict[str, list[Sequence[str]]]) -> AsyncIterator[Callable[[str], Any]]:
    """A name server, and a function that asks it. Each question takes the next of a name's answers."""

    class Protocol(asyncio.DatagramProtocol):
        def connection_made(self, transport: Any) -> None:
            self.transport = transport

        def datagram_received(self, data: bytes, sender: Any) -> None:
            labels, at = [], 12
            while data[at]:
                labels.append(data[at + 1 : at + 1 + data[at]].decode())
                at += 1 + data[at]
            queue = answers[".".join(labels)]
            addresses = queue.pop(0) if len(queue) > 1 else queue[0]
            records = b"".join(
                struct.pack("!HHHIH", 0xC00C, 1 if len(packed) == 4 else 28, 1, 0, len(packed)) + packed
                for packed in (ip_address(address).packed for address in addresses)
            )
            header = data[:2] + struct.pack("!HHHHH", 0x8180, 1, len(addresses), 0, 0)
            self.transport.sendto(header + data[12 : at + 5] + records, sender)

    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(Protocol, local_addr=("127.0.0.1", 0))

    async def ask(host: str) -> list[str]:
        question = b"".join(bytes([len(label)]) + label.encode() for label in host.split("."))
        query = struct.pack("!HHHHHH", 1, 0x0100, 1, 0, 0, 0) + question + struct.pack("!BHH", 0, 1, 1)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.setblocking(False)
            await loop.sock_connect(client, transport.get_extra_info("sockname"))
            await loop.sock_sendall(client, query)
            reply = await loop.sock_recv(client, 4096)
        at, found = len(query), []
        for _ in range(struct.unpack("!H", reply[6:8])[0]):
            length = struct.unpack("!H", reply[at + 10 : at + 12])[0]
            found.append(str(ip_address(reply[at + 12 : at + 12 + length])))
            at += 12 + length
        return found

    try:
        yield ask
    finally:
        transport.close()


async def hello(request: web.BaseRequest) -> web.Response:
    return web.Response(text="hello", headers={"ETag": '"1"'})


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.2:{port}/",
        "http://127.1:{port}/",
        "http://2130706433:{port}/",
        "http://0x7f.1:{port}/",
        "http://0x7f000001:{port}/",
        "http://0177.0.0.1:{port}/",
        "http://127.0.0.2.:{port}/",
        "http://１２７.0.0.2:{port}/",
        "http://127。0。0。2:{port}/",
        "http://%31%32%37.0.0.2:{port}/",
        "http://0.0.0.0:{port}/",
        "http://0:{port}/",
        "http://[::]:{port}/",
        "http://[::1]:{port}/",
        "http://[::ffff:127.0.0.2]:{port}/",
        "http://[::ffff:7f00:2]:{port}/",
        "http://[::127.0.0.2]:{port}/",
        "http://[64:ff9b::7f00:2]:{port}/",
        "http://[64:ff9b:1::7f00:2]:{port}/",
        "http://[2002:7f00:2::]:{port}/",
        "http://[2001:0:1::80ff:fffd]:{port}/",
        "http://[fe80::1%25lo]:{port}/",
        "http://[fd00:ec2::254]/latest/meta-data/",
        "http://169.254.169.254/latest/meta-data/",
        "http://168.63.129.16/",
        "http://100.64.0.1/",
        "http://10.0.0.1/",
        "http://192.168.1.1/",
        "http://172.31.0.1/",
        "http://192.0.0.8/",
        "http://198.18.0.1/",
        "http://224.0.0.1/",
        "http://255.255.255.255/",
        "http://user:secret@127.0.0.1:{port}/",
        "http://example.org@127.0.0.1:{port}/",
        "http://127.0.0.1:{port}\\@example.org/",
        "http://exa mple.org/",
        "http://-/",
        "http:///etc/passwd",
        "//127.0.0.1:{port}/",
        "file:///etc/passwd",
        "gopher://127.0.0.1:{port}/",
        "ftp://127.0.0.1/",
        "data:text/plain,hello",
        "",
    ],
)
async def test_a_url_that_is_not_public_is_refused_before_anything_is_sent(url: str) -> None:
    asked = []

    async def note(request: web.BaseRequest) -> web.Response:
        asked.append(request)
        return web.Response()

    async with serving(note, host="0.0.0.0") as port, fetching() as fetcher:
        with pytest.raises(FetchRefused) as error:
            await fetcher.fetch(url.format(port=port))
    assert not asked
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("name", ["localhost", "LOCALHOST", "ⓛocalhost"])
async def test_localhost_is_refused_by_whatever_name(name: str) -> None:
    async with serving(hello) as port, fetching(networks=()) as fetcher:
        with pytest.raises(FetchRefused, match="a loopback address.*fetch_networks"):
            await fetcher.fetch(f"http://{name}:{port}/")


async def test_networks_that_the_operator_allows_are_reached() -> None:
    async with serving(hello) as port:
        async with fetching() as fetcher:
            for host in ("127.0.0.1", "[::ffff:127.0.0.1]"):
                fetched = await fetcher.fetch(f"http://{host}:{port}/a#b")
                assert (fetched.content, fetched.etag) == (b"hello", '"1"')
                assert fetched.url == f"http://{'[::ffff:7f00:1]' if '[' in host else host}:{port}/a"
        async with fetching(networks=[ip_network("127.0.0.0/24")]) as fetcher:
            assert (await fetcher.fetch(f"http://127.0.0.1:{port}/")).status == 200
    assert not Settings().fetch_allowed
    assert len(Settings(fetch_networks="10.0.0.0/8, ::1/128 127.0.0.1").fetch_allowed) == 3
    with pytest.raises(ConfigurationError, match=r"fetch_networks.*10\.1\.0\.0/16"):
        Settings(fetch_networks="10.0.0.0/8 intranet")


async def test_a_name_is_resolved_once_and_all_its_addresses_are_checked() -> None:
    names: dict[str, list[Sequence[str]]] = {
        "rebinding.test": [["127.0.0.1"], ["127.0.0.2"]],
        "mixed.test": [["93.184.215.14", "127.0.0.2"]],
        "mapped.test": [["::ffff:10.0.0.1"]],
        "metadata.test": [["169.254.169.254"]],
    }
    inside = []

    async def close(request: web.BaseRequest) -> web.Response:
        return web.Response(text="outside", headers={"Connection": "close"})

    async def secret(request: web.BaseRequest) -> web.Response:
        inside.append(request)
        return web.Response(text="secret")

    async with serving(close) as port, name_server(names) as resolve, fetching(resolve=resolve) as fetcher:
        # 127.0.0.1 plays the public address here: it is allowed, and the others are not.
        assert (await fetcher.fetch(f"http://rebinding.test:{port}/")).content == b"outside"
        for name, kind in {
            "rebinding": "loopback",
            "mixed": "loopback",
            "mapped": "private",
            "metadata": "metadata",
        }.items():
            with pytest.raises(FetchRefused, match=f"{kind}.*fetch_networks") as error:
                await fetcher.fetch(f"http://{name}.test:{port}/")
            assert "10.0.0.1" not in str(error.value)
        names["unknown.test"] = [[]]
        with pytest.raises(FetchFailed, match="there is no such host") as failure:
            await fetcher.fetch(f"http://unknown.test:{port}/")
        assert failure.value.permanent
    assert not inside


async def test_a_checked_name_connects_to_the_address_that_was_checked() -> None:
    """The name server is asked once for a fetch: a second answer would lead inside."""
    names: dict[str, list[Sequence[str]]] = {"once.test": [["127.0.0.1"], ["127.0.0.2"]]}
    async with serving(hello) as port, name_server(names) as resolve, fetching(resolve=resolve) as fetcher:
        assert (await fetcher.fetch(f"http://once.test:{port}/")).content == b"hello"
        assert names["once.test"] == [["127.0.0.2"]]


async def test_every_redirect_is_checked() -> None:
    asked = []

    async def redirect(request: web.BaseRequest) -> web.Response:
        asked.append(request.headers)
        target = request.rel_url.query.get("to")
        if request.path.startswith("/loop"):
            target = f"/loop{len(asked)}"
        if target is None:
            return web.Response(text=request.path)
        return web.Response(status=302, headers={"Location": target, "Set-Cookie": "a=b"})

    async with serving(redirect) as port, fetching() as fetcher:
        base = f"http://127.0.0.1:{port}"
        fetched = await fetcher.fetch(f"{base}/?to=/there%23fragment")
        assert (fetched.url, fetched.content) == (f"{base}/there", b"/there")
        assert "Cookie" not in asked[-1]
        assert asked[-1]["User-Agent"].startswith("UpChatty/")
        for target in (
            "http://127.0.0.2/",
            "//[::1]/",
            "file:///etc/passwd",
            "http://a:b@127.0.0.1/",
            "http://[",
        ):
            with pytest.raises(FetchRefused):
                await fetcher.fetch(f"{base}/?to={target}")
        asked.clear()
        with pytest.raises(FetchFailed, match="redirects more than 5 times") as error:
            await fetcher.fetch(f"{base}/loop")
        assert error.value.permanent and len(asked) == 6


async def test_slow_endless_and_growing_bodies_are_cut() -> None:
    bombs = {
        "/bomb": gzip.compress(bytes(range(256)) * 100_000),
        "/ratio": gzip.compress(bytes(MOST_BYTES - 1)),
    }
    pauses = {"/drip": 0.05, "/silent": 30.0}

    async def respond(request: web.BaseRequest) -> web.StreamResponse:
        if bomb := bombs.get(request.path):
            return web.Response(body=bomb, headers={"Content-Encoding": "gzip"})
        response = web.StreamResponse()
        if request.path == "/claims":
            response.content_length = 10 * MOST_BYTES
        await response.prepare(request)
        pause = pauses.get(request.path, 0.0)
        while True:
            await asyncio.sleep(pause)
            await response.write(b"." if pause else bytes(65536))

    async with serving(respond) as port, fetching(total_seconds=0.7, silence_seconds=0.3) as fetcher:
        for path, problem, permanent in (
            ("drip", "longer than 0.7 seconds", False),
            ("silent", "silent for too long", False),
            ("endless", "more than 4,194,304 bytes.*max_document_bytes", True),
            ("claims", "more than 4,194,304 bytes", True),
            ("bomb", "more than 4,194,304 bytes|grows", True),
            ("ratio", "grows more than 200 times", True),
        ):
            with pytest.raises(FetchFailed, match=problem) as error:
                await fetcher.fetch(f"http://127.0.0.1:{port}/{path}")
            assert error.value.permanent is permanent, path


async def test_what_is_not_http_fails_with_a_sentence() -> None:
    replies = [
        b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: a\r\n" * 10_000 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: zstd\r\nContent-Length: 3\r\n\r\nabc",
        b"HTTP/1.1 304 Not Modified\r\n\r\n",
        b"HTTP/1.1 206 Partial Content\r\nContent-Length: 3\r\n\r\nabc",
        b"",
    ]

    async def reply(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(replies[0])
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(reply, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, fetching() as fetcher:
        while replies:
            with pytest.raises(FetchFailed):
                await fetcher.fetch(f"http://127.0.0.1:{port}/")
            replies.pop(0)
    async with fetching() as fetcher:
        with pytest.raises(FetchFailed, match=r"no connection to its host \(Connection refused\)") as error:
            await fetcher.fetch(f"http://127.0.0.1:{port}/")
        assert not error.value.permanent


async def test_certificates_are_verified() -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    async with serving(hello, tls=context) as port, fetching() as fetcher:
        with pytest.raises(FetchFailed, match="certificate is not trusted"):
            await fetcher.fetch(f"https://127.0.0.1:{port}/")


async def test_statuses_types_and_conditions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")

    async def respond(request: web.BaseRequest) -> web.Response:
        if request.path == "/page":
            if request.headers.get("If-None-Match") == '"v2"':
                return web.Response(status=304, headers={"ETag": '"v2"'})
            headers = {"ETag": '"v2"', "Last-Modified": "Sun, 22 Nov 2026 10:00:00 GMT"}
            return web.Response(
                body=b"<p>\xe9", headers=headers | {"Content-Type": "Text/HTML; Charset=Latin-1"}
            )
        if request.path == "/image":
            return web.Response(body=b"...", content_type="image/png")
        return web.Response(status=int(request.path[1:]), headers={"Retry-After": "17"})

    async with serving(respond) as port, fetching() as fetcher:
        base = f"http://127.0.0.1:{port}"
        fetched = await fetcher.fetch(f"{base}/page")
        assert (fetched.content, fetched.media_type) == (b"<p>\xe9", "text/html; charset=latin-1")
        again = await fetcher.fetch(
            f"{base}/page", etag=fetched.etag, last_modified=fetched.last_modified, accept=["text/html"]
        )
        assert again.not_modified and not again.content
        with pytest.raises(UnwantedMediaType, match="image/png"):
            await fetcher.fetch(f"{base}/image", accept=["text/html"])
        for status, permanent in ((404, True), (410, True), (403, True), (429, False), (503, False)):
            with pytest.raises(FetchFailed, match=str(status)) as error:
                await fetcher.fetch(f"{base}/{status}")
            assert (error.value.permanent, error.value.status) == (permanent, status)
            assert error.value.retry_after == (None if permanent else 17)


# Crawling


class Site:
    """A web site: bodies by path, with their media types."""

    def __init__(self) -> None:
        self.pages: dict[str, str | bytes] = {}
        self.status: dict[str, int] = {}
        self.headers: dict[str, dict[str, str]] = {}
        self.asked: list[str] = []
        self.full: list[str] = []
        self.base = ""

    async def respond(self, request: web.BaseRequest) -> web.Response:
        path = request.path_qs
        self.asked.append(path)
        headers = self.headers.get(path, {})
        if path in self.status:
            return web.Response(status=self.status[path], headers=headers)
        if path not in self.pages:
            return web.Response(status=404)
        body = self.pages[path]
        body = body.replace("BASE", self.base).encode() if isinstance(body, str) else body
        etag = f'"{hash(body)}"'
        if request.headers.get("If-None-Match") == etag:
            return web.Response(status=304, headers={"ETag": etag})
        self.full.append(path)
        return web.Response(body=body, headers={"Content-Type": "text/html", "ETag": etag} | headers)

    async def crawl(self, path: str = "/", kind: Any = "site", **options: Any) -> list[Page]:
        async with fetching() as fetcher:
            return [page async for page in crawl(fetcher, self.base + path, kind=kind, **options)]

    async def paths(self, *arguments: Any, **options: Any) -> list[str]:
        return [page.url.removeprefix(self.base) for page in await self.crawl(*arguments, **options)]


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    site = Site()
    async with serving(site.respond) as port:
        site.base = f"http://127.0.0.1:{port}"
        yield site


def links(*targets: str, head: str = "") -> str:
    anchors = " ".join(f'<a href="{target}">x</a>' for target in targets)
    return f"<html><head>{head}</head><body>{anchors}</body></html>"


async def test_a_site_is_crawled_breadth_first_and_each_page_once(site: Site) -> None:
    site.pages = {
        "/": links(
            "/b?utm_source=x#part",
            "b",
            "BASE:80/",
            "/a/",
            "http://127.0.0.2/elsewhere",
            "/image.png",
            "/picture",
            "mailto:a@b.c",
            "/private/x",
            "http://[",
            "/gone",
            "/moved",
            "/inward",
            "/print",
            "/frontly",
            "/broken",
        ),
        "/b": links("/deep/1", "/b?page=2"),
        "/b?page=2": links("/from-noindex", head='<meta name="robots" content="NOINDEX">'),
        "/a/": links("sub", head='<base href="BASE/a/">'),
        "/a/sub": links("/never", head='<meta name="robots" content="nofollow">'),
        "/picture": b"...",
        "/print": links("/", head='<link rel="canonical" href="/b">'),
        "/frontly": links(head='<link rel="canonical" href="BASE/">'),
        "/deep/1": links("/deep/2"),
        "/deep/2": links("/deep/3"),
        "/from-noindex": b"%PDF-1.4",
        "/robots.txt": "User-agent: *\nDisallow: /private/\nCrawl-delay: 0.01\n",
    }
    site.headers = {
        "/picture": {"Content-Type": "image/png"},
        "/from-noindex": {"Content-Type": "application/pdf"},
        "/moved": {"Location": "/a/"},
        "/inward": {"Location": "http://127.0.0.2/"},
        "/robots.txt": {"Content-Type": "text/plain"},
    }
    site.status = {"/moved": 301, "/inward": 302, "/broken": 503}
    assert await site.paths(depth=3) == [
        *("/", "/b", "/a/", "/frontly", "/broken"),
        *("/deep/1", "/a/sub"),
        *("/deep/2", "/from-noindex"),
    ]
    assert "/private/x" not in site.asked and "/image.png" not in site.asked
    assert site.asked.count("/robots.txt") == 1
    assert await site.paths(depth=0) == ["/"]
    assert await site.paths(depth=1) == ["/", "/b", "/a/", "/frontly", "/broken"]
    assert await site.paths(pages=2) == ["/", "/b"]
    assert await site.paths("/a/", within=True) == ["/a/", "/a/sub"]
    broken = (await site.crawl(depth=1))[-1]
    assert broken.fetched is None and isinstance(broken.problem, FetchFailed)


async def test_a_trap_of_duplicates_has_an_end(site: Site) -> None:
    async def respond(request: web.BaseRequest) -> web.Response:
        number = int(request.rel_url.query.get("n", 0))
        site.asked.append(request.path_qs)
        targets = [f"/?n={number * 20 + i}" for i in range(20)]
        body = links(*targets, head='<link rel="canonical" href="/x">')
        return web.Response(text=body, content_type="text/html")

    async with serving(respond) as port:
        site.base = f"http://127.0.0.1:{port}"
        assert len(await site.paths(pages=30, depth=1000)) == 1
    assert len(site.asked) < 70


async def test_robots_txt_decides_whether_a_site_is_read(site: Site) -> None:
    site.pages = {"/": links("/a"), "/a": links(), "/robots.txt": "User-agent: upchatty\nDisallow: /\n"}
    with pytest.raises(FetchRefused, match="robots.txt"):
        await site.crawl()
    site.status = {"/robots.txt": 503}
    with pytest.raises(FetchFailed) as error:
        await site.crawl()
    assert not error.value.permanent
    site.status = {"/robots.txt": 403}
    assert await site.paths() == ["/", "/a"]
    with pytest.raises(FetchFailed, match="404"):
        await site.crawl("/nothing")
    assert [path for path in site.asked if path != "/robots.txt"] == ["/", "/a", "/nothing"]


async def test_an_unchanged_page_is_not_sent_again_where_its_links_are_not_needed(site: Site) -> None:
    site.pages = {"/": links("/a", "/b"), "/a": links("/c"), "/b": links()}
    known = {
        page.url: (page.fetched.etag, page.fetched.last_modified)
        for page in await site.crawl(depth=1)
        if page.fetched
    }
    site.pages["/b"] = links("/changed")
    site.full.clear()
    pages = await site.crawl(depth=1, known=known.get)
    assert site.full == ["/", "/b"]
    assert [page.fetched and page.fetched.not_modified for page in pages] == [False, True, False]


async def test_sitemaps_of_every_form(site: Site) -> None:
    site.pages = {
        "/sitemap.xml": '<?xml version="1.0"?><sitemapindex xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">'
        "<sitemap><loc>BASE/pages.xml.gz</loc></sitemap><sitemap><loc> BASE/list.txt </loc></sitemap>"
        "<sitemap><loc>http://127.0.0.2/outside.xml</loc></sitemap><sitemap><loc>BASE/old.xml</loc></sitemap>"
        "<sitemap><loc>BASE/sitemap.xml</loc></sitemap></sitemapindex>",
        "/pages.xml.gz": gzip.compress(
            f"<urlset xmlns:image='i'><url><loc>{site.base}/1?a=1&amp;b=2</loc>"
            f"<image:image><image:loc>{site.base}/image</image:loc></image:image></url>"
            f"<url><loc>http://127.0.0.2/2</loc></url><url><loc>{site.base}/3</loc></url></urlset>".encode()
        ),
        "/list.txt": "BASE/3\nBASE/4\n\nBASE/private/5\n",
        "/1?a=1&b=2": links("/not-listed"),
        "/3": links(),
        "/4": links(),
        "/private/5": links(),
        "/robots.txt": "User-agent: *\nDisallow: /private/",
    }
    assert await site.paths("/sitemap.xml", "sitemap") == ["/1?a=1&b=2", "/3", "/4"]
    assert await site.paths("/sitemap.xml", "sitemap", pages=1) == ["/1?a=1&b=2"]
    known = {
        page.url: (page.fetched.etag, None)
        for page in await site.crawl("/list.txt", "sitemap")
        if page.fetched
    }
    again = await site.crawl("/list.txt", "sitemap", known=known.get)
    assert all(page.fetched and page.fetched.not_modified for page in again) and len(again) == 2
    # One that cannot be read now may have any page: none must seem to be gone.
    site.status = {"/list.txt": 500}
    with pytest.raises(FetchFailed, match="500"):
        await site.crawl("/sitemap.xml", "sitemap")


@pytest.mark.parametrize(
    "content",
    [
        b"<html><body>no sitemap</body></html>",
        b"<urlset><url><loc>http://x/",
        b"just text",
        b"\xff\xfe\x00",
        gzip.compress(bytes(MOST_BYTES + 1)),
        gzip.compress(b"<urlset></urlset>")[:-10],
        b'<!DOCTYPE urlset [<!ENTITY a "aaaaaaaaaa">'
        + b"".join(b'<!ENTITY %c "%s">' % (98 + i, b"&%c;" % (97 + i) * 10) for i in range(9))
        + b"]><urlset><url><loc>http://127.0.0.1/&j;</loc></url></urlset>",
        b'<!DOCTYPE urlset [<!ENTITY x SYSTEM "file:///etc/passwd">]>'
        b"<urlset><url><loc>http://127.0.0.1/&x;</loc></url></urlset>",
        b"<urlset>" + b"<a>" * 100_000,
    ],
    ids=range(9),
)
async def test_what_is_no_sitemap_or_a_bomb_is_refused(site: Site, content: bytes) -> None:
    site.pages = {"/sitemap.xml": content}
    with pytest.raises(FetchFailed) as error:
        await site.crawl("/sitemap.xml", "sitemap")
    assert error.value.permanent
