"""Fetch what a user names by a URL, and nothing that only this machine can reach.

Every request goes through one guard, which holds for redirects too:

- a name is resolved once, every address that comes back is checked, and the connection goes to one of
  those, so that a name server cannot answer the check and the connection differently;
- whatever socket is opened, the address that it connects to is checked once more;
- proxies, cookies and logins play no part;
- time, bytes, redirects and the growth by decompression are limited.

Which addresses are public: https://www.iana.org/assignments/iana-ipv4-special-registry and
https://www.iana.org/assignments/iana-ipv6-special-registry.
"""

import asyncio
import os
import re
import socket
import time
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)
from typing import ClassVar

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from upchatty import __version__
from upchatty.errors import UpChattyError

USER_AGENT = f"UpChatty/{__version__}"
TOTAL_SECONDS = 60.0
CONNECT_SECONDS = 10.0
SILENCE_SECONDS = 20.0
REDIRECTS = 5
RATIO = 200  # of the bytes of a body to those that came for it: text has up to about 20
RATIO_FROM = 1024 * 1024  # bytes; short bodies may have any
CONNECTIONS_PER_HOST = 8
LONGEST_URL = 2000
LONGEST_FIELD = 500
BLOCK = 64 * 1024

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
Resolve = Callable[[str], Awaitable[Sequence[str]]]
"""The addresses of a name, as text; OSError where there are none."""

REDIRECT = (301, 302, 303, 307, 308)
TEMPORARY = (408, 425, 429)
NO_SUCH_NAME = (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME))
HOST_NAME = re.compile(r"[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?)*\.?", re.ASCII)
# The WHATWG's "ends in a number": what some resolver takes for an IPv4 address (0x7f.1, 127.1, 2130706433).
NUMBER_LAST = re.compile(r"(.*\.)?([0-9]+|0x[0-9a-f]*)\.?", re.ASCII)

NAT64 = IPv6Network("64:ff9b::/96")
SPECIAL = [
    (ip_network(network), kind)
    for kind, networks in {
        "a cloud provider's metadata": "169.254.169.254 fd00:ec2::254 168.63.129.16 "
        "100.100.100.200 192.0.0.192",
        "a loopback": "127.0.0.0/8 ::1",
        "an unspecified": "0.0.0.0/8 ::",
        "a link-local": "169.254.0.0/16 fe80::/10",
        "a private": "10.0.0.0/8 172.16.0.0/12 192.168.0.0/16 fc00::/7 fec0::/10",
        "a carrier's shared": "100.64.0.0/10",
        "a multicast": "224.0.0.0/4 ff00::/8",
        "a translated": "2002::/16 2001::/32 64:ff9b:1::/48",
        "a reserved": "192.0.0.0/24 192.0.2.0/24 192.88.99.0/24 198.18.0.0/15 198.51.100.0/24 "
        "203.0.113.0/24 240.0.0.0/4 2001::/23 2001:db8::/32 3fff::/20",
    }.items()
    for network in networks.split()
]
GLOBAL_UNICAST = IPv6Network("2000::/3")


class FetchRefused(UpChattyError):
    """A URL that must not be fetched, or leads to one. Trying again does not help."""

    sentence = "{url} is not fetched: {problem}"


class FetchFailed(UpChattyError):
    """A URL that could not be fetched.

    Args:
        permanent: Whether it is of no use to try again soon.
        status: The HTTP status, where one came.
        retry_after: Seconds after which the server asks to be tried again.
        fields: `url` and `problem`.
    """

    sentence = "{url} cannot be fetched: {problem}"

    def __init__(
        self,
        *,
        permanent: bool = False,
        status: int | None = None,
        retry_after: float | None = None,
        **fields: object,
    ) -> None:
        super().__init__(**fields)
        self.permanent = permanent
        self.status = status
        self.retry_after = retry_after


class UnwantedMediaType(FetchFailed):
    """A body of another kind than the caller accepts; it was not read."""

    sentence = "{url} is {media_type}, which is not read here"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """What came.

    Args:
        url: Where it came from in the end, after redirects.
        status: The HTTP status.
        media_type: The Content-Type, lower case, with its charset where one is given; None: not said.
        content: The body, decompressed; empty if it is not modified.
        etag: What it can be asked for with again.
        last_modified: Likewise.
        not_modified: It is still what the caller has.
        robots: The X-Robots-Tag field: what crawlers are asked.
    """

    url: str
    status: int
    media_type: str | None = None
    content: bytes = b""
    etag: str | None = None
    last_modified: str | None = None
    not_modified: bool = False
    robots: str = ""


async def resolve_name(host: str) -> list[str]:
    """The addresses of a name, as the operating system knows them."""
    infos = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in infos))


class Fetcher:
    """Fetches URLs that users name. `close` it in the end.

    Args:
        networks: Networks that may be reached although they are not public.
        max_bytes: Bytes that a body may have, decompressed.
        resolve: Finds the addresses of a name.
        total_seconds: How long one fetch may take, with its redirects.
        silence_seconds: How long a server may send nothing.
    """

    def __init__(
        self,
        networks: Collection[Network],
        max_bytes: int,
        *,
        resolve: Resolve = resolve_name,
        total_seconds: float = TOTAL_SECONDS,
        silence_seconds: float = SILENCE_SECONDS,
    ) -> None:
        self.max_bytes = max_bytes
        self._guard = _Guard(networks, resolve)
        self._total_seconds = total_seconds
        self._silence_seconds = silence_seconds
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        """Close the connections."""
        if self._session:
            await self._session.close()
            self._session = None

    async def fetch(
        self,
        url: str,
        *,
        etag: str | None = None,
        last_modified: str | None = None,
        accept: Sequence[str] = (),
    ) -> Fetched:
        """Fetch a URL.

        Args:
            url: An http or https URL.
            etag: What the caller has; if it is still that, nothing comes but `not_modified`
                (RFC 9110, section 13.1).
            last_modified: Likewise.
            accept: Media types to which the caller can do something; none: any. A body that is said to be
                of another is not read.

        Raises:
            FetchRefused: The URL, or one that it redirects to, must not be fetched.
            FetchFailed: Nothing came, or too much.
            UnwantedMediaType: It is not of a type in `accept`.
        """
        headers = {"Accept": ", ".join((*accept, "*/*;q=0.1")) if accept else "*/*"}
        if etag:
            headers["If-None-Match"] = etag
        if last_modified:
            headers["If-Modified-Since"] = last_modified
        try:
            async with asyncio.timeout(self._total_seconds):
                return await self._follow(_parsed(url), headers, accept)
        except TimeoutError:
            problem = f"it took longer than {self._total_seconds:g} seconds"
            raise FetchFailed(url=_shown(url), problem=problem) from None

    async def _follow(self, url: URL, headers: dict[str, str], accept: Sequence[str]) -> Fetched:
        first = url
        for _ in range(REDIRECTS + 1):
            self._guard.check_literal(url)
            with _network_errors(url):
                async with self._opened().get(url, headers=headers, allow_redirects=False) as response:
                    if response.status not in REDIRECT or "Location" not in response.headers:
                        return await self._received(response, accept)
                    url = _parsed(response.headers["Location"], base=url)
        problem = f"it redirects more than {REDIRECTS} times"
        raise FetchFailed(url=_shown(first), problem=problem, permanent=True)

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.TCPConnector(
                resolver=self._guard,
                use_dns_cache=False,
                socket_factory=self._guard.open_socket,
                limit_per_host=CONNECTIONS_PER_HOST,
            )
            self._session = aiohttp.ClientSession(
                connector=connector,
                cookie_jar=aiohttp.DummyCookieJar(),
                trust_env=False,
                headers={"User-Agent": USER_AGENT, "Accept-Encoding": "gzip, deflate"},
                timeout=aiohttp.ClientTimeout(sock_connect=CONNECT_SECONDS, sock_read=self._silence_seconds),
            )
        return self._session

    async def _received(self, response: aiohttp.ClientResponse, accept: Sequence[str]) -> Fetched:
        _check_status(response)
        media_type = _field(response, "Content-Type")
        fetched = Fetched(
            url=str(response.url),
            status=response.status,
            media_type=media_type and media_type.lower(),
            etag=_field(response, "ETag"),
            last_modified=_field(response, "Last-Modified"),
            not_modified=response.status == 304,
            robots=", ".join(response.headers.getall("X-Robots-Tag", [])),
        )
        if fetched.not_modified:
            return fetched
        bare = (fetched.media_type or "").partition(";")[0].strip()
        if accept and bare and bare not in accept:
            raise UnwantedMediaType(url=_shown(response.url), media_type=bare, permanent=True)
        return replace(fetched, content=await self._body(response))

    async def _body(self, response: aiohttp.ClientResponse) -> bytes:
        """The body; what is too large is not read to its end."""
        url = response.url
        if (response.content_length or 0) > self.max_bytes:
            raise self._too_large(url)
        body = bytearray()
        async for block in response.content.iter_chunked(BLOCK):
            body += block
            if len(body) > self.max_bytes:
                raise self._too_large(url)
            if len(body) > max(RATIO_FROM, RATIO * response.content.total_raw_bytes):
                problem = f"its body grows more than {RATIO} times when it is decompressed"
                raise FetchFailed(url=_shown(url), problem=problem, permanent=True)
        return bytes(body)

    def _too_large(self, url: URL) -> FetchFailed:
        problem = (
            f"it has more than {self.max_bytes:,} bytes; "
            "the operator can allow more with the setting max_document_bytes"
        )
        return FetchFailed(url=_shown(url), problem=problem, permanent=True)


class _Guard(AbstractResolver):
    """Decides about addresses, and is in the way of every connection."""

    _advice: ClassVar[str] = "; if it may be fetched, the operator can allow that with fetch_networks"

    def __init__(self, networks: Collection[Network], resolve: Resolve) -> None:
        self._networks = networks
        self._resolve = resolve

    def check_literal(self, url: URL) -> None:
        """Check a host that is an address itself: aiohttp does not resolve those.

        Raises:
            FetchRefused: It must not be connected to.
        """
        if (address := _literal(url)) and (kind := self._refused(address)):
            raise FetchRefused(url=_shown(url), problem=f"its host is {kind} address{self._advice}")

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """The addresses of a name, if all of them may be connected to.

        Raises:
            FetchRefused: One of them must not be connected to.
            OSError: There are none.
        """
        async with asyncio.timeout(CONNECT_SECONDS):
            addresses = [ip_address(text) for text in await self._resolve(host)]
        for address in addresses:
            if kind := self._refused(address):
                raise FetchRefused(url=host, problem=f"its name leads to {kind} address{self._advice}")
        if not addresses:
            raise socket.gaierror(socket.EAI_NONAME, "the name has no address")
        return [
            ResolveResult(
                hostname=host,
                host=str(address),
                port=port,
                family=_family(address),
                proto=socket.IPPROTO_TCP,
                flags=socket.AI_NUMERICHOST,
            )
            for address in addresses
        ]

    async def close(self) -> None:
        pass

    def open_socket(self, target: aiohttp.AddrInfoType) -> socket.socket:
        """A socket for an address, which nothing but this makes.

        Raises:
            PermissionError: It must not be connected to.
        """
        family, kind, protocol, _, sockaddr = target
        if self._refused(ip_address(str(sockaddr[0]))):
            raise PermissionError("the address must not be connected to")
        return socket.socket(family, kind, protocol)

    def _refused(self, address: Address) -> str | None:
        """What kind of address it is, with its article, if it must not be connected to."""
        address = _carried(address)
        if any(address in network for network in self._networks):
            return None
        for network, kind in SPECIAL:
            if address in network:
                return kind
        is_public = address.is_global if address.version == 4 else address in GLOBAL_UNICAST
        return None if is_public else "a reserved"


def _carried(address: Address) -> Address:
    """The IPv4 address that packets to an IPv6 address reach, where it is one (RFC 4291, RFC 6052)."""
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped:
            return address.ipv4_mapped
        if address in NAT64:
            return IPv4Address(int(address) & 0xFFFFFFFF)
    return address


def _family(address: Address) -> socket.AddressFamily:
    return socket.AF_INET if address.version == 4 else socket.AF_INET6


def _literal(url: URL) -> Address | None:
    try:
        return ip_address(url.raw_host or "")
    except ValueError:
        return None


def _parsed(text: str, base: URL | None = None) -> URL:
    """A URL in the one form that its spellings have.

    Raises:
        FetchRefused: It is none, or none that may be fetched wherever it leads.
    """
    try:
        url = URL(text.strip())
        if base:
            url = base.join(url)
    except ValueError:
        raise FetchRefused(url=_shown(text), problem="it is not a valid URL") from None
    if problem := _problem(url):
        raise FetchRefused(url=_shown(url), problem=problem)
    return url.with_fragment(None)


def _problem(url: URL) -> str | None:
    if url.scheme not in ("http", "https"):
        return "only http and https URLs are"
    if url.raw_user is not None or url.raw_password is not None:
        return "it carries a login, which would be kept with the document"
    if len(str(url)) > LONGEST_URL:
        return f"it has more than {LONGEST_URL} characters"
    if url.port == 0:
        return "there is no port 0"
    host = url.raw_host or ""
    if ":" in host:
        return None if _literal(url) and "%" not in host else "it has no valid host"
    if not HOST_NAME.fullmatch(host.lower()):
        return "it has no valid host name"
    if NUMBER_LAST.fullmatch(host.lower()) and not _literal(url):
        return "its host is neither a name nor an address in its usual form, such as 192.0.2.1"
    return None


def _check_status(response: aiohttp.ClientResponse) -> None:
    status = response.status
    was_conditional = any(name.startswith("If-") for name in response.request_info.headers)
    if (status in range(200, 300) and status != 206) or (status == 304 and was_conditional):
        return
    is_temporary = status >= 500 or status in TEMPORARY
    try:
        name = f"{status} {HTTPStatus(status).phrase}"
    except ValueError:
        name = str(status)
    raise FetchFailed(
        url=_shown(response.url),
        problem=f"the server answered {name}",
        permanent=not is_temporary,
        status=status,
        retry_after=_retry_after(response.headers.get("Retry-After", "")) if is_temporary else None,
    )


def _retry_after(value: str) -> float | None:
    """Seconds, from a number of them or a date (RFC 9110, section 10.2.3)."""
    if value.isascii() and value.isdigit():
        return float(value[:9])
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _field(response: aiohttp.ClientResponse, name: str) -> str | None:
    """A header's value, if it is one that can be kept and sent back."""
    value = response.headers.get(name, "")
    return (
        value if value and len(value) <= LONGEST_FIELD and value.isascii() and value.isprintable() else None
    )


@contextmanager
def _network_errors(url: URL) -> Iterator[None]:
    """Turn what aiohttp raises into FetchFailed with a sentence."""
    shown = _shown(url)
    try:
        yield
    except aiohttp.ClientConnectorCertificateError:
        raise FetchFailed(url=shown, problem="its certificate is not trusted", permanent=True) from None
    except aiohttp.ClientConnectorDNSError as error:
        is_unknown = error.os_error.errno in NO_SUCH_NAME
        problem = "there is no such host" if is_unknown else "its host's name could not be resolved"
        raise FetchFailed(url=shown, problem=problem, permanent=is_unknown) from None
    except aiohttp.ClientSSLError:
        raise FetchFailed(url=shown, problem="no encrypted connection to its host") from None
    except aiohttp.ClientConnectorError as error:
        # The number's own text: that of the error names the address.
        reason = os.strerror(error.os_error.errno) if error.os_error.errno else "it failed"
        raise FetchFailed(url=shown, problem=f"no connection to its host ({reason})") from None
    except (aiohttp.InvalidURL, UnicodeError):
        raise FetchRefused(url=shown, problem="it is not a valid URL") from None
    except aiohttp.SocketTimeoutError:
        raise FetchFailed(url=shown, problem="the server was silent for too long") from None
    except aiohttp.ClientResponseError:
        raise FetchFailed(url=shown, problem="what the server sent is not valid HTTP") from None
    except TimeoutError:  # of the connection, or of the name server
        raise FetchFailed(url=shown, problem="its host did not answer in time") from None
    except (aiohttp.ClientError, OSError):
        raise FetchFailed(url=shown, problem="the connection broke off") from None


def _shown(url: str | URL) -> str:
    """A URL for a sentence: without a login, printable, and not too long."""
    text = re.sub(r"(?<=//)[^/?#]*@", "", str(url))
    text = "".join(character if character.isprintable() else "?" for character in text)
    return text if len(text) <= 200 else f"{text[:200]}…"
