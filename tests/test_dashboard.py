"""docs/grafana-dashboard.json shows what /metrics has: all of it, and nothing else."""

import json
import re
from pathlib import Path

import httpx
import pytest

from upchatty.settings import Settings
from upchatty.testing import ScriptedEngine, running_server

DASHBOARD = json.loads((Path(__file__).parents[1] / "docs" / "grafana-dashboard.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
OF_THE_WHOLE_SERVER = {
    "upchatty_http_requests_total",
    "upchatty_rate_limited_total",
    "upchatty_records_lost_total",
    "upchatty_search_seconds_bucket",
    "upchatty_unanswered_total",
}
METRIC = re.compile(r"\b(upchatty_\w+)(\{[^}]*\})?")


def queries() -> list[str]:
    variables = [variable["query"]["query"] for variable in DASHBOARD["templating"]["list"][1:]]
    return variables + [target["expr"] for panel in PANELS for target in panel["targets"]]


def shown() -> set[str]:
    names = [name for query in queries() for name, _ in METRIC.findall(query)]
    return {re.sub(r"_(bucket|sum|count)$", "", name) for name in names}


async def exposed(folder: Path) -> set[str]:
    """The metrics of a server that has just started."""
    async with ScriptedEngine() as engine:
        settings = Settings(data_dir=folder, models={"default": {"url": engine.url}})
        async with running_server(settings) as server, httpx.AsyncClient(verify=False) as client:
            text = (await client.get(server.address + "/metrics")).text
    names = set(re.findall(r"^# TYPE (upchatty_\w+)", text, re.MULTILINE))
    return {name for name in names if not name.endswith("_created")}


async def test_dashboard_and_metrics_are_the_same(tmp_path: Path) -> None:
    metrics = await exposed(tmp_path)
    assert shown() - metrics == set(), "the dashboard asks for what /metrics does not have"
    assert metrics - shown() == set(), "the dashboard does not show these metrics"


def test_what_a_model_has_can_be_filtered_by_model() -> None:
    for panel in PANELS:
        for target in panel["targets"]:
            for name, labels in METRIC.findall(target["expr"]):
                assert (labels == '{model=~"$model"}') != (name in OF_THE_WHOLE_SERVER), target["expr"]


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_panel_says_what_it_shows(panel: dict) -> None:  # type: ignore[type-arg]
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert panel["datasource"]["uid"] == "${datasource}"
    assert all(target["expr"].count("(") == target["expr"].count(")") for target in panel["targets"])
    assert not re.search(r"upchatty|_", panel["title"]), "a title is in plain words"


def test_panels_have_places_of_their_own() -> None:
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not taken & cells and max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells
