"""The clients that people use, unchanged: OpenAI's for Python and Node, LangChain's, and curl."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from langchain_openai import ChatOpenAI
from openai import (
    APIStatusError,
    AsyncOpenAI,
    AuthenticationError,
    BadRequestError,
    NotFoundError,
    OpenAI,
    PermissionDeniedError,
)
from pydantic import BaseModel

from tests.support import ADMIN_KEY, Server, question

pytestmark = pytest.mark.any_database  # test_records.py and test_management.py ask on both

NODE = Path(__file__).parent / "node"
OFFLINE = ("ENOTFOUND", "EAI_AGAIN", "ECONNREFUSED", "ECONNRESET", "ETIMEDOUT", "ENETUNREACH")


# Room enough for the JSON to be closed, and always the same answer.
EXACT = {"max_tokens": 200, "temperature": 0.0}


class Mood(BaseModel):
    """What a structured answer has to be."""

    happy: bool


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[OpenAI]:
    """OpenAI's client with an admin key. It does not retry, so that no failure goes unseen."""
    with OpenAI(base_url=server.api, api_key=ADMIN_KEY, max_retries=0) as client:
        yield client


@pytest.fixture
def chat_key(server: Server) -> str:
    """A key that opens one chatbot, another one than the server's first."""
    with server.client() as client:
        other = client.post("/chatbots", json={"name": "other"}).json()["id"]
        key = {"name": "one chatbot", "scope": "chat", "chatbots": [other]}
        return client.post("/keys", json=key).json()["key"]


def requests_served(server: Server) -> int:
    """How often a completion was asked for, as the server's log has it."""
    return server.log().count('"path":"/api/v1/chat/completions"')


# OpenAI's client for Python


def test_openai_completion(client: OpenAI, server: Server) -> None:
    answer = client.chat.completions.create(**question(server.chatbot), temperature=0.0, seed=1)
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == server.chatbot
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage and 0 < answer.usage.completion_tokens <= 16
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer._request_id


def test_openai_conversation_goes_back_as_it_came(client: OpenAI, server: Server) -> None:
    first = client.chat.completions.create(**question(server.chatbot))
    messages: Any = [
        {"role": "user", "content": "How are you?"},
        first.choices[0].message,  # with refusal, tool_calls and the like, all null
        {"role": "user", "content": [{"type": "text", "text": "And now?"}]},
    ]
    second = client.chat.completions.create(
        model=server.chatbot, messages=messages, max_completion_tokens=4, user="somebody", store=False
    )
    assert second.usage and first.usage
    assert second.usage.prompt_tokens > first.usage.prompt_tokens
    assert second.usage.completion_tokens <= 4


def test_openai_stream(client: OpenAI, server: Server) -> None:
    with client.chat.completions.create(**question(server.chatbot), stream=True) as stream:
        chunks = list(stream)
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] in (
        ["stop"],
        ["length"],
    )
    assert all(chunk.usage is None for chunk in chunks)


def test_openai_stream_with_usage(client: OpenAI, server: Server) -> None:
    options: Any = {"include_usage": True}
    chunks = list(
        client.chat.completions.create(**question(server.chatbot), stream=True, stream_options=options)
    )
    assert all(chunk.usage is None and chunk.choices for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    usage = chunks[-1].usage
    assert usage and usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_openai_stream_helper(client: OpenAI, server: Server) -> None:
    asked = question(server.chatbot, "Are you happy?", **EXACT)
    with client.chat.completions.stream(**asked, response_format=Mood) as stream:
        heard = "".join(event.delta for event in stream if event.type == "content.delta")
        message = stream.get_final_completion().choices[0].message
    assert heard == message.content
    assert isinstance(message.parsed, Mood)


def test_openai_stream_that_is_left_early(client: OpenAI, server: Server) -> None:
    with client.chat.completions.create(
        **question(server.chatbot, "Tell me a long story.", max_tokens=400), stream=True
    ) as stream:
        next(iter(stream))
    assert client.chat.completions.create(**question(server.chatbot, max_tokens=1)).choices


def test_openai_raw_response(client: OpenAI, server: Server) -> None:
    raw = client.chat.completions.with_raw_response.create(
        **question(server.chatbot), extra_headers={"X-Request-ID": "seen-by-both"}
    )
    assert raw.status_code == 200
    assert raw.headers["x-request-id"] == "seen-by-both"
    assert raw.headers["content-type"] == "application/json"
    assert raw.parse().choices[0].message.content


def test_openai_streaming_response(client: OpenAI, server: Server) -> None:
    with client.chat.completions.with_streaming_response.create(
        **question(server.chatbot), stream=True
    ) as response:
        lines = [line for line in response.iter_lines() if line]
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"


def test_openai_structured_answer(client: OpenAI, server: Server) -> None:
    answer = client.chat.completions.parse(
        **question(server.chatbot, "Are you happy?", **EXACT), response_format=Mood
    )
    assert isinstance(answer.choices[0].message.parsed, Mood)


def test_openai_json_schema(client: OpenAI, server: Server) -> None:
    schema = {"type": "object", "properties": {"colour": {"enum": ["red", "blue"]}}, "required": ["colour"]}
    answer_format: Any = {"type": "json_schema", "json_schema": {"name": "paint", "schema": schema}}
    answer = client.chat.completions.create(
        **question(server.chatbot, "Choose a colour.", **EXACT), response_format=answer_format
    )
    assert json.loads(answer.choices[0].message.content or "")["colour"] in ("red", "blue")


def test_openai_models(client: OpenAI, server: Server) -> None:
    assert server.chatbot in [model.id for model in client.models.list()]
    model = client.models.retrieve(server.chatbot)
    assert (model.id, model.object, model.owned_by) == (server.chatbot, "model", "upchatty")
    assert type(model.created) is int
    with pytest.raises(NotFoundError):
        client.models.retrieve("bot_unknown")


@pytest.mark.parametrize("stream", [False, True])
def test_openai_errors(client: OpenAI, server: Server, chat_key: str, stream: bool) -> None:
    def assert_refused(kind: type[APIStatusError], word: str, client: OpenAI, **parameters: Any) -> None:
        asked = question(server.chatbot) | parameters
        with pytest.raises(kind) as refused:
            client.chat.completions.create(**asked, stream=stream)
        assert word in refused.value.body  # OpenAI's client takes the sentence out of the JSON

    one_chatbot = client.with_options(api_key=chat_key)
    assert_refused(AuthenticationError, "key", client.with_options(api_key="upchatty_unknown"))
    assert_refused(NotFoundError, "bot_unknown", client, model="bot_unknown")
    assert_refused(BadRequestError, "temperature", client, temperature=1.5)
    assert_refused(PermissionDeniedError, "chatbot", one_chatbot)
    with pytest.raises(PermissionDeniedError):
        one_chatbot.get("/chatbots", cast_to=httpx.Response)


def test_openai_retries_no_error_of_the_caller(client: OpenAI, server: Server) -> None:
    before = requests_served(server)
    with pytest.raises(BadRequestError):
        client.with_options(max_retries=3).chat.completions.create(model=server.chatbot, messages=[])
    assert requests_served(server) == before + 1


def test_openai_retries_what_a_server_asks_to_retry(server: Server) -> None:
    """A proxy that is busy once: the client waits as `Retry-After` says, and asks again."""
    asked = []

    def busy_once(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        if len(asked) == 1:
            return httpx.Response(503, headers={"Retry-After": "1"}, json={"error": "busy"})
        with server.client() as client:
            return client.post("/chat/completions", content=request.content, headers=request.headers)

    http_client = httpx.Client(transport=httpx.MockTransport(busy_once))
    with OpenAI(base_url=server.api, api_key=ADMIN_KEY, http_client=http_client) as client:
        assert client.chat.completions.create(**question(server.chatbot)).choices
    assert len(asked) == 2


async def test_openai_async(server: Server) -> None:
    async with AsyncOpenAI(base_url=server.api, api_key=ADMIN_KEY, max_retries=0) as client:
        answer = await client.chat.completions.create(**question(server.chatbot))
        assert answer.choices[0].message.content
        stream = await client.chat.completions.create(**question(server.chatbot), stream=True)
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        assert [model async for model in client.models.list()]
        with pytest.raises(NotFoundError):
            await client.chat.completions.create(**question("bot_unknown"), stream=True)


# LangChain


def langchain(server: Server, **options: Any) -> ChatOpenAI:
    options = {"max_tokens": 8, "max_retries": 0} | options
    return ChatOpenAI(model=server.chatbot, base_url=server.api, api_key=ADMIN_KEY, **options)


def test_langchain_invoke(server: Server) -> None:
    answer = langchain(server).invoke([("system", "Be brief."), ("human", "How are you?")])
    assert answer.content
    assert answer.response_metadata["finish_reason"] in ("stop", "length")
    usage = answer.usage_metadata
    assert usage and usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]


def test_langchain_stream(server: Server) -> None:
    chunks = list(langchain(server, stream_usage=True).stream("How are you?"))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk  # type: ignore[assignment]
    assert whole.content
    assert whole.usage_metadata and whole.usage_metadata["output_tokens"] <= 8


async def test_langchain_async(server: Server) -> None:
    assert (await langchain(server).ainvoke("How are you?")).content
    assert "".join([str(chunk.content) async for chunk in langchain(server).astream("How are you?")])


def test_langchain_structured_answer(server: Server) -> None:
    model = langchain(server, **EXACT).with_structured_output(Mood, method="json_schema")
    answer = model.invoke("Are you happy?")
    assert isinstance(answer, Mood)


# curl


def curl(server: Server, *arguments: str, key: str = ADMIN_KEY, **parameters: Any) -> str:
    finished = subprocess.run(
        [
            *("curl", "--silent", "--show-error", server.api + "/chat/completions"),
            *("-H", f"Authorization: Bearer {key}", "-H", "Content-Type: application/json"),
            *("-d", json.dumps(question(server.chatbot) | parameters), *arguments),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    return finished.stdout


@pytest.fixture
def _curl() -> None:
    if not shutil.which("curl"):
        pytest.skip("curl is not installed")


@pytest.mark.usefixtures("_curl")
def test_curl(server: Server) -> None:
    assert json.loads(curl(server))["choices"][0]["message"]["content"]
    assert curl(server, "--include", key="unknown").startswith("HTTP/1.1 401 Unauthorized")


@pytest.mark.usefixtures("_curl")
def test_curl_stream(server: Server) -> None:
    head, _, body = curl(server, "-N", "--include", stream=True).partition("\n\n")
    assert "content-type: text/event-stream; charset=utf-8" in head.lower()
    data = [event.removeprefix("data: ") for event in body.strip().split("\n\n")]
    assert data[-1] == "[DONE]"
    chunks = [json.loads(event) for event in data[:-1]]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)


# OpenAI's client for Node


@pytest.fixture(scope="module")
def node_client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the Node client and the package that it needs."""
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("node and npm are not installed, so OpenAI's client for Node is not tested")
    folder = tmp_path_factory.mktemp("node")
    for file in NODE.iterdir():
        shutil.copy(file, folder)
    installed = subprocess.run(
        ["npm", "install", "--no-package-lock", "--no-audit", "--no-fund"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    if installed.returncode and any(word in installed.stderr for word in OFFLINE):
        pytest.skip(f"npm reaches no package registry, so the Node client is not tested: {installed.stderr}")
    assert installed.returncode == 0, installed.stderr
    return folder


def test_openai_for_node(server: Server, node_client: Path) -> None:
    finished = subprocess.run(
        ["node", "client.mjs"],
        cwd=node_client,
        env=os.environ
        | {"OPENAI_BASE_URL": server.api, "OPENAI_API_KEY": ADMIN_KEY, "CHATBOT": server.chatbot},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    seen = json.loads(finished.stdout)

    assert seen["completion"]["choices"][0]["message"]["content"]
    assert seen["completion"]["usage"]["completion_tokens"] <= 8

    *chunks, last = seen["chunks"]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert last["choices"] == [] and last["usage"]["total_tokens"] > 0
    assert seen["helper"]["text"] == seen["helper"]["completion"]["choices"][0]["message"]["content"]
    assert seen["chunks_before_abort"] == 2

    assert server.chatbot in seen["models"]
    assert seen["model"]["id"] == server.chatbot

    errors = seen["errors"]
    assert (errors["unknown"]["class"], errors["unknown"]["status"]) == ("NotFoundError", 404)
    assert (errors["invalid"]["class"], errors["invalid"]["status"]) == ("BadRequestError", 400)
    assert "temperature" in errors["invalid"]["message"]
    assert (errors["stranger"]["class"], errors["stranger"]["status"]) == ("AuthenticationError", 401)
    assert (errors["streamed"]["class"], errors["streamed"]["status"]) == ("BadRequestError", 400)
