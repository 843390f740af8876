"""What the API costs on top of its own engine, and what the engine's settings bring.

Every figure is a ratio of two ways measured in turn in one run, since machines are noisy: the same
question goes to the API and to the llama.cpp server behind it. Prints Markdown.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import psutil

from benchmarks.server import KEY, Address, ServerUnderTest
from benchmarks.texts import COPY_QUESTIONS, OTHER_QUESTIONS, handbook

INSTRUCTIONS = "You are a helpful assistant. Answer briefly and truthfully."


@dataclass
class Timing:
    """One streamed answer: seconds to its first text and to its end, its tokens and its text."""

    first: float
    total: float
    tokens: int
    text: str

    @property
    def rate(self) -> float:
        """Tokens a second after the first."""
        return (self.tokens - 1) / (self.total - self.first)


class Target:
    """Something that answers chat completions.

    Args:
        session: The HTTP client.
        url: The base URL, up to and with `/v1`.
        key: The API key.
        model: The model's or the chatbot's name.
        instructions: Sent as a system message; None where the chatbot has its own.
    """

    def __init__(
        self, session: aiohttp.ClientSession, url: str, key: str, model: str, instructions: str | None = None
    ) -> None:
        self._session, self._url, self._model = session, url, model
        self._headers = {"Authorization": f"Bearer {key}"}
        self._system = [{"role": "system", "content": instructions}] if instructions else []

    async def ask(self, question: str, **parameters: Any) -> Timing:
        """Ask, streamed."""
        messages = [*self._system, {"role": "user", "content": question}]
        body = {"model": self._model, "messages": messages, "stream": True, "temperature": 0.0}
        body |= {"stream_options": {"include_usage": True}, **parameters}
        started, first, text, tokens = time.perf_counter(), 0.0, [], 0
        async with self._session.post(
            self._url + "/chat/completions", json=body, headers=self._headers
        ) as response:
            response.raise_for_status()
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                chunk = msgspec.json.decode(line[6:])
                if chunk["choices"] and (piece := chunk["choices"][0]["delta"].get("content")):
                    first = first or time.perf_counter() - started
                    text.append(piece)
                if usage := chunk.get("usage"):
                    tokens = usage["completion_tokens"]
        return Timing(first, time.perf_counter() - started, tokens, "".join(text))


async def throughput(target: Target, streams: int, tokens: int) -> float:
    """Tokens a second with this many streams at once."""
    started = time.perf_counter()
    answers = await asyncio.gather(
        *(
            target.ask(f"Tell me a long story about dragon number {n}.", max_tokens=tokens)
            for n in range(streams)
        )
    )
    return sum(answer.tokens for answer in answers) / (time.perf_counter() - started)


async def in_turn(
    rounds: int, ours: Callable[[], Awaitable[float]], direct: Callable[[], Awaitable[float]]
) -> tuple[float, float, float]:
    """Two measurements taken in turn: their medians, and the median of the ratios pair by pair."""
    pairs = []
    for number in range(rounds):
        if number % 2:
            theirs, mine = await direct(), await ours()
        else:
            mine, theirs = await ours(), await direct()
        pairs.append((mine, theirs))
    mine, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
    return mine, theirs, statistics.median(mine / theirs for mine, theirs in pairs)


async def compare_with_direct_calls(rounds: int) -> None:
    """Throughput and time to first token, through the API and directly; memory at rest."""
    async with RunningServer() as (session, address):
        resting = psutil.Process(address.pid).memory_info().rss / 2**20
        ours = Target(session, address.api, KEY, address.chatbot)
        direct = Target(session, address.engine, address.engine_key, "default", INSTRUCTIONS)
        await throughput(ours, 8, 4)
        print("| streams | tokens/s through the API | tokens/s directly | ratio |\n|---|---|---|---|")
        for streams in (1, 4, 8, 16):
            mine, theirs, ratio = await in_turn(
                2 * rounds,
                lambda n=streams: throughput(ours, n, 32),
                lambda n=streams: throughput(direct, n, 32),
            )
            print(f"| {streams} | {mine:.1f} | {theirs:.1f} | {ratio:.3f} |", flush=True)

        async def first(target: Target) -> float:
            return (await target.ask("How are you?", max_tokens=2)).first * 1000

        mine, theirs, _ = await in_turn(20 * rounds, lambda: first(ours), lambda: first(direct))
        print(
            f"\nTime to first token, one stream, median: {mine:.1f} ms through the API, {theirs:.1f} ms directly,"
        )
        print(
            f"so {mine - theirs:.1f} ms added. The API's process at rest: {resting:.0f} MiB resident.\n",
            flush=True,
        )


async def second_question(rounds: int) -> None:
    """Time to first token of the first and the second question to a chatbot with long instructions."""
    async with RunningServer() as (session, address):
        ratios = []
        for number in range(rounds):
            chatbot = await _make_chatbot(session, address, f"Handbook {number}\n" + handbook(number))
            target = Target(session, address.api, KEY, chatbot)
            first = (await target.ask("When is the library open?", max_tokens=2)).first
            second = (await target.ask("What does a lost book cost?", max_tokens=2)).first
            ratios.append((second / first, first, second))
        ratio, first, second = sorted(ratios)[len(ratios) // 2]
        print(f"Second question with 1,500 tokens of instructions: {second:.3f} s to the first token against")
        print(f"{first:.3f} s for the first question, ratio {ratio:.3f}.\n", flush=True)


async def speculation(rounds: int) -> None:
    """Answers with and without speculation, that quote the instructions and that do not."""
    print("| answer | tokens | tokens/s with | without | ratio | same text |\n|---|---|---|---|---|---|")
    async with (
        RunningServer(speculation="ngram") as (session, fast),
        RunningServer(speculation="off") as (_, slow),
    ):
        ratios = []
        for kind, questions in (("quotes", COPY_QUESTIONS), ("other", OTHER_QUESTIONS)):
            for instructions, question in questions:
                with_ = await _asking(session, fast, instructions, question)
                without = await _asking(session, slow, instructions, question)
                pairs = [(await with_(), await without()) for _ in range(rounds)]
                mine, theirs = (
                    statistics.median(answer.rate for answer in side) for side in zip(*pairs, strict=True)
                )
                same = len({answer.text for pair in pairs for answer in pair}) == 1
                print(
                    f"| {kind} | {pairs[0][0].tokens} | {mine:.1f} | {theirs:.1f} | {mine / theirs:.2f} | {same} |"
                )
                if kind == "quotes":
                    ratios.append(mine / theirs)
    print(f"\nMedian ratio of the answers that quote: {statistics.median(ratios):.2f}\n", flush=True)


async def _asking(
    session: aiohttp.ClientSession, address: Address, instructions: str, question: str
) -> Callable[[], Awaitable[Timing]]:
    """Asks a new chatbot the same question again and again; its prompt is in the cache already."""
    target = Target(session, address.api, KEY, await _make_chatbot(session, address, instructions))
    await target.ask(question, max_tokens=1)
    return lambda: target.ask(question, max_tokens=160)


class RunningServer:
    """A server under test with an HTTP session."""

    def __init__(self, **model: Any) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._server = ServerUnderTest(Path(self._folder.name), **model)

    async def __aenter__(self) -> tuple[aiohttp.ClientSession, Address]:
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True))
        return self._session, await self._server.__aenter__()

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()
        await self._server.__aexit__()
        self._folder.cleanup()


async def _make_chatbot(session: aiohttp.ClientSession, address: Address, instructions: str) -> str:
    async with session.post(
        address.api + "/chatbots",
        json={"name": "benchmark", "instructions": instructions},
        headers={"Authorization": f"Bearer {KEY}"},
    ) as response:
        response.raise_for_status()
        return str((await response.json())["id"])


PARTS = {"direct": compare_with_direct_calls, "second": second_question, "speculation": speculation}


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; none: all")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    for part in arguments.parts or PARTS:
        await PARTS[part](arguments.rounds)


if __name__ == "__main__":
    asyncio.run(main())
