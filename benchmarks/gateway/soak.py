"""A hundred thousand mixed requests, to see whether memory or anything else grows."""

import asyncio
import itertools
import random
from dataclasses import dataclass, field

from benchmarks.gateway.load import Answer, mistake
from benchmarks.gateway.measure import warm_up
from benchmarks.gateway.servers import Server
from benchmarks.gateway.target import Question

CALLERS = 64
SETTLE_SECONDS = 3.0
WHOLE, STREAM = Question(delay=5), Question(stream=True, chunks=20, delay=5)
ABANDONED = (Question(delay=500), Question(stream=True, chunks=50, pause=10))
KINDS = {"whole": 38, "streamed": 38, "abandoned": 20, "bad": 4}
"""Percent of the requests."""


@dataclass
class Soak:
    """What came of it.

    Attributes:
        early, end: Resident bytes after the first tenth and at the end, both with nothing going on.
        early_files, end_files: Open files and sockets at those times.
        counts: Requests by kind.
        mistakes: What was wrong, a few of them.
        wrong: How many answers were wrong.
    """

    early: int = 0
    end: int = 0
    early_files: int = 0
    end_files: int = 0
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    mistakes: list[str] = field(default_factory=list)
    wrong: int = 0


async def soak(server: Server, requests: int) -> Soak:
    """Ask so many questions, a fifth of them abandoned before the answer or in the middle of it."""
    result, chance = Soak(), random.Random(0)
    await warm_up(server, 2)
    await _ask(server, requests // 10, chance, result)
    result.early, result.early_files = await _settled(server)
    await _ask(server, requests - requests // 10, chance, result)
    result.end, result.end_files = await _settled(server)
    return result


async def _settled(server: Server) -> tuple[int, int]:
    server.pool.close()
    await asyncio.sleep(SETTLE_SECONDS)
    return server.process.resident_bytes(), server.process.open_files()


async def _ask(server: Server, requests: int, chance: random.Random, result: Soak) -> None:
    kinds = iter(chance.choices(list(KINDS), list(KINDS.values()), k=requests))
    bad = itertools.cycle(_bad_requests(server))

    async def caller() -> None:
        for kind in kinds:
            result.counts[kind] += 1
            if kind == "abandoned":
                await _abandon(server, chance)
                continue
            if kind == "bad":
                request, status = next(bad)
                answer = await server.pool.ask(request)
                problem = "" if answer.status == status else f"status {answer.status} in place of {status}"
            else:
                question = WHOLE if kind == "whole" else STREAM
                answer = await server.pool.ask(server.target.request(question))
                problem = mistake(answer, question)
            if problem:
                result.wrong += 1
                result.mistakes = [*result.mistakes, f"{kind}: {problem}"][:5]

    await asyncio.gather(*(caller() for _ in range(CALLERS)))


async def _abandon(server: Server, chance: random.Random) -> None:
    connection = await server.pool.connection()
    question = chance.choice(ABANDONED)
    connection.ask(server.target.request(question), Answer(0.0), lambda answer: None)
    await asyncio.sleep(chance.uniform(0.005, 0.15))
    connection.abort()


def _bad_requests(server: Server) -> list[tuple[bytes, int]]:
    """Requests that cannot be answered, and the status that each has to get."""
    target = server.target
    right = target.body(Question())
    return [
        (target.raw_request(right[:-5]), 400),
        (target.raw_request(right.replace('"temperature":0.7', '"temperature":7')), 400),
        (target.raw_request(right, Authorization="Bearer wrong"), 401),
        (target.raw_request(right.replace(target.model, "bot_none")), 404),
    ]
