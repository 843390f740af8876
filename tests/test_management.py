"""Chatbots, their versions, keys, and the list of models."""

import asyncio
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import httpx
import pytest
from sqlalchemy import Select, func, select
from sqlalchemy.ext.asyncio import create_async_engine

from tests.support import Server, assert_error, question
from upchatty.storage.tables import chatbot_versions, chatbots, completions

UNKNOWN = "bot_" + "0" * 32
DEFAULT_INSTRUCTIONS = "You are a helpful assistant. Answer briefly and truthfully."


@pytest.fixture(scope="module")
def admin(server: Server) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


@pytest.fixture
def bot(admin: httpx.Client) -> Iterator[str]:
    """A chatbot of the test's own."""
    chatbot_id = admin.post("/chatbots", json={"name": "A test's own"}).json()["id"]
    yield chatbot_id
    admin.delete(f"/chatbots/{chatbot_id}")


def rows(server: Server, query: Select[Any]) -> list[Any]:
    """What a query finds in the server's database."""

    async def run() -> list[Any]:
        url = server.environment.get("UPCHATTY_DATABASE_URL", "").replace(
            "postgresql:", "postgresql+asyncpg:"
        )
        engine = create_async_engine(url or f"sqlite+aiosqlite:///{server.data_dir / 'upchatty.db'}")
        async with engine.connect() as connection:
            found = list(await connection.execute(query))
        await engine.dispose()
        return found

    return asyncio.run(run())


def eventually(check: Callable[[], Any], seconds: float = 5) -> Any:
    """What `check` returns once it is true."""
    deadline = time.monotonic() + seconds
    while not (result := check()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return result


def make_key(admin: httpx.Client, **fields: Any) -> dict[str, Any]:
    response = admin.post("/keys", json={"name": "a key", "scope": "chat"} | fields)
    assert response.status_code == 201, response.text
    created: dict[str, Any] = response.json()
    return created


def ask(server: Server, key: str, chatbot: str) -> httpx.Response:
    with server.client(key) as client:
        return client.post("/chat/completions", json=question(chatbot, max_tokens=1))


# Chatbots


def test_new_chatbot_has_the_defaults(admin: httpx.Client) -> None:
    response = admin.post("/chatbots", json={"name": "Ann"})
    assert response.status_code == 201
    chatbot = response.json()
    assert chatbot.pop("id").startswith("bot_")
    assert abs(chatbot.pop("created_at") - time.time()) < 60
    assert abs(chatbot.pop("updated_at") - time.time()) < 60
    assert chatbot == {
        "object": "chatbot",
        "version": 1,
        "published_version": 1,
        "name": "Ann",
        "instructions": DEFAULT_INSTRUCTIONS,
        "model": None,
        "temperature": 0.7,
        "max_tokens": 1024,
        "keep_text": True,
        "limits": None,
        "policy": "open",
        "threshold": None,
        "fallback_message": None,
        "passages": None,
    }


def test_new_chatbot_takes_what_is_given(admin: httpx.Client) -> None:
    given = {
        "name": "Ann 😀",
        "instructions": "Rhyme.\n\"'<&",
        "model": "default",
        "temperature": 0,
        "max_tokens": 7,
        "keep_text": False,
    }
    chatbot = admin.post("/chatbots", json=given).json()
    assert chatbot.items() >= given.items()
    assert admin.get(f"/chatbots/{chatbot['id']}").json() == chatbot


def test_null_is_as_absent(admin: httpx.Client) -> None:
    fields = ("instructions", "model", "temperature", "max_tokens", "keep_text")
    chatbot = admin.post("/chatbots", json={"name": "Ann"} | dict.fromkeys(fields)).json()
    assert chatbot["instructions"] == DEFAULT_INSTRUCTIONS and chatbot["max_tokens"] == 1024


BAD_FIELDS = [("name", value) for value in (None, 1, "", "x" * 201, [], {}, True, "a\0b")] + [
    *(("instructions", value) for value in (1, [], {}, False, "a\0b")),
    *(("model", value) for value in (1, "", "no such model", [], "a\0b")),
    *(("temperature", value) for value in ("0.5", -0.1, 1.1, 2, [], True)),
    *(("max_tokens", value) for value in (0, -1, 1.5, "1", 10**30, [], True)),
    *(("keep_text", value) for value in (0, 1, "true", [])),
    ("unknown", 1),
    ("id", "bot_x"),
    ("version", 2),
]


@pytest.mark.parametrize(("field", "value"), BAD_FIELDS)
def test_bad_field(admin: httpx.Client, bot: str, field: str, value: object) -> None:
    assert_error(admin.post("/chatbots", json={"name": "Ann"} | {field: value}), 400, field)
    if value is not None or field == "name":
        assert_error(admin.patch(f"/chatbots/{bot}", json={field: value}), 400, field)
    assert admin.get(f"/chatbots/{bot}").json()["version"] == 1


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"null", b"{", b'{"name":"\\ud800"}', b'{"name":"a","name":"b"}']
)
def test_bad_body(admin: httpx.Client, bot: str, content: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    assert_error(admin.post("/chatbots", content=content, headers=headers), 400)
    assert_error(admin.patch(f"/chatbots/{bot}", content=content, headers=headers), 400)
    assert_error(admin.post("/keys", content=content, headers=headers), 400)


def test_name_is_required(admin: httpx.Client) -> None:
    assert_error(admin.post("/chatbots", json={}), 400, "name", "required")


def test_a_change_makes_a_version(admin: httpx.Client, bot: str) -> None:
    changed = admin.patch(f"/chatbots/{bot}", json={"instructions": "Rhyme.", "temperature": 0.1})
    assert changed.status_code == 200
    assert (
        changed.json().items()
        >= {
            "version": 2,
            "published_version": 2,
            "name": "A test's own",
            "instructions": "Rhyme.",
            "temperature": 0.1,
        }.items()
    )
    assert admin.get(f"/chatbots/{bot}").json() == changed.json()
    first = admin.get(f"/chatbots/{bot}@1").json()
    assert first["version"] == 1 and first["instructions"] == DEFAULT_INSTRUCTIONS


def test_a_change_to_null_takes_the_default_again(admin: httpx.Client, bot: str) -> None:
    admin.patch(f"/chatbots/{bot}", json={"instructions": "Rhyme.", "max_tokens": 5})
    changed = admin.patch(f"/chatbots/{bot}", json={"instructions": None}).json()
    assert changed["instructions"] == DEFAULT_INSTRUCTIONS and changed["max_tokens"] == 5


def test_no_change_makes_no_version(admin: httpx.Client, bot: str) -> None:
    unchanged = admin.patch(f"/chatbots/{bot}", json={})
    assert unchanged.status_code == 200 and unchanged.json()["version"] == 1


def test_going_back_to_a_version(admin: httpx.Client, bot: str) -> None:
    admin.patch(f"/chatbots/{bot}", json={"name": "Second"})
    back = admin.patch(f"/chatbots/{bot}", json={"published_version": 1})
    assert back.status_code == 200
    assert back.json()["version"] == back.json()["published_version"] == 1
    assert admin.get(f"/chatbots/{bot}").json()["name"] == "A test's own"
    assert admin.patch(f"/chatbots/{bot}", json={"name": "Third"}).json()["version"] == 3
    versions = admin.get(f"/chatbots/{bot}/versions").json()["data"]
    assert [version["name"] for version in versions] == ["A test's own", "Second", "Third"]


@pytest.mark.parametrize(
    ("version", "status"), [(2, 404), (0, 400), (-1, 400), ("1", 400), (None, 400), (1.5, 400)]
)
def test_going_back_to_no_version(admin: httpx.Client, bot: str, version: object, status: int) -> None:
    assert_error(admin.patch(f"/chatbots/{bot}", json={"published_version": version}), status)


def test_going_back_and_on_from_there(admin: httpx.Client, bot: str) -> None:
    admin.patch(f"/chatbots/{bot}", json={"name": "Second", "max_tokens": 7})
    changed = admin.patch(f"/chatbots/{bot}", json={"published_version": 1, "temperature": 0.5}).json()
    assert changed["version"] == 3
    assert (changed["name"], changed["temperature"]) == ("A test's own", 0.5)
    assert changed["max_tokens"] != 7


@pytest.mark.parametrize("method", ["GET", "PATCH", "DELETE"])
@pytest.mark.parametrize("name", [UNKNOWN, "bot_x", "x", "bot_%00", "%ff", "' OR 1=1", UNKNOWN + "@1"])
def test_unknown_chatbot(admin: httpx.Client, method: str, name: str) -> None:
    response = admin.request(method, f"/chatbots/{name}", json={"name": "Ann"} if method == "PATCH" else None)
    assert_error(response, 404)


def test_a_version_cannot_be_changed(admin: httpx.Client, bot: str) -> None:
    assert_error(admin.patch(f"/chatbots/{bot}@1", json={"name": "Ann"}), 404)
    assert_error(admin.delete(f"/chatbots/{bot}@1"), 404)
    assert_error(admin.get(f"/chatbots/{bot}@1/versions"), 404)
    assert_error(admin.get(f"/chatbots/{bot}@2"), 404, f"{bot}@2")
    assert admin.get(f"/chatbots/{bot}").status_code == 200


def test_a_change_is_answered_with_at_once(admin: httpx.Client, bot: str) -> None:
    ask_for = question(bot, max_tokens=1)
    admin.post("/chat/completions", json=ask_for)
    before = admin.post("/chat/completions", json=ask_for).json()["usage"]["prompt_tokens"]
    admin.patch(f"/chatbots/{bot}", json={"instructions": "Talk like a pirate would talk. " * 20})
    after = admin.post("/chat/completions", json=ask_for).json()["usage"]["prompt_tokens"]
    first = admin.post("/chat/completions", json=ask_for | {"model": f"{bot}@1"}).json()
    assert after > before + 50
    assert first["usage"]["prompt_tokens"] == before and first["model"] == f"{bot}@1"


# What a chatbot owns


def test_deleting_takes_versions_and_records_along(server: Server, admin: httpx.Client) -> None:
    bot = admin.post("/chatbots", json={"name": "Soon gone"}).json()["id"]
    admin.patch(f"/chatbots/{bot}", json={"name": "Sooner"})
    admin.post("/chat/completions", json=question(bot, max_tokens=1))
    records = select(completions.c.id).where(completions.c.chatbot_id == bot)
    eventually(lambda: rows(server, records))
    assert len(rows(server, select(chatbot_versions).where(chatbot_versions.c.chatbot_id == bot))) == 2
    deleted = admin.delete(f"/chatbots/{bot}")
    assert deleted.status_code == 204 and not deleted.content
    assert not rows(server, records)
    assert not rows(server, select(chatbot_versions).where(chatbot_versions.c.chatbot_id == bot))
    assert not rows(server, select(chatbots).where(chatbots.c.id == bot))
    for response in (
        admin.get(f"/chatbots/{bot}"),
        admin.get(f"/chatbots/{bot}@1"),
        admin.get(f"/chatbots/{bot}/versions"),
        admin.get(f"/models/{bot}"),
        admin.delete(f"/chatbots/{bot}"),
        admin.post("/chat/completions", json=question(bot)),
        admin.post("/chat/completions", json=question(f"{bot}@1")),
    ):
        assert_error(response, 404, bot)
    assert bot not in {model["id"] for model in admin.get("/models").json()["data"]}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("keep_text", [False, True])
def test_record_keeps_text_only_where_it_may(
    server: Server, admin: httpx.Client, keep_text: bool, stream: bool
) -> None:
    bot = admin.post("/chatbots", json={"name": "Discreet", "keep_text": keep_text}).json()["id"]
    response = admin.post(
        "/chat/completions", json=question(bot, "My name is Canary.", max_tokens=2, stream=stream)
    )
    assert response.status_code == 200
    query = select(completions).where(completions.c.chatbot_id == bot)
    [record] = eventually(lambda: rows(server, query))
    assert record.version == 1 and record.streamed is stream
    assert record.prompt_tokens > 0 and record.completion_tokens in (1, 2)
    assert record.finish_reason in ("stop", "length")
    if keep_text:
        assert record.messages == [{"role": "user", "content": "My name is Canary."}]
        assert record.answer
    else:
        assert record.messages is None and record.answer is None
        assert "Canary" not in repr(record)
    admin.delete(f"/chatbots/{bot}")


def test_refused_requests_leave_no_record(server: Server, admin: httpx.Client, bot: str) -> None:
    assert_error(admin.post("/chat/completions", json=question(bot, temperature=2)), 400)
    count = select(func.count()).where(completions.c.chatbot_id == bot)
    assert rows(server, count) == [(0,)]


# Lists


def test_pages_of_chatbots(admin: httpx.Client) -> None:
    made = [admin.post("/chatbots", json={"name": f"Number {number}"}).json()["id"] for number in range(5)]
    seen: list[str] = []
    page: dict[str, Any] = {"has_more": True}
    while page["has_more"]:
        page = admin.get("/chatbots", params={"limit": 2, "after": seen[-1] if seen else ""}).json()
        assert page["object"] == "list" and 1 <= len(page["data"]) <= 2
        seen += [chatbot["id"] for chatbot in page["data"]]
    assert [chatbot_id for chatbot_id in seen if chatbot_id in made] == made
    assert len(set(seen)) == len(seen)
    assert admin.get("/chatbots", params={"after": seen[-1]}).json() == {
        "object": "list",
        "data": [],
        "has_more": False,
    }
    for chatbot_id in made:
        admin.delete(f"/chatbots/{chatbot_id}")


def test_pages_of_versions(admin: httpx.Client, bot: str) -> None:
    for name in "BC":
        admin.patch(f"/chatbots/{bot}", json={"name": name})
    first = admin.get(f"/chatbots/{bot}/versions", params={"limit": 2}).json()
    assert [version["version"] for version in first["data"]] == [1, 2] and first["has_more"] is True
    rest = admin.get(f"/chatbots/{bot}/versions", params={"after": 2}).json()
    assert [version["version"] for version in rest["data"]] == [3] and rest["has_more"] is False


def test_pages_of_keys(admin: httpx.Client) -> None:
    made = [make_key(admin)["id"] for _ in range(3)]
    page = admin.get("/keys", params={"limit": 1, "after": made[0]}).json()
    assert [key["id"] for key in page["data"]] == [made[1]] and page["has_more"] is True
    page = admin.get("/keys", params={"limit": 2, "after": made[0]}).json()
    assert [key["id"] for key in page["data"]] == made[1:]
    for key_id in made:
        admin.delete(f"/keys/{key_id}")


@pytest.mark.parametrize("path", ["/chatbots", "/keys", "/chatbots/{bot}/versions"])
@pytest.mark.parametrize(
    ("name", "value"),
    [("limit", value) for value in ("0", "-1", "101", "x", "", "1.5", "true", "9" * 30, "\0", "٣")]
    + [("after", "\0"), ("after", "x" * 100)],
)
def test_bad_page(admin: httpx.Client, bot: str, path: str, name: str, value: str) -> None:
    response = admin.get(path.format(bot=bot), params={name: value})
    assert_error(response, 400, f"{name}: ")
    assert "`" not in response.json()["error"]


# Models


def test_models_are_the_chatbots(admin: httpx.Client, bot: str) -> None:
    listed = admin.get("/models").json()
    assert listed["object"] == "list" and listed["has_more"] is False
    [model] = [model for model in listed["data"] if model["id"] == bot]
    assert model["object"] == "model" and type(model["created"]) is int and model["owned_by"]
    assert admin.get(f"/models/{bot}").json() == model


@pytest.mark.parametrize("name", [UNKNOWN, "gpt-4o", "%00", "bot_x"])
def test_unknown_model(admin: httpx.Client, name: str) -> None:
    assert_error(admin.get(f"/models/{name}"), 404)


# Keys


def test_a_key_is_shown_once(server: Server, admin: httpx.Client, bot: str) -> None:
    created = make_key(admin, name="Web site", chatbots=[bot])
    assert created["key"].startswith("upchatty_") and len(created["key"]) > 40
    assert (
        created.items()
        >= {"name": "Web site", "scope": "chat", "chatbots": [bot], "expires_at": None}.items()
    )
    listed = admin.get("/keys", params={"limit": 100})
    assert created["key"] not in listed.text and "hash" not in listed.text
    [same] = [key for key in listed.json()["data"] if key["id"] == created["id"]]
    assert same == {name: value for name, value in created.items() if name != "key"}
    assert created["key"] not in server.log()


def test_a_chat_key_opens_what_it_names(server: Server, admin: httpx.Client, bot: str) -> None:
    key = make_key(admin, chatbots=[bot])["key"]
    assert ask(server, key, bot).status_code == 200
    assert ask(server, key, f"{bot}@1").status_code == 200
    refused = ask(server, key, server.chatbot)
    assert_error(refused, 403)
    assert_error(ask(server, key, f"{server.chatbot}@1"), 403)
    assert_error(ask(server, key, UNKNOWN), 404)
    with server.client(key) as client:
        assert [model["id"] for model in client.get("/models").json()["data"]] == [bot]
        assert client.get(f"/models/{bot}").status_code == 200
        other = client.get(f"/models/{server.chatbot}")
        assert_error(other, 403)
        assert server.chatbot not in other.text


def test_a_key_for_a_deleted_chatbot_opens_nothing(server: Server, admin: httpx.Client) -> None:
    bot = admin.post("/chatbots", json={"name": "Soon gone"}).json()["id"]
    key = make_key(admin, chatbots=[bot])["key"]
    admin.delete(f"/chatbots/{bot}")
    assert_error(ask(server, key, server.chatbot), 403)
    with server.client(key) as client:
        assert client.get("/models").json()["data"] == []


def test_a_chat_key_that_names_none_opens_all(server: Server, admin: httpx.Client, bot: str) -> None:
    for chatbots_ in (None, []):
        key = make_key(admin, chatbots=chatbots_)["key"]
        assert ask(server, key, bot).status_code == 200
        with server.client(key) as client:
            assert {bot, server.chatbot} <= {model["id"] for model in client.get("/models").json()["data"]}


def test_an_admin_key_opens_all(server: Server, admin: httpx.Client, bot: str) -> None:
    key = make_key(admin, scope="admin")["key"]
    assert ask(server, key, bot).status_code == 200
    with server.client(key) as client:
        assert client.get("/keys").status_code == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/chatbots"),
        ("POST", "/chatbots"),
        ("GET", "/chatbots/{bot}"),
        ("PATCH", "/chatbots/{bot}"),
        ("DELETE", "/chatbots/{bot}"),
        ("GET", "/chatbots/{bot}/versions"),
        ("GET", "/keys"),
        ("POST", "/keys"),
        ("DELETE", "/keys/key_x"),
    ],
)
def test_a_chat_key_manages_nothing(
    server: Server, admin: httpx.Client, bot: str, method: str, path: str
) -> None:
    key = make_key(admin, chatbots=[bot])["key"]
    with server.client(key) as client:
        assert_error(client.request(method, path.format(bot=bot)), 403, "admin")
    with server.client(None) as client:
        assert_error(client.request(method, path.format(bot=bot)), 401)
    assert admin.get(f"/chatbots/{bot}").json()["version"] == 1


def test_a_revoked_key_is_refused_within_a_second(server: Server, admin: httpx.Client) -> None:
    created = make_key(admin)
    with server.client(created["key"]) as client:
        assert client.get("/models").status_code == 200
        revoked = admin.delete(f"/keys/{created['id']}")
        assert revoked.status_code == 204 and not revoked.content
        time.sleep(1)
        response = client.get("/models")
    assert_error(response, 401)
    assert response.headers["www-authenticate"] == "Bearer"
    assert created["id"] not in admin.get("/keys", params={"limit": 100}).text
    assert_error(admin.delete(f"/keys/{created['id']}"), 404)


@pytest.mark.parametrize("name", ["key_x", "x", "%00", "key_" + "0" * 32, "%ff"])
def test_unknown_key(admin: httpx.Client, name: str) -> None:
    assert_error(admin.delete(f"/keys/{name}"), 404, "key")


def moment(offset: timedelta, zone: timezone) -> str:
    return (datetime.now(UTC) + offset).astimezone(zone).isoformat()


@pytest.mark.parametrize(
    "zone", [UTC, timezone(timedelta(hours=-9, minutes=-30)), timezone(timedelta(hours=14))]
)
def test_a_key_expires_at_a_moment(server: Server, admin: httpx.Client, zone: timezone) -> None:
    past = make_key(admin, expires_at=moment(timedelta(seconds=-2), zone))
    future = make_key(admin, expires_at=moment(timedelta(hours=1), zone))
    assert abs(future["expires_at"] - time.time() - 3600) < 60
    response = ask(server, past["key"], server.chatbot)
    assert_error(response, 401, "expired")
    assert response.headers["www-authenticate"] == "Bearer"
    with server.client(future["key"]) as client:
        assert client.get("/models").status_code == 200


def test_a_key_expires_while_it_is_used(server: Server, admin: httpx.Client) -> None:
    expires_at = int(time.time()) + 2
    created = make_key(admin, expires_at=expires_at)
    assert created["expires_at"] == expires_at
    with server.client(created["key"]) as client:
        assert client.get("/models").status_code == 200
        while time.time() < expires_at:
            client.get("/models")
            time.sleep(0.1)
        assert_error(client.get("/models"), 401, "expired")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("name", value) for value in (None, 1, "", "x" * 201, "a\0b", [])),
        *(("scope", value) for value in (None, 1, "", "Chat", "owner", [], "a\0b")),
        *(("chatbots", value) for value in ("x", [1], [None], {}, ["a\0b"], ["x" * 100_000])),
        ("chatbots", [f"bot_{number:032x}" for number in range(40_000)]),
        *(
            ("expires_at", value)
            for value in ("", "tomorrow", "2030-01-01", "2030-01-01T00:00:00", "1893456000")
        ),
        *(("expires_at", value) for value in (-1, 1.5, 10**12, 10**30, True, [], {}, "2030-13-01T00:00:00Z")),
        *(("limits", value) for value in (1, [], {"unknown": 1}, {"requests_per_minute": 0})),
        ("unknown", 1),
        ("key", "upchatty_mine"),
    ],
)
def test_bad_key(admin: httpx.Client, field: str, value: object) -> None:
    response = admin.post("/keys", json={"name": "a key", "scope": "chat"} | {field: value})
    assert_error(response, 400, field)
    assert len(response.content) < 500


@pytest.mark.parametrize("chatbot", [UNKNOWN, "x"])
def test_key_for_an_unknown_chatbot(admin: httpx.Client, chatbot: str) -> None:
    body = {"name": "a key", "scope": "chat", "chatbots": [chatbot]}
    assert_error(admin.post("/keys", json=body), 404, chatbot)


@pytest.mark.parametrize("missing", ["name", "scope"])
def test_key_needs(admin: httpx.Client, missing: str) -> None:
    fields = {"name": "a key", "scope": "chat"}
    del fields[missing]
    assert_error(admin.post("/keys", json=fields), 400, missing, "required")


@pytest.mark.parametrize(
    "text", ["0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59", "1969-12-31T23:59:59Z"]
)
def test_far_moments_break_nothing(admin: httpx.Client, text: str) -> None:
    response = admin.post("/keys", json={"name": "far", "scope": "chat", "expires_at": text})
    assert response.status_code in (201, 400)
    assert admin.get("/keys", params={"limit": 100}).status_code == 200


def test_an_admin_key_names_no_chatbots(admin: httpx.Client, bot: str) -> None:
    assert_error(
        admin.post("/keys", json={"name": "a", "scope": "admin", "chatbots": [bot]}), 400, "chatbots"
    )
