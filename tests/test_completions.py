"""`POST /chat/completions`, whole and streamed."""


from tests.support import Server


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
