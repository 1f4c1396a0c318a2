"""All systems in one cell: each swept on the first seed, then the best of its settings run on every seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from bench.best import Best, tight_interference_ms
from bench.cells import Cell, Timing
from bench.finalists import Asked, run_finals
from bench.intervals import Interval, mean_interval, ratio_interval
from bench.lab import Lab
from bench.search import Question, find_best
from bench.settings import Kind
from bench.systems import BASELINES, SYSTEMS

PUBLISHED = {"centralized": (2.1, 1.94), "sled": (4.1, 3.7)}  # capacity and goodput of the paper's best case
_FIRST_DEVICES = 32  # where a search begins


@dataclass(frozen=True, slots=True)
class Comparison:
    """Bests by system, one per seed (the first one has the runs of the sweep, too)."""

    cell: Cell
    bests: dict[str, list[Best]]

    def capacities(self, system: str) -> list[float]:
        """Devices at 95 % attainment, per seed."""
        return [float(best.capacity) for best in self.bests[system]]

    def goodputs(self, system: str) -> list[float]:
        """Peak goodput, per seed."""
        return [best.peak_goodput for best in self.bests[system]]

    def ratio(self, figure: str, system: str) -> Interval | None:
        """`wisp` / another system in `capacity` or `goodput`; None if either is 0 with any seed."""
        values = self.capacities if figure == "capacity" else self.goodputs
        return ratio_interval(values("wisp"), values(system))

    def against_best_other(self, figure: str) -> tuple[float | None, str | None]:
        """`wisp` / the best baseline, by means, and which that is; None where no baseline has anything."""
        values = self.capacities if figure == "capacity" else self.goodputs
        means = {name: sum(values(name)) / len(values(name)) for name in self.bests}
        best = max((name for name in means if name in BASELINES), key=lambda name: means[name], default=None)
        return (means["wisp"] / means[best] if best and means[best] else None), best


def compare(
    lab: Lab, cell: Cell, kinds: Sequence[Kind], timing: Timing, seeds: Sequence[int], wants_peak: bool = True,
    together: int = 0,
) -> Comparison:  # fmt: skip
    """Sweep every system on the first seed, then run its finalists on all of them.

    `together`: settings of a system that are swept one after the other, parts beside each other; 0: all.
    """
    return compare_cells(lab, [cell], kinds, timing, seeds, wants_peak, together)[0]


def compare_cells(
    lab: Lab, cells: Sequence[Cell], kinds: Sequence[Kind], timing: Timing, seeds: Sequence[int],
    wants_peak: bool = True, together: int = 0,
) -> list[Comparison]:  # fmt: skip
    """See `compare`; the cells beside each other."""
    asked = _swept(lab, cells, kinds, timing, seeds[0], wants_peak, together)
    found = iter(run_finals(lab, asked, timing, seeds))
    return [Comparison(cell, {kind.name: next(found) for kind in kinds}) for cell in cells]


def _swept(
    lab: Lab, cells: Sequence[Cell], kinds: Sequence[Kind], timing: Timing, seed: int, wants_peak: bool, together: int
) -> list[Asked]:
    """The best of every system over all its settings, in every cell."""
    parts = [(cell, kind, kind.parts(together)) for cell in cells for kind in kinds]
    swept = [Question(cell, part, timing, seed, _FIRST_DEVICES, wants_peak) for cell, _, own in parts for part in own]
    # The last system is ours and takes longest: begun first, it is not waited for alone.
    answered = reversed(lab.map("sweep", find_best, swept[::-1], note=str))
    return [Asked(cell, kind, _best_of([next(answered) for _ in own])) for cell, kind, own in parts]


def _best_of(bests: Sequence[Best]) -> Best:
    """One system of which parts of the settings were searched apart: the first of the highest capacity and peak."""
    holder, leader = max(bests, key=lambda best: best.capacity), max(bests, key=lambda best: best.peak_goodput)
    return replace(holder.with_peak_of(leader), runs=[run for best in bests for run in best.runs])


def ratio_figures(comparison: Comparison, figure: str) -> dict[str, Any]:
    """`FIGURE_vs_SYSTEM` with `_ci` for every baseline, the published ratios beside, and the ablations."""
    figures: dict[str, Any] = {}
    for system in comparison.bests:
        if system == "wisp":
            continue
        interval = comparison.ratio(figure, system)
        key = f"{figure}_vs_{system.replace('-', '_')}"
        figures[key] = interval.mean if interval else None
        figures[f"{key}_ci"] = [interval.low, interval.high] if interval else None
    for system, pair in PUBLISHED.items():
        if system in comparison.bests:
            reached = figures[f"{figure}_vs_{system}"]
            asked = pair[0 if figure == "capacity" else 1]
            figures[f"{figure}_vs_{system}_published"] = asked
            figures[f"{figure}_vs_{system}_reaches_published"] = None if reached is None else reached >= asked
    ratio, best = comparison.against_best_other(figure)
    return figures | {f"{figure}_vs_best_other": ratio, f"{figure}_best_other": best}


def summary_rows(comparison: Comparison) -> list[list[Any]]:
    """A row per system: capacity and peak with intervals, settings, WDT share and interference at capacity."""
    rows = []
    for system, bests in comparison.bests.items():
        first, shown = bests[0], bests[0].capacity_figures or bests[0].peak_figures
        peak_shown = [str(mean_interval(comparison.goodputs(system))), first.peak_devices, first.peak_setting]
        rows.append([
            system, str(mean_interval(comparison.capacities(system))), first.capacity_setting,
            *(peak_shown if first.has_peak else [None] * 3),
            shown.get("acceptance_rate") or None, shown.get("wdt_share") or None,  # 0: nothing was drafted
            tight_interference_ms(shown),
            shown.get("mean_pass_ms"), shown.get("busy_share"),
        ])  # fmt: skip
    return rows


SUMMARY_COLUMNS = (
    "system", "capacity", "held by", "peak goodput, tok/s", "devices", "reached by", "acceptance", "WDT share",
    "interference, ms", "pass, ms", "busy",
)  # fmt: skip


def chosen_kinds(names: Sequence[str], kinds: Sequence[Kind]) -> list[Kind]:
    """Kinds by name, those of `kinds` with their settings, others as in `systems`; `wisp` always, and last."""
    own = {kind.name: kind for kind in kinds}
    return [own.get(name, SYSTEMS[name]) for name in names if name != "wisp"] + [SYSTEMS["wisp"]]
