"""All systems in one cell: each tuned on the first seed, then run at its best on every seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bench.cells import Cell, Timing
from bench.intervals import Interval, mean_interval, ratio_interval
from bench.scheduler_systems import Lab
from bench.search import Best, Question, best_of, find_best, tight_interference_ms
from bench.systems import BASELINES, SYSTEMS, Kind, reachable

PUBLISHED = {"centralized": (2.1, 1.94), "sled": (4.1, 3.7)}  # capacity and goodput of the paper's best case
_FIRST_DEVICES = 32  # where a search begins


@dataclass(frozen=True, slots=True)
class Comparison:
    """Bests by system, one per seed (the first one has the sweep)."""

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
    """Tune every system on the first seed, then find its capacity and peak on the others with what was best.

    `together`: settings of a system that are swept one after the other, parts beside each other; 0: all.
    """
    tuned = _tuned(lab, cell, kinds, timing, seeds[0], wants_peak, together)
    others = on_seeds(lab, cell, kinds, tuned, timing, seeds[1:], wants_peak)
    return Comparison(cell, {name: [best, *others[name]] for name, best in tuned.items()})


def _tuned(
    lab: Lab, cell: Cell, kinds: Sequence[Kind], timing: Timing, seed: int, wants_peak: bool, together: int
) -> dict[str, Best]:
    """The best of every system over all its settings."""
    parts = [kind.parts(together) for kind in kinds]
    swept = [Question(cell, part, timing, seed, _FIRST_DEVICES, wants_peak) for kind in parts for part in kind]
    # The last system is ours and takes longest: begun first, it is not waited for alone.
    answered = reversed(lab.map("sweep", find_best, swept[::-1], note=str))
    return {kind.name: best_of([next(answered) for _ in own]) for kind, own in zip(kinds, parts, strict=True)}


def on_seeds(
    lab: Lab, cell: Cell, kinds: Sequence[Kind], tuned: Mapping[str, Best], timing: Timing, seeds: Sequence[int],
    wants_peak: bool = True,
) -> dict[str, list[Best]]:  # fmt: skip
    """Capacity and peak of every system on these seeds, with the settings that were `tuned` on another one."""
    asked = [(kind.name, _at_best(cell, kind, tuned[kind.name], timing, seed, wants_peak))
             for seed in seeds for kind in kinds]  # fmt: skip
    questions = [question for _, own in asked for question in own]
    answers = iter(lab.map("seeds", find_best, questions, note=str)) if questions else iter(())
    bests: dict[str, list[Best]] = {kind.name: [] for kind in kinds}
    for name, own in asked:
        bests[name].append(_joined([next(answers) for _ in own]))
    return bests


def on_seed(cell: Cell, kind: Kind, tuned: Best, timing: Timing, seed: int) -> Best:
    """Capacity and peak of one system on one seed, with the settings that were `tuned` on another one."""
    return _joined([find_best(question) for question in _at_best(cell, kind, tuned, timing, seed, wants_peak=True)])


def _at_best(cell: Cell, kind: Kind, best: Best, timing: Timing, seed: int, wants_peak: bool) -> list[Question]:
    """One question, or two if capacity and peak have different settings. What holds nobody may still have a peak: it
    is looked for from where it was before."""
    by_name = reachable(kind.settings)
    holder, leader = by_name[best.capacity_setting], by_name[best.peak_setting]
    held = Question(cell, kind.only(holder), timing, seed, max(1, best.capacity), wants_peak=False)
    if not wants_peak:
        return [held]
    peak = Question(cell, kind.only(leader), timing, seed, max(1, best.peak_devices))
    return [peak] if holder == leader else [held, peak]


def _joined(parts: Sequence[Best]) -> Best:
    holder, leader = parts[0], parts[-1]
    if holder is leader:
        return holder
    return replace(holder.with_peak_of(leader), runs=holder.runs + leader.runs)


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
            shown.get("acceptance_rate"), shown.get("wdt_share"), tight_interference_ms(shown),
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
