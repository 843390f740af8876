"""What is asked, and where."""

import json
from dataclasses import dataclass, field

from benchmarks.upstream import words


@dataclass(frozen=True)
class Question:
    """One kind of question; the mock upstream does what it says.

    Attributes:
        stream: Whether the answer is to be streamed.
        chunks: Pieces of the answer.
        delay: Milliseconds before the answer.
        pause: Milliseconds between two pieces.
        each: Whether the upstream writes each piece by itself.
    """

    stream: bool = False
    chunks: int = 12
    delay: int = 0
    pause: int = 0
    each: bool = False

    @property
    def content(self) -> str:
        """The message's text."""
        return f"mock: chunks={self.chunks} delay={self.delay} pause={self.pause} each={int(self.each)}"

    @property
    def answer(self) -> str:
        """The text of the right answer."""
        return "".join(words(self.chunks))


@dataclass(frozen=True)
class Target:
    """Something that answers chat completions.

    Attributes:
        name: For the tables.
        port: Where it listens, on 127.0.0.1.
        path: The path of chat completions.
        model: What it calls the model.
        headers: What it wants besides.
        connections: How many are used where throughput is measured.
    """

    name: str
    port: int
    path: str = "/v1/chat/completions"
    model: str = "mock"
    headers: dict[str, str] = field(default_factory=dict)
    connections: int = 32

    def body(self, question: Question) -> str:
        """The request's body."""
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": question.content}],
            "temperature": 0.7,
        }
        if question.stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return json.dumps(body, separators=(",", ":"))

    def request(self, question: Question) -> bytes:
        """The request as it goes over the wire."""
        return self.raw_request(self.body(question))

    def raw_request(self, body: str, **headers: str) -> bytes:
        """A request with any body.

        Args:
            body: What is sent, right or wrong.
            headers: Instead of this target's own.
        """
        lines = [f"POST {self.path} HTTP/1.1", f"Host: 127.0.0.1:{self.port}", f"Content-Length: {len(body)}"]
        fields = {"Content-Type": "application/json", **self.headers, **headers}
        lines += [f"{name}: {value}" for name, value in fields.items()]
        return ("\r\n".join(lines) + "\r\n\r\n" + body).encode()

    def script(self, question: Question) -> str:
        """The same request as a script for wrk, which prints the result as JSON."""
        headers = {"Content-Type": "application/json", **self.headers}
        lines = ['wrk.method = "POST"', f"wrk.body = [==[{self.body(question)}]==]"]
        lines += [f"wrk.headers[{json.dumps(name)}] = {json.dumps(value)}" for name, value in headers.items()]
        return "\n".join([*lines, RESULT])


RESULT = """
function done(summary, latency, requests)
  local e = summary.errors
  io.write(string.format(
    '\\nRESULT {"answers": %d, "microseconds": %d, "bytes": %d, "errors": %d}\\n',
    summary.requests, summary.duration, summary.bytes, e.connect + e.read + e.write + e.status + e.timeout))
end
"""
