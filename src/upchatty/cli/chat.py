"""`upchatty chat ID`: a conversation in the terminal."""

import asyncio
import sys

from upchatty.api.services import Services
from upchatty.app import open_services
from upchatty.auth import Caller
from upchatty.chat.answer import Question
from upchatty.cli.administration import configure_quiet_logs
from upchatty.cli.output import CommonSettings
from upchatty.cli.progress import RichProgress
from upchatty.errors import RequestError
from upchatty.settings import Settings

TERMINAL = Caller("terminal", "admin", frozenset())


def chat(chatbot: str, /, *, settings: CommonSettings = Settings()) -> None:
    """Talk with a chatbot, with history; an empty line or Ctrl-D ends it.

    Lines that come through a pipe are questions too, and only the answers are printed. No server needs
    to be running: the model is loaded for the conversation.

    Args:
        chatbot: The chatbot's id, bot_…; with @3 behind it, its version 3.
    """
    asyncio.run(_converse(chatbot, settings))


async def _converse(chatbot: str, settings: Settings) -> None:
    configure_quiet_logs(settings)
    async with open_services(settings, RichProgress()) as services:
        who = await services.chatbots.get(chatbot)
        await services.pool.model(who.model).start()
        if sys.stdin.isatty():
            print(f"This is {who.name}. An empty line or Ctrl-D ends the conversation.", file=sys.stderr)
        messages: list[dict[str, str]] = []
        while line := await asyncio.to_thread(_read_line):
            messages.append({"role": "user", "content": line})
            try:
                messages.append({"role": "assistant", "content": await _answer(services, chatbot, messages)})
            except RequestError as error:
                if not sys.stdin.isatty():
                    raise
                messages.pop()
                print(f"error: {error}", file=sys.stderr)


async def _answer(services: Services, chatbot: str, messages: list[dict[str, str]]) -> str:
    question = Question(chatbot, list(messages), streamed=True)
    async with services.answering.answer(TERMINAL, question) as answer:
        async for texts in answer.pieces():
            print(*texts, sep="", end="", flush=True)
        print()
    return answer.text


def _read_line() -> str:
    """The next question, or nothing at the end."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""
