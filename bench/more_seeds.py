"""A system that was tuned on one seed, on others, with what was best there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from bench.best import Best
from bench.cells import Cell, Timing
from bench.lab import Lab
from bench.search import Question, find_best
from bench.settings import Kind, reachable


def on_seeds(
    lab: Lab, cell: Cell, kinds: Sequence[Kind], tuned: Mapping[str, Best], timing: Timing, seeds: Sequence[int]
) -> dict[str, list[Best]]:
    """Capacity and peak of every system on these seeds, with the settings that were `tuned` on another one."""
    asked = [(kind.name, _at_best(cell, kind, tuned[kind.name], timing, seed)) for seed in seeds for kind in kinds]
    questions = [question for _, own in asked for question in own]
    answers = iter(lab.map("seeds", find_best, questions, note=str)) if questions else iter(())
    bests: dict[str, list[Best]] = {kind.name: [] for kind in kinds}
    for name, own in asked:
        bests[name].append(_joined([next(answers) for _ in own]))
    return bests


def on_seed(cell: Cell, kind: Kind, tuned: Best, timing: Timing, seed: int) -> Best:
    """Capacity and peak of one system on one seed, with the settings that were `tuned` on another one."""
    return _joined([find_best(question) for question in _at_best(cell, kind, tuned, timing, seed)])


def _at_best(cell: Cell, kind: Kind, best: Best, timing: Timing, seed: int) -> list[Question]:
    """One question, or two if capacity and peak have different settings. What holds nobody may still have a peak: it
    is looked for from where it was before."""
    by_name = reachable(kind.settings)
    holder, leader = by_name[best.capacity_setting], by_name[best.peak_setting]
    held = Question(cell, kind.only(holder), timing, seed, max(1, best.capacity), wants_peak=False)
    peak = Question(cell, kind.only(leader), timing, seed, max(1, best.peak_devices))
    return [peak] if holder == leader else [held, peak]


def _joined(parts: Sequence[Best]) -> Best:
    holder, leader = parts[0], parts[-1]
    if holder is leader:
        return holder
    return replace(holder.with_peak_of(leader), runs=holder.runs + leader.runs)
