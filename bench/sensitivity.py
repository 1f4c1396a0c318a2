"""The headline under other assumptions: other traces, other forms of the cost, a measured profile, devices
whose own prefill takes time; the same mix.

One seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from bench.cells import DRAFTS, MIX, Cell, Timing
from bench.comparison import chosen_kinds, compare_cells
from bench.gpu_profile import DEFAULT, NORMS
from bench.lab import Lab
from bench.settings import Kind

MEASURED = "h100-qwen3-32b"  # by `wisp-bench profile --shape qwen3-32b --device cuda` on an H100
_PREFILL_FACTOR = 10.0  # prompt tokens that a device reads in the time of a draft token; 5 to 20 are usual on CPUs
SYSTEMS_SHOWN = ("centralized", "sled", "published", "colocated")
SENSITIVITY_COLUMNS = (
    "draft", "profile", "prefill factor", "capacity of wisp", "goodput of wisp",
    *(f"{figure} / {name}" for figure in ("capacity", "goodput") for name in SYSTEMS_SHOWN),
)  # fmt: skip


def variants(headline: Cell = MIX) -> list[Cell]:
    """The headline, then one assumption changed at a time."""
    drafts = [replace(headline, draft=draft) for draft in DRAFTS if draft != headline.draft]
    profiles = [*(f"{DEFAULT}{suffix}" for suffix in NORMS), MEASURED]
    forms = [replace(headline, profile=profile) for profile in profiles]
    reading = replace(headline, prefill_factor=_PREFILL_FACTOR)
    return [headline, *drafts, *(cell for cell in forms if cell != headline), reading]


def sensitivity(
    lab: Lab, cells: Sequence[Cell], timing: Timing, seed: int, tried: Sequence[Kind]
) -> list[dict[str, Any]]:
    """A row per cell, see SENSITIVITY_COLUMNS; ratios are None where the other system has nothing. `tried`: systems
    with the settings that are tried."""
    kinds = chosen_kinds(SYSTEMS_SHOWN, tried)
    rows = []
    for comparison in compare_cells(lab, cells, kinds, timing, [seed]):
        cell, bests = comparison.cell, {name: own[0] for name, own in comparison.bests.items()}
        wisp = bests["wisp"]
        row: dict[str, Any] = {"draft": cell.draft, "profile": cell.profile, "prefill_factor": cell.prefill_factor,
                               "capacity": wisp.capacity, "goodput": wisp.peak_goodput}  # fmt: skip
        row |= {f"capacity_vs_{n}": _ratio(wisp.capacity, bests[n].capacity) for n in SYSTEMS_SHOWN}
        row |= {f"goodput_vs_{n}": _ratio(wisp.peak_goodput, bests[n].peak_goodput) for n in SYSTEMS_SHOWN}
        row["settings"] = {name: [best.capacity_setting, best.peak_setting] for name, best in bests.items()}
        rows.append(row)
    return rows


def table_rows(rows: Sequence[dict[str, Any]]) -> list[list[Any]]:
    """What a table shows of the rows of `sensitivity`: all but the settings."""
    return [[value for name, value in row.items() if name != "settings"] for row in rows]


def _ratio(value: float, other: float) -> float | None:
    return value / other if other else None
