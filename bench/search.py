"""A system at its best in one cell: its capacity and its peak goodput, over its settings and numbers of devices.

Capacity: the usual setting is bisected first. Any other setting has to hold more devices than the best so far, which
one run tells; only if it does is it followed upwards. So every setting of the sweep is tried, and few runs are long
ones. Then the neighbours of the best one, until none holds more. While the best holds so few devices that single
sessions decide, every setting is bisected for itself (*).

Peak goodput: every setting is tried at the number of devices that gave the most so far, with as many as it has KV
memory for (if that differs), with fewer, as what drafts more may do best there (*), and, among several classes, with
twice as many (what gives up a class may); the best one with fewer and more too, as the hill is a bumpy one (*), and it
climbs from there, up or down, first in large steps, then in small ones; again its neighbours follow.

(*) Not in short runs, see `Timing.looks_around`.
Attainment is taken to fall with the number of devices. Runs are random in their sessions, so all this holds to a few
percent with one seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from bench.bisection import most_that_hold
from bench.cells import Cell, Timing
from bench.simulator import simulate
from bench.systems import Kind, Setting
from wisp_plugin.errors import ConfigError

Figures = dict[str, float]
Measure = Callable[[Setting, int], Figures]
ATTAINMENT = 0.95
MOST_DEVICES = 1024
_GAIN = 1.003  # a step that brings less is none
# Of the devices of the most goodput so far: where else a peak may be.
_FAR, _FEWER, _AROUND = 2.0, 0.75, (0.7, 0.85, 1.2, 1.4)
_FEW_DEVICES = 8  # their sessions in a run are fewer than the twenty that a share of 0.95 needs
HOW = (ATTAINMENT, MOST_DEVICES, _GAIN, _FAR, _FEWER, *_AROUND, _FEW_DEVICES)  # all that decides beside a `Timing`


@dataclass(frozen=True, slots=True)
class Best:
    """A system in a cell: capacity and peak goodput, each with its setting, devices and all figures of that run.

    Without `has_peak` no peak was looked for, and what stands for it is the run at capacity.
    """

    system: str
    capacity: int
    capacity_setting: str
    capacity_figures: Figures
    peak_goodput: float
    peak_devices: int
    peak_setting: str
    peak_figures: Figures
    runs: list[tuple[str, int, float, float]]  # setting, devices, attainment, goodput: all that was tried
    has_peak: bool = True

    def __str__(self) -> str:
        peak = f", {self.peak_goodput:.0f} tok/s at {self.peak_devices} ({self.peak_setting})" if self.has_peak else ""
        return f"{self.system}: {self.capacity} devices ({self.capacity_setting}){peak}"

    def with_peak_of(self, other: Best) -> Best:
        """This capacity and the peak of `other`."""
        return replace(
            self, peak_goodput=other.peak_goodput, peak_devices=other.peak_devices, peak_setting=other.peak_setting,
            peak_figures=other.peak_figures,
        )  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def tight_interference_ms(figures: Figures) -> float | None:
    """Mean interference in the tightest class, of the figures of a run."""
    return next((value for name, value in figures.items() if name.startswith("interference_ms_")), None)


class Search:
    """Runs of one system in one cell; no run is made twice."""

    def __init__(
        self, measure: Measure, first: int, most: int | None = None, timing: Timing | None = None,
        looks_far: bool = True,
    ) -> None:  # fmt: skip
        """`first`: number of devices to begin with; `most`: no more are tried (None: MOST_DEVICES). `looks_far`: for
        peaks at twice as many, where a system has given up some of its sessions."""
        timing = timing or Timing()
        self._looks_far, self._looks_around = looks_far, timing.looks_around
        self._resolution, self._climbs = timing.resolution, timing.climbs
        self._most = MOST_DEVICES if most is None else most
        self._measure, self._first = measure, min(max(1, first), self._most)
        self.runs: dict[tuple[Setting, int], Figures] = {}

    def run(self, setting: Setting, num_devices: int) -> Figures:
        """The figures of a run."""
        key = (setting, num_devices)
        if key not in self.runs:
            self.runs[key] = self._measure(setting, num_devices)
        return self.runs[key]

    def holds(self, setting: Setting, num_devices: int) -> bool:
        """Whether enough sessions meet their SLO."""
        return self.run(setting, num_devices)["attainment"] >= ATTAINMENT

    def capacity(self, kind: Kind) -> tuple[int, Setting]:
        """The most devices that any setting holds (0: not even one), and that setting."""
        best = kind.settings[0]
        most = self._bisect(best, 0, self._first)
        tried, waiting = {best}, list(kind.settings[1:]) or kind.neighbours(best)
        while waiting:
            setting = waiting.pop(0)
            tried.add(setting)
            held = self._more_than(most, setting)
            if held > most:
                best, most = setting, held
            if not waiting:
                waiting = [following for following in kind.neighbours(best) if following not in tried]
        return most, best

    def _more_than(self, most: int, setting: Setting) -> int:
        """The most devices of a setting, or anything up to `most` if it holds no more than those."""
        if most < _FEW_DEVICES and self._looks_around:
            return self._bisect(setting, 0, self._leader()[1])
        above = most + max(1, round(self._resolution * most))
        holds_more = above <= self._most and self.holds(setting, above)
        return self._bisect(setting, above, round(1.25 * above) + 1) if holds_more else 0

    def _bisect(self, setting: Setting, good: int, probe: int) -> int:
        """The most devices of a setting that holds `good`; the first question is `probe`."""
        return most_that_hold(lambda n: self.holds(setting, n), good, probe, self._most, self._resolution)

    def peak(self, kind: Kind) -> tuple[int, Setting]:
        """Devices and setting of the most goodput. Call it behind `capacity`."""
        for setting in kind.settings:
            self.run(setting, self._leader()[1])
        leading, at = self._leader()
        for setting in kind.settings:  # as many devices as its KV memory has room for, by that of the leader
            self.run(setting, self._scaled(at, setting.kv_share / leading.kv_share))
        at = self._leader()[1]
        for factor in (_FEWER,) * self._looks_around + (_FAR,) * self._looks_far:
            for setting in kind.settings:
                self.run(setting, self._scaled(at, factor))
        leading, at = self._leader()
        for factor in _AROUND if self._looks_around else ():
            self.run(leading, self._scaled(at, factor))
        for factor in self._climbs:
            self._climb(factor)
        for setting in kind.settings if len(self._climbs) > 1 else ():  # the peak has moved: once more
            self.run(setting, self._leader()[1])
        self._climb_settings(kind)
        setting, num_devices = self._leader()
        return num_devices, setting

    def _climb_settings(self, kind: Kind) -> None:
        """From the setting of the leader to better ones next to it, each with the number of devices that suits it."""
        tried: set[Setting] = set()
        while (leading := self._leader()[0]) not in tried:
            tried.add(leading)
            for setting in kind.neighbours(leading):
                self.run(setting, self._leader()[1])
            if self._leader()[0] != leading:
                self._climb(self._climbs[-1])

    def _scaled(self, num_devices: int, factor: float) -> int:
        return min(max(1, round(factor * num_devices)), self._most)

    def _leader(self) -> tuple[Setting, int]:
        return max(self.runs, key=lambda key: self.runs[key]["goodput"])

    def _climb(self, factor: float) -> None:
        setting, at = self._leader()
        for direction in (factor, 1.0 / factor):
            while True:
                further = round(at * direction)
                following = max(at + 1, further) if direction > 1.0 else max(1, further)
                if following == at or following > self._most:
                    break
                before = self.run(setting, at)["goodput"]
                if not self.run(setting, following)["goodput"] > _GAIN * before:
                    break
                at = following


def measure_in(cell: Cell, timing: Timing, seed: int) -> Measure:
    """Runs of one seed in a cell."""
    base = cell.scenario(timing, seed)

    def measure(setting: Setting, num_devices: int) -> Figures:
        figures = simulate(setting.serve(base, cell.draft).with_devices(num_devices)).figures()
        if not figures["sessions"]:
            raise ConfigError(f"{cell.name}: a run of {base.duration_s:g} s has no session to judge with {num_devices} "
                              "devices; profiles with passes as long as these need longer runs")  # fmt: skip
        return figures

    return measure


@dataclass(frozen=True, slots=True)
class Question:
    """What `find_best` is asked; can be sent to another process. Without `wants_capacity` the one that is told is
    that of the devices that were run: none is looked for."""

    cell: Cell
    kind: Kind
    timing: Timing
    seed: int = 0
    first: int = 24
    wants_peak: bool = True
    wants_capacity: bool = True


def find_best(question: Question) -> Best:
    """The best of a system in a cell."""
    kind = question.kind
    measure = measure_in(question.cell, question.timing, question.seed)
    several_classes = question.cell.tpot_passes == 0
    search = Search(measure, question.first, timing=question.timing, looks_far=several_classes)
    if question.wants_capacity:
        capacity, setting = search.capacity(kind)
    else:
        setting = kind.settings[0]
        capacity = question.first if search.holds(setting, question.first) else 0
    held = search.runs.get((setting, capacity), {})
    num_devices, peak_setting = search.peak(kind) if question.wants_peak else (capacity, setting)
    peak = search.runs.get((peak_setting, num_devices), {})
    runs = [(str(s), n, f["attainment"], f["goodput"]) for (s, n), f in search.runs.items()]
    return Best(kind.name, capacity, str(setting), held, peak.get("goodput", 0.0), num_devices, str(peak_setting), peak,
                runs, question.wants_peak)  # fmt: skip


def best_of(bests: Sequence[Best]) -> Best:
    """One system of which parts of the settings were searched apart: the first of the highest capacity and peak."""
    holder, leader = max(bests, key=lambda best: best.capacity), max(bests, key=lambda best: best.peak_goodput)
    return replace(holder.with_peak_of(leader), runs=[run for best in bests for run in best.runs])
