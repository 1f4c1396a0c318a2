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

from collections.abc import Callable
from dataclasses import dataclass

from bench.best import ATTAINMENT, Best, Figures
from bench.bisection import most_that_hold
from bench.cells import Cell, Timing
from bench.settings import Kind, Setting
from bench.simulator import simulate
from wisp_plugin.errors import ConfigError

Measure = Callable[[Setting, int], Figures]
MOST_DEVICES = 1024
_GAIN = 1.003  # a step that brings less is none
# Of the devices of the most goodput so far: where else a peak may be.
_FAR, _FEWER, _AROUND = 2.0, 0.75, (0.7, 0.85, 1.2, 1.4)
_FEW_DEVICES = 8  # their sessions in a run are fewer than the twenty that a share of 0.95 needs
HOW = (ATTAINMENT, MOST_DEVICES, _GAIN, _FAR, _FEWER, *_AROUND, _FEW_DEVICES)  # all that decides beside a `Timing`


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
        self._climbed: set[Setting] = set()  # in another search, of which only the best is known

    def run(self, setting: Setting, num_devices: int) -> Figures:
        """The figures of a run."""
        key = (setting, num_devices)
        if key not in self.runs:
            self.runs[key] = self._measure(setting, num_devices)
        return self.runs[key]

    def figures(self, setting: Setting, num_devices: int) -> Figures:
        """Those of a run that was made or is known; none if it was not."""
        return self.runs.get((setting, num_devices), {})

    def tried(self) -> list[tuple[str, int, float, float]]:
        """Setting, devices, attainment and goodput of every run."""
        made = [(key, found) for key, found in self.runs.items() if key[0] not in self._climbed]
        return [(str(setting), n, found["attainment"], found["goodput"]) for (setting, n), found in made]

    def holds(self, setting: Setting, num_devices: int) -> bool:
        """Whether enough sessions meet their SLO."""
        return self.run(setting, num_devices)["attainment"] >= ATTAINMENT

    def capacity(self, kind: Kind) -> tuple[int, Setting]:
        """The most devices that any setting holds (0: not even one), and that setting."""
        best = kind.settings[0]
        most = self._bisect(best, 0, self._first)
        return self._hold_more(kind, most, best, list(kind.settings[1:]) or kind.neighbours(best))

    def capacity_behind(self, known: Best, kind: Kind) -> tuple[int, Setting]:
        """The same, where all settings but the last have come to `known`; `peak` goes on from there too."""
        *before, last = kind.settings
        by_name = {str(setting): setting for setting in before}
        self.runs[by_name[known.peak_setting], max(1, known.peak_devices)] = known.peak_figures
        self._climbed.update(before)
        return self._hold_more(kind, known.capacity, by_name[known.capacity_setting], [last])

    def _hold_more(self, kind: Kind, most: int, best: Setting, waiting: list[Setting]) -> tuple[int, Setting]:
        tried = {best}
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
        for factor in _AROUND if self._looks_around and leading not in self._climbed else ():
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
        if setting in self._climbed:
            return
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
    that of the devices that were run: none is looked for. `known`: what all settings but the last have come to, so that
    only the last is tried."""

    cell: Cell
    kind: Kind
    timing: Timing
    seed: int = 0
    first: int = 24
    wants_peak: bool = True
    wants_capacity: bool = True
    known: Best | None = None


def find_best(question: Question) -> Best:
    """The best of a system in a cell."""
    kind = question.kind
    measure = measure_in(question.cell, question.timing, question.seed)
    several_classes = question.cell.tpot_passes == 0
    search = Search(measure, question.first, timing=question.timing, looks_far=several_classes)
    if question.known:
        capacity, setting = search.capacity_behind(question.known, kind)
        kind = kind.only(kind.settings[-1])
    elif question.wants_capacity:
        capacity, setting = search.capacity(kind)
    else:
        setting = kind.settings[0]
        capacity = question.first if search.holds(setting, question.first) else 0
    held = search.figures(setting, capacity)
    num_devices, peak_setting = search.peak(kind) if question.wants_peak else (capacity, setting)
    peak = search.figures(peak_setting, num_devices)
    return Best(kind.name, capacity, str(setting), held, peak.get("goodput", 0.0), num_devices, str(peak_setting), peak,
                search.tried(), question.wants_peak)  # fmt: skip
