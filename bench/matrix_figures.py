"""What a matrix says: WISP against the best other system of each cell, and against each system over all cells."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from bench.comparison import PUBLISHED
from bench.matrix_parts import CellResult
from bench.systems import BASELINES

NO_REGRET = 0.97
LEAST_CENTRALIZED = 16  # cells where centralized holds fewer devices count for no headline


@dataclass(frozen=True, slots=True)
class Ratio:
    """WISP / the best other system in a cell; None: no other system has anything."""

    value: float | None
    other: str


def mean(values: Sequence[float]) -> float:
    """Over seeds."""
    return sum(values) / len(values)


def against_best(result: CellResult, figure: str, others: Iterable[str] = BASELINES) -> Ratio:
    """`figure` is `capacity` or `goodput`."""
    values = {name: mean(own) for name, own in getattr(result, figure).items()}
    best = max((name for name in others if name in values), key=lambda name: values[name])
    return Ratio(values["wisp"] / values[best] if values[best] else None, best)


def against(result: CellResult, figure: str, system: str) -> float | None:
    """WISP / one system; None if that has nothing."""
    values = getattr(result, figure)
    other = mean(values[system])
    return mean(values["wisp"]) / other if other else None


def is_lost(result: CellResult) -> bool:
    """Whether WISP has less than NO_REGRET of the best other system in capacity or goodput."""
    ratios = [against_best(result, figure).value for figure in ("capacity", "goodput")]
    return any(ratio is not None and ratio < NO_REGRET for ratio in ratios)


def before_and_after(before: CellResult, after: CellResult) -> dict[str, Any]:
    """The ratios of a cell with few and with more seeds."""
    row: dict[str, Any] = {"cell": before.cell.name, "seeds": len(after.goodput["wisp"])}
    for figure in ("capacity", "goodput"):
        ratio = against_best(after, figure)
        row |= {f"{figure}_before": against_best(before, figure).value, figure: ratio.value}
        row[f"best_other_{figure}"] = ratio.other
    return row


def matrix_figures(results: Sequence[CellResult]) -> dict[str, Any]:
    """All figures of a matrix, see `bench.matrix`."""
    figures: dict[str, Any] = {"cells": len(results)}
    without = [name for name in BASELINES if name != "colocated"]
    for figure in ("goodput", "capacity"):
        ratios = [against_best(r, figure) for r in results]
        figures[f"matrix_min_{figure}"] = _least([ratio.value for ratio in ratios])
        edge = [against_best(r, figure, without).value for r in results]
        figures[f"matrix_min_{figure}_without_colocated"] = _least(edge)
        figures[f"cells_lost_{figure}"] = [
            {"cell": r.cell.name, "ratio": round(ratio.value, 4), "best_other": ratio.other}
            for r, ratio in zip(results, ratios, strict=True)
            if ratio.value is not None and ratio.value < NO_REGRET
        ]
        figures |= _against_systems(results, figure)
    figures |= waste_figures(results)
    figures["matrix_min"] = _least([figures["matrix_min_goodput"], figures["matrix_min_capacity"]])
    return figures


def _against_systems(results: Sequence[CellResult], figure: str) -> dict[str, Any]:
    """Median over cells and share of cells in which the published ratio holds; geometric means."""
    counted = [r for r in results if mean(r.capacity["centralized"]) >= LEAST_CENTRALIZED]
    figures: dict[str, Any] = {"cells_counted": len(counted)}
    for system, pair in PUBLISHED.items():
        asked = pair[0 if figure == "capacity" else 1]
        ratios = [against(r, figure, system) for r in counted]
        # Without anything on the other side alone the published ratio holds, but there is no number for a median.
        alone = [math.inf if mean(getattr(r, figure)["wisp"]) else 0.0 for r in counted]
        bounded = [other if ratio is None else ratio for ratio, other in zip(ratios, alone, strict=True)]
        middle = statistics.median(bounded) if bounded else None
        key = f"{figure}_vs_{system}"
        figures[f"{key}_median"] = middle if middle is not None and math.isfinite(middle) else None
        figures[f"{key}_share"] = sum(ratio >= asked for ratio in bounded) / len(bounded) if bounded else None
    for system in BASELINES:
        if system in results[0].capacity:
            name = system.replace("-", "_")
            known = [ratio for r in results if (ratio := against(r, figure, system)) is not None]
            figures[f"{figure}_vs_{name}_gm"] = geometric_mean(known)
            figures[f"{figure}_vs_{name}_gm_cells"] = len(known)
            # A cell in which the other has next to nothing weighs heavily in a mean; not in the middle.
            figures[f"{figure}_vs_{name}_gm_median"] = statistics.median(known) if known else None
    for speeds in dict.fromkeys(r.cell.speeds for r in results):
        found = [against(r, figure, "published") for r in results if r.cell.speeds == speeds]
        name = f"{figure}_vs_published_gm_{speeds}_devices"
        figures[name] = geometric_mean([ratio for ratio in found if ratio is not None])
    return figures


def geometric_mean(values: Sequence[float]) -> float | None:
    """None without values; 0 if one of them is 0."""
    if not values or min(values) <= 0.0:
        return 0.0 if values else None
    return math.exp(sum(map(math.log, values)) / len(values))


def _least(values: Sequence[float | None]) -> float | None:
    return min((v for v in values if v is not None), default=None)


def table_rows(results: Sequence[CellResult]) -> list[list[Any]]:
    """A row per cell, see TABLE_COLUMNS."""
    rows = []
    for r in results:
        goodput, capacity = against_best(r, "goodput"), against_best(r, "capacity")
        rows.append([
            r.cell.tpot_passes, r.cell.speeds, r.cell.rtt_ms[0], r.cell.draft,
            mean(r.capacity["wisp"]), capacity.value, capacity.other,
            mean(r.goodput["wisp"]), goodput.value, goodput.other,
            against(r, "capacity", "centralized"), against(r, "goodput", "centralized"),
            against(r, "goodput", "published"),
        ])  # fmt: skip
    return rows


TABLE_COLUMNS = (
    "tpot, passes", "devices", "RTT, ms", "draft", "capacity", "capacity / best other", "best other in capacity",
    "goodput", "goodput / best other", "best other in goodput",
    "capacity / centralized", "goodput / centralized", "goodput / published",
)  # fmt: skip

MEDIAN_COLUMNS = (
    "cells", "goodput / best other", "capacity / best other", "goodput / centralized", "capacity / centralized",
    "goodput / published",
)  # fmt: skip


def median_rows(results: Sequence[CellResult]) -> list[list[Any]]:
    """Medians of ratios over all cells, those of each tpot, and those of each kind of devices; see MEDIAN_COLUMNS."""
    groups = {"all": list(results)}
    for r in results:
        groups.setdefault(f"tpot {r.cell.tpot_passes:g}", []).append(r)
    for r in results:
        groups.setdefault(f"{r.cell.speeds} devices", []).append(r)
    return [[name, *_medians(own)] for name, own in groups.items()]


def _medians(results: Sequence[CellResult]) -> list[float | None]:
    best = [[against_best(r, figure).value for r in results] for figure in ("goodput", "capacity")]
    pairs = (("goodput", "centralized"), ("capacity", "centralized"), ("goodput", "published"))
    columns = [*best, *([against(r, figure, system) for r in results] for figure, system in pairs)]
    known = [[value for value in column if value is not None] for column in columns]
    return [statistics.median(column) if column else None for column in known]


SETTING_COLUMNS = ("cell", "goodput / best other", "WISP with", "best other", "with")


def setting_rows(results: Sequence[CellResult]) -> list[list[Any]]:
    """What the ratios of goodput are between, a row per cell, see SETTING_COLUMNS."""
    rows: list[list[Any]] = []
    for r in results:
        ratio = against_best(r, "goodput")
        rows.append([r.cell.name, ratio.value, r.settings["wisp"][1], ratio.other, r.settings[ratio.other][1]])
    return rows


WDT_OF = ("sled", "published", "fixed-edf", "wisp")
INTERFERENCE_OF = ("centralized", "sled", "published", "colocated", "wisp")
WASTE_COLUMNS = (
    "cell", *(f"WDT share, {name}" for name in WDT_OF), *(f"interference of {name}, ms" for name in INTERFERENCE_OF)
)  # fmt: skip


def waste_rows(results: Sequence[CellResult]) -> list[list[Any]]:
    """Wasted drafting time and interference at the peak, a row per cell, see WASTE_COLUMNS; None if nobody noted it."""
    return [[r.cell.name, *map(r.wdt_share.get, WDT_OF), *map(r.interference_ms.get, INTERFERENCE_OF)] for r in results]


def waste_figures(results: Sequence[CellResult]) -> dict[str, Any]:
    """Medians of the same over cells."""
    figures: dict[str, Any] = {}
    for figure, systems in (("wdt_share", WDT_OF), ("interference_ms", INTERFERENCE_OF)):
        for system in systems:
            known = [value for r in results if (value := getattr(r, figure).get(system)) is not None]
            figures[f"{figure}_{system.replace('-', '_')}_median"] = statistics.median(known) if known else None
    return figures
