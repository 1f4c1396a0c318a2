"""The Grafana dashboard asks for metrics that are exposed, and Grafana can import it."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

from wisp_plugin.telemetry import Telemetry

DASHBOARD = Path(__file__).resolve().parents[1] / "dashboards" / "wisp.json"


def panels_of(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    """All panels, those inside rows too."""
    return list(itertools.chain.from_iterable([panel, *panel.get("panels", [])] for panel in dashboard["panels"]))


def test_the_dashboard_asks_for_what_is_exposed() -> None:
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    panels = panels_of(dashboard)
    ids_ = [panel["id"] for panel in panels]
    assert len(set(ids_)) == len(ids_)
    exposed = {family.name for family in Telemetry().families()}
    asked: set[str] = set()
    for panel in panels:
        if panel["type"] == "row":
            continue
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, panel["title"]
        assert panel["targets"], panel["title"]
        for goal in panel["targets"]:
            names = set(re.findall(r"\bwisp_\w+", goal["expr"]))
            assert names, goal["expr"]
            assert goal["expr"].count("(") == goal["expr"].count(")")
            asked |= names
    assert asked <= exposed
    assert [panel["title"] for panel in panels if panel["type"] == "row"] == [
        "SLO", "Passes", "Drafts", "Estimator", "KV",
    ]  # fmt: skip
    assert dashboard["schemaVersion"] >= 36
    assert any(variable["type"] == "datasource" for variable in dashboard["templating"]["list"])


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in panels_of(json.loads(DASHBOARD.read_text(encoding="utf-8"))):
        place = panel["gridPos"]
        cells = set(
            itertools.product(range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"]))
        )
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
