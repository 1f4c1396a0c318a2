"""The best settings of a system, after a sweep of all on one seed, run closely on every seed.

A sweep takes steps of a quarter in the number of devices, and luck with its seed may decide between settings that are
alike: what it gives are the finalists, those that come within a few percent of the best. Each is searched in small
steps on every seed, and the best one by the mean over the seeds is what the system is credited with, one for capacity
and one for the peak of goodput. The same for all systems, WISP among them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from bench.best import ATTAINMENT, Best
from bench.cells import Cell, Timing
from bench.lab import Lab
from bench.search import Question, find_best
from bench.settings import Kind, Setting, reachable

MOST = 2  # for capacity, and as many for the peak
CLOSE_CAPACITY, CLOSE_PEAK = 0.9, 0.97
_JUST_FAILS = 0.9  # an attainment


@dataclass(frozen=True, slots=True)
class Asked:
    """A system in a cell, and its best of the sweep."""

    cell: Cell
    kind: Kind
    swept: Best


@dataclass(frozen=True, slots=True)
class Finalist:
    """A setting, the devices that a search of it begins with, and what is asked of it."""

    setting: Setting
    first: int
    for_capacity: bool
    for_peak: bool


def finalists_of(kind: Kind, swept: Best) -> list[Finalist]:
    """At most `MOST` for capacity and as many for the peak; what has won the sweep is always among them."""
    held, peaks = dict[str, tuple[float, int]](), dict[str, tuple[float, int]]()
    for name, num_devices, attainment, goodput in swept.runs:
        if attainment >= _JUST_FAILS:  # such a run tells of nearly as many devices as one that holds
            held[name] = max(held.get(name, (0.0, 0)), (num_devices * min(1.0, attainment / ATTAINMENT), num_devices))
        peaks[name] = max(peaks.get(name, (0.0, 0)), (goodput, num_devices))
    holders = list(dict.fromkeys([swept.capacity_setting, *_close(held, CLOSE_CAPACITY * swept.capacity)]))[:MOST]
    leaders: list[str] = []
    if swept.has_peak:
        leaders = list(dict.fromkeys([swept.peak_setting, *_close(peaks, CLOSE_PEAK * swept.peak_goodput)]))[:MOST]
    # A hill of goodput is a bumpy one: who is to climb it begins where the peak was, whatever else is asked of it.
    first = {name: max(1, peaks[name][1] if name in leaders else swept.capacity) for name in (*holders, *leaders)}
    by_name = reachable(kind.settings)
    return [Finalist(by_name[name], at, name in holders, name in leaders) for name, at in first.items()]


def _close(scores: Mapping[str, tuple[float, int]], least: float) -> list[str]:
    """Those with a score of at least `least`, the best first."""
    ordered = sorted(scores, key=lambda name: scores[name][0], reverse=True)
    return [name for name in ordered if scores[name][0] >= least]


def run_finals(lab: Lab, asked: Sequence[Asked], timing: Timing, seeds: Sequence[int]) -> list[list[Best]]:
    """For each asked its best on every seed, all with the settings that are best by the mean."""
    entries = [finalists_of(one.kind, one.swept) for one in asked]
    questions = [
        Question(one.cell, one.kind.only(own.setting), timing.closer(), seed, own.first, own.for_peak, own.for_capacity)
        for one, finalists in zip(asked, entries, strict=True) for own in finalists for seed in seeds
    ]  # fmt: skip
    answers = iter(lab.map("finals", find_best, questions, note=str))
    results = []
    for one, finalists in zip(asked, entries, strict=True):
        found = [(own, [next(answers) for _ in seeds]) for own in finalists]
        results.append(_credited(one.swept, found))
    return results


def _credited(swept: Best, found: Sequence[tuple[Finalist, list[Best]]]) -> list[Best]:
    """Per seed the capacity and the peak of the settings that are best by the mean; the runs of the sweep are kept with
    those of the first seed."""
    holders = max((own for f, own in found if f.for_capacity), key=lambda own: sum(best.capacity for best in own))
    joined = holders
    if swept.has_peak:
        leaders = max((own for f, own in found if f.for_peak), key=lambda own: sum(best.peak_goodput for best in own))
        joined = [replace(holder, has_peak=True).with_peak_of(leader)
                  for holder, leader in zip(holders, leaders, strict=True)]  # fmt: skip
    of_first = [run for _, own in found for run in own[0].runs]
    return [replace(joined[0], runs=[*swept.runs, *of_first]), *joined[1:]]
