"""A server that engines answer on, and the connections to it.

Why not aiohttp's client: docs/benchmarks.md.
"""

import asyncio
import socket
import ssl
from collections import deque
from collections.abc import Mapping
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from aiohappyeyeballs import start_connection
from python_socks import ProxyError
from python_socks.async_.asyncio import Proxy

from upchatty import __version__
from upchatty.engines.connection import NEVER, Connection, ConnectionBroken, StaleConnection

CONNECT_SECONDS = 5.0
HAPPY_EYEBALLS_SECONDS = 0.25  # then the next address is tried, too: RFC 8305
MOST_IDLE = 256
DEFAULT_PORTS = {"http": 80, "https": 443}


class ConnectFailed(Exception):
    """There is no connection to be had; says why."""


class Origin:
    """One server.

    Args:
        url: `http://…` or `https://…`; a path in it does not count.
        headers: Sent with every request.
        keep_alive: Whether a connection serves more than one request.

    Raises:
        ValueError: The URL is none.
    """

    def __init__(self, url: str, headers: Mapping[str, str], *, keep_alive: bool = True) -> None:
        parts = urlsplit(url)
        if parts.scheme not in DEFAULT_PORTS or not parts.hostname:
            raise ValueError(f"expected http://… or https://…, got {url!r}")
        self._host = parts.hostname
        self._port = parts.port or DEFAULT_PORTS[parts.scheme]
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._proxy = _proxy(parts.scheme, parts.netloc)
        self._keep_alive = keep_alive
        fixed = {"Host": parts.netloc.rpartition("@")[2], "User-Agent": f"upchatty/{__version__}", **headers}
        if not keep_alive:
            fixed["Connection"] = "close"
        self._headers = "".join(f"{name}: {value}\r\n" for name, value in fixed.items()).encode("latin-1")
        self._idle: deque[Connection] = deque()
        self._open: set[Connection] = set()
        self.closed = False

    async def get(self, path: str, timeout_seconds: float) -> Connection:
        """Ask for a path, given from the server's root; otherwise as `post`."""
        request = b"GET %b HTTP/1.1\r\n%b\r\n" % (path.encode(), self._headers)
        return await self._exchange(request, timeout_seconds, NEVER)

    async def post(
        self, path: str, body: bytes, timeout_seconds: float, deadline: float = NEVER, extra: bytes = b""
    ) -> Connection:
        """Send JSON, and wait for the head of the answer.

        Args:
            path: From the server's root.
            body: The JSON.
            timeout_seconds: How long the server may be silent.
            deadline: When the wait ends anyway, by the loop's clock.
            extra: Further header lines, each with its line's end.

        Returns:
            The connection, with the answer's status and headers. It has to be closed.

        Raises:
            ConnectFailed, ConnectionBroken, Silent: There is no answer.
        """
        head = b"POST %b HTTP/1.1\r\n%bContent-Type: application/json\r\n%bContent-Length: %d\r\n\r\n"
        request = head % (path.encode(), self._headers, extra, len(body)) + body
        return await self._exchange(request, timeout_seconds, deadline)

    def close(self) -> None:
        """Close every connection, those in use as well."""
        self.closed = True
        for connection in [*self._open]:
            connection.abort()

    async def _exchange(self, request: bytes, timeout_seconds: float, deadline: float) -> Connection:
        while self._idle:
            connection = self._idle.pop()
            try:
                await self._begin(connection, request, timeout_seconds, deadline)
                return connection
            except StaleConnection:
                continue  # at once on another one
        connection = await self._connect(deadline)
        await self._begin(connection, request, timeout_seconds, deadline)
        return connection

    async def _begin(
        self, connection: Connection, request: bytes, timeout_seconds: float, deadline: float
    ) -> None:
        try:
            await connection.exchange(request, timeout_seconds, deadline)
        except BaseException:
            connection.abort()
            raise

    async def _connect(self, deadline: float) -> Connection:
        if self.closed:
            raise ConnectionBroken("it has just ended")
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout_at(min(loop.time() + CONNECT_SECONDS, deadline)):
                return await self._open_connection(loop)
        except ssl.SSLCertVerificationError as error:
            raise ConnectFailed(f"its certificate cannot be verified ({error.verify_message})") from None
        except ssl.SSLError as error:
            raise ConnectFailed(f"it does not speak TLS as expected ({error.reason})") from None
        except TimeoutError:
            raise ConnectFailed(f"it accepts no connection within {CONNECT_SECONDS:g} seconds") from None
        except socket.gaierror:
            raise ConnectFailed(f"the name {self._host} does not resolve") from None
        except (OSError, ProxyError) as error:
            raise ConnectFailed("it does not accept connections") from error

    async def _open_connection(self, loop: asyncio.AbstractEventLoop) -> Connection:
        if self._proxy:
            connected = await Proxy.from_url(self._proxy).connect(self._host, self._port)
        else:
            addresses = await loop.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
            connected = await start_connection(addresses, happy_eyeballs_delay=HAPPY_EYEBALLS_SECONDS)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _, connection = await loop.create_connection(
            lambda: Connection(self._take_back, self._forget),
            sock=connected,
            ssl=self._tls,
            server_hostname=self._host if self._tls else None,
        )
        self._open.add(connection)
        return connection

    def _take_back(self, connection: Connection) -> None:
        if self._keep_alive and not self.closed and len(self._idle) < MOST_IDLE:
            self._idle.append(connection)
        else:
            connection.abort()

    def _forget(self, connection: Connection) -> None:
        self._open.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)


def _proxy(scheme: str, netloc: str) -> str | None:
    """The proxy that the environment names for a URL."""
    return None if proxy_bypass(netloc) else getproxies().get(scheme)
