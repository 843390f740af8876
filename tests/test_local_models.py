"""Several models that run here: loaded when they are asked, unloaded when another one needs the room."""

import json
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.faults import eventually, open_stream, record
from tests.support import Server, assert_error, question
from upchatty.engines.gguf import least_memory
from upchatty.errors import ConfigurationError
from upchatty.settings import Settings

MIB = 1024 * 1024
# One small model takes about 170 MiB, with its share for cached prompts 240 at most: two of them fit.
ROOM_FOR_TWO = "520MiB"
ROOM_FOR_ONE = "300MiB"
SIZE = re.compile(r'"memory_mib": ?(\d+)')


class LocalModels:
    """A server with several small models, and a chatbot of each.

    Args:
        server: The server.
    """

    def __init__(self, server: Server) -> None:
        self.server = server
        self.client = server.client()
        self._chatbots: dict[str, str] = {}

    def chatbot(self, model: str) -> str:
        """The chatbot of this model."""
        if model not in self._chatbots:
            made = self.client.post("/chatbots", json={"name": model, "model": model})
            self._chatbots[model] = made.json()["id"]
        return self._chatbots[model]

    def ask(self, model: str, patience: float = 60, **parameters: Any) -> httpx.Response:
        """A short question to this model."""
        body = question(self.chatbot(model), **({"max_tokens": 2} | parameters))
        return self.client.post("/chat/completions", json=body, headers={"X-Request-Timeout": str(patience)})

    def story(self, model: str) -> dict[str, Any]:
        """A question whose answer takes a while."""
        return question(self.chatbot(model), "Write a long story about a whale.", max_tokens=400, seed=1)

    def loaded(self) -> set[str]:
        """The models in memory, by the metrics."""
        text = httpx.get(self.server.address + "/metrics").text
        return set(re.findall(r'^upchatty_model_loaded{model="(\w+)"} 1\.0$', text, re.MULTILINE))

    def engines(self) -> list[psutil.Process]:
        """The processes that run llama.cpp."""
        assert self.server.process
        found = []
        for child in psutil.Process(self.server.process.pid).children():
            with suppress(psutil.Error):
                if "upchatty.engines.llama_child" in child.cmdline():
                    found.append(child)
        return found

    def is_ready(self) -> bool:
        """Whether the server calls itself ready."""
        return httpx.get(self.server.address + "/health/ready", timeout=30).status_code == 200

    def times_logged(self, event: str, model: str) -> int:
        """How often something was said of a model."""
        lines = [json.loads(line) for line in self.server.log().splitlines() if line.startswith("{")]
        return sum(line["event"] == event and line.get("model") == model for line in lines)


def serve(folder: Path, models: dict[str, dict[str, Any]], memory: str = "0") -> Iterator[LocalModels]:
    """A server with these models, the first one the default."""
    environment = {
        "UPCHATTY_MODELS": json.dumps(models),
        "UPCHATTY_DEFAULT_MODEL": next(iter(models)),
        "UPCHATTY_MODELS_MEMORY": memory,
    }
    with Server(folder, **environment) as server:
        yield LocalModels(server)
        assert server.stop() == 0


@pytest.fixture(scope="module")
def small(model_file: Path) -> dict[str, Any]:
    """The settings of a small model."""
    return {"path": str(model_file), "context": 512, "slots": 1, "threads": 1}


@pytest.fixture(scope="module")
def bad_file(model_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model file of which half is missing."""
    file = tmp_path_factory.mktemp("bad") / "half.gguf"
    file.write_bytes(model_file.read_bytes()[: model_file.stat().st_size // 2])
    return file


@pytest.fixture(scope="module")
def without_limit(
    small: dict[str, Any], bad_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalModels]:
    half = small | {"path": str(bad_file)}
    models = {"one": small, "two": small, "three": small, "half": half, "saved": half | {"fallback": "one"}}
    yield from serve(tmp_path_factory.mktemp("models"), models)


@pytest.fixture(scope="module")
def room_for_one(small: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalModels]:
    yield from serve(tmp_path_factory.mktemp("models"), {"one": small, "two": small}, ROOM_FOR_ONE)


@pytest.fixture
def room_for_two(small: dict[str, Any], tmp_path: Path) -> Iterator[LocalModels]:
    yield from serve(tmp_path, dict.fromkeys(("one", "two", "three"), small), ROOM_FOR_TWO)


def test_loaded_when_asked_and_once_for_all_who_wait(without_limit: LocalModels) -> None:
    models = without_limit
    assert models.loaded() == {"one"} and len(models.engines()) == 1
    models.chatbot("two")
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(models.ask, ["two"] * 4))
    assert [answer.status_code for answer in answers] == [200] * 4
    assert models.loaded() == {"one", "two"} and len(models.engines()) == 2
    assert models.times_logged("model loaded", "two") == 1
    waited = record(models.server, answers[0].json()["id"])["queue_ms"]
    assert waited > 100  # for the model

    table = models.server.run("models", "list").stdout.splitlines()
    assert table[0].endswith("LOADED")
    assert {line.split()[0] for line in table if line.endswith(" yes")} == {"one", "two"}
    assert json.loads(models.server.run("status", "--json").stdout)["loaded"] == ["one", "two"]


def test_nobody_waits_forever_for_a_model(without_limit: LocalModels) -> None:
    without_limit.chatbot("three")
    response = without_limit.ask("three", patience=0.2)
    assert_error(response, 503, "'three'", "could not be loaded within 0.")
    assert int(response.headers["retry-after"]) >= 1
    eventually(lambda: "three" in without_limit.loaded())  # for the next ones


def test_file_that_cannot_be_loaded(without_limit: LocalModels, model_file: Path, bad_file: Path) -> None:
    models = without_limit
    for _ in range(3):
        response = models.ask("half")
        assert_error(response, 503, "'half'", "cannot be loaded", "log")
        assert 1 <= int(response.headers["retry-after"]) <= 5
        assert str(bad_file) not in response.text
    assert models.times_logged("model not loaded", "half") == 1  # then it was left alone
    assert models.ask("saved").headers["x-upchatty-fallback"] == "one"
    assert "half" not in models.loaded() and models.is_ready()
    bad_file.write_bytes(model_file.read_bytes())
    eventually(lambda: models.ask("half").status_code == 200)


def test_least_recently_used_gives_way(room_for_two: LocalModels) -> None:
    models = room_for_two
    (first,) = models.engines()
    assert models.ask("two").status_code == 200
    assert models.loaded() == {"one", "two"}
    assert models.ask("one").status_code == 200
    assert models.ask("three").status_code == 200
    assert models.loaded() == {"one", "three"}  # two was used before one
    assert models.ask("two").status_code == 200
    assert models.loaded() == {"two", "three"}
    assert not first.is_running()
    assert len(models.engines()) == 2
    assert sum(engine.memory_info().rss for engine in models.engines()) < 520 * MIB
    assert int(SIZE.findall(models.server.log())[0]) in range(100, 260)

    # The default model will be loaded when it is asked: that is ready.
    assert models.is_ready()
    assert models.times_logged("model unloaded", "one") == 1
    assert models.ask("one").status_code == 200
    assert "one" in models.loaded() and models.is_ready()
    assert models.server.metric("upchatty_engine_restarts", model="one") == 0


def test_a_model_that_answers_stays(room_for_one: LocalModels) -> None:
    models = room_for_one
    with ThreadPoolExecutor(1) as threads:
        with open_stream(models.client, models.story("one"), pieces=2) as stream:
            refused = models.ask("two", patience=1.0)
            assert_error(refused, 503, "'two'", "memory", "other models")
            assert int(refused.headers["retry-after"]) >= 1
            patient = threads.submit(models.ask, "two")
            eventually(lambda: models.server.metric("upchatty_completions_waiting", model="two") == 1)
            assert models.loaded() == {"one"}
            stream.read_pieces(2)
        assert patient.result().status_code == 200
    assert models.loaded() == {"two"} and len(models.engines()) == 1


def test_models_that_take_turns(room_for_one: LocalModels) -> None:
    models = room_for_one
    for name in ("one", "two"):
        models.chatbot(name)
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(models.ask, ["one", "two"] * 3))
    assert [answer.status_code for answer in answers] == [200] * 6
    assert len(models.engines()) == 1


def test_a_busy_model_cannot_keep_another_one_out(room_for_one: LocalModels) -> None:
    models = room_for_one
    models.chatbot("two")
    enough = threading.Event()
    served: list[int] = []

    def keep_asking(_: int) -> None:
        while not enough.is_set():
            served.append(models.ask("one", max_tokens=8).status_code)

    with ThreadPoolExecutor(3) as threads:
        busy = threads.map(keep_asking, range(3))
        eventually(lambda: len(served) > 3)
        try:
            assert models.ask("two", patience=30).status_code == 200
        finally:
            enough.set()
        list(busy)
    assert set(served) == {200}


def test_model_that_is_too_large(small: dict[str, Any], tmp_path: Path) -> None:
    models = {"one": small, "large": small | {"context": 16384}}
    server = Server(
        tmp_path,
        UPCHATTY_MODELS=json.dumps(models),
        UPCHATTY_DEFAULT_MODEL="one",
        UPCHATTY_MODELS_MEMORY=ROOM_FOR_ONE,
    )
    ended = server.run("serve", "--port", "0", timeout=60)
    assert ended.returncode == 2
    sentence = ended.stderr.splitlines()[-1]
    assert "models_memory" in sentence and "'large'" in sentence and "300 MiB" in sentence


def test_default_model_that_turns_out_too_large(small: dict[str, Any], tmp_path: Path) -> None:
    more_than_the_file = "110MiB"
    server = Server(
        tmp_path,
        UPCHATTY_MODELS=json.dumps({"default": small}),
        UPCHATTY_MODELS_MEMORY=more_than_the_file,
    )
    ended = server.run("serve", "--port", "0", timeout=60)
    assert ended.returncode == 2
    assert "models_memory: the model 'default' takes 1" in ended.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("1000", 1000), ("6GiB", 6 << 30), ("1.5 gb", 1_500_000_000), ("512M", 512 << 20)],
)
def test_sizes(text: str, size: int) -> None:
    assert Settings(models_memory=text).models_memory_bytes == size


@pytest.mark.parametrize("text", ["", "much", "-1", "6 GiB each", "1e9", "GiB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"models_memory: .*6GiB"):
        Settings(models_memory=text)


def test_least_memory(model_file: Path, tmp_path: Path) -> None:
    weights = model_file.stat().st_size
    # SmolLM2-135M's 30 layers each keep keys and values of 3 heads with 64 numbers of 2 bytes.
    assert least_memory(model_file, 1000) == weights + 1000 * 30 * 3 * 64 * 2 * 2
    header, damaged = model_file.read_bytes()[:200_000], tmp_path / "damaged.gguf"
    for end in (24, 25, 300, 1000, 100_000):
        damaged.write_bytes(header[:end])
        assert least_memory(damaged, 1000) >= end
    for at in range(24, 1200, 7):
        damaged.write_bytes(header[:at] + b"\xff" * 9 + header[at + 9 :])
        assert least_memory(damaged, 1000) >= len(header)
