"""Several servers behind one model: each with its own key, name and weight; what is wrong in the settings."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support import question
from upchatty.errors import ConfigurationError
from upchatty.settings import Settings
from upchatty.testing import ScriptedAnswer, ScriptedEngine, running_server


@asynccontextmanager
async def asking(folder: Path, **model: Any) -> AsyncIterator[Any]:
    """A function that asks a server whose default model has these settings."""
    async with running_server(Settings(data_dir=folder, models={"default": model})) as server:
        headers = {"Authorization": f"Bearer {server.key}"}
        async with httpx.AsyncClient(
            verify=False, base_url=server.address + "/api/v1", headers=headers
        ) as client:

            async def ask(**parameters: Any) -> httpx.Response:
                return await client.post(
                    "/chat/completions", json=question(server.chatbot.id, **parameters), timeout=20
                )

            yield ask


async def test_each_replica_has_its_own_key_and_model_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FIRST_KEY", "first-secret")
    monkeypatch.setenv("COMMON_KEY", "common-secret")
    (tmp_path / "key").write_text("second-secret\n")
    async with ScriptedEngine() as first, ScriptedEngine() as second, ScriptedEngine() as third:
        replicas = [
            {"url": first.url, "api_key_env": "FIRST_KEY", "model": "first-name"},
            {"url": second.url, "api_key_file": str(tmp_path / "key")},
            {"url": third.url},
        ]
        common = {"model": "common-name", "api_key_env": "COMMON_KEY"}
        slow = ScriptedAnswer(headers_delay=0.3)
        for engine in (first, second, third):
            engine.default = slow
        async with asking(tmp_path / "data", replicas=replicas, **common) as ask:
            answers = await asyncio.gather(*(ask() for _ in range(9)))
    assert {answer.status_code for answer in answers} == {200}
    asked = [
        {(request.headers["Authorization"], request.body["model"]) for request in engine.requests}
        for engine in (first, second, third)
    ]
    assert asked == [
        {("Bearer first-secret", "first-name")},
        {("Bearer second-secret", "common-name")},
        {("Bearer common-secret", "common-name")},
    ]


async def test_work_follows_the_weights(tmp_path: Path) -> None:
    async with (
        ScriptedEngine(ScriptedAnswer(delay=0.1)) as heavy,
        ScriptedEngine(ScriptedAnswer(delay=0.1)) as light,
    ):
        replicas = [{"url": heavy.url, "weight": 3}, {"url": light.url, "weight": 1}]
        async with asking(tmp_path, replicas=replicas) as ask:
            await asyncio.gather(*(ask() for _ in range(40)))
    assert len(heavy.requests) + len(light.requests) == 40
    assert 2 <= len(heavy.requests) / len(light.requests) <= 4.5


async def test_slots_of_each_replica(tmp_path: Path) -> None:
    async with (
        ScriptedEngine(ScriptedAnswer(delay=0.2)) as narrow,
        ScriptedEngine(ScriptedAnswer(delay=0.2)) as wide,
    ):
        replicas = [{"url": narrow.url, "slots": 1}, {"url": wide.url, "slots": 5}]
        async with asking(tmp_path, replicas=replicas, queue=0) as ask:
            answers = await asyncio.gather(*(ask() for _ in range(8)))
    assert sorted(answer.status_code for answer in answers) == [200] * 6 + [503] * 2
    assert (len(narrow.requests), len(wide.requests)) == (1, 5)


async def test_fallbacks_that_refer_to_each_other_end(tmp_path: Path) -> None:
    async with ScriptedEngine(ScriptedAnswer(status=500)) as engine:
        models = {
            "default": {"url": engine.url, "fallback": "other"},
            "other": {"url": engine.url, "fallback": "default"},
        }
        async with running_server(Settings(data_dir=tmp_path, models=models)) as server:
            url, headers = (
                server.address + "/api/v1/chat/completions",
                {"Authorization": f"Bearer {server.key}"},
            )
            answer = await asyncio.to_thread(
                httpx.post, url, headers=headers, json=question(server.chatbot.id)
            )
    assert answer.status_code == 502
    assert len(engine.requests) == 2


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"url": "http://a/v1", "replicas": [{"url": "http://b/v1"}]}, ["exactly one", "url and replicas"]),
        ({"replicas": [{"weight": 1}]}, ["replicas", "url"]),
        ({"replicas": [{"url": "http://a/v1", "weight": 0}]}, ["weight"]),
        ({"replicas": [{"url": "http://a/v1", "slots": 0}]}, ["slots"]),
        ({"replicas": [{"url": "http://a/v1", "wieght": 1}]}, ["wieght"]),
        ({"replicas": [{"url": "gpu1:8000"}]}, ["http://", "gpu1:8000"]),
        ({"url": "ftp://a/v1"}, ["http://", "ftp"]),
        ({"url": "http://bücher.example/v1"}, ["http://", "bücher"]),
        ({"url": "http://a/v1", "fallback": "nobody"}, ["fallback", "nobody"]),
        ({"url": "http://a/v1", "fallback": "default"}, ["fallback", "another model"]),
        ({"url": "http://a/v1", "deadline_seconds": 0}, ["deadline_seconds"]),
    ],
)
def test_wrong_settings_are_told(model: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigurationError) as told:
        Settings(models={"default": model})
    for word in words:
        assert word in str(told.value)


@pytest.mark.parametrize(
    ("key", "word"),
    [({"api_key_env": "NOT_SET_ANYWHERE"}, "NOT_SET"), ({"api_key_file": "two lines"}, "ASCII")],
)
async def test_a_key_that_is_none_keeps_the_server_from_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: dict[str, str], word: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "two lines").write_text("first\nsecond\n")
    models = {"default": {"replicas": [{"url": "http://127.0.0.1:9/v1"} | key]}}
    with pytest.raises(ConfigurationError, match=word):
        async with running_server(Settings(data_dir=tmp_path / "data", models=models)):
            pass
