"""The servers side by side: throughput and latency, in turn, round after round."""

import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from benchmarks.gateway.measure import Latency, Throughput, latency, throughput
from benchmarks.gateway.report import Goal, number, table
from benchmarks.gateway.servers import Server
from benchmarks.gateway.target import Question

DIRECTLY, OURS = "directly", "upchatty"
CHUNKS = 100
RATE, STREAM_RATE = 1000.0, 100.0  # requests a second where latency is measured
SUSTAINABLE = 0.6  # of what a server can do; nearer to it, its queue would be measured

Result = TypeVar("Result", Throughput, Latency)


@dataclass(frozen=True)
class Comparison:
    """Servers that run, and how they are measured.

    Attributes:
        servers: By name; the mock upstream, asked directly, is among them.
        rounds: How often each is measured.
        seconds: How long each time.
    """

    servers: Mapping[str, Server]
    rounds: int
    seconds: float

    async def throughput(self) -> list[Goal]:
        """Whole answers and streams, as many as they can; prints tables."""
        wholes = await self._in_turn("whole answers", partial(throughput, question=Question()))
        print("Whole answers, from an upstream that answers at once:\n")
        self._print_throughput(wholes, "answer", 1)
        streams = await self._in_turn(
            "streams", partial(throughput, question=Question(stream=True, chunks=CHUNKS))
        )
        print(f"Streams of {CHUNKS} chunks, from an upstream that writes a stream at once:\n")
        self._print_throughput(streams, "chunk", CHUNKS)
        packets = await self._in_turn(
            "streams in packets",
            partial(throughput, question=Question(stream=True, chunks=CHUNKS, each=True)),
        )
        print("The same, from an upstream that writes every chunk by itself:\n")
        self._print_throughput(packets, "chunk", CHUNKS)
        if OURS not in self.servers:
            return []
        return [
            Goal("whole answers a second on a core", 4000, _median(wholes[OURS], "rate"), least=True),
            *(
                Goal(f"whole answers a second, times {name}", wanted, _times(wholes, name), least=True)
                for name, wanted in (("nginx", 0.17), ("litellm", 30), ("portkey", 3))
            ),
            *_stream_goals("written at once", streams),
            *_stream_goals("written one by one", packets),
        ]

    async def latency(self) -> list[Goal]:
        """Latency and time to first token at a constant rate; prints tables."""
        rates = await self._rates(Question(), RATE)
        wholes = await self._in_turn("latency", partial(latency, question=Question(delay=20)), rates)
        print("Latency of whole answers in ms, from an upstream that answers after 20 ms:\n")
        self._print_latency(wholes, rates, "median", "p99")
        stream_rates = await self._rates(Question(stream=True), STREAM_RATE)
        streams = await self._in_turn(
            "time to first token", partial(latency, question=Question(stream=True, delay=20)), stream_rates
        )
        print("Time to first token of streams in ms, from an upstream that begins after 20 ms:\n")
        self._print_latency(streams, stream_rates, "first", "first_p99")
        if OURS not in self.servers:
            return []
        at_rate = f"added latency at {rates[OURS]:,.0f} requests a second"
        return [
            Goal(f"{at_rate}, median", 0.5, _added(wholes, OURS, "median"), least=False, unit="ms"),
            Goal(f"{at_rate}, p99", 2, _added(wholes, OURS, "p99"), least=False, unit="ms"),
            Goal(
                "added time to first token, median", 1, _added(streams, OURS, "first"), least=False, unit="ms"
            ),
        ]

    async def _rates(self, question: Question, rate: float) -> dict[str, float]:
        """How many requests a second each server gets: fewer than the rate where a peer cannot do as many."""
        rates = {}
        for name, server in self.servers.items():
            can = math.inf if name in (DIRECTLY, OURS) else (await throughput(server, question, 3)).rate
            rates[name] = rate if can * SUSTAINABLE >= rate else max(float(f"{can / 2:.1g}"), 1.0)
        return rates

    async def _in_turn(
        self,
        what: str,
        measure: Callable[..., Awaitable[Result]],
        rates: Mapping[str, float] | None = None,
    ) -> dict[str, list[Result]]:
        results: dict[str, list[Result]] = defaultdict(list)
        for turn in range(self.rounds):
            for name, server in self.servers.items():
                say(f"{what}, round {turn + 1} of {self.rounds}: {name}")
                rate = {"rate": rates[name]} if rates else {}
                result = await measure(server, seconds=self.seconds, **rate)
                if result.wrong:
                    print(f"- {server.target.name}, {what}: {result.wrong} answers were wrong or missing\n")
                results[name].append(result)
        return results

    def _print_throughput(
        self, results: Mapping[str, Sequence[Throughput]], unit: str, number_of: int
    ) -> None:
        heads = ["server", f"{unit}s/s", f"CPU µs/{unit}", "core busy"]
        rows = [
            [
                server.target.name,
                number(_median(results[name], "rate") * number_of),
                number(_median(results[name], "cpu") / number_of * 1e6),
                f"{_median(results[name], 'busy'):.0%}",
            ]
            for name, server in self.servers.items()
        ]
        if OURS in self.servers:
            heads += ["UpChatty, times this", "by CPU time"]
            for row, name in zip(rows, self.servers, strict=True):
                row += [number(_times(results, name)), number(_times(results, name, by_cpu=True))]
        print(table(heads, rows), flush=True)

    def _print_latency(
        self, results: Mapping[str, Sequence[Latency]], rates: Mapping[str, float], median: str, p99: str
    ) -> None:
        rows = [
            [
                server.target.name,
                number(rates[name]),
                number(_median(results[name], median)),
                number(_median(results[name], p99)),
                number(_added(results, name, median)),
                number(_added(results, name, p99)),
                number(_median(results[name], "cpu") * 1e6),
            ]
            for name, server in self.servers.items()
        ]
        heads = ["server", "requests/s", "median", "p99", "added, median", "added, p99", "CPU µs/request"]
        print(table(heads, rows), flush=True)


def _stream_goals(how: str, results: Mapping[str, Sequence[Throughput]]) -> list[Goal]:
    chunks = _median(results[OURS], "rate") * CHUNKS
    return [
        Goal(f"streamed chunks a second on a core, {how}", 1e5, chunks, least=True),
        Goal(f"streamed chunks a second, {how}, times nginx", 0.9, _times(results, "nginx"), least=True),
    ]


def say(what: str) -> None:
    """Tell who waits what goes on."""
    print(what, file=sys.stderr, flush=True)


def _median(results: Sequence[Throughput | Latency], figure: str) -> float:
    return float(statistics.median(getattr(result, figure) for result in results))


def _times(results: Mapping[str, Sequence[Throughput]], name: str, *, by_cpu: bool = False) -> float:
    """How many times as quick UpChatty is, the median of the rounds; not a number if one is missing."""
    pairs = list(zip(results.get(OURS, []), results.get(name, []), strict=False))
    if not pairs or not all(theirs.rate for _, theirs in pairs):
        return math.nan
    return statistics.median(
        theirs.cpu / ours.cpu if by_cpu else ours.rate / theirs.rate for ours, theirs in pairs
    )


def _added(results: Mapping[str, Sequence[Latency]], name: str, figure: str) -> float:
    """What a server adds to the upstream's own time, the median of the rounds."""
    pairs = zip(results[name], results[DIRECTLY], strict=True)
    return float(
        statistics.median(getattr(through, figure) - getattr(direct, figure) for through, direct in pairs)
    )
