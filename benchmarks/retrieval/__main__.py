"""Measures retrieval: scripts/bench retrieval [--manuals git handbook postgresql] [--database-url URL]…"""

import argparse
import asyncio
from pathlib import Path

from benchmarks.retrieval.manuals import MANUALS, measure
from upchatty.engines.files import ModelFiles
from upchatty.engines.pool import open_embedding
from upchatty.knowledge.splitting import BUDGET
from upchatty.settings import Settings


async def run(urls: list[str], names: list[str], budgets: list[int]) -> None:
    """Measure on each database, with each size of passages."""
    settings = Settings(data_dir=Path("data"))
    async with open_embedding(settings, ModelFiles(settings.cache_dir)) as model:
        assert model  # a built-in one
        for budget in budgets:
            for url in urls:
                await measure(url, model, names, budget)


def main() -> None:
    """Measure what the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--database-url", action="append", help="an empty PostgreSQL database, besides SQLite"
    )
    parser.add_argument("--manuals", nargs="*", choices=[*MANUALS], default=[*MANUALS])
    parser.add_argument("--budgets", nargs="*", type=int, default=[BUDGET], help="tokens of a passage")
    given = parser.parse_args()
    asyncio.run(run(["", *(given.database_url or [])], given.manuals, given.budgets))


if __name__ == "__main__":
    main()
