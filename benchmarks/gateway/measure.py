"""One measurement of one server at a time."""

import asyncio
import gc
import statistics
import time
from dataclasses import dataclass

import msgspec

from benchmarks.gateway import peers
from benchmarks.gateway.load import Answer, mistake, percentile
from benchmarks.gateway.servers import Server
from benchmarks.gateway.target import Question

SAMPLE_SECONDS = 0.5  # between two answers that are read and checked during a throughput run


@dataclass(frozen=True)
class Throughput:
    """What wrk got.

    Attributes:
        rate: Answers a second.
        cpu: Seconds of CPU time that the server took for each answer.
        busy: The share of a core that it took.
        wrong: Answers with an error, and checked ones that were not as they should be.
    """

    rate: float
    cpu: float
    busy: float
    wrong: int


class _Result(msgspec.Struct):
    answers: int
    microseconds: int
    bytes: int
    errors: int


async def throughput(server: Server, question: Question, seconds: float) -> Throughput:
    """As many answers as the server gives.

    Some answers are read and checked meanwhile; wrk itself only looks at status and end.
    """
    script = server.folder / "wrk.lua"
    script.write_text(server.target.script(question))
    url = f"http://127.0.0.1:{server.target.port}{server.target.path}"
    command = [
        peers.program("wrk", "wrk"),
        "-t1",
        f"-c{server.target.connections}",
        f"-d{max(round(seconds), 1)}s",
    ]
    cpu, began = server.process.cpu_seconds(), time.monotonic()
    process = await asyncio.create_subprocess_exec(
        *command,
        "--timeout",
        "30s",
        "-s",
        str(script),
        url,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    reading = asyncio.create_task(process.communicate())
    checked, wrong = 0, 0
    while not (await asyncio.wait((reading,), timeout=SAMPLE_SECONDS))[0]:
        wrong += bool(await server.pool.check(question))
        checked += 1
    cpu, took = server.process.cpu_seconds() - cpu, time.monotonic() - began
    output = (await reading)[0]
    if b"RESULT " not in output:
        said = " ".join(output.decode(errors="replace").split())
        raise peers.NotToBeHad(f"{server.target.name} cannot be measured: wrk says {said[-200:]!r}")
    result = msgspec.json.decode(output.rpartition(b"RESULT ")[2], type=_Result)
    answers = result.answers + checked
    return Throughput(
        result.answers / result.microseconds * 1e6, cpu / max(answers, 1), cpu / took, result.errors + wrong
    )


@dataclass(frozen=True)
class Latency:
    """Milliseconds at a constant rate, from when a request was due.

    Attributes:
        median, p99: To the end of the answer.
        first: To the first text, median.
        first_p99: To the first text.
        cpu: Seconds of CPU time that the server took for each answer.
        wrong: Answers that did not come or were not as they should be.
    """

    median: float
    p99: float
    first: float
    first_p99: float
    cpu: float
    wrong: int


async def latency(server: Server, question: Question, rate: float, seconds: float) -> Latency:
    """Latencies at this many requests a second."""
    cpu = server.process.cpu_seconds()
    gc.collect()
    gc.disable()  # a collection in the load generator would look like a slow server
    try:
        answers = await server.pool.at_rate(question, rate, max(round(rate * seconds), 1))
    finally:
        gc.enable()
    cpu = server.process.cpu_seconds() - cpu
    came = [answer for answer in answers if not mistake(answer, question)]
    ends = [(answer.ended - answer.due) * 1000 for answer in came] or [float("nan")]
    firsts = [(answer.first - answer.due) * 1000 for answer in came] or [float("nan")]
    return Latency(
        statistics.median(ends),
        percentile(ends, 0.99),
        statistics.median(firsts),
        percentile(firsts, 0.99),
        cpu / len(answers),
        len(answers) - len(came),
    )


@dataclass(frozen=True)
class ManyStreams:
    """Streams that were all open at once.

    Attributes:
        lost: Those that did not end as they should.
        rest, open, after: Resident bytes before, with all of them open, and after.
        late: Seconds by which the last of them ended late.
        cpu: Seconds of CPU time that the server took for each token.
    """

    lost: int
    rest: int
    open: int
    after: int
    late: float
    cpu: float


async def many_streams(server: Server, streams: int, seconds: int) -> ManyStreams:
    """So many streams at once, a token a second each, for so many seconds."""
    await warm_up(server, 2)
    rest = server.process.resident_bytes()
    question = Question(stream=True, chunks=seconds, pause=1000)
    opening = streams / 500
    cpu = server.process.cpu_seconds()
    asking = asyncio.create_task(server.pool.at_rate(question, 500, streams))
    await asyncio.sleep(opening + 1)
    most = 0
    while not (await asyncio.wait((asking,), timeout=0.5))[0]:
        most = max(most, server.process.resident_bytes())
    answers = await asking
    cpu = server.process.cpu_seconds() - cpu
    came = [answer for answer in answers if not mistake(answer, question)]
    late = max((answer.ended - answer.due - seconds for answer in came), default=float("nan"))
    server.pool.close()
    await asyncio.sleep(10)
    after = server.process.resident_bytes()
    return ManyStreams(streams - len(came), rest, most, after, late, cpu / streams / seconds)


async def warm_up(server: Server, seconds: float) -> None:
    """Answers of both kinds that nobody counts: code is compiled, caches are filled."""

    async def ask_again_and_again(question: Question) -> Answer | None:
        answer = None
        while time.monotonic() < end:
            answer = await server.pool.ask(server.target.request(question))
        return answer

    end = time.monotonic() + seconds
    kinds = (Question(), Question(stream=True, chunks=100))
    await asyncio.gather(*(ask_again_and_again(kind) for kind in kinds for _ in range(4)))
