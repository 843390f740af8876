"""`upchatty knowledge unanswered`"""

import asyncio
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from upchatty.chat.unanswered import Unanswered
from upchatty.chat.usage import selection
from upchatty.cli.administration import administration
from upchatty.cli.output import JSON, CommonSettings, moment, print_json, print_table
from upchatty.settings import Settings

Time = Annotated[str | None, Parameter(help="Such as 2030-12-31; without it, the last 30 days count.")]


def unanswered(
    chatbot: Annotated[str, Parameter(help="The chatbot's id, bot_….")],
    /,
    *,
    start: Annotated[Time, Parameter(name="--from")] = None,
    end: Annotated[Time, Parameter(name="--to")] = None,
    limit: Annotated[int, Parameter(validator=Number(gte=1))] = 20,
    clear: Annotated[bool, Parameter(negative="", show_default=False)] = False,
    json: JSON = False,
    settings: CommonSettings = Settings(),
) -> None:
    """What a grounded chatbot was asked and could not answer, like with like, the most frequent first.

    Args:
        limit: How many rows at most.
        clear: Forget the questions after that.
    """
    time = selection(start, end, start_name="--from", end_name="--to")

    async def run() -> None:
        async with administration(settings) as opened:
            found = await opened.chatbots.get(chatbot)
            questions = Unanswered(opened.database, None)
            clusters = await questions.clusters(found.id, time.start, time.end)
            if clear:
                await questions.clear(found.id)
        if json:
            print_json(clusters[:limit])
        elif not clusters:
            print("No question was left without an answer in that time.")
        else:
            rows = [(c.count, c.question, moment(c.last_at), c.score) for c in clusters[:limit]]
            print_table(["COUNT", "QUESTION", "LAST ASKED", "BEST SCORE"], rows)

    asyncio.run(run())
