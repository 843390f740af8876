"""A real server in a process of its own, and what tests do with it."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

ADMIN_KEY = "upchatty_test_admin_key_0123456789"
START_SECONDS = 60
STOP_SECONDS = 40
UNENCRYPTED: dict[str, Any] = {"verify": False}  # spares each client of httpx 50 ms of reading certificates


class Server:
    """`upchatty serve` on a free port.

    Args:
        folder: Where data and logs go; a second server on the same folder finds the first one's data.
        flags: Further command-line flags.
        environment: Further environment variables.
    """

    def __init__(self, folder: Path, *flags: str, **environment: str) -> None:
        self.folder = folder
        self.data_dir = folder / "data"
        self.log_file = folder / "server.log"
        self._flags = flags
        self._environment = {"UPCHATTY_ADMIN_KEY": ADMIN_KEY} | environment
        self.process: subprocess.Popen[bytes] | None = None
        self.address = ""
        self.chatbot = ""
        self.banner = ""

    def __enter__(self) -> "Server":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start, and wait until the server has printed what there is to tell."""
        self.folder.mkdir(parents=True, exist_ok=True)
        output = self.folder / "output.txt"
        with output.open("wb") as stdout, self.log_file.open("ab") as stderr:
            self.process = subprocess.Popen(
                self.command("serve", "--port", "0", *self._flags),
                stdout=stdout,
                stderr=stderr,
                env=self.environment,
            )
        deadline = time.monotonic() + START_SECONDS
        while not (found := re.search(r"answers at (\S+)", output.read_text())):
            if self.process.poll() is not None:
                raise AssertionError(f"the server ended: {self.log()[-2000:]}")
            if time.monotonic() > deadline:
                self.process.kill()
                raise AssertionError(f"the server did not start: {self.log()[-2000:]}")
            time.sleep(0.05)
        self.banner = output.read_text()
        self.address = found[1]
        self.chatbot = re.search(r"chatbot +(bot_\w+)", self.banner)[1]  # type: ignore[index]

    def stop(self) -> int:
        """SIGTERM, and the exit code."""
        assert self.process
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_SECONDS)

    def kill(self) -> None:
        """SIGKILL."""
        assert self.process
        self.process.kill()
        self.process.wait()

    def command(self, *arguments: str) -> list[str]:
        """A command line of `upchatty` on this server's data folder."""
        return [sys.executable, "-m", "upchatty", *arguments, "--data-dir", str(self.data_dir)]

    def run(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run an `upchatty` command on this server's data folder."""
        return subprocess.run(
            self.command(*arguments),
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            **options,
        )

    @property
    def environment(self) -> dict[str, str]:
        """The environment of the server and its commands."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith("UPCHATTY_")}
        return clean | self._environment

    @property
    def api(self) -> str:
        """The API's base URL, as OpenAI's clients want it."""
        return self.address + "/api/v1"

    def client(self, key: str | None = ADMIN_KEY, **options: Any) -> httpx.Client:
        """An HTTP client of the API with this key."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        options = UNENCRYPTED | options
        return httpx.Client(base_url=self.api, headers=headers, timeout=110, **options)

    def log(self) -> str:
        """What the server has logged; its lines are written every 20 ms."""
        time.sleep(0.1)
        return self.log_file.read_text(errors="replace")

    def metric(self, name: str, **labels: str) -> float:
        """A metric's value, 0 where it has none yet."""
        wanted = "".join(f'.*{label}="{value}"' for label, value in labels.items())
        pattern = rf"^{name}(?:{{{wanted}.*}})? (\S+)$" if labels else rf"^{name}(?:{{.*}})? (\S+)$"
        found = re.search(pattern, httpx.get(self.address + "/metrics", **UNENCRYPTED).text, re.MULTILINE)
        return float(found[1]) if found else 0.0


def assert_error(response: httpx.Response, status: int, *words: str) -> None:
    """The contract's error: this status, JSON with the one key, a sentence that has these words."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"].startswith("application/json")
    body = response.json()
    assert list(body) == ["error"]
    assert isinstance(body["error"], str) and body["error"]
    for word in words:
        assert word in body["error"], body["error"]


def question(chatbot: str, text: str = "How are you?", **parameters: Any) -> dict[str, Any]:
    """A request body with one user message."""
    return {"model": chatbot, "messages": [{"role": "user", "content": text}], "max_tokens": 16} | parameters


def events(response: httpx.Response) -> list[str]:
    """The data of a stream's events."""
    return [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
