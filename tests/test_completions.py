"""`POST /chat/completions`: what is answered, and what the parameters do."""

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import xllamacpp

from tests.support import Server, assert_error, question

pytestmark = pytest.mark.any_database  # test_records.py and test_management.py ask on both

CONTEXT, SHORT = 4096, 512  # tokens
BRIEF = "Be brief."
Messages = list[dict[str, str]]


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


@pytest.fixture(scope="session")
def count_tokens(model_file: Path) -> Callable[[Messages], int]:
    """Counts a prompt's tokens with a llama.cpp of the tests' own."""
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(model_file)
    parameters.hostnames, parameters.port = ["127.0.0.1"], 0
    parameters.n_ctx, parameters.n_parallel, parameters.verbosity, parameters.ui = 256, 1, 1, False
    engine = xllamacpp.Server(parameters)

    def count(messages: Messages) -> int:
        url = engine.listening_address
        prompt = httpx.post(url + "/apply-template", json={"messages": messages}).json()["prompt"]
        body = {"content": prompt, "add_special": True, "parse_special": True}
        return len(httpx.post(url + "/tokenize", json=body).json()["tokens"])

    return count


@pytest.fixture
def make_bot(client: httpx.Client) -> Iterator[Callable[..., str]]:
    """Makes chatbots, and deletes them again."""
    made: list[str] = []

    def make(**fields: Any) -> str:
        made.append(client.post("/chatbots", json={"name": "A test's own"} | fields).json()["id"])
        return made[-1]

    yield make
    for chatbot_id in made:
        client.delete(f"/chatbots/{chatbot_id}")


def ask(client: httpx.Client, chatbot: str, **parameters: Any) -> dict[str, Any]:
    """The answer to a question at temperature 0."""
    body = question(chatbot, max_tokens=8, temperature=0) | parameters
    response = client.post("/chat/completions", json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def text(answer: dict[str, Any]) -> str:
    content: str = answer["choices"][0]["message"]["content"]
    return content


def said(*words: str) -> Messages:
    """A conversation in turns, the user first."""
    return [{"role": ("user", "assistant")[number % 2], "content": word} for number, word in enumerate(words)]


def following(schema: dict[str, Any]) -> dict[str, Any]:
    """A response_format that makes the answer follow a schema."""
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


def test_published_example(server: Server) -> None:
    example = {
        "model": server.chatbot,
        "messages": [{"role": "user", "content": "How are you?"}],
        "temperature": 0.7,
    }
    with server.client() as client:
        response = client.post("/chat/completions", json=example)
    assert response.status_code == 200
    body = response.json()
    assert set(body) == {"id", "object", "created", "model", "choices", "usage"}
    assert body["id"].startswith("chatcmpl-")
    assert body["object"] == "chat.completion"
    assert type(body["created"]) is int
    assert body["model"] == server.chatbot
    [choice] = body["choices"]
    assert choice["index"] == 0
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"]
    assert choice["finish_reason"] in ("stop", "length")
    usage = body["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_shape_to_the_letter(server: Server, client: httpx.Client) -> None:
    response = client.post("/chat/completions", json=question(server.chatbot, max_tokens=2))
    assert response.headers["content-type"] == "application/json"
    assert response.reason_phrase == "OK"
    body = response.json()
    assert list(body["choices"][0]) == ["index", "message", "finish_reason"]
    assert list(body["choices"][0]["message"]) == ["role", "content"]
    assert list(body["usage"]) == ["prompt_tokens", "completion_tokens", "total_tokens"]
    assert all(type(count) is int for count in body["usage"].values())
    assert abs(body["created"] - time.time()) < 60


def test_ids_are_unique(server: Server, client: httpx.Client) -> None:
    assert len({ask(client, server.chatbot, max_tokens=1)["id"] for _ in range(3)}) == 3


def test_version_is_echoed(server: Server, client: httpx.Client) -> None:
    model = f"{server.chatbot}@1"
    assert ask(client, model, max_tokens=1)["model"] == model


def test_each_version_answers_as_itself(client: httpx.Client, make_bot: Callable[..., str]) -> None:
    bot = make_bot(max_tokens=1)
    client.patch(f"/chatbots/{bot}", json={"max_tokens": 3})
    lengths = [
        ask(client, model, max_tokens=8)["usage"]["completion_tokens"]
        for model in (bot, f"{bot}@1", f"{bot}@2")
    ]
    assert lengths == [3, 1, 3]


@pytest.mark.parametrize(
    "limits",
    [
        {"max_tokens": 3},
        {"max_tokens": None, "max_completion_tokens": 3},
        {"max_tokens": 3, "max_completion_tokens": 8},
        {"max_tokens": 10**30, "max_completion_tokens": 3},
    ],
)
def test_token_limit(server: Server, client: httpx.Client, limits: dict[str, Any]) -> None:
    answer = ask(client, server.chatbot, **limits)
    assert answer["usage"]["completion_tokens"] == 3
    assert answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("asked", [None, 5, 1_000_000, 2**31, 10**30])
def test_the_chatbots_own_limit_cuts_the_callers(
    client: httpx.Client, make_bot: Callable[..., str], asked: int | None
) -> None:
    answer = ask(client, make_bot(max_tokens=4), max_tokens=asked)
    assert answer["usage"]["completion_tokens"] == 4
    assert answer["choices"][0]["finish_reason"] == "length"


def test_stop(server: Server, client: httpx.Client) -> None:
    for stop in (" two", [" two"], ["never", " two", "three"]):
        answer = ask(
            client,
            server.chatbot,
            stop=stop,
            max_tokens=16,
            response_format=following({"enum": ["one two three"]}),
        )
        assert text(answer) == '"one'
        assert answer["choices"][0]["finish_reason"] == "stop"


def test_temperature_zero_is_deterministic(server: Server, client: httpx.Client) -> None:
    assert len({text(ask(client, server.chatbot, seed=seed)) for seed in (1, 1, 2, None)}) == 1


@pytest.mark.parametrize("seed", [0, 7, -1, 2**32 - 1, 2**63 - 1, -(2**63)])
def test_seed_repeats_an_answer(server: Server, client: httpx.Client, seed: int) -> None:
    answers = {
        text(
            ask(
                client,
                server.chatbot,
                seed=seed,
                temperature=1,
                messages=said("Invent a name for a ship."),
                max_tokens=8,
            )
        )
        for _ in range(2)
    }
    assert len(answers) == 1


def test_seeds_differ(server: Server, client: httpx.Client) -> None:
    messages = said("Invent a name for a ship.")
    answers = {
        text(ask(client, server.chatbot, seed=seed, temperature=1, messages=messages, max_tokens=8))
        for seed in range(4)
    }
    assert len(answers) > 1


def test_ignored_parameters_change_nothing(server: Server, client: httpx.Client) -> None:
    ignored = {
        "user": "someone",
        "metadata": {"a": "b"},
        "store": True,
        "service_tier": "auto",
        "parallel_tool_calls": False,
        "never heard of": [{"x": None}],
        "n": 1,
        "tools": [],
        "logprobs": False,
        "response_format": {"type": "text"},
        "stop": [],
    }
    assert text(ask(client, server.chatbot, **ignored)) == text(ask(client, server.chatbot))


def test_null_is_as_absent(server: Server, client: httpx.Client) -> None:
    names = [
        *("stream", "stream_options", "max_completion_tokens", "top_p", "stop", "seed", "presence_penalty"),
        *(
            "frequency_penalty",
            "response_format",
            "n",
            "logprobs",
            "tools",
            "tool_choice",
            "user",
            "metadata",
        ),
    ]
    assert text(ask(client, server.chatbot, **dict.fromkeys(names))) == text(ask(client, server.chatbot))


def test_temperature_null_is_the_chatbots_own(client: httpx.Client, make_bot: Callable[..., str]) -> None:
    bot = make_bot(temperature=0)
    assert len({text(ask(client, bot, temperature=None)) for _ in range(3)}) == 1


def test_json_object(server: Server, client: httpx.Client) -> None:
    answer = ask(
        client,
        server.chatbot,
        messages=said("A person's name, as a JSON object with the key name."),
        response_format={"type": "json_object"},
        max_tokens=24,
    )
    if answer["choices"][0]["finish_reason"] == "stop":
        assert isinstance(json.loads(text(answer)), dict)
    assert text(answer).lstrip().startswith("{")


def test_json_schema(server: Server, client: httpx.Client) -> None:
    schema = {
        "type": "object",
        "properties": {
            "colour": {"enum": ["red", "grün", "🟦"]},
            "count": {"type": "integer", "maximum": 9, "minimum": 1},
        },
        "required": ["colour", "count"],
        "additionalProperties": False,
    }
    answer = ask(client, server.chatbot, response_format=following(schema), max_tokens=40)
    value = json.loads(text(answer))
    assert set(value) == {"colour", "count"}
    assert value["colour"] in ("red", "grün", "🟦") and 1 <= value["count"] <= 9
    assert answer["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    "schema",
    [{"type": "nonsense"}, {"$ref": "#/nowhere"}, {"enum": []}, {"properties": 1}, {"const": 10**400}],
)
def test_a_schema_that_is_none(server: Server, client: httpx.Client, schema: dict[str, Any]) -> None:
    body = question(server.chatbot, response_format=following(schema))
    assert_error(client.post("/chat/completions", json=body), 400, "response_format")


# What the engine reads


def test_usage_is_the_engines_own_count(
    client: httpx.Client, make_bot: Callable[..., str], count_tokens: Callable[[Messages], int]
) -> None:
    bot = make_bot(instructions="Answer in rhymes. 😀")
    conversation = said("Grüße! 漢字 <|im_start|>?", "Hello.\n\n\tYes", "And now?")
    usage = ask(client, bot, messages=conversation, max_tokens=2)["usage"]
    expected = count_tokens([{"role": "system", "content": "Answer in rhymes. 😀"}, *conversation])
    assert usage["prompt_tokens"] == expected
    assert usage["completion_tokens"] <= 2
    assert usage["total_tokens"] == expected + usage["completion_tokens"]


def test_usage_does_not_depend_on_the_cache(server: Server, client: httpx.Client) -> None:
    counts = {ask(client, server.chatbot, max_tokens=1)["usage"]["prompt_tokens"] for _ in range(3)}
    assert len(counts) == 1


@pytest.mark.parametrize("role", ["system", "developer"])
def test_what_the_program_adds_comes_after_the_instructions(
    client: httpx.Client, make_bot: Callable[..., str], count_tokens: Callable[[Messages], int], role: str
) -> None:
    bot = make_bot(instructions="You are Ann.")
    added = [{"role": role, "content": "It is Monday."}, *said("What day is it?")]
    usage = ask(client, bot, messages=added, max_tokens=1)["usage"]
    merged = [{"role": "system", "content": "You are Ann.\n\nIt is Monday."}, *said("What day is it?")]
    assert usage["prompt_tokens"] == count_tokens(merged)


def test_text_parts_are_a_text(server: Server, client: httpx.Client) -> None:
    parts = [{"type": "text", "text": "Name a"}, {"type": "text", "text": "colour."}]
    as_parts = ask(client, server.chatbot, messages=[{"role": "user", "content": parts}])
    as_text = ask(client, server.chatbot, messages=said("Name a\ncolour."))
    assert (text(as_parts), as_parts["usage"]) == (text(as_text), as_text["usage"])


def test_assistant_without_content(server: Server, client: httpx.Client) -> None:
    silent = {"role": "assistant", "content": None, "refusal": None, "tool_calls": None}
    messages = [*said("Hello?"), silent, *said("Are you there?")]
    assert ask(client, server.chatbot, messages=messages, max_tokens=1)["usage"]["prompt_tokens"] > 0


# Long conversations


@pytest.fixture(scope="module")
def forgetful(model_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a short context, which is soon full: the arithmetic is the same at every length."""
    models = {"default": {"path": str(model_file), "context": SHORT, "slots": 1}}
    with Server(tmp_path_factory.mktemp("forgetful"), UPCHATTY_MODELS=json.dumps(models)) as server:
        yield server


def ask_briefly(server: Server, messages: Messages) -> int:
    """The length of the prompt that the engine read, in tokens, after the instructions `BRIEF`."""
    with server.client() as client:
        fields = {"name": "brief", "instructions": BRIEF, "max_tokens": 4}
        bot = client.post("/chatbots", json=fields).json()["id"]
        prompt_tokens: int = ask(client, bot, messages=messages, max_tokens=1)["usage"]["prompt_tokens"]
    return prompt_tokens


def test_oldest_turns_give_way(forgetful: Server, count_tokens: Callable[[Messages], int]) -> None:
    turns = [f"{number}: " + "word " * 30 for number in range(30)]
    conversation = said(*turns, "This is the newest question.")
    prompt = ask_briefly(forgetful, conversation)
    instructions = [{"role": "system", "content": BRIEF}]
    # Whole turns go, and as few as possible: one of the ends of the conversation was read.
    kept = [count_tokens(instructions + conversation[first:]) for first in range(2, 31, 2)]
    assert prompt in kept
    assert SHORT * 3 // 4 - 90 < prompt <= SHORT


def test_newest_question_alone_is_kept_whole(
    forgetful: Server, count_tokens: Callable[[Messages], int]
) -> None:
    newest = said("word " * 400)
    prompt = ask_briefly(forgetful, [*said("old " * 60, "older " * 60), *newest])
    assert prompt == count_tokens([{"role": "system", "content": BRIEF}, *newest])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("before", [[], ["Hello.", "Hello!"]])
def test_too_long_a_message(server: Server, client: httpx.Client, before: list[str], stream: bool) -> None:
    body = question(server.chatbot, stream=stream) | {"messages": said(*before, "word " * 4200)}
    response = client.post("/chat/completions", json=body)
    recognised = f"messages: prompt is too long: this model's maximum context length is {CONTEXT} tokens"
    assert_error(response, 400)
    sentence = response.json()["error"]
    assert sentence.startswith(recognised)
    assert int(re.findall(r"\d+", sentence)[-1]) > 4200  # how long it is
