"""The faulty upstream as tests use it: a process that they start, steer, kill and count."""

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Any
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

from upchatty.testing.faulty_upstream import HOST, Behaviour

CONTROL_SECONDS = 10.0

_open = build_opener(ProxyHandler({})).open


@dataclass(frozen=True)
class Stats:
    """What an upstream has seen since it was started."""

    accepted: int
    """Connections."""
    connections: int
    """Of these, open at this moment."""
    requests: int
    """Completions asked for."""
    running: int
    """Of these, being answered at this moment."""
    completed: int
    """Of these, answered as the behaviour says, up to its end."""
    aborted: int
    """Of these, given up by the caller before."""
    probes: int
    """Requests for anything else, such as the list of models."""
    last_headers: dict[str, str]
    """Of the last completion that was asked for; names in lower case."""
    last_body: dict[str, Any]


class FaultyUpstream:
    """An OpenAI-compatible server in a process of its own that fails on demand.

        with FaultyUpstream(fault="close_midevent", after=3) as upstream:
            client = openai.OpenAI(base_url=upstream.url, api_key="any")
            ...                                     # three pieces, and a broken connection
            upstream.set(fault="status", status=429, headers={"Retry-After": "7"}, times=1)
            ...                                     # one refusal, then all is well
            upstream.set(dialect="usage_on_every_chunk")
            upstream.kill()                         # SIGKILL; `restart` brings it back on the same port
            upstream.restart()
            assert upstream.stats().connections == 0

    Args:
        fault: One of `FAULTS`, where each is explained.
        dialect: One of `DIALECTS`, likewise.
        details: The other fields of `Behaviour`.

    Raises:
        TypeError, ValueError: `Behaviour` has no such field, fault or dialect.
    """

    def __init__(self, *, fault: str = "none", dialect: str = "usage_after_finish", **details: Any) -> None:
        self.behaviour = Behaviour(fault=fault, dialect=dialect, **details)
        self._process: subprocess.Popen[str] | None = None
        self._port = 0
        self._control_port = 0

    def __enter__(self) -> "FaultyUpstream":
        self.restart()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def url(self) -> str:
        """The base URL, as OpenAI's clients want it."""
        scheme = "https" if self.behaviour.fault == "tls" else "http"
        return f"{scheme}://{HOST}:{self._port}/v1"

    @property
    def is_running(self) -> bool:
        """Whether there is a process."""
        return self._process is not None

    def set(self, *, fault: str = "none", dialect: str = "usage_after_finish", **details: Any) -> None:
        """Behave like this from now on; what is not named is as it should be. Answers that are under
        way go on as they began. An upstream that was killed does so from its restart on.

        Args:
            fault: One of `FAULTS`.
            dialect: One of `DIALECTS`.
            details: The other fields of `Behaviour`.
        """
        behaviour = Behaviour(fault=fault, dialect=dialect, **details)
        if self.is_running:
            self._control(asdict(behaviour))
        self.behaviour = behaviour

    def stats(self) -> Stats:
        """The counters of the process that runs now."""
        told = self._control()
        return Stats(**{name: told[name] for name in Stats.__dataclass_fields__})

    def kill(self) -> None:
        """SIGKILL: every connection ends at once, and nobody listens any longer."""
        if self._process:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def restart(self) -> None:
        """Start again with the latest behaviour, on the same port; kill it before if it still runs."""
        self.kill()
        command = [
            sys.executable, "-m", "upchatty.testing.faulty_upstream", "--until-input-ends",
            "--port", str(self._port), "--control-port", str(self._control_port),
            "--behaviour", json.dumps(asdict(self.behaviour)),
        ]  # fmt: skip
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )  # its input ends when this process does, however that comes
        assert self._process.stdout
        ports = self._process.stdout.readline()
        if not ports:
            raise RuntimeError("the faulty upstream did not start; its standard error says why")
        told = json.loads(ports)
        self._port, self._control_port = told["port"], told["control_port"]

    def _control(self, behaviour: dict[str, Any] | None = None) -> dict[str, Any]:
        data = None if behaviour is None else json.dumps(behaviour).encode()
        request = Request(f"http://{HOST}:{self._control_port}/control", data)
        try:
            with _open(request, timeout=CONTROL_SECONDS) as response:
                told: dict[str, Any] = json.load(response)
                return told
        except HTTPError as error:
            raise ValueError(json.load(error)["error"]) from None
