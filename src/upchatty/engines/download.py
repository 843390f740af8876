"""Fetch a big file over HTTP: resumed where it broke off, and checked against its SHA-256.

The half file is `<destination>.part`; `<destination>.part.etag` is what its server called it
(RFC 9110, section 13.1.5: `If-Range`), so that the rest of another file is never put behind it.
"""

import asyncio
import errno
import hashlib
import os
import re
import shutil
from collections.abc import AsyncIterable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Protocol

import aiohttp
import stamina
from yarl import URL

from upchatty.errors import DownloadError

BLOCK = 1024 * 1024
CONNECT_SECONDS = 20
SILENCE_SECONDS = 60
ATTEMPTS = 5


class Progress(Protocol):
    """Whoever shows how far a download is; all sizes are bytes."""

    def start(self, total: int | None, done: int, label: str) -> None:
        """A connection begins to deliver; called again when one broke off and another goes on.

        Args:
            total: The file's size, None where the server does not say.
            done: What is on the disk already.
            label: The file's name.
        """

    def advance(self, n: int) -> None:
        """`n` more bytes are on the disk."""

    def finish(self) -> None:
        """Nothing more comes, for better or worse."""


class NoProgress:
    """A Progress that shows nothing."""

    def start(self, total: int | None, done: int, label: str) -> None:
        pass

    def advance(self, n: int) -> None:
        pass

    def finish(self) -> None:
        pass


class Transient(DownloadError):
    """A failure that the next attempt may not meet."""


async def download(
    url: str,
    destination: Path,
    *,
    sha256: str | None = None,
    headers: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> str:
    """Fetch `url` into `destination`; what an earlier call left unfinished is not fetched again.

    Args:
        url: An http or https URL; redirects are followed.
        destination: The file to make. It appears only when it is complete and right.
        sha256: The sum that it must have, in hex.
        headers: Sent to the URL's own origin only, never to where it redirects.
        progress: Is told about every block.

    Returns:
        The file's SHA-256 in lower-case hex.

    Raises:
        DownloadError: The server cannot be reached or refuses, the disk is full, or the sum differs.
    """
    progress = progress or NoProgress()
    try:
        with disk_errors(url, destination.parent):
            with closing(await asyncio.to_thread(_Part, destination)) as part:
                await _receive_all(url, headers, part, progress)
            return await asyncio.to_thread(part.commit, url, sha256)
    finally:
        progress.finish()


def attempts() -> AsyncIterable[stamina.Attempt]:
    """Run a block again after a Transient, with growing pauses: about ten seconds in all.

    It is a context and not a decorator because stamina logs a decorated function's arguments, and
    the headers among them can hold a token.
    """
    return stamina.retry_context(on=Transient, attempts=ATTEMPTS, timeout=None, wait_initial=0.5, wait_max=10)


def open_session(url: str, headers: Mapping[str, str] | None = None) -> aiohttp.ClientSession:
    """A session for `url` and its redirects.

    Proxies and ~/.netrc count (`trust_env`); so do SSL_CERT_FILE and SSL_CERT_DIR, since aiohttp's
    default is `ssl.create_default_context()`.

    Args:
        url: Where the session begins.
        headers: Sent to the URL's own origin only.
    """
    origin = URL(url).origin()

    async def add_headers(
        request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
    ) -> aiohttp.ClientResponse:
        if request.url.origin() == origin:
            request.headers.update(headers or {})
        return await handler(request)

    return aiohttp.ClientSession(
        trust_env=True,
        timeout=aiohttp.ClientTimeout(connect=CONNECT_SECONDS, sock_read=SILENCE_SECONDS),
        headers={"Accept-Encoding": "identity"},  # a range of a compressed body is of no use
        auto_decompress=False,
        read_bufsize=BLOCK,
        middlewares=[add_headers],
    )


@contextmanager
def network_errors(url: str) -> Iterator[None]:
    """Turn what aiohttp raises into a DownloadError that says what to do."""
    shown = without_secrets(url)
    try:
        yield
    except aiohttp.ClientConnectorCertificateError as error:
        raise DownloadError(
            url=shown,
            problem=f"the certificate of {error.host} is not trusted; if your network has an authority "
            "of its own, name that authority's file in SSL_CERT_FILE",
        ) from None
    except aiohttp.ClientConnectorError as error:
        raise Transient(
            url=shown,
            problem=f"no connection to {error.host}:{error.port} ({error.strerror}); "
            "check the network, and HTTPS_PROXY if there is a proxy",
        ) from None
    except aiohttp.InvalidURL:
        raise DownloadError(url=shown, problem="it is not a valid http or https URL") from None
    except aiohttp.ClientResponseError as error:
        raise Transient(url=shown, problem=f"the server answered {error.status} {error.message}") from None
    except TimeoutError:
        raise Transient(url=shown, problem="the server was silent for too long; try again later") from None
    except aiohttp.ClientError as error:
        raise Transient(
            url=shown, problem=f"the connection broke off ({type(error).__name__}); run it again to go on"
        ) from None


@contextmanager
def disk_errors(url: str, folder: Path) -> Iterator[None]:
    """Turn an OSError of the file system into a DownloadError that says what to do."""
    try:
        yield
    except OSError as error:
        problem = f"{error.filename or folder} cannot be written ({error.strerror})"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            problem = f"the disk of {folder} is full; free some space and run it again"
        raise DownloadError(url=without_secrets(url), problem=problem) from None


def put_in_place(part: Path, destination: Path) -> None:
    """Rename a finished file. It is on the disk first, so that a power cut leaves no empty one."""
    with part.open("ab") as file:
        os.fsync(file.fileno())
    part.replace(destination)


def check_status(url: str, response: aiohttp.ClientResponse) -> None:
    """Raise DownloadError for a status of 400 and above."""
    if response.status < 400:
        return
    problem = f"the server answered {response.status} {response.reason}"
    if response.status >= 500 or response.status in (408, 429):
        raise Transient(url=without_secrets(url), problem=f"{problem}; try again later")
    if response.status in (401, 403):
        problem += "; if it needs a login, put that into ~/.netrc"
    raise DownloadError(url=without_secrets(url), problem=problem)


def without_secrets(url: str) -> str:
    """The URL for a sentence: without a login and without a query, which may be signed."""
    parts = URL(url)
    return str(parts.with_user(None).with_query(None)) if parts.host else url


class _Part:
    """The half file: its bytes, their running sum, and its server's name for them.

    Opening, `append` and `commit` hash or write much: call them in a thread.
    """

    def __init__(self, destination: Path) -> None:
        self.destination = destination
        self.path = destination.with_name(f"{destination.name}.part")
        self._etag = destination.with_name(f"{destination.name}.part.etag")
        self._sum = hashlib.sha256()
        self.size = 0
        self.farthest = 0
        self.validator = self._etag.read_text() if self._etag.exists() else None
        self._file = self.path.open("ab" if self.validator else "wb")
        if self.validator:
            with self.path.open("rb") as existing:
                while block := existing.read(BLOCK):
                    self._count(block)

    @property
    def headers(self) -> dict[str, str]:
        """What to ask the server for: the rest, or all of it."""
        if self.validator and self.size:
            return {"Range": f"bytes={self.size}-", "If-Range": self.validator}
        return {}

    def append(self, block: bytes) -> None:
        self._file.write(block)
        self._count(block)

    def _count(self, block: bytes) -> None:
        self._sum.update(block)
        self.size += len(block)
        self.farthest = max(self.farthest, self.size)

    def clear(self, validator: str | None) -> None:
        """Forget the bytes; those to come are of the version that `validator` names."""
        self._etag.unlink(missing_ok=True)
        self._file.close()
        self._file = self.path.open("wb")
        self._sum, self.size, self.validator = hashlib.sha256(), 0, validator
        if validator:
            self._etag.write_text(validator)

    def close(self) -> None:
        self._file.close()

    def commit(self, url: str, sha256: str | None) -> str:
        """Make the closed half file the whole one, or delete it if its sum is wrong."""
        actual = self._sum.hexdigest()
        if sha256 and actual != sha256.lower():
            self.path.unlink()
            self._etag.unlink(missing_ok=True)
            raise DownloadError(
                url=without_secrets(url),
                problem=f"what came had the SHA-256 {actual} and was deleted; expected {sha256.lower()}",
            )
        put_in_place(self.path, self.destination)
        self._etag.unlink(missing_ok=True)
        return actual


async def _receive_all(url: str, headers: Mapping[str, str] | None, part: _Part, progress: Progress) -> None:
    async with open_session(url, headers) as session:
        complete = False
        # Attempts count from the last byte gained: a bad line may break off any number of times.
        while not complete:
            async for attempt in attempts():
                with attempt:
                    complete = await _receive(session, url, part, progress)


async def _receive(session: aiohttp.ClientSession, url: str, part: _Part, progress: Progress) -> bool:
    """Read from one connection until it ends.

    Returns:
        Whether the file is complete; False: the connection broke off, but brought something new.

    Raises:
        Transient: It broke off and brought nothing new.
    """
    reached = part.farthest
    try:
        with network_errors(url):
            async with session.get(url, headers=part.headers) as response:
                await _read(response, url, part, progress)
    except Transient:
        if part.farthest > reached:
            return False
        raise
    return True


async def _read(response: aiohttp.ClientResponse, url: str, part: _Part, progress: Progress) -> None:
    if response.status == 416:
        if _range_total(response) == part.size:
            return  # an earlier run stopped between the last byte and the renaming
        part.clear(None)
        raise Transient(url=without_secrets(url), problem="the file changed on the server; run it again")
    check_status(url, response)
    total = _begin(response, url, part)
    _check_space(url, part, total)
    progress.start(total, part.size, part.destination.name)
    async for block in response.content.iter_chunked(BLOCK):
        await asyncio.to_thread(part.append, block)
        progress.advance(len(block))
    if total is not None and part.size != total:
        raise Transient(
            url=without_secrets(url),
            problem=f"the server sent {part.size} of {total} bytes; run it again to go on",
        )


def _begin(response: aiohttp.ClientResponse, url: str, part: _Part) -> int | None:
    """Make the half file ready for the body that follows, and return the whole file's size."""
    if response.status == 206:
        if not response.headers.get("Content-Range", "").startswith(f"bytes {part.size}-"):
            part.clear(None)
            raise Transient(
                url=without_secrets(url), problem="the server sent another range than the one asked for"
            )
        return _range_total(response)
    part.clear(_validator(response))
    return response.content_length


def _range_total(response: aiohttp.ClientResponse) -> int | None:
    total = re.search(r"/(\d+)$", response.headers.get("Content-Range", ""))
    return int(total[1]) if total else None


def _validator(response: aiohttp.ClientResponse) -> str | None:
    """What If-Range accepts: a strong ETag, else a date."""
    etag = response.headers.get("ETag", "")
    return etag if etag.startswith('"') else response.headers.get("Last-Modified")


def _check_space(url: str, part: _Part, total: int | None) -> None:
    """Say at once what would otherwise be found out after gigabytes."""
    folder = part.destination.parent
    free, needed = shutil.disk_usage(folder).free, (total or 0) - part.size
    if needed > free:
        raise DownloadError(
            url=without_secrets(url),
            problem=f"it needs {needed:,} more bytes in {folder}, and the disk has {free:,}; free some space",
        )
