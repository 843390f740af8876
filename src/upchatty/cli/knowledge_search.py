"""`upchatty knowledge search …`"""

import asyncio
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from upchatty.api.search import FindingsView
from upchatty.chat.answer import least_score
from upchatty.cli.administration import administration
from upchatty.cli.output import JSON, CommonSettings, print_json
from upchatty.engines.files import ModelFiles
from upchatty.engines.pool import open_embedding
from upchatty.errors import InvalidRequest
from upchatty.knowledge.search import Finding, Findings, Search
from upchatty.settings import Settings

SHOWN_TEXT = 240  # characters of a passage


def search(
    chatbot: Annotated[str, Parameter(help="The chatbot's id, bot_….")],
    /,
    *query: str,
    limit: Annotated[int | None, Parameter(validator=Number(gte=1, lte=50))] = None,
    message: list[str] | None = None,
    dropped: Annotated[bool, Parameter(negative="", show_default=False)] = False,
    json: JSON = False,
    settings: CommonSettings = Settings(),
) -> None:
    """Search a chatbot's documents as for an answer, and say what was found and why. A reranker is not asked.

    Args:
        query: The question.
        limit: How many passages are kept at most; as many as the chatbot's answers are given.
        message: What the user has said before, to which the question may refer; may be given several times.
        dropped: Show passages that are dropped, too.
    """
    if not (question := " ".join(query).strip()):
        raise InvalidRequest(parameter="QUERY", expected="expected a question to search for")

    async def run() -> Findings:
        async with (
            administration(settings) as opened,
            open_embedding(settings, ModelFiles(settings.cache_dir)) as embedding,
        ):
            found = await opened.chatbots.get(chatbot)
            searching = Search(opened.database, embedding, None, settings)
            return await searching.search(
                found.id,
                [*(message or []), question],
                limit=limit or found.passages,
                threshold=least_score(found),
                explain=True,
                seconds=None,
            )

    findings = asyncio.run(run())
    if json:
        print_json(FindingsView.of(findings))
        return
    shown = findings.passages if dropped else findings.kept
    if not shown:
        print(
            "No passage fits; --dropped shows what came nearest." if findings.passages else "No passage fits."
        )
    for finding in shown:
        _print(finding)


def _print(finding: Finding) -> None:
    place = " > ".join([finding.title, *finding.headings])
    page = f", page {finding.page}" if finding.page else ""
    text = " ".join(finding.text.split())
    print(f"{finding.score:.3f}  {place}{page}")
    print(f"       {finding.document_id}{f'  {finding.url}' if finding.url else ''}")
    print(f"       words {_scored(finding.lexical_rank, finding.lexical_score)}", end="")
    print(f", meaning {_scored(finding.vector_rank, finding.vector_score)}; {finding.reason}")
    print(f"       {text if len(text) <= SHOWN_TEXT else text[:SHOWN_TEXT] + '…'}\n")


def _scored(rank: int | None, score: float | None) -> str:
    return "-" if rank is None or score is None else f"{score:.3f} (place {rank})"
