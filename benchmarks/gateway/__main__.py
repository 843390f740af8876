"""`python -m benchmarks.gateway`: measures UpChatty beside its peers, and prints Markdown.

Every server has one core, the mock upstream and the load have the others. The servers take turns, round
after round; what is printed are medians over the rounds. `--soak` does something else instead: a hundred
thousand mixed requests to UpChatty, to see what grows.
"""

import argparse
import asyncio
import os
import resource
import sqlite3
import sys
import tempfile
from contextlib import closing
from pathlib import Path

import uvloop

from benchmarks.clock import PreciseTimer
from benchmarks.gateway import peers
from benchmarks.gateway.compare import DIRECTLY, OURS, Comparison, say
from benchmarks.gateway.cores import Cores
from benchmarks.gateway.measure import many_streams, warm_up
from benchmarks.gateway.report import Goal, machine, table
from benchmarks.gateway.servers import SERVERS, Server, start, start_upstream
from benchmarks.gateway.soak import KINDS, soak

PARTS = ("throughput", "latency", "streams")
STREAMS, STREAM_SECONDS = 2000, 20
WARM_UP_SECONDS = 10.0  # Node's compiler takes that long
OPEN_FILES = 16384
MIB = 2**20


class Benchmark:
    """The run.

    Args:
        arguments: The command line's.
        folder: For the servers' data.
    """

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self._arguments, self._folder = arguments, folder
        self._cores = Cores.divided()
        self._timer = PreciseTimer(asyncio.get_running_loop())

    async def run(self) -> None:
        """Measure, and print."""
        print(f"Run on {machine()}.\n")
        os.sched_setaffinity(0, self._cores.load)
        if not self._cores.apart:
            print("There is one core only, for the servers and the load: these figures are worthless.\n")
        upstream = await start_upstream(self._new_folder("upstream"), self._cores.load, self._timer)
        goals: list[Goal] = []
        try:
            if self._arguments.soak:
                goals += await self._soak(upstream)
            else:
                if {"throughput", "latency"} & set(self._arguments.parts):
                    goals += await self._side_by_side(upstream)
                if "streams" in self._arguments.parts and OURS in self._arguments.only:
                    goals += await self._many_streams(upstream)
        finally:
            upstream.stop()
        if goals:
            print(table(["target", "wanted", "measured", "met"], [goal.cells() for goal in goals]))

    async def _side_by_side(self, upstream: Server) -> list[Goal]:
        servers, goals = {DIRECTLY: upstream}, []
        try:
            for name in self._arguments.only:
                try:
                    servers[name] = await self._start(name, upstream)
                except peers.NotToBeHad as error:
                    print(f"- {name} was not measured: {error}\n", flush=True)
            for server in servers.values():
                say(f"warming up {server.target.name}")
                await warm_up(server, WARM_UP_SECONDS)
            rounds, seconds = self._arguments.rounds, self._arguments.seconds
            print(f"Medians of {rounds} rounds, in each of which every server has its {seconds:g} s.\n")
            comparison = Comparison(servers, rounds, seconds)
            if "throughput" in self._arguments.parts:
                goals += await comparison.throughput()
            if "latency" in self._arguments.parts:
                goals += await comparison.latency()
        finally:
            for name, server in servers.items():
                if name != DIRECTLY:
                    server.stop()
        if OURS in servers:
            print(f"Records that UpChatty wrote meanwhile: {_records(servers[OURS]):,}.\n")
        return goals

    async def _many_streams(self, upstream: Server) -> list[Goal]:
        say(f"{STREAMS} streams")
        server = await self._start(OURS, upstream)
        try:
            result = await many_streams(server, STREAMS, STREAM_SECONDS)
        finally:
            server.stop()
        each = (result.open - result.rest) / STREAMS / 1024
        print(
            f"{STREAMS:,} streams open at once in a server just started, a token a second each for "
            f"{STREAM_SECONDS} s: {result.lost} lost, the last one ended {result.late:.2f} s late. Resident: "
            f"{result.rest / MIB:.0f} MiB at rest, {result.open / MIB:.0f} MiB with all of them open, "
            f"{result.after / MIB:.0f} MiB after. CPU time of a token: {result.cpu * 1e6:.0f} µs.\n"
        )
        name = f"{STREAMS:,} streams at once"
        return [
            Goal(f"{name}, lost", 0, result.lost, least=False),
            Goal(f"{name}, memory of each", 40, each, least=False, unit="KiB"),
            Goal("memory at rest", 150, result.rest / MIB, least=False, unit="MiB"),
            Goal(f"memory after {name}", 150, result.after / MIB, least=False, unit="MiB"),
        ]

    async def _soak(self, upstream: Server) -> list[Goal]:
        say(f"{self._arguments.requests:,} mixed requests")
        server = await self._start(OURS, upstream)
        try:
            result = await soak(server, self._arguments.requests)
        finally:
            server.stop()
        counts = ", ".join(f"{result.counts[kind]:,} {kind}" for kind in KINDS)
        print(
            f"{self._arguments.requests:,} requests to UpChatty: {counts}. Resident after the first tenth "
            f"{result.early / MIB:.1f} MiB, at the end {result.end / MIB:.1f} MiB; open files {result.early_files} "
            f"and {result.end_files}. Wrong answers: {result.wrong}. Records: {_records(server):,}.\n"
        )
        for mistake in result.mistakes:
            print(f"- {mistake}\n")
        return [
            Goal("memory at the end, times that after a tenth", 1.05, result.end / result.early, least=False),
            Goal("wrong answers", 0, result.wrong, least=False),
        ]

    async def _start(self, name: str, upstream: Server) -> Server:
        say(f"starting {name}")
        folder, port = self._new_folder(name), upstream.target.port
        return await start(name, folder, port, self._cores.server, self._timer)

    def _new_folder(self, name: str) -> Path:
        return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self._folder))


def _records(server: Server) -> int:
    """How many answers UpChatty has recorded."""
    with closing(sqlite3.connect(server.folder / "data" / "upchatty.db")) as database:
        return int(database.execute("SELECT count(*) FROM completions").fetchone()[0])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench gateway", description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; none: all")
    parser.add_argument(
        "--only", nargs="+", choices=SERVERS, default=[*SERVERS], metavar="NAME", help=", ".join(SERVERS)
    )
    parser.add_argument("--without-peers", action="store_true", help="no gateway that has to be installed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0, help="of one measurement")
    parser.add_argument("--soak", action="store_true", help="the mixed requests instead")
    parser.add_argument("--requests", type=int, default=100_000, help="of the soak")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(unknown)}")
    arguments.parts = arguments.parts or PARTS
    if arguments.without_peers:
        arguments.only = [name for name in arguments.only if name in (OURS, "nginx")]
    return arguments


async def main() -> None:
    if not hasattr(os, "sched_setaffinity"):
        sys.exit("This benchmark gives each server a core of its own, which it can do on Linux only.")
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    limit = OPEN_FILES if most == resource.RLIM_INFINITY else min(OPEN_FILES, most)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, most))  # the servers inherit it
    with tempfile.TemporaryDirectory(prefix="upchatty-bench-") as folder:
        try:
            await Benchmark(_arguments(), Path(folder)).run()
        except peers.NotToBeHad as error:
            sys.exit(f"scripts/bench gateway: {error}")


if __name__ == "__main__":
    uvloop.run(main())
