"""A Hugging Face hub, its CDN and a page of wheels, on this machine, with faults to order."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from aiohttp import web

LOOPBACK = "127.0.0.1"


@dataclass
class Seen:
    """One request as a server saw it."""

    host: str
    method: str
    path: str
    range: str | None
    if_range: str | None
    authorization: str | None
    status: int = 0
    sent: int = 0


@dataclass
class Hub:
    """What the servers serve, how they misbehave, and what they saw.

    `cuts` and `failures` are used up, one for each answer of the CDN.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    """`owner/name/revision/path` to content."""
    wheels: dict[str, bytes] = field(default_factory=dict)
    token: str | None = None
    linked: bool = True
    cuts: list[int] = field(default_factory=list)
    """Break the connection after so many bytes."""
    hang_after: int | None = None
    """Fall silent after so many bytes."""
    failures: list[int] = field(default_factory=list)
    """Answer with this status."""
    delay: float = 0.0
    """Seconds before a body begins."""
    ranges: bool = True
    corrupt: bool = False
    etag: str = '"v1"'
    claimed_size: int | None = None
    moved_from: str | None = None
    """A repository's former name, whose requests are redirected."""
    seen: list[Seen] = field(default_factory=list)
    url: str = ""
    cdn: str = ""

    def bodies(self) -> list[Seen]:
        """The requests for content that were answered with some."""
        return [seen for seen in self.seen if seen.method == "GET" and seen.sent]

    def _note(self, host: str, request: web.Request) -> Seen:
        headers = request.headers
        seen = Seen(
            host,
            request.method,
            request.raw_path,
            headers.get("Range"),
            headers.get("If-Range"),
            headers.get("Authorization"),
        )
        self.seen.append(seen)
        return seen

    async def resolve(self, request: web.Request) -> web.Response:
        """`/{owner}/{name}/resolve/{revision}/{path}`: a redirect to the CDN."""
        self._note("hub", request)
        where = request.match_info
        repository = f"{where['owner']}/{where['name']}"
        if repository == self.moved_from:
            location = request.raw_path.replace(f"/{repository}/", "/new/home/", 1)
            return web.Response(status=307, headers={"Location": location})
        if self.token and request.headers.get("Authorization") != f"Bearer {self.token}":
            return web.Response(status=401)
        key = f"{repository}/{where['revision']}/{where['path']}"
        if key not in self.files:
            return web.Response(status=404)
        headers = {"Location": f"{self.cdn}/blob/{key}?signature=secret", "X-Repo-Commit": "c" * 40}
        if self.linked:
            headers["X-Linked-Etag"] = f'"{hashlib.sha256(self.files[key]).hexdigest()}"'
            headers["X-Linked-Size"] = str(len(self.files[key]))
        return web.Response(status=302, headers=headers)

    async def blob(self, request: web.Request) -> web.StreamResponse:
        return await self._serve(request, self.files[request.match_info["key"]])

    async def wheel(self, request: web.Request) -> web.StreamResponse:
        return await self._serve(request, self.wheels[request.match_info["name"]])

    async def page(self, request: web.Request) -> web.Response:
        """The links that pip reads."""
        links = [
            f'<a href="/wheels/{name}#sha256={hashlib.sha256(content).hexdigest()}">{name}</a>'
            for name, content in self.wheels.items()
        ]
        return web.Response(
            text=f"<!DOCTYPE html><html><body>{''.join(links)}</body></html>", content_type="text/html"
        )

    async def _serve(self, request: web.Request, content: bytes) -> web.StreamResponse:
        seen = self._note("cdn", request)
        if self.failures:
            seen.status = self.failures.pop(0)
            return web.Response(status=seen.status)
        first = 0
        if self.ranges and seen.range and seen.if_range in (None, self.etag):
            first = int(seen.range.removeprefix("bytes=").removesuffix("-"))
        if first and first >= len(content):
            seen.status = 416
            return web.Response(status=416, headers={"Content-Range": f"bytes */{len(content)}"})
        response = web.StreamResponse(status=206 if first else 200, headers={"ETag": self.etag})
        if first:
            response.headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        body = bytes(len(content) - first) if self.corrupt else content[first:]
        response.content_length = self.claimed_size or len(body)
        seen.status = response.status
        return await self._send(request, response, body, seen)

    async def _send(
        self, request: web.Request, response: web.StreamResponse, body: bytes, seen: Seen
    ) -> web.StreamResponse:
        await asyncio.sleep(self.delay)
        await response.prepare(request)
        cut = self.cuts.pop(0) if self.cuts else self.hang_after
        part = body if cut is None else body[:cut]
        if request.method == "GET" and part:
            await response.write(part)
            seen.sent = len(part)
        if cut is not None:
            await asyncio.sleep(3600 if self.hang_after is not None else 0.05)
            assert request.transport
            request.transport.close()
        return response


@asynccontextmanager
async def running(hub: Hub) -> AsyncIterator[Hub]:
    """Serve the hub on one port and its CDN on another."""
    front, back = web.Application(), web.Application()
    front.router.add_route("*", "/{owner}/{name}/resolve/{revision}/{path:.+}", hub.resolve)
    back.router.add_route("*", "/blob/{key:.+}", hub.blob)
    back.router.add_route("*", "/wheels/{name}", hub.wheel)
    back.router.add_get("/links/", hub.page)
    runners = [web.AppRunner(app, shutdown_timeout=0.1) for app in (front, back)]
    try:
        ports = []
        for runner in runners:
            await runner.setup()
            await web.TCPSite(runner, LOOPBACK, 0).start()
            ports.append(runner.addresses[0][1])
        hub.url, hub.cdn = (f"http://{LOOPBACK}:{port}" for port in ports)
        yield hub
    finally:
        for runner in runners:
            await runner.cleanup()
