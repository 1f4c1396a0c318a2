"""The best settings of a system, after a sweep of all on one seed, run closely on every seed.

A sweep takes steps of a quarter in the number of devices, and luck with its seed may decide between settings that are
alike: what it gives are the finalists, those that come within a few percent of the best. Each is searched in small
steps on every seed, and the best one by the mean over the seeds is what the system is credited with, one for capacity
and one for the peak of goodput. The same for all systems, WISP among them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from bench.cells import Cell, Timing
from bench.scheduler_systems import Lab
from bench.search import ATTAINMENT, Best, Question, find_best
from bench.systems import Kind, Setting, reachable

MOST = 2  # for capacity, and for the peak
CLOSE_CAPACITY, CLOSE_PEAK = 0.9, 0.97


@dataclass(frozen=True, slots=True)
class Asked:
    """A system in a cell, and its best of the sweep."""

    cell: Cell
    kind: Kind
    swept: Best


def finalists_of(kind: Kind, swept: Best) -> dict[Setting, int]:
    """At most twice `MOST` settings, the best ones first, each with the devices that its search begins with."""
    by_name = reachable(kind.settings)
    held, peaks = dict[str, tuple[float, int]](), dict[str, tuple[float, int]]()
    for name, num_devices, attainment, goodput in swept.runs:
        # A run that just fails tells of nearly as many devices as one that holds.
        held[name] = max(held.get(name, (0.0, 0)), (num_devices * min(1.0, attainment / ATTAINMENT), num_devices))
        peaks[name] = max(peaks.get(name, (0.0, 0)), (goodput, num_devices))
    first = {swept.capacity_setting: max(1, swept.capacity)}
    # With so few devices that hold, every setting was bisected, and a run far beyond tells nothing.
    for name in _close(held, CLOSE_CAPACITY * swept.capacity) if swept.capacity > 1 else ():
        first.setdefault(name, max(1, swept.capacity))
    if swept.has_peak:
        first.setdefault(swept.peak_setting, swept.peak_devices)
        for name in _close(peaks, CLOSE_PEAK * swept.peak_goodput):
            first.setdefault(name, peaks[name][1])
    return {by_name[name]: num_devices for name, num_devices in first.items()}


def _close(scores: Mapping[str, tuple[float, int]], least: float) -> list[str]:
    """The best `MOST` of those with a score of at least `least`."""
    ordered = sorted(scores, key=lambda name: scores[name][0], reverse=True)
    return [name for name in ordered if scores[name][0] >= least][:MOST]


def run_finals(
    lab: Lab, asked: Sequence[Asked], timing: Timing, seeds: Sequence[int], wants_peak: bool
) -> list[list[Best]]:
    """For each asked its best on every seed, all with the settings that are best by the mean."""
    entries = [list(finalists_of(one.kind, one.swept).items()) for one in asked]
    questions = [
        Question(one.cell, one.kind.only(setting), timing.closer(), seed, first, wants_peak)
        for one, own in zip(asked, entries, strict=True) for setting, first in own for seed in seeds
    ]  # fmt: skip
    answers = iter(lab.map("finals", find_best, questions, note=str))
    results = []
    for one, own in zip(asked, entries, strict=True):
        by_setting = [[next(answers) for _ in seeds] for _ in own]
        results.append(_credited(one.swept, by_setting))
    return results


def _credited(swept: Best, by_setting: Sequence[Sequence[Best]]) -> list[Best]:
    """Per seed the capacity and the peak of the settings that are best by the mean; the runs of the sweep are kept with
    those of the first seed."""
    holders = max(by_setting, key=lambda bests: sum(best.capacity for best in bests))
    leaders = max(by_setting, key=lambda bests: sum(best.peak_goodput for best in bests)) if swept.has_peak else holders
    joined = [
        holder.with_peak_of(leader) if swept.has_peak else holder
        for holder, leader in zip(holders, leaders, strict=True)
    ]
    of_first = [run for bests in by_setting for run in bests[0].runs]
    return [replace(joined[0], runs=[*swept.runs, *of_first]), *joined[1:]]
