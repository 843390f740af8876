"""What operators rely on: health, metrics, request ids, the access log."""

import json
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support import ADMIN_KEY, Server, assert_error, question

OPEN_PATHS = ["/health/live", "/health/ready", "/metrics", "/schema/openapi.json"]
BOTH_KINDS = [{"stream": False}, {"stream": True}]


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


def log_lines(server: Server, request_id: str) -> list[dict[str, Any]]:
    """The log's lines about a request, as soon as there are any."""
    deadline = time.monotonic() + 5
    while not (lines := [line for line in server.log().splitlines() if f'"{request_id}"' in line]):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("path", OPEN_PATHS)
@pytest.mark.any_database
def test_open_to_everybody(server: Server, path: str) -> None:
    response = httpx.get(server.address + path)
    assert response.status_code == 200
    assert httpx.get(server.address + path, headers={"Authorization": "Bearer wrong"}).status_code == 200
    wrong = httpx.post(server.address + path)
    assert_error(wrong, 405)
    assert "GET" in wrong.headers["allow"]


@pytest.mark.parametrize("path", OPEN_PATHS)
@pytest.mark.any_database
def test_head_is_get_without_a_body(server: Server, path: str) -> None:
    response = httpx.head(server.address + path)
    assert response.status_code == 200 and response.content == b""
    assert response.headers["content-type"] == httpx.get(server.address + path).headers["content-type"]


def test_head_of_the_api(server: Server, client: httpx.Client) -> None:
    assert client.head("/models").status_code == 200
    assert client.head(f"/chatbots/{server.chatbot}").status_code == 200
    assert client.head("/nope").status_code == 404
    assert client.head("/chat/completions").status_code == 405
    with server.client(None) as stranger:
        assert stranger.head("/models").status_code == 401


def test_health(server: Server) -> None:
    assert httpx.get(server.address + "/health/live").json()["status"] == "live"
    assert httpx.get(server.address + "/health/ready").json()["status"] == "ready"


def test_not_ready_until_the_engine_answers(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    new = Server(tmp_path)
    command = new.command("serve", "--port", address.rpartition(":")[2])
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, env=new.environment, stdout=log, stderr=log)
    try:
        early = _first_answer(address)
        assert_error(early, 503)
        assert int(early.headers["retry-after"]) > 0
        assert httpx.get(address + "/health/live").status_code == 200
        deadline = time.monotonic() + 60
        while httpx.get(address + "/health/ready").status_code == 503:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert httpx.get(address + "/health/ready").status_code == 200
    finally:
        process.terminate()
        assert process.wait(40) == 0


def _first_answer(address: str) -> httpx.Response:
    deadline = time.monotonic() + 60
    while True:
        try:
            return httpx.get(address + "/health/ready", timeout=60)
        except httpx.TransportError:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_metrics_count(server: Server, client: httpx.Client) -> None:
    def counts() -> tuple[float, ...]:
        return (
            server.metric("upchatty_http_requests_total", status="200"),
            server.metric("upchatty_http_requests_total", status="400"),
            server.metric("upchatty_completions_total", finish_reason="length", model="default"),
            server.metric("upchatty_completion_tokens_total", model="default"),
            server.metric("upchatty_prompt_tokens_total", model="default"),
        )

    before = counts()
    answer = client.post("/chat/completions", json=question(server.chatbot, max_tokens=2, temperature=0))
    client.post("/chat/completions", json=question(server.chatbot, temperature=5))
    after = counts()
    ok, bad, length, completion, prompt = (new - old for new, old in zip(after, before, strict=True))
    assert ok >= 1 and bad == 1 and length == 1
    assert (prompt, completion) == (answer.json()["usage"]["prompt_tokens"], 2)
    assert server.metric("upchatty_completions_running", model="default") == 0


@pytest.mark.any_database
def test_metrics_are_prometheus_text_and_name_nobody(server: Server, client: httpx.Client) -> None:
    client.post("/chat/completions", json=question(server.chatbot, "A canary sings.", max_tokens=1))
    response = httpx.get(server.address + "/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    assert "# TYPE upchatty_http_requests_total counter" in response.text
    for secret in (server.chatbot, "bot_", "key_", ADMIN_KEY, "canary"):
        assert secret not in response.text


# Request ids


@pytest.mark.parametrize(
    "sane", ["abc", "01ABC-def_0.9:x", "a" * 128, "550e8400-e29b-41d4-a716-446655440000"]
)
@pytest.mark.any_database
def test_sane_request_id_is_echoed(client: httpx.Client, sane: str) -> None:
    response = client.get("/models", headers={"X-Request-ID": sane})
    assert response.headers.get_list("x-request-id") == [sane]


@pytest.mark.parametrize(
    "other",
    ["", "a b", "a" * 129, "<script>", '"', "a,b", "a;b", "{}", "a\tb", "é".encode(), "../x", "a%0d%0ab"],
)
@pytest.mark.any_database
def test_other_request_id_is_replaced(client: httpx.Client, other: str | bytes) -> None:
    response = client.get("/models", headers={"X-Request-ID": other})
    [request_id] = response.headers.get_list("x-request-id")
    assert len(request_id) == 32 and request_id.isalnum()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/models", 200),
        ("POST", "/chat/completions", 400),
        ("GET", "/nope", 404),
        ("PUT", "/models", 405),
        ("HEAD", "/models", 200),
        ("OPTIONS", "/models", 204),
        ("GET", "/chatbots?limit=x", 400),
    ],
)
@pytest.mark.any_database
def test_every_response_has_an_id_of_its_own(
    client: httpx.Client, method: str, path: str, status: int
) -> None:
    responses = [client.request(method, path) for _ in range(2)]
    assert [response.status_code for response in responses] == [status, status]
    assert len({response.headers["x-request-id"] for response in responses}) == 2


@pytest.mark.parametrize("kind", BOTH_KINDS)
@pytest.mark.any_database
def test_answers_have_the_callers_id(server: Server, client: httpx.Client, kind: dict[str, bool]) -> None:
    response = client.post(
        "/chat/completions",
        json=question(server.chatbot, max_tokens=1, **kind),
        headers={"X-Request-ID": f"mine-{kind['stream']}"},
    )
    assert response.headers.get_list("x-request-id") == [f"mine-{kind['stream']}"]


@pytest.mark.any_database
def test_open_and_unauthenticated_responses_have_ids(server: Server) -> None:
    for path in (*OPEN_PATHS, "/api/v1/models", "/nowhere"):
        assert httpx.get(server.address + path).headers["x-request-id"]


# The access log


@pytest.mark.parametrize("kind", BOTH_KINDS)
@pytest.mark.any_database
def test_one_line_a_request(server: Server, client: httpx.Client, kind: dict[str, bool]) -> None:
    response = client.post("/chat/completions", json=question(server.chatbot, max_tokens=1, **kind))
    [line] = log_lines(server, response.headers["x-request-id"])
    assert line["event"] == "request" and line["level"] == "info" and line["time"].endswith("Z")
    assert (line["method"], line["path"], line["status"]) == ("POST", "/api/v1/chat/completions", 200)
    assert line["ms"] > 0
    assert line["key"].startswith("key_")


@pytest.mark.any_database
def test_line_of_a_head_request(server: Server, client: httpx.Client) -> None:
    response = client.head("/models")
    [line] = log_lines(server, response.headers["x-request-id"])
    assert line["method"] == "HEAD" and line["key"].startswith("key_")


@pytest.mark.parametrize(("path", "status"), [("/nope", 404), ("/chat/completions", 405), ("/models", 200)])
@pytest.mark.any_database
def test_errors_are_logged_as_well(client: httpx.Client, server: Server, path: str, status: int) -> None:
    response = client.get(path)
    [line] = log_lines(server, response.headers["x-request-id"])
    assert line["status"] == status == response.status_code


@pytest.mark.any_database
def test_an_id_or_a_path_cannot_forge_a_line(client: httpx.Client, server: Server) -> None:
    response = client.get('/models/%0a{"event":"request","status":200,"forged":1}')
    [line] = log_lines(server, response.headers["x-request-id"])
    assert line["status"] == 404
    assert not any(
        line.startswith('{"event":"request","status":200,"forged"') for line in server.log().splitlines()
    )


def test_log_tells_neither_texts_nor_secrets(server: Server, client: httpx.Client) -> None:
    secret = client.post("/keys", json={"name": "quiet", "scope": "chat"}).json()["key"]
    canary = "Zanzibar canary"
    with server.client(secret) as caller:
        good = question(server.chatbot, canary, max_tokens=1)
        for body in (good, good | {"stream": True}, good | {"temperature": 5}, good | {"stop": [canary, 1]}):
            caller.post("/chat/completions", json=body)
        caller.post("/chat/completions", content=canary.encode())
        last = caller.get("/models", params={"api_key": secret, "q": canary})
    with server.client(secret + "x") as stranger:
        assert_error(stranger.get("/models"), 401)
    assert log_lines(server, last.headers["x-request-id"])
    for word in (secret, ADMIN_KEY, "Zanzibar"):
        assert word not in server.log()
