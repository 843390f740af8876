"""Every command of `upchatty`, as an owner or operator calls it."""

import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tests.support import ADMIN_KEY, Server
from upchatty import __version__
from upchatty.cli import main

GONE = "http://127.0.0.1:9"
PTY_SECONDS = 60


class Result:
    """What a command printed, and its exit code."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Command = Callable[..., Result]


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator[Command]:
    """Runs commands in this process, on a data folder of their own."""
    for name in [name for name in os.environ if name.startswith("UPCHATTY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("UPCHATTY_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.chdir(tmp_path)

    def command(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["upchatty", *arguments])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return Result(code, out, err)

    return command


def assert_refused(result: Result, code: int, *words: str) -> None:
    """A clear sentence on standard error, nothing on standard output, and the exit code."""
    assert (result.code, result.out) == (code, ""), result.err
    lines = result.err.splitlines()
    assert all(line.startswith("upchatty: ") for line in lines)
    assert len([line for line in lines if not line.endswith("--help")]) == 1
    for word in words:
        assert word in result.err


# Help


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ["serve", "chat", "status", "chatbots", "keys", "models", "Exit codes"]),
        (("serve",), ["--port", "UPCHATTY_PORT", "--data-dir", "[default: 8000]", "--config"]),
        (("chat",), ["CHATBOT", "bot_", "pipe"]),
        (("status",), ["--json", "ready"]),
        (("chatbots",), ["create", "delete", "edit", "list", "show"]),
        (("chatbots", "list"), ["--json"]),
        (("chatbots", "create"), ["NAME", "--instructions", "--temperature"]),
        (("chatbots", "show"), ["CHATBOT", "bot_"]),
        (("chatbots", "edit"), ["CHATBOT", "--publish"]),
        (("chatbots", "delete"), ["CHATBOT", "--yes"]),
        (("keys",), ["create", "list", "revoke"]),
        (("keys", "create"), ["--scope", "--chatbot", "--expires", "--days", "--tokens-per-day"]),
        (("keys", "list"), ["--json"]),
        (("keys", "revoke"), ["KEY", "key_"]),
        (("models",), ["list", "pull"]),
        (("usage",), ["--from", "--to", "--by", "--chart", "--json"]),
        (("models", "list"), ["--json"]),
        (("models", "pull"), ["NAME"]),
    ],
)
def test_help(run: Command, tmp_path: Path, arguments: tuple[str, ...], words: list[str]) -> None:
    result = run(*arguments, "--help")
    assert result.code == 0
    for word in words:
        assert word in result.out
    assert "UPCHATTY_CONFIG, UPCHATTY_CONFIG" not in result.out
    assert not list(tmp_path.iterdir())


def test_version(run: Command) -> None:
    assert run("--version").out.strip() == __version__


# Chatbots


def test_chatbots_from_first_to_last(run: Command, tmp_path: Path) -> None:
    first = run("chatbots", "list")
    assert first.code == 0 and "chatbots create" in first.out
    assert str(tmp_path / "data" / "upchatty.db") in first.err  # it was made just now

    instructions = tmp_path / "instructions.txt"
    instructions.write_text("You sell ice cream. Ünïcode, [brackets] and all.")
    made = run("chatbots", "create", "Ada [1]", "--instructions", f"@{instructions}", "--json")
    assert made.code == 0 and made.err == ""
    chatbot = made.json["id"]
    assert made.json | {"id": 0, "created_at": 0, "updated_at": 0} == {
        "id": 0,
        "object": "chatbot",
        "version": 1,
        "published_version": 1,
        "name": "Ada [1]",
        "instructions": instructions.read_text(),
        "model": None,
        "temperature": 0.7,
        "max_tokens": 1024,
        "keep_text": True,
        "limits": None,
        "policy": "open",
        "threshold": None,
        "fallback_message": None,
        "passages": None,
        "created_at": 0,
        "updated_at": 0,
    }

    assert run("chatbots", "list", "--json").json == [made.json]
    heading, row = run("chatbots", "list").out.splitlines()
    assert heading.split() == ["ID", "NAME", "VERSION", "MODEL", "CHANGED"]
    assert chatbot in row and "Ada [1]" in row and row == row.rstrip()

    edited = run(
        *("chatbots", "edit", chatbot, "--name", "Eve", "--temperature", "0", "--max-tokens", "9"),
        *("--no-keep-text", "--json"),
    )
    assert edited.json["version"] == 2
    assert [edited.json[field] for field in ("name", "temperature", "max_tokens", "keep_text")] == [
        "Eve",
        0.0,
        9,
        False,
    ]
    shown = run("chatbots", "show", chatbot).out
    assert re.search(r"^name +Eve$", shown, re.MULTILINE)
    assert re.search(
        r"^instructions +You sell ice cream. Ünïcode, \[brackets\] and all.$", shown, re.MULTILINE
    )
    assert run("chatbots", "show", f"{chatbot}@1", "--json").json["name"] == "Ada [1]"

    assert run("chatbots", "edit", chatbot, "--publish", "1", "--json").json["name"] == "Ada [1]"
    assert_refused(run("chatbots", "edit", chatbot, "--publish", "7"), 4, f"{chatbot}@7")
    assert_refused(run("chatbots", "edit", chatbot), 2, "--publish")
    assert_refused(run("chatbots", "edit", chatbot, "--publish", "1", "--name", "x"), 2, "--publish")

    assert_refused(run("chatbots", "delete", chatbot), 2, "--yes")
    gone = run("chatbots", "delete", chatbot, "--yes")
    assert (gone.code, gone.out, gone.err) == (0, "", "")
    assert_refused(run("chatbots", "show", chatbot), 4, chatbot)
    assert_refused(run("chatbots", "delete", chatbot, "-y"), 4, chatbot)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["create"], ["NAME"]),
        (["create", ""], ["1 to 200"]),
        (["create", "x" * 201], ["1 to 200"]),
        (["create", "x", "--temperature", "1.5"], ["--temperature"]),
        (["create", "x", "--max-tokens", "0"], ["--max-tokens"]),
        (["create", "x", "--max-tokens", "many"], ["--max-tokens", "many"]),
        (["create", "x", "--model", "unknown"], ["model", "default"]),
        (["create", "x", "--instructions", "@/no/such/file"], ["/no/such/file", "No such file"]),
        (["create", "x", "--colour", "red"], ["--colour"]),
        (["rename"], ["rename"]),
    ],
)
def test_wrong_chatbots(run: Command, arguments: list[str], words: list[str]) -> None:
    run("chatbots", "list")
    assert_refused(run("chatbots", *arguments), 2, *words)
    assert run("chatbots", "list", "--json").json == []


# Keys


def test_keys_from_first_to_last(run: Command) -> None:
    run("keys", "list")
    made = run("keys", "create", "mine")
    assert re.fullmatch(r"upchatty_[\w-]{43}\n", made.out) and made.err == ""

    chatbot = run("chatbots", "create", "Ada", "--json").json["id"]
    chat = run(
        "keys", "create", "page", "--scope", "chat", "--chatbot", chatbot, "--days", "1.5", "--json"
    ).json
    assert chat["key"].startswith("upchatty_")
    assert (chat["scope"], chat["chatbots"]) == ("chat", [chatbot])
    assert chat["expires_at"] - chat["created_at"] == pytest.approx(1.5 * 24 * 60 * 60, abs=5)

    dated = run("keys", "create", "dated", "--expires", "2100-12-31T12:00", "--json").json
    assert dated["expires_at"] == datetime(2100, 12, 31, 12).timestamp()  # noqa: DTZ001  # local, as typed

    listed = run("keys", "list", "--json").json
    assert [key["name"] for key in listed] == ["mine", "page", "dated"]
    assert not any("key" in key for key in listed)
    table = run("keys", "list").out
    assert table.splitlines()[0].split() == ["ID", "NAME", "SCOPE", "CHATBOTS", "MADE", "EXPIRES", "LIMITS"]
    assert "2100-12-31 12:00:00" in table and "never" in table
    assert made.out.strip() not in table

    assert run("keys", "revoke", chat["id"]).code == 0
    assert_refused(run("keys", "revoke", chat["id"]), 4, chat["id"])
    assert [key["name"] for key in run("keys", "list", "--json").json] == ["mine", "dated"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["NAME"]),
        ([""], ["1 to 200"]),
        (["x", "--scope", "everything"], ["--scope", "admin", "chat"]),
        (["x", "--days", "0"], ["--days"]),
        (["x", "--days", "-1"], ["--days"]),
        (["x", "--days", "1e30"], ["--days"]),
        (["x", "--days", "nan"], ["--days"]),
        (["x", "--expires", "tomorrow"], ["--expires", "tomorrow"]),
        (["x", "--expires", "1999-01-01"], ["--expires", "1999"]),
        (["x", "--expires", "2100-01-01", "--days", "1"], ["--expires", "--days"]),
        (["x", "--chatbot", "bot_1"], ["chatbot"]),
    ],
)
def test_wrong_keys(run: Command, arguments: list[str], words: list[str]) -> None:
    run("keys", "list")
    assert_refused(run("keys", "create", *arguments), 2, *words)
    assert run("keys", "list", "--json").json == []


def test_key_for_an_unknown_chatbot(run: Command) -> None:
    run("keys", "list")
    assert_refused(run("keys", "create", "x", "--scope", "chat", "--chatbot", "bot_1"), 4, "bot_1")


# Models


def test_models(run: Command, model_file: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text(
        f"""
        [models.here]
        path = "{model_file}"
        [models.missing]
        path = "/no/such.gguf"
        [models.big_one]
        url = "{GONE}/v1"
        """
    )
    listed = run("models", "list", "--config", str(config)).out.splitlines()
    assert listed[0].split() == ["NAME", "TASK", "SOURCE", "FILE"]
    rows = {line.split()[0]: line for line in listed[1:]}
    assert set(rows) == {"default", "embedding", "here", "missing", "big_one"}
    assert rows["default"].split()[1:3] == ["(default)", "chat"]
    assert rows["embedding"].split()[1:3] == ["(default)", "embedding"]
    assert rows["here"].endswith(str(model_file))
    assert rows["missing"].endswith("missing")
    assert rows["big_one"].endswith("at its server")

    models = {model["name"]: model for model in run("--config", str(config), "models", "list", "--json").json}
    assert models["default"]["default"] and not models["here"]["default"]
    assert [models[name]["present"] for name in ("here", "missing", "big_one")] == [True, False, False]
    assert models["big_one"]["file"] is None

    pulled = run("models", "pull", "here", "--config", str(config))
    assert (pulled.code, pulled.out.strip()) == (0, str(model_file))
    assert run("models", "pull", "big_one", "--config", str(config)).out == ""
    assert_refused(run("models", "pull", "missing", "--config", str(config)), 1, "/no/such.gguf")
    assert_refused(run("models", "pull", "other", "--config", str(config)), 2, "other", "big_one")


def test_pull_fetches_what_is_needed(run: Command, model_file: Path) -> None:
    pulled = run("models", "pull")
    listed = run("models", "list", "--json").json
    assert pulled.out.splitlines() == [model["file"] for model in listed if model["present"]]
    assert [model["name"] for model in listed] == ["default", "embedding"]


# Settings


def database_of(run: Command, *arguments: str) -> str:
    """The folder that a command works on, by its own account."""
    return str(run("status", "--json", *arguments).json["data"])


def test_flags_come_before_environment_before_file(
    run: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("UPCHATTY_DATA_DIR")
    config = tmp_path / "upchatty.toml"
    config.write_text('data_dir = "from-file"\nport = 1234\nlog_level = "error"\n')
    assert database_of(run) == str(tmp_path / "data")
    assert database_of(run, "--config", str(config)) == str(tmp_path / "from-file")
    monkeypatch.setenv("UPCHATTY_CONFIG", str(config))
    assert database_of(run) == str(tmp_path / "from-file")
    monkeypatch.setenv("UPCHATTY_DATA_DIR", "from-environment")
    assert database_of(run) == str(tmp_path / "from-environment")
    assert database_of(run, "--data-dir", "from-flag") == str(tmp_path / "from-flag")


def test_models_of_flags_environment_and_file(
    run: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def names(*arguments: str) -> list[str]:
        return [model["name"] for model in run("models", "list", "--json", *arguments).json]

    config = tmp_path / "upchatty.toml"
    config.write_text(f'default_model = "file_1"\n[models.file_1]\nurl = "{GONE}"\nslots = 2\n')
    assert names("--config", str(config)) == ["default", "embedding", "file_1"]
    monkeypatch.setenv("UPCHATTY_MODELS", json.dumps({"environment": {"url": GONE}}))
    assert names() == ["default", "embedding", "environment"]
    assert names("--models.flag.url", GONE) == ["default", "embedding", "flag"]


def test_file_gives_no_values_for_arguments(run: Command, tmp_path: Path) -> None:
    config = tmp_path / "upchatty.toml"
    config.write_text('name = "from a file"\n')
    assert_refused(run("keys", "create", "--config", str(config)), 2, "'name'")


def test_environment_gives_no_values_for_arguments(run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPCHATTY_NAME", "from the environment")
    monkeypatch.setenv("UPCHATTY_JSON", "true")
    assert_refused(run("keys", "create"), 2, "NAME")
    assert run("keys", "list").out.startswith("ID")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prot = 1", ["'prot'", "did you mean 'port'"]),
        ("colour = 1", ["'colour'", "port, data_dir"]),
        ("[serve]\nport = 1", ["'serve'"]),
        ('port = "eighty"', ["port", "eighty"]),
        ("port = 70000", ["port", "0 to 65535"]),
        ('log_level = "loud"', ["log_level", "loud"]),
        ("port = = 1", ["is not TOML", "line 1"]),
        ('default_model = "big"', ["default_model", "[models.big]"]),
        ("[models.big]\ncontext = 1", ["models.big", "exactly one of"]),
        ('[models.big]\nurl = "http://x"\npath = "y"', ["models.big", "not path and url"]),
        ('[models.big]\nurl = "http://x"\nslots = 0', ["models", "slots"]),
        ('[models.big]\nurl = "http://x"\ncontxt = 1', ["models.big", "contxt"]),
        ('models = "big"', ["models"]),
    ],
)
def test_wrong_file(run: Command, tmp_path: Path, text: str, words: list[str]) -> None:
    config = tmp_path / "wrong.toml"
    config.write_text(text)
    assert_refused(run("--config", str(config), "models", "list"), 2, *words)


def test_file_that_cannot_be_read(run: Command, tmp_path: Path) -> None:
    assert_refused(run("--config", "/no/such.toml", "status"), 2, "/no/such.toml")
    assert_refused(run("--config", str(tmp_path), "status"), 2, str(tmp_path))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("PORT", "eighty", ["UPCHATTY_PORT", "eighty"]),
        ("PORT", "-1", ["port", "0 to 65535"]),
        ("LOG_FORMAT", "xml", ["UPCHATTY_LOG_FORMAT", "xml"]),
        ("ADMIN_KEY", "two words", ["admin_key"]),
        ("MODELS", "{", ["UPCHATTY_MODELS"]),
        ("DATABASE_URL", "mysql://host/name", ["database_url"]),
        ("DATABASE_URL", "nonsense", ["database_url"]),
    ],
)
def test_wrong_environment(
    run: Command, monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: list[str]
) -> None:
    monkeypatch.setenv(f"UPCHATTY_{name}", value)
    assert_refused(run("keys", "list"), 2, *words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["launch"], ["launch", "serve"]),
        (["serve", "--prot", "1"], ["--prot", "--port"]),
        (["serve", "--port", "65536"], ["port", "0 to 65535"]),
        (["serve", "--port"], ["--port"]),
        (["serve", "--host", "no.such.host.invalid", "--port", "0"], ["no.such.host.invalid"]),
        (["status", "now"], ["now"]),
        (["keys", "revoke"], ["KEY"]),
    ],
)
def test_wrong_usage(run: Command, arguments: list[str], words: list[str]) -> None:
    assert_refused(run(*arguments), 2, *words)


def test_data_folder_that_cannot_be_used(run: Command, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert_refused(run("keys", "list", "--data-dir", str(tmp_path / "file")), 2, "file")
    assert_refused(run("serve", "--port", "0", "--data-dir", str(tmp_path / "file")), 2, "data_dir", "file")


# Status


def test_status_makes_nothing(run: Command, tmp_path: Path) -> None:
    result = run("status")
    assert result.code == 3
    assert re.search(r"^server +not running$", result.out, re.MULTILINE)
    assert not list(tmp_path.iterdir())


def test_status_of_a_running_server(server: Server) -> None:
    result = server.run("status", "--json")
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    assert facts["version"] == __version__
    assert (facts["server"], facts["address"]) == ("ready", server.address)
    assert facts["chatbots"] >= 1 and facts["keys"] >= 1
    assert facts["models"] == ["default", "embedding"]


# Serve


@pytest.fixture(scope="module")
def own_server(tmp_path_factory: pytest.TempPathFactory, model_file: Path) -> Iterator[Server]:
    """A server without a fixed key, at its first start."""
    with Server(tmp_path_factory.mktemp("own"), UPCHATTY_ADMIN_KEY="") as running:
        yield running


def paste(banner: str, **environment: str) -> dict[str, Any]:
    """The answer to the banner's command line, pasted into a shell."""
    line = banner[banner.index("  curl ") :]
    pasted = subprocess.run(
        ["sh", "-c", line], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    return json.loads(pasted.stdout)  # type: ignore[no-any-return]


def test_first_and_second_start(own_server: Server) -> None:
    [key] = set(re.findall(r"upchatty_[\w-]{43}", own_server.banner))
    assert "shown this once" in own_server.banner
    own_server.run("chatbots", "edit", own_server.chatbot, "--max-tokens", "8")
    assert paste(own_server.banner)["choices"][0]["message"]["content"]

    assert own_server.stop() == 0
    started = time.monotonic()
    own_server.start()
    assert time.monotonic() - started < 30  # a few seconds on a machine that is not busy
    assert not re.search(r"upchatty_[\w-]{43}", own_server.banner)
    assert f"upchatty keys create NAME --data-dir {own_server.data_dir}" in own_server.banner
    assert paste(own_server.banner, KEY=key)["choices"][0]["message"]["content"]


def test_keys_of_a_running_server(own_server: Server) -> None:
    made = own_server.run("keys", "create", "another", "--json")
    key = json.loads(made.stdout)
    with own_server.client(key["key"]) as client:
        assert client.get("/chatbots").status_code == 200
        assert own_server.run("keys", "revoke", key["id"]).returncode == 0
        time.sleep(1)
        assert client.get("/chatbots").status_code == 401


def test_data_folder_in_use(own_server: Server) -> None:
    second = own_server.run("serve", "--port", "0")
    assert (second.returncode, second.stdout) == (5, "")
    assert str(own_server.data_dir) in second.stderr and "--data-dir" in second.stderr


def test_port_in_use(own_server: Server, run: Command) -> None:
    port = own_server.address.rpartition(":")[2]
    assert_refused(run("serve", "--port", port), 2, port)


def test_fixed_key_is_not_shown(server: Server) -> None:
    assert ADMIN_KEY not in server.banner
    assert "Bearer $UPCHATTY_ADMIN_KEY" in server.banner


# Chat


@pytest.fixture(scope="module")
def brief(own_server: Server) -> str:
    """A chatbot whose answers are short and always the same."""
    made = own_server.run(
        *("chatbots", "create", "Brief", "--max-tokens", "8", "--temperature", "0", "--json")
    )
    return str(json.loads(made.stdout)["id"])


def test_chat_through_a_pipe(own_server: Server, brief: str) -> None:
    alone = own_server.run("chat", brief, input="How are you?\n")
    assert (alone.returncode, alone.stderr) == (0, "")
    first = alone.stdout.strip()
    assert first

    both = own_server.run("chat", f"{brief}@1", input="How are you?\nAnd now?\n")
    assert both.returncode == 0
    answers = both.stdout.strip()
    assert answers.startswith(first) and len(answers) > len(first)  # the second knows the first


def test_chat_without_questions(own_server: Server, brief: str) -> None:
    nothing = own_server.run("chat", brief, input="")
    assert (nothing.returncode, nothing.stdout) == (0, "")


def test_chat_with_nobody(run: Command) -> None:
    run("chatbots", "list")
    assert_refused(run("chat", "bot_1"), 4, "bot_1")
    assert_refused(run("chat"), 2, "CHATBOT")


def test_chat_in_a_terminal(own_server: Server, brief: str) -> None:
    """Two questions in a pseudo terminal; the second is answered with the first one in mind."""
    controller, terminal = pty.openpty()
    with subprocess.Popen(
        own_server.command("chat", brief),
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env=own_server.environment,
    ) as chat:
        os.close(terminal)
        greeting = read_until(controller, "> ")
        assert "Brief" in greeting and "Ctrl-D" in greeting
        os.write(controller, b"How are you?\n")
        assert len(read_until(controller, "\n> ").splitlines()) >= 3  # the echo, the answer, the prompt
        os.write(controller, "Say ‘ünïcode’.\n".encode())
        assert "ünïcode" in read_until(controller, "\n> ")
        os.write(controller, b"\x04")
        assert chat.wait(PTY_SECONDS) == 0
    os.close(controller)


def read_until(terminal: int, end: str) -> str:
    """What a terminal shows, up to this end."""
    text, deadline = b"", time.monotonic() + PTY_SECONDS
    while not text.decode(errors="replace").replace("\r", "").endswith(end):
        assert select.select([terminal], [], [], deadline - time.monotonic())[0], text
        text += os.read(terminal, 4096)
    return text.decode().replace("\r", "")
