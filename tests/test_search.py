"""Searching passages: over HTTP, on both databases, with an engine whose embeddings tell of words."""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from sqlalchemy import insert, text

from tests.support import ADMIN_KEY, UNENCRYPTED, assert_error
from upchatty.engines.embedding import EmbeddingModel
from upchatty.engines.files import ModelFiles
from upchatty.engines.pool import Pool
from upchatty.knowledge.follow_ups import search_texts
from upchatty.knowledge.search import Search
from upchatty.knowledge.words import question_terms, terms
from upchatty.metrics import Metrics
from upchatty.settings import Settings
from upchatty.storage.database import Database
from upchatty.storage.passages import NewPassage, embedded_hashes, publish
from upchatty.storage.tables import documents
from upchatty.testing import ScriptedAnswer, ScriptedEngine, running_server

pytestmark = pytest.mark.asyncio(loop_scope="module")

LANGUAGES = {
    "Chinese": ("图书馆周一至周五早上九点开门。", "图书馆几点开门?"),
    "Japanese": ("会員登録はウェブサイトから無料でできます。", "会員登録の方法は?"),
    "Thai": ("พิพิธภัณฑ์เปิดทุกวันเวลาเก้าโมงเช้า", "พิพิธภัณฑ์เปิดกี่โมง"),
    "Korean": ("도서관은 월요일에 휴관합니다.", "도서관 휴관"),
    "Russian": ("Детские площадки открыты до вечера.", "Где детская площадка?"),
    "German": ("Die Öffnungszeiten der Häuser stehen am Eingang.", "Welche Oeffnungszeit hat das Haus?"),
    "Arabic": ("تفتح المكتبة أبوابها كل صباح", "متى تفتح المكتبة؟"),
    "Hindi": ("किताबें पुस्तकालय में मिलती हैं", "किताब कहाँ मिलती है"),
    "French": ("Les enfants reçoivent un goûter à l'école.", "Quel gouter pour un enfant ?"),
    "code": ("Call getUserName() or run pg_dump --force with utf-8.", "what does --force do in pg_dump"),
}


def document_id(chatbot: str, name: str) -> str:
    """The id of a document that a test puts in."""
    return "doc_" + hashlib.sha256(f"{chatbot} {name}".encode()).hexdigest()[:32]


@dataclass
class Running:
    """A server, and what puts passages beside it into its database."""

    client: httpx.AsyncClient
    database: Database
    embedding: EmbeddingModel
    engine: ScriptedEngine

    async def chatbot(self) -> str:
        made = await self.client.post("/chatbots", json={"name": "Searching"})
        assert made.status_code == 201, made.text
        return str(made.json()["id"])

    async def put(self, chatbot: str, document: str, *texts: str, url: str | None = None) -> None:
        """Put a document in, or its new version."""
        document = document_id(chatbot, document)
        row = {"id": document, "chatbot_id": chatbot, "kind": "text", "title": "A title", "url": url}
        row |= {"identity": hashlib.sha256(document.encode()).hexdigest(), "status": "ready"}
        async with self.database.transaction() as connection:
            there = text("SELECT 1 FROM documents WHERE id = :id")
            if not await connection.scalar(there, {"id": document}):
                await connection.execute(insert(documents).values(row | {"created_at": 0, "updated_at": 0}))
        model = self.embedding.fingerprint
        known = await embedded_hashes(self.database, document, model)
        vectors = await self.embedding.embed(texts)
        passages = [
            NewPassage(
                position=position,
                headings=["Chapter"],
                page=None,
                anchor="there",
                text=passage,
                terms=" ".join(terms(passage)),
                tokens=len(passage.split()),
                hash=(hash_ := hashlib.sha256(passage.encode()).hexdigest()),
                embedding=None if hash_ in known else vector.astype("<f2").tobytes(),
            )
            for position, (passage, vector) in enumerate(zip(texts, vectors, strict=True))
        ]
        assert await publish(
            self.database,
            document,
            chatbot,
            passages=passages,
            embedding_model=model,
            document={"passages": len(texts)},
        )

    async def search(self, chatbot: str, query: str, **parameters: Any) -> dict[str, Any]:
        response = await self.client.post(f"/chatbots/{chatbot}/search", json={"query": query} | parameters)
        assert response.status_code == 200, response.text
        return dict(response.json())

    async def texts(self, chatbot: str, query: str, **parameters: Any) -> list[str]:
        """The texts of the passages that are kept."""
        found = await self.search(chatbot, query, **parameters)
        return [passage["text"] for passage in found["data"] if passage["kept"]]

    async def count(self, query: str, **parameters: Any) -> int:
        async with self.database.transaction() as connection:
            return int(await connection.scalar(text(query), parameters) or 0)


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def settings_of_database(
    request: pytest.FixtureRequest,
    new_database: Callable[[str], str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[str, Any]]:
    """Where the database is."""
    folder = tmp_path_factory.mktemp("search")
    return {"data_dir": folder, "database_url": new_database(request.param), "admin_key": ADMIN_KEY}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(settings_of_database: dict[str, Any]) -> AsyncIterator[Running]:
    """A server with its database."""
    async with ScriptedEngine(dimensions=256) as engine:
        models: dict[str, dict[str, Any]] = {"default": {"url": engine.url}}
        models["embedding"] = {"url": engine.url, "task": "embedding"}
        models["frail"] = {"url": engine.url, "fallback": "default"}
        settings = Settings(models=models, workers=0, **settings_of_database)
        pool = await Pool.open(settings, ModelFiles(settings.cache_dir), Metrics())
        async with running_server(settings) as server:
            database = Database(settings.database_url, settings.sqlite_file)
            headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
            url = server.address + "/api/v1"
            async with httpx.AsyncClient(base_url=url, headers=headers, timeout=30, **UNENCRYPTED) as client:
                assert pool.embedding
                yield Running(client, database, pool.embedding, engine)
            await database.close()
        await pool.stop()


async def test_every_language_finds_its_words(running: Running) -> None:
    chatbot = await running.chatbot()
    await running.put(chatbot, "all", *(passage for passage, _ in LANGUAGES.values()))
    for language, (passage, question) in LANGUAGES.items():
        found = await running.search(chatbot, question, limit=1)
        [best] = [finding for finding in found["data"] if finding["kept"]]
        assert best["text"] == passage, language
        assert best["lexical_rank"] == 1, language


async def test_explanation(running: Running) -> None:
    chatbot = await running.chatbot()
    await running.put(
        chatbot, "a", "The shop opens at nine.", "Dogs are welcome.", url="https://example.com/a#x"
    )
    await running.put(chatbot, "b", "The shop opens at nine.", "The shop opens late on Sundays.")
    found = await running.search(chatbot, "When does the shop open?", limit=1)
    best, *others = found["data"]
    assert best["kept"] and best["url"] in ("https://example.com/a#there", None)
    assert best["headings"] == ["Chapter"] and best["title"] == "A title"
    assert best["lexical_rank"] == 1 and best["vector_rank"] in (1, 2)
    assert found["score"] == best["score"] == max(finding["score"] for finding in found["data"])
    assert all(0 <= finding["score"] <= 1 for finding in found["data"])
    reasons = {finding["text"]: finding["reason"] for finding in others}
    assert "same text" in reasons["The shop opens at nine."]
    assert "limit of 1" in reasons["The shop opens late on Sundays."]
    assert "threshold" in reasons["Dogs are welcome."]
    assert not any(finding["kept"] for finding in others)


async def test_chatbots_do_not_see_each_other(running: Running) -> None:
    mine, other = await running.chatbot(), await running.chatbot()
    await running.put(mine, "a", "The password of the wireless network is walnut.")
    await running.put(other, "a", "There is no wireless network.")
    assert await running.texts(other, "password of the wireless network") == ["There is no wireless network."]
    assert await running.texts(await running.chatbot(), "password") == []


async def test_new_version_replaces_the_old_one(running: Running) -> None:
    chatbot = await running.chatbot()
    await running.put(chatbot, "a", "Entry costs five euros.", "The garden closes at eight.")
    kept = "SELECT id FROM passages WHERE chatbot_id = :chatbot AND text LIKE 'The garden%'"
    before = await running.count(kept, chatbot=chatbot)
    assert await running.texts(chatbot, "What does entry cost?", limit=1) == ["Entry costs five euros."]
    await running.put(chatbot, "a", "Entry costs seven euros.", "The garden closes at eight.")
    assert await running.texts(chatbot, "What does entry cost?", limit=1) == ["Entry costs seven euros."]
    assert await running.texts(chatbot, "When does the garden close?", limit=1) == [
        "The garden closes at eight."
    ]
    assert await running.count(kept, chatbot=chatbot) == before  # neither stored nor embedded again


async def test_readers_see_a_version_whole_and_writers_do_not_block_each_other(running: Running) -> None:
    chatbot = await running.chatbot()
    versions = [[f"Walnut {number} {part}." for part in range(20)] for number in range(6)]
    await running.put(chatbot, "a", *versions[0])

    async def write(document: str) -> None:
        for version in versions:
            await running.put(chatbot, document, *version)

    writing = asyncio.gather(*(write(document) for document in "abcd"))
    while not writing.done():
        found = await running.search(chatbot, "walnut", limit=50)
        of_a = {t["text"].split()[1] for t in found["data"] if t["document_id"] == document_id(chatbot, "a")}
        assert len(of_a) <= 1
    await writing
    total = "SELECT {} FROM passage_totals WHERE chatbot_id = :chatbot"
    assert await running.count(total.format("passages"), chatbot=chatbot) == 80
    walnuts = "SELECT passages FROM passage_terms WHERE chatbot_id = :chatbot AND term = 'walnut'"
    assert await running.count(walnuts, chatbot=chatbot) == 80


async def test_what_is_removed_leaves_nothing(running: Running) -> None:
    chatbot = await running.chatbot()
    await running.put(chatbot, "a", "A rare quokka lives here.", "Another quokka.")
    await running.put(chatbot, "b", "No animal lives here.")
    assert len(await running.texts(chatbot, "quokka")) == 2
    gone = await running.client.delete(f"/chatbots/{chatbot}/documents/{document_id(chatbot, 'a')}")
    assert gone.status_code == 204, gone.text
    assert "A rare quokka lives here." not in await running.texts(chatbot, "Where does the quokka live?")
    terms_left = "SELECT count(*) FROM passage_terms WHERE chatbot_id = :chatbot"
    assert await running.count(terms_left, chatbot=chatbot) == len(set(terms("No animal lives here.")))
    assert (await running.client.delete(f"/chatbots/{chatbot}")).status_code == 204
    for table in ("passages", "passage_totals", "passage_terms"):
        left = f"SELECT count(*) FROM {table} WHERE chatbot_id = :chatbot"
        assert await running.count(left, chatbot=chatbot) == 0
    if running.database._engine.dialect.name == "sqlite":
        index = "SELECT count(*) FROM passage_index WHERE passage_index MATCH 'quokka'"
        assert await running.count(index) == 0


async def test_follow_ups(running: Running) -> None:
    chatbot = await running.chatbot()
    await running.put(
        chatbot,
        "a",
        "A swimming course for adults costs 90 euros.",
        "A swimming course for children costs 60 euros.",
        "The library has books for children.",
        "Parking costs two euros an hour.",
    )
    earlier = ["What does the swimming course for adults cost?"]
    [best] = await running.texts(chatbot, "And for children?", messages=earlier, limit=1)
    assert best == "A swimming course for children costs 60 euros."
    alone = await running.search(chatbot, "How much does parking cost per hour?", messages=earlier)
    assert alone["query"] == ["How much does parking cost per hour?"]
    assert alone["data"][0]["text"] == "Parking costs two euros an hour."


@pytest.mark.parametrize(
    ("question", "refers"),
    [
        ("And for children?", True),
        ("What about refunds?", True),
        ("How much does it cost?", True),
        ("Why?", True),
        ("For groups?", True),
        ("Und für Kinder?", True),
        ("Et pour les enfants ?", True),
        ("А для детей?", True),
        ("那儿童呢?", True),
        ("What is PostgreSQL?", False),
        ("How do I change the billing address of my account?", False),
        ("Wie hoch ist die Miete?", False),
        ("图书馆周末几点开门到几点关门?", False),
        ("Is there parking near the main entrance?", False),
    ],
)
async def test_which_questions_refer_to_earlier_ones(question: str, refers: bool) -> None:
    assert len(search_texts(["What does a ticket cost?", question])) == 1 + refers


async def test_words_match_across_spellings() -> None:
    for passage, question in [
        ("Zahlungsbedingungen für Kinder", "ZAHLUNGSBEDINGUNG für das Kind"),
        ("naïve café", "naive cafe"),
        ("data\N{LATIN SMALL LIGATURE FI}le", "datafile"),
        ("ｆｕｌｌｗｉｄｔｈ", "fullwidth"),
        ("1,300 visitors", "1300 visitors"),
        ("uses C++ and v1.2.3", "C++ 1.2.3"),
        ("snake_case_name", "snake_case_name"),
        ("getUserName", "user name"),
        ("ёлка", "елка"),
    ]:
        asked = {asked.term for asked in question_terms(question) if not asked.is_alternative}
        assert asked <= set(terms(passage)), question


async def test_without_the_embedding_model_words_are_searched(running: Running) -> None:
    chatbot = await running.chatbot()
    await running.put(chatbot, "a", "The shop opens at nine.", "Dogs are welcome.")
    settings = Settings(models={"default": {"url": running.engine.url}})
    found = await Search(running.database, None, None, settings).search(chatbot, ["Are dogs welcome?"])
    assert found.passages[0].text == "Dogs are welcome." and found.passages[0].vector_score is None


async def test_reranker_orders_and_its_failure_changes_nothing(running: Running) -> None:
    chatbot = await running.chatbot()
    await running.put(chatbot, "a", "Tea tea tea and coffee.", "Tea in the garden.")
    async with ScriptedEngine() as engine:
        models: dict[str, dict[str, Any]] = {"default": {"url": engine.url}}
        models["order"] = {"url": engine.url, "task": "rerank"}
        settings = Settings(models=models, reranker="order")
        pool = await Pool.open(settings, ModelFiles(settings.cache_dir), Metrics())
        search = Search(running.database, running.embedding, pool.reranker, settings)
        found = await search.search(chatbot, ["tea in the garden"])
        scores = [finding.reranker_score for finding in found.kept]
        assert None not in scores and scores == sorted(scores, reverse=True)
        engine.refuse_texts.extend([ScriptedAnswer(status=400)] * 20)
        failed = await search.search(chatbot, ["tea in the garden"])
        assert failed.kept[0].text == "Tea in the garden." and failed.kept[0].reranker_score is None
        await pool.stop()


async def test_bad_requests(running: Running) -> None:
    chatbot = await running.chatbot()
    path = f"/chatbots/{chatbot}/search"
    assert_error(await running.client.post(path, json={}), 400, "query")
    assert_error(await running.client.post(path, json={"query": ""}), 400, "query")
    assert_error(await running.client.post(path, json={"query": "a", "limit": 0}), 400, "limit")
    assert_error(await running.client.post("/chatbots/bot_none/search", json={"query": "a"}), 404)
    made = await running.client.post("/keys", json={"name": "visitor", "scope": "chat"})
    headers = {"Authorization": f"Bearer {made.json()['key']}"}
    assert_error(await running.client.post(path, json={"query": "a"}, headers=headers), 403)
    for query in ('"', "' OR '", "\\ : | & ! ( )", "()", "\N{GRINNING FACE}", "a" * 5000, "* NEAR("):
        assert await running.texts(chatbot, query) == []


RANKINGS: dict[str, list[list[str]]] = {}


async def test_both_databases_rank_alike(running: Running, settings_of_database: dict[str, Any]) -> None:
    sample = json.loads(SAMPLE.read_text()) if SAMPLE.exists() else None
    passages = [p["text"] for p in sample["paragraphs"]] if sample else [p for p, _ in LANGUAGES.values()]
    questions = (
        [q["question"] for q in sample["questions"][:60]] if sample else [q for _, q in LANGUAGES.values()]
    )
    chatbot = await running.chatbot()
    await running.put(chatbot, "all", *passages)
    rankings = [await running.texts(chatbot, question, limit=10) for question in questions]
    RANKINGS["postgresql" if settings_of_database["database_url"] else "sqlite"] = rankings
    assert all(ranking == rankings for ranking in RANKINGS.values())


SAMPLE = Path(__file__).parents[2] / "shared" / "eval" / "squad_sample.json"
