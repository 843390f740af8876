"""Server-sent events as the contract has them, to the byte."""

import json
from typing import Any

import httpx
import pytest

from tests.support import Server, assert_error, question

pytestmark = pytest.mark.any_database  # test_records.py and test_management.py ask on both

EMOJI = "😀👍🏽é漢字 ‍👩‍👩‍👧 ü"


def stream(server: Server, **parameters: Any) -> tuple[httpx.Response, bytes]:
    """A streamed answer to a question, and its body as it came."""
    with server.client() as client:
        response = client.post("/chat/completions", json=question(server.chatbot, stream=True, **parameters))
    return response, response.content


def chunks_of(body: bytes) -> list[dict[str, Any]]:
    """The chunks before `[DONE]`, with the framing checked: every event is one line and a blank one."""
    assert body.endswith(b"\n\n")
    events = body.removesuffix(b"\n\n").split(b"\n\n")
    data = [event for event in events if event != b": keep-alive"]
    assert data.pop() == b"data: [DONE]"
    assert all(event.startswith(b"data: {") and b"\n" not in event and b"\r" not in event for event in data)
    return [json.loads(event.removeprefix(b"data: ").decode()) for event in data]


def test_headers(server: Server) -> None:
    response, _ = stream(server, max_tokens=2)
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["x-request-id"]
    assert "content-encoding" not in response.headers and "content-length" not in response.headers


@pytest.mark.parametrize("max_tokens", [1, 8])
def test_order_and_shape(server: Server, max_tokens: int) -> None:
    _, body = stream(server, max_tokens=max_tokens, temperature=0)
    first, *content, last = chunks_of(body)
    for chunk in (first, *content, last):
        assert list(chunk) == ["id", "object", "created", "model", "choices"]
        assert chunk["object"] == "chat.completion.chunk"
        assert type(chunk["created"]) is int
        assert chunk["model"] == server.chatbot
        assert (chunk["id"], chunk["created"]) == (first["id"], first["created"])
        [choice] = chunk["choices"]
        assert list(choice) == ["index", "delta", "finish_reason"] and choice["index"] == 0
    assert first["id"].startswith("chatcmpl-")
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert content
    for chunk in content:
        assert list(chunk["choices"][0]["delta"]) == ["content"]
        assert chunk["choices"][0]["delta"]["content"]
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in (first, *content))
    assert last["choices"] == [{"index": 0, "delta": {}, "finish_reason": "length"}]


@pytest.mark.parametrize("options", [None, {}, {"include_usage": None}, {"include_usage": False}])
def test_no_usage_unless_asked_for(server: Server, options: object) -> None:
    _, body = stream(server, max_tokens=1, stream_options=options)
    for chunk in chunks_of(body):
        assert "usage" not in chunk and chunk["choices"]


def test_usage_comes_once_and_last(server: Server) -> None:
    _, body = stream(server, max_tokens=3, temperature=0, stream_options={"include_usage": True})
    *chunks, finish, usage = chunks_of(body)
    assert finish["choices"][0]["finish_reason"] == "length"
    assert usage["choices"] == [] and usage["id"] == finish["id"] and usage["object"] == finish["object"]
    counts = usage["usage"]
    assert counts["completion_tokens"] == 3
    assert counts["total_tokens"] == counts["prompt_tokens"] + 3
    assert all("usage" not in chunk and chunk["choices"] for chunk in (*chunks, finish))


def test_usage_option_without_stream_changes_nothing(server: Server) -> None:
    with server.client() as client:
        body = question(server.chatbot, max_tokens=1, stream_options={"include_usage": True})
        response = client.post("/chat/completions", json=body)
    assert response.json()["object"] == "chat.completion"


def test_same_answer_as_without_stream(server: Server) -> None:
    with server.client() as client:
        body = question(server.chatbot, "Name three colours.", temperature=0, seed=1)
        whole = client.post("/chat/completions", json=body).json()["choices"][0]
    _, streamed = stream(
        server, messages=[{"role": "user", "content": "Name three colours."}], temperature=0, seed=1
    )
    chunks = chunks_of(streamed)
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == whole["message"]["content"]
    assert chunks[-1]["choices"][0]["finish_reason"] == whole["finish_reason"]


def test_characters_stay_whole(server: Server) -> None:
    schema = {"enum": [EMOJI]}
    _, body = stream(
        server, max_tokens=80, response_format={"type": "json_schema", "json_schema": {"schema": schema}}
    )
    chunks = chunks_of(body)  # decodes every event on its own, strictly
    pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert json.loads("".join(pieces)) == EMOJI
    assert len([piece for piece in pieces if piece]) > 3
    assert not any("\ufffd" in piece for piece in pieces)


def test_stop_ends_with_stop(server: Server) -> None:
    schema = {"enum": ["one two three"]}
    _, body = stream(
        server,
        stop=" two",
        response_format={"type": "json_schema", "json_schema": {"schema": schema}},
    )
    chunks = chunks_of(body)
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == '"one'
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_pieces_come_while_the_answer_is_made(server: Server) -> None:
    with (
        server.client() as client,
        client.stream(
            "POST", "/chat/completions", json=question(server.chatbot, "Count.", max_tokens=12, stream=True)
        ) as response,
    ):
        reads = [read for read in response.iter_raw() if b"data: {" in read]
    assert len(reads) >= 4


def test_accept_header_does_not_matter(server: Server) -> None:
    for accept in ("application/json", "text/event-stream", "*/*", "text/html"):
        with server.client() as client:
            response = client.post(
                "/chat/completions",
                json=question(server.chatbot, max_tokens=1, stream=True),
                headers={"Accept": accept},
            )
        assert response.headers["content-type"].startswith("text/event-stream")


def test_failure_before_the_first_byte_is_a_plain_error(server: Server) -> None:
    with server.client() as client:
        for body, status in (
            (question("bot_" + "0" * 32, stream=True), 404),
            (question(server.chatbot, stream=True, temperature=2), 400),
            (question(server.chatbot, stream=True, stream_options={"include_usage": 1}), 400),
            (question(server.chatbot, "word " * 5000, stream=True), 400),
        ):
            assert_error(client.post("/chat/completions", json=body), status)


@pytest.mark.parametrize("stream_value", [None, False])
def test_without_stream_there_are_no_events(server: Server, stream_value: bool | None) -> None:
    with server.client() as client:
        body = question(server.chatbot, max_tokens=1, stream=stream_value)
        response = client.post("/chat/completions", json=body)
    assert response.headers["content-type"] == "application/json"
    assert response.json()["choices"][0]["message"]["content"]


def test_model_is_echoed_with_its_version(server: Server) -> None:
    _, body = stream(server, max_tokens=1, model=f"{server.chatbot}@1")
    assert {chunk["model"] for chunk in chunks_of(body)} == {f"{server.chatbot}@1"}
