"""What is refused, and how: `POST /chat/completions` and everything else that reads input.

A body that is fine but for its chatbot, which does not exist, gets 404: that shows without an engine's
work that a value was accepted.
"""

import gzip
import json
import socket
from collections.abc import Iterator

import httpx
import pytest

from tests.support import ADMIN_KEY, Server, assert_error

COMPLETIONS = "/chat/completions"
NOBODY = "bot_" + "0" * 32
MESSAGES = '[{"role":"user","content":"Hi"}]'
JSON = {"Content-Type": "application/json"}
TEN_MB = b'{"user":"' + b"a" * 10_000_000 + b'"}'


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


def body(extra: str = "", messages: str = MESSAGES, model: str = f'"{NOBODY}"') -> bytes:
    """A request's body, as text because much of what is tried is no JSON."""
    return f'{{"model":{model},"messages":{messages}{extra}}}'.encode()


def post(client: httpx.Client, content: bytes, **headers: str) -> httpx.Response:
    return client.post(COMPLETIONS, content=content, headers=JSON | headers)


def refuses(client: httpx.Client, content: bytes, *words: str) -> None:
    assert_error(post(client, content), 400, *words)


def accepts(client: httpx.Client, content: bytes) -> None:
    assert_error(post(client, content), 404, NOBODY)


NO_NUMBER = ['"1"', "true", "[]", "{}", '""', "[1]", '{"a":1}']
NO_INTEGER = [*NO_NUMBER, "0.5", "16.7"]
NO_BOOLEAN = ['"true"', "0", "1", "1.0", "[]", "{}", '""']
NO_STRING = ["1", "1.5", "true", "[]", "{}", '["a"]', '{"a":1}']
NO_OBJECT = ["1", "true", "[]", '"text"', "[{}]"]
NO_ARRAY = ["1", "true", "{}", '"a"', '{"a":[]}']

REFUSED = {
    "model": [*NO_STRING, "null"],
    "messages": [*NO_ARRAY, "null", "[]"],
    "temperature": [*NO_NUMBER, "-0.1", "1.0001", "-1", "2", "1e300"],
    "top_p": [*NO_NUMBER, "-0.1", "1.0001", "2"],
    "stream": NO_BOOLEAN,
    "stream_options": NO_OBJECT,
    "max_tokens": [*NO_INTEGER, "0", "-1", "-99999999999999999999"],
    "max_completion_tokens": [*NO_INTEGER, "0", "-1"],
    "stop": [
        *("1", "true", "{}", '{"a":1}', "[1]", "[null]", '["a",["b"]]'),
        *('""', '[""]', '["a","b","c","d","e"]'),
    ],
    "seed": [*NO_INTEGER, "9223372036854775808", "-9223372036854775809"],
    "presence_penalty": [*NO_NUMBER, "-2.1", "2.1"],
    "frequency_penalty": [*NO_NUMBER, "-2.1", "2.1"],
    "response_format": [*NO_OBJECT, "{}", '{"type":null}', '{"type":"xml"}', '{"type":1}'],
    # Known, but not built.
    "n": [*NO_INTEGER, "0", "-1", "2", "128"],
    "logprobs": [*NO_BOOLEAN, "true"],
    "top_logprobs": [*NO_INTEGER, "1", "20", "-1"],
    "logit_bias": [*NO_OBJECT, '{"50256":-100}'],
    "tools": [*NO_ARRAY, '[{"type":"function","function":{"name":"f"}}]', "[null]"],
    "functions": [*NO_ARRAY, '[{"name":"f"}]'],
    "tool_choice": [*NO_STRING, '"required"', '{"type":"function","function":{"name":"f"}}'],
    "function_call": ["1", '{"name":"f"}', '"f"'],
    "modalities": [*NO_ARRAY, '["audio"]', '["text","audio"]', "[1]"],
    "audio": ["1", '{"voice":"alloy","format":"mp3"}'],
    "web_search_options": ["1", "{}"],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in REFUSED.items() for value in values]
)
@pytest.mark.any_database
def test_wrong_value_names_its_parameter(client: httpx.Client, name: str, value: str) -> None:
    required = {"model": f'"{NOBODY}"', "messages": MESSAGES}
    fields = required | {name: value}
    content = "{" + ",".join(f'"{field}":{text}' for field, text in fields.items()) + "}"
    refuses(client, content.encode(), name)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1e400"])
@pytest.mark.parametrize(
    "place",
    [
        *(f'"{name}":%' for name in sorted(REFUSED.keys() - {"model", "messages"})),
        '"user":%',
        '"metadata":{"a":[{"b":%}]}',
        '"stream_options":{"include_usage":%}',
        '"stream_options":{"unknown":%}',
        '"response_format":{"type":"json_object","unknown":%}',
        '"response_format":{"type":"json_schema","json_schema":{"schema":{"type":"number","maximum":%}}}',
        '"response_format":{"type":"json_schema","json_schema":{"schema":{"enum":[1,[%]]}}}',
    ],
)
@pytest.mark.any_database
def test_no_number_is_infinite(client: httpx.Client, place: str, number: str) -> None:
    refuses(client, body("," + place.replace("%", number)))


@pytest.mark.parametrize("number", ["NaN", "1e999"])
@pytest.mark.parametrize(
    "message", ['{"role":"user","content":%}', '{"role":"user","content":"a","weight":%}', "%"]
)
@pytest.mark.any_database
def test_no_number_in_a_message_is_infinite(client: httpx.Client, message: str, number: str) -> None:
    refuses(client, body(messages=f"[{message.replace('%', number)}]"))


ACCEPTED = {
    "temperature": ["0", "0.0", "1", "1.0", "0.5", "5e-1", "-0.0", "1e-400", "null"],
    "top_p": ["0", "1", "0.9", "null"],
    "stream": ["true", "false", "null"],
    "stream_options": ["null", "{}", '{"include_usage":null}', '{"include_usage":true}', '{"unknown":1}'],
    "max_tokens": ["1", "1000000000", "2147483648", "1" + "0" * 30, "null"],
    "max_completion_tokens": ["1", "9223372036854775808", "null"],
    "stop": ['"a"', '["a"]', '["a","b","c","d"]', "[]", "null"],
    "seed": ["0", "-1", "9223372036854775807", "-9223372036854775808", "null"],
    "presence_penalty": ["-2", "2", "0.0", "null"],
    "frequency_penalty": ["-2.0", "2", "null"],
    "response_format": ["null", '{"type":"text"}', '{"type":"json_object"}', '{"type":"text","x":1}'],
    "n": ["1", "null"],
    "logprobs": ["false", "null"],
    "top_logprobs": ["0", "null"],
    "logit_bias": ["{}", "null"],
    "tools": ["[]", "null"],
    "functions": ["[]", "null"],
    "tool_choice": ['"none"', '"auto"', "null"],
    "function_call": ['"none"', "null"],
    "modalities": ['["text"]', "null"],
    "audio": ["null"],
    "web_search_options": ["null"],
    "user": ['"someone"', "1", "null", "{}"],
    "metadata": ['{"a":"b"}', "null", "5"],
    "store": ["true", "null"],
    "service_tier": ['"auto"'],
    "parallel_tool_calls": ["true"],
    "reasoning_effort": ['"low"'],
    "never heard of": ["1e5", '{"a":[{"b":null}]}', "9" * 30, "9" * 5000, '"\\ud83d\\ude00"'],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in ACCEPTED.items() for value in values]
)
@pytest.mark.any_database
def test_right_or_ignored_value(client: httpx.Client, name: str, value: str) -> None:
    accepts(client, body(f',"{name}":{value}'))


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("null", ["messages[0]"]),
        ('"Hi"', ["messages[0]"]),
        ("[]", ["messages[0]"]),
        ("{}", ["messages[0].role", "required"]),
        ('{"content":"Hi"}', ["messages[0].role", "required"]),
        ('{"role":"user"}', ["messages[0].content", "required"]),
        ('{"role":"system"}', ["messages[0].content", "required"]),
        ('{"role":null,"content":"Hi"}', ["messages[0].role"]),
        ('{"role":1,"content":"Hi"}', ["messages[0].role"]),
        ('{"role":"USER","content":"Hi"}', ["messages[0].role", "'user'", "'assistant'", "'USER'"]),
        ('{"role":"tool","content":"Hi"}', ["messages[0].role", "'tool'"]),
        ('{"role":"function","content":"Hi"}', ["messages[0].role", "'function'"]),
        ('{"role":"user","content":null}', ["messages[0].content", "string"]),
        ('{"role":"system","content":null}', ["messages[0].content"]),
        ('{"role":"developer","content":null}', ["messages[0].content"]),
        ('{"role":"user","content":1}', ["messages[0].content", "string"]),
        ('{"role":"user","content":false}', ["messages[0].content", "string"]),
        ('{"role":"user","content":{}}', ["messages[0].content", "string"]),
        ('{"role":"assistant","content":{}}', ["messages[0].content", "string"]),
        ('{"role":"user","content":["Hi"]}', ["messages[0].content[0]"]),
        ('{"role":"user","content":[{}]}', ["messages[0].content[0].type", "required"]),
        ('{"role":"user","content":[{"text":"Hi"}]}', ["messages[0].content[0].type", "required"]),
        ('{"role":"user","content":[{"type":"text"}]}', ["messages[0].content[0].text", "required"]),
        ('{"role":"user","content":[{"type":"text","text":null}]}', ["messages[0].content[0].text"]),
        (
            '{"role":"user","content":[{"type":"image_url","image_url":{"url":"http://a/b.png"}}]}',
            ["messages[0].content[0].type", "'text'", "image_url"],
        ),
        (
            '{"role":"user","content":[{"type":"text","text":"a"},{"type":"input_audio","input_audio":{}}]}',
            ["messages[0].content[1].type", "'text'", "input_audio"],
        ),
        (
            '{"role":"assistant","content":null,"tool_calls":[{"id":"1","type":"function"}]}',
            ["messages[0].tool_calls"],
        ),
        ('{"role":"user","content":"Hi"},{"role":"user","content":5}', ["messages[1].content"]),
    ],
)
@pytest.mark.any_database
def test_wrong_message_says_where(client: httpx.Client, message: str, words: list[str]) -> None:
    refuses(client, body(messages=f"[{message}]"), *words)


@pytest.mark.parametrize(
    "message",
    [
        '{"role":"system","content":"Be brief."}',
        '{"role":"developer","content":"Be brief."}',
        '{"role":"assistant","content":null}',
        '{"role":"assistant"}',
        '{"role":"assistant","content":"Hi","refusal":null,"tool_calls":null,"audio":null,"annotations":[]}',
        '{"role":"assistant","content":"Hi","tool_calls":[]}',
        '{"role":"user","content":"Hi","name":"Ann","unknown":[1]}',
        '{"role":"user","content":""}',
        '{"role":"user","content":[{"type":"text","text":"a","unknown":1},{"type":"text","text":"b"}]}',
        '{"content":"Hi","role":"user"}',
    ],
)
@pytest.mark.any_database
def test_right_message(client: httpx.Client, message: str) -> None:
    accepts(client, body(messages=f"[{message}]"))


@pytest.mark.parametrize(
    "value",
    [
        '{"type":"json_schema"}',
        '{"type":"json_schema","json_schema":null}',
        '{"type":"json_schema","json_schema":{}}',
        '{"type":"json_schema","json_schema":{"name":"a"}}',
        '{"type":"json_schema","json_schema":{"schema":null}}',
        '{"type":"json_schema","json_schema":{"schema":[]}}',
        '{"type":"json_schema","json_schema":{"schema":"object"}}',
        '{"type":"json_schema","json_schema":[]}',
    ],
)
@pytest.mark.any_database
def test_json_schema_without_a_schema(client: httpx.Client, value: str) -> None:
    refuses(client, body(f',"response_format":{value}'), "response_format.json_schema", "expected")


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b" ", b"\n", b"null", b"true", b"1", b'"x"', b"[]", b"[{}]", b"{", b"}", b"{]", b"'x'"),
        *(b"NaN", b"undefined", b"\0", b"\xff", b"\xef\xbb\xbf", b"model=x", b"<a/>", b"--x\r\n"),
        b"\xef\xbb\xbf" + body(),
        body() + b"x",
        body() + b"\0",
        body() + body(),
        body() + b",",
        body().decode().encode("utf-16"),
        body().decode().encode("utf-32"),
        gzip.compress(body(), mtime=0),
        body()[:-1],
        body(","),
        body(",'user':1"),
        body(",user:1"),
        body(',"user":01'),
        body(',"user":+1'),
        body(',"user":.5'),
        body(',"user":1.'),
        body(',"user":0x1'),
        body(',"user":1e'),
        body(',"user":True'),
        body(',"user":undefined'),
        body(',"user":"\t"'),
        body(',"user":"\\x"'),
        body(',"user":"\\u12"'),
        body("/* a comment */"),
    ],
)
@pytest.mark.any_database
def test_no_json(client: httpx.Client, content: bytes) -> None:
    refuses(client, content, "expected")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{}", ["model", "required"]),
        (body().replace(b'"model"', b'"modell"'), ["model", "required"]),
        (body().replace(b'"messages"', b'"message"'), ["messages", "required"]),
        (body().replace(b'"model"', b'"Model"'), ["model", "required"]),
    ],
)
@pytest.mark.any_database
def test_missing_parameter(client: httpx.Client, content: bytes, words: list[str]) -> None:
    refuses(client, content, *words)


@pytest.mark.parametrize("text", [b"\xff", b"a\xc3", b"\xc0\x80", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80"])
@pytest.mark.parametrize("place", ['"messages":[{"role":"user","content":"%"}]', '"user":"%"', '"%":1'])
@pytest.mark.any_database
def test_invalid_utf8(client: httpx.Client, place: str, text: bytes) -> None:
    content = f'{{"model":"{NOBODY}",' + place + ("" if "messages" in place else f',"messages":{MESSAGES}')
    refuses(client, content.encode().replace(b"%", text) + b"}", "body")


@pytest.mark.parametrize("text", ["\\ud800", "\\udc00", "a\\uD83D b", "\\ude00\\ud83d", "\\ud800\\ud800"])
@pytest.mark.parametrize(
    "place",
    [
        '"messages":[{"role":"user","content":"%"}]',
        '"messages":[{"role":"user","content":[{"type":"text","text":"%"}]}]',
        f'"messages":{MESSAGES},"stop":"%"',
        f'"messages":{MESSAGES},"response_format":{{"type":"json_schema",'
        '"json_schema":{"schema":{"enum":["%"]}}}',
        f'"messages":{MESSAGES},"user":"%"',
        f'"messages":{MESSAGES},"metadata":{{"%":1,"%":2}}',
    ],
)
def test_lone_surrogate(client: httpx.Client, place: str, text: str) -> None:
    refuses(client, f'{{"model":"{NOBODY}",{place.replace("%", text)}}}'.encode())


@pytest.mark.parametrize(
    ("content", "parameter"),
    [
        (body(messages='[{"role":"user","content":"a\\u0000b"}]'), "messages[0].content"),
        (
            body(messages='[{"role":"user","content":[{"type":"text","text":"\\u0000"}]}]'),
            "messages[0].content[0].text",
        ),
        (body(',"stop":"\\u0000"'), "stop"),
        (body(',"stop":["a","\\u0000"]'), "stop[1]"),
        (body(model='"bot_\\u0000"'), "model"),
        (
            body(',"response_format":{"type":"json_schema","json_schema":{"schema":{"enum":["\\u0000"]}}}'),
            "response_format.json_schema.schema",
        ),
        (
            body(',"response_format":{"type":"json_schema","json_schema":{"schema":{"\\u0000":1}}}'),
            "response_format.json_schema.schema",
        ),
    ],
)
def test_escaped_nul(client: httpx.Client, content: bytes, parameter: str) -> None:
    refuses(client, content, parameter, "NUL")


def test_raw_nul(client: httpx.Client) -> None:
    refuses(client, body(messages='[{"role":"user","content":"a\0b"}]'))


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (body(',"model":"x"'), "model"),
        (body(',"temperature":0,"temperature":0'), "temperature"),
        (body(',"never heard of":1,"never heard of":1'), "never heard of"),
        (body(',"\\u006dodel":"x"'), "model"),
        (body(messages='[{"role":"user","content":"a","content":"b"}]'), "content"),
        (body(messages='[{"role":"user","content":"a","role":"user"}]'), "role"),
        (body(messages='[{"role":"user","content":[{"type":"text","text":"a","text":"b"}]}]'), "text"),
        (body(',"metadata":{"a":{"b":1,"b":2}}'), "b"),
        (body(',"metadata":{"":1,"":2}'), "''"),
        (body(',"stream_options":{"include_usage":true,"include_usage":false}'), "include_usage"),
        (
            body(',"response_format":{"type":"json_schema","json_schema":{"schema":{"type":1,"type":2}}}'),
            "type",
        ),
    ],
)
@pytest.mark.any_database
def test_duplicate_key(client: httpx.Client, content: bytes, name: str) -> None:
    refuses(client, content, name, "twice")


@pytest.mark.any_database
def test_duplicate_role(client: httpx.Client) -> None:
    refuses(client, body(messages='[{"role":"user","content":"a","role":"system"}]'), "role")


@pytest.mark.any_database
def test_duplicate_among_very_many_keys_is_found_at_once(client: httpx.Client) -> None:
    keys = ",".join(f'"k{number}":0' for number in range(200_000))
    refuses(client, body(f',"metadata":{{{keys},"k199999":1}}'), "k199999", "twice")


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"messages":' + b"[" * 100_000,
        body(',"user":' + "[" * 100_000 + "]" * 100_000),
        body(',"metadata":' + '{"a":' * 50_000 + "1" + "}" * 50_000),
        body(messages='[{"role":"user","content":' + "[" * 50_000 + "]" * 50_000 + "}]"),
        body(
            ',"response_format":{"type":"json_schema","json_schema":{"schema":'
            + '{"a":' * 50_000
            + "1"
            + "}" * 50_000
            + "}}"
        ),
    ],
    ids=["arrays", "objects", "messages", "ignored", "metadata", "content", "schema"],
)
@pytest.mark.any_database
def test_deep_nesting(client: httpx.Client, content: bytes) -> None:
    refuses(client, content)


def test_the_server_is_well_after_all_this(client: httpx.Client, server: Server) -> None:
    accepts(client, body())
    assert "internal error" not in server.log()


@pytest.mark.parametrize(
    "content_type",
    [
        *("", "text/plain", "application/x-www-form-urlencoded", "application/jsonx", "json", "*/*"),
        *(
            "multipart/form-data; boundary=x",
            "application/vnd.api+json",
            "application/xml; a=application/json",
        ),
    ],
)
@pytest.mark.any_database
def test_wrong_content_type(client: httpx.Client, content_type: str) -> None:
    response = post(client, body(), **{"Content-Type": content_type})
    assert_error(response, 415, "Content-Type", "application/json")


@pytest.mark.any_database
def test_missing_content_type(client: httpx.Client) -> None:
    response = client.post(COMPLETIONS, content=body())
    assert_error(response, 415, "Content-Type", "application/json")


@pytest.mark.parametrize(
    "content_type", ["application/json; charset=utf-8", "Application/JSON", "application/json;charset=UTF-8"]
)
@pytest.mark.any_database
def test_right_content_type(client: httpx.Client, content_type: str) -> None:
    assert_error(post(client, body(), **{"Content-Type": content_type}), 404, NOBODY)


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "nonsense"])
@pytest.mark.any_database
def test_encoded_body(client: httpx.Client, encoding: str) -> None:
    response = post(client, gzip.compress(body()), **{"Content-Encoding": encoding})
    assert_error(response, 415, encoding)


@pytest.mark.any_database
def test_identity_is_no_encoding(client: httpx.Client) -> None:
    assert_error(post(client, body(), **{"Content-Encoding": "identity"}), 404, NOBODY)


@pytest.mark.parametrize("path", [COMPLETIONS, "/chatbots", "/keys"])
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.any_database
def test_large_body(client: httpx.Client, path: str, chunked: bool) -> None:
    content = iter([TEN_MB[start : start + 65536] for start in range(0, len(TEN_MB), 65536)])
    response = client.post(path, content=content if chunked else TEN_MB, headers=JSON)
    assert_error(response, 413, "body", str(8 * 1024 * 1024))


@pytest.mark.any_database
def test_a_large_body_does_not_need_a_key_to_be_refused(server: Server) -> None:
    with server.client(None) as client:
        assert_error(client.post(COMPLETIONS, content=TEN_MB, headers=JSON), 401)


@pytest.mark.parametrize(
    "model",
    [
        *("", "gpt-4o", "bot_", "bot_1", NOBODY, f"{NOBODY}@1", f"{NOBODY} ", f" {NOBODY}", f"{NOBODY}\n"),
        *(NOBODY.upper(), f"{NOBODY}0", "bot_" + "٠" * 32, "é😀", "../../etc/passwd", "' OR 1=1 --", "%00"),
    ],
)
def test_unknown_chatbot(client: httpx.Client, model: str) -> None:
    assert_error(post(client, body(model=json.dumps(model))), 404, "chatbot")


@pytest.mark.parametrize(
    "version", ["@2", "@0", "@", "@x", "@-1", "@1.0", "@01", "@1@1", "@999999999999999999"]
)
def test_unknown_version(client: httpx.Client, server: Server, version: str) -> None:
    assert_error(post(client, body(model=f'"{server.chatbot}{version}"')), 404, server.chatbot)


def test_errors_quote_no_more_than_they_need(client: httpx.Client) -> None:
    for response in (
        post(client, body(model=json.dumps("x" * 100_000))),
        post(client, body(messages=f'[{{"role":"{"x" * 100_000}","content":"Hi"}}]')),
        post(client, body(',"{0}":1,"{0}":2'.format("x" * 100_000))),
        client.get("/models/" + "x" * 20_000),
        client.delete("/keys/" + "x" * 20_000),
        client.delete("/chatbots/" + "x" * 20_000),
    ):
        assert response.status_code in (400, 404)
        assert len(response.content) < 500, response.text[:100]


UNAUTHENTICATED = {
    "missing": None,
    "empty": b"",
    "scheme only": b"Bearer",
    "scheme and a space": b"Bearer ",
    "basic": b"Basic dXNlcjpwYXNzd29yZA==",
    "key only": ADMIN_KEY.encode(),
    "two tokens": f"Bearer {ADMIN_KEY} {ADMIN_KEY}".encode(),
    "a comma": f"Bearer {ADMIN_KEY}, Bearer x".encode(),
    "other scheme": f"Token {ADMIN_KEY}".encode(),
    "glued": f"Bearer{ADMIN_KEY}".encode(),
    "colon": f"Bearer: {ADMIN_KEY}".encode(),
    "tab": f"Bearer\t{ADMIN_KEY}".encode(),
    "unknown": b"Bearer upchatty_unknown",
    "longer": f"Bearer {ADMIN_KEY}x".encode(),
    "shorter": f"Bearer {ADMIN_KEY[:-1]}".encode(),
    "other case": f"Bearer {ADMIN_KEY.upper()}".encode(),
    "quoted": f'Bearer "{ADMIN_KEY}"'.encode(),
    "not ASCII": b"Bearer \xff\xfe",
    "very long": b"Bearer " + b"x" * 50_000,
}


@pytest.mark.parametrize("path", [COMPLETIONS, "/chatbots"])
@pytest.mark.parametrize("case", UNAUTHENTICATED)
def test_unauthenticated(server: Server, case: str, path: str) -> None:
    header, content = UNAUTHENTICATED[case], body()
    lines = [
        f"POST /api/v1{path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n".encode(),
        b"Content-Type: application/json\r\nContent-Length: %d\r\n" % len(content),
        b"" if header is None else b"Authorization: " + header + b"\r\n",
    ]
    response = speak(server, b"".join(lines) + b"\r\n" + content)
    assert_error(response, 401)
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.headers["x-request-id"]
    assert ADMIN_KEY not in response.text


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "bEaReR", "Bearer "])
def test_scheme_in_any_case(server: Server, scheme: str) -> None:
    with server.client(None) as client:
        response = client.get("/models", headers={"Authorization": f"{scheme} {ADMIN_KEY}"})
    assert response.status_code == 200


@pytest.mark.parametrize(
    "path",
    ["/nope", "/chat", "/chat/completions/x", "/models/a/b", "/chatbots/x/nope", "/%00", "/..%2f", "/é"],
)
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
@pytest.mark.any_database
def test_unknown_path(client: httpx.Client, method: str, path: str) -> None:
    assert_error(client.request(method, path), 404)


@pytest.mark.parametrize(
    "path", ["/", "/api", "/api/v1", "/api/v2/models", "/schema/swagger", "/favicon.ico"]
)
@pytest.mark.any_database
def test_unknown_path_outside_of_the_api(server: Server, path: str) -> None:
    authorization = {"Authorization": f"Bearer {ADMIN_KEY}"}
    assert_error(httpx.get(server.address + path, headers=authorization), 404, path)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", COMPLETIONS, {"POST"}),
        ("PUT", COMPLETIONS, {"POST"}),
        ("DELETE", COMPLETIONS, {"POST"}),
        ("POST", "/models", {"GET", "HEAD"}),
        ("DELETE", f"/models/{NOBODY}", {"GET", "HEAD"}),
        ("PUT", "/chatbots", {"GET", "HEAD", "POST"}),
        ("POST", f"/chatbots/{NOBODY}", {"GET", "HEAD", "PATCH", "DELETE"}),
        ("PATCH", "/keys", {"GET", "HEAD", "POST"}),
        ("GET", f"/keys/{NOBODY}", {"DELETE"}),
        ("TRACE", "/models", {"GET", "HEAD"}),
    ],
)
@pytest.mark.any_database
def test_wrong_method(client: httpx.Client, method: str, path: str, allowed: set[str]) -> None:
    response = client.request(method, path)
    assert_error(response, 405, method, path)
    assert set(response.headers["allow"].split(", ")) - {"OPTIONS"} == allowed
    options = client.options(path)
    assert options.status_code == 204
    assert set(options.headers["allow"].split(", ")) - {"OPTIONS"} == allowed


@pytest.mark.parametrize(
    "garbage",
    [
        *(b"hello\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b"\0\0\0\0\r\n\r\n"),
        *(b"GET / HTTP/9.9\r\n\r\n", b"FOO / HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
        b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /a b HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.1\r\nBad Header: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nX-A: a\0b\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\nab",
        b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n",
    ],
)
@pytest.mark.any_database
def test_no_http(server: Server, garbage: bytes) -> None:
    assert_error(speak(server, garbage), 400, "HTTP")


@pytest.mark.any_database
def test_even_no_http_gets_a_request_id(server: Server) -> None:
    assert speak(server, b"hello\r\n\r\n").headers.get("x-request-id")


def speak(server: Server, request: bytes) -> httpx.Response:
    """Send bytes as they are, and read the answer until the server closes the connection."""
    url = httpx.URL(server.address)
    with socket.create_connection((url.host, url.port or 80), timeout=20) as connection:
        connection.sendall(request)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, content = answer.partition(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").split("\r\n")
    headers = [(name, value) for name, _, value in (line.partition(": ") for line in lines)]
    version, number, phrase = status.split(" ", 2)
    assert version == "HTTP/1.1" and phrase
    return httpx.Response(int(number), headers=headers, content=content)
