"""`upchatty knowledge calibrate`"""

import asyncio
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from upchatty.cli.administration import administration
from upchatty.cli.output import JSON, CommonSettings, print_json, print_table
from upchatty.cli.progress import RichProgress
from upchatty.engines.files import ModelFiles
from upchatty.engines.pool import open_embedding
from upchatty.errors import ConfigurationError, InvalidRequest
from upchatty.knowledge.calibration import Calibration, Example, read_examples
from upchatty.knowledge.calibration import calibrate as best_threshold
from upchatty.knowledge.search import Search
from upchatty.settings import Settings


def calibrate(
    chatbot: Annotated[str, Parameter(help="The chatbot's id, bot_….")],
    /,
    *,
    examples: Path,
    apply: Annotated[bool, Parameter(negative="", show_default=False)] = False,
    json: JSON = False,
    settings: CommonSettings = Settings(),
) -> None:
    """Find the threshold of a grounded chatbot from examples, and what each does to them.

    Args:
        examples: Questions with whether the documents answer them, as CSV, JSON lines or TOML.
        apply: Set the threshold, which makes the chatbot's next version.
    """
    try:
        known = read_examples(examples.name, examples.read_bytes())
    except OSError as error:
        problem = f"cannot read {examples} ({error.strerror})"
        raise ConfigurationError(setting="--examples", problem=problem) from None

    async def run() -> Calibration:
        files, progress = ModelFiles(settings.cache_dir), RichProgress()
        async with (
            administration(settings) as opened,
            open_embedding(settings, files, progress=progress) as embedding,
        ):
            asked = await opened.chatbots.get(chatbot)
            if not asked.known_passages:
                raise InvalidRequest(
                    parameter="calibrate", expected="this chatbot knows nothing yet: add documents first"
                )
            search = Search(opened.database, embedding, None, settings)
            found = [await search.search(asked.id, [example.question], seconds=None) for example in known]
            result = best_threshold(known, [findings.score for findings in found])
            if apply:
                await opened.chatbots.change(asked.id, threshold=result.best.threshold)
            return result

    _print(asyncio.run(run()), known, applied=apply, json=json)


def _print(result: Calibration, known: list[Example], *, applied: bool, json: bool) -> None:
    if json:
        outcomes = {"best": result.best._asdict(), "others": [o._asdict() for o in result.others]}
        print_json(result._asdict() | outcomes | {"applied": applied})
    else:
        rows = [
            (f"{o.threshold:.4g}", o.false_answers, o.false_refusals, f"{o.balanced_accuracy:.3f}")
            for o in sorted({*result.others, result.best})
        ]
        print_table(["THRESHOLD", "FALSE ANSWERS", "FALSE REFUSALS", "BALANCED ACCURACY"], rows)
        kinds = f"{result.answerable} with an answer, {result.unanswerable} without"
        done = "is set" if applied else "separates best; --apply sets it"
        print(f"\n{len(known)} examples, {kinds}: {result.best.threshold:.4g} {done}.")
    for warning in result.warnings:
        print(f"upchatty: {warning}", file=sys.stderr)
