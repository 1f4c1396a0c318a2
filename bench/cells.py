"""Cells of the comparison: an SLO, devices, a link, a draft and a profile; and the default mix of the headline."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from bench.gpu_cost import unloaded_pass_s
from bench.gpu_profile import DEFAULT, draft_step_on, find_profile, kv_tokens
from bench.scenario import Scenario
from bench.trace_walk import WalkOf
from bench.workload import CLASSES, DeviceKind, SloClass, Throttling, Workload

MIX_SPEEDS = (30.0, 60.0, 120.0)
# Draft speeds (tokens/s) of the devices of a cell, dealt in equal shares.
SPEEDS = {"slow": (8.0, 30.0), "mixed": MIX_SPEEDS, "fast": (60.0, 120.0)}
DRAFTS = ("int4", "mixed48", "int8")  # plain 4-bit, better 4-bit, 8-bit: acceptance of their traces rises
# Sessions of the mix are shorter, those at a tpot of 4 passes take 36 s. Looser SLOs hardly make them any longer.
_USUAL_SESSION_S, _MOST_STRETCH = 24.0, 3.0
FULL_AXES: tuple[Sequence[Any], ...] = ((1.05, 1.1, 1.5, 2.0, 4.0), tuple(SPEEDS), (5.0, 20.0, 100.0), DRAFTS)
REDUCED_AXES: tuple[Sequence[Any], ...] = ((1.1, 1.5, 4.0), ("slow", "fast"), (20.0,), ("mixed48", "int8"))


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell. `tpot_passes` 0: three classes at 1.1, 1.5 and 2.5 unloaded passes. RTTs in ms (lowest, highest).

    `prefill_factor`: a device reads its prompt so many times as fast as it drafts, and only then begins to; 0: in no
    time.
    """

    tpot_passes: float
    speeds: str
    rtt_ms: tuple[float, float]
    draft: str
    profile: str = DEFAULT
    prefill_factor: float = 0.0

    @property
    def name(self) -> str:
        """Unique, for a person and for files that go on."""
        slo = f"tpot {self.tpot_passes:g}" if self.tpot_passes else "three classes"
        low, high = self.rtt_ms
        rtt = f"{low:g}" if low == high else f"{low:g}-{high:g}"
        reading = f", prompts read at {self.prefill_factor:g} times draft speed" if self.prefill_factor else ""
        return f"{slo}, {self.speeds} devices, RTT {rtt} ms, {self.draft}, {self.profile}{reading}"

    def scenario(self, timing: Timing, seed: int) -> Scenario:
        """The cell's scenario, without a system and with few devices."""
        costs = find_profile(self.profile).costs
        classes = (SloClass(f"x{self.tpot_passes:g}", self.tpot_passes),) if self.tpot_passes else CLASSES
        workload = Workload(
            rtt_s=(self.rtt_ms[0] / 1e3, self.rtt_ms[1] / 1e3),
            jitter_s=0.05 * sum(self.rtt_ms) / 2e3,
            classes=classes,
            unloaded_pass_s=unloaded_pass_s(costs),
            kinds=tuple(DeviceKind(speed) for speed in SPEEDS[self.speeds]),
            throttling=Throttling(),
            think_s=timing.think_s,
            seed=seed,
        )
        timing = timing.suited_to(workload.mean_session_s)
        return Scenario(
            replace(workload, stagger_s=timing.warm_up_s),
            tokens=WalkOf(self.draft, seed),
            duration_s=timing.duration_s,
            warm_up_s=timing.warm_up_s,
            costs=costs,
            draft_step=draft_step_on(self.profile, costs.norm),
            noise_sigma=0.03,
            kv_tokens=kv_tokens(),
            prefill_factor=self.prefill_factor,
            seed=seed,
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "name": self.name}


@dataclass(frozen=True, slots=True)
class Timing:
    """Length of a run, its warm-up (over which devices start), and the mean pause of a user between sessions.

    How closely a search looks: `resolution` of a capacity (or one device), and the factors on the number of devices by
    which it climbs to the peak of goodput. `suits`: runs are made longer for sessions longer than usual; not those that
    only show that all works.
    """

    duration_s: float = 36.0
    warm_up_s: float = 12.0
    think_s: float = 2.0
    resolution: float = 0.03
    climbs: tuple[float, ...] = (1.4, 1.12)
    suits: bool = True

    @property
    def looks_around(self) -> bool:
        """Whether a search looks beside the hill that it climbs, and at every setting where single sessions decide: not
        in runs that only show that all works."""
        return self.suits

    def suited_to(self, session_s: float) -> Timing:
        """Runs and warm-ups longer by as much as such sessions are longer than usual ones, so that a run sees KV memory
        as full as it gets."""
        stretch = min(max(1.0, session_s / _USUAL_SESSION_S), _MOST_STRETCH) if self.suits else 1.0
        return replace(self, duration_s=stretch * self.duration_s, warm_up_s=stretch * self.warm_up_s)

    def closer(self) -> Timing:
        """The same runs, searched in smaller steps; those that only show that all works stay as they are."""
        return replace(self, resolution=min(self.resolution, 0.03), climbs=(1.25, 1.1)) if self.suits else self


MEDIUM = Timing(resolution=0.06, climbs=(1.25,))
QUICK = Timing(16.0, 6.0, resolution=0.06, climbs=(1.25,), suits=False)
SHORT = Timing(12.0, 4.0, resolution=0.1, climbs=(1.4,), suits=False)
MIX = Cell(0.0, "mixed", (10.0, 40.0), "mixed48")


def cells(axes: Sequence[Sequence[Any]], profile: str = DEFAULT) -> Iterator[Cell]:
    """All cells of the axes SLO x speed x RTT x draft."""
    for tpot_passes, speeds, rtt_ms, draft in itertools.product(*axes):
        yield Cell(tpot_passes, speeds, (rtt_ms, rtt_ms), draft, profile)


def corners_first(wanted: Sequence[Cell]) -> list[Cell]:
    """The corners of the axes, then what lies between them: who is stopped on the way has seen the extremes."""
    places = {cell: (cell.tpot_passes, cell.speeds, cell.rtt_ms, cell.draft) for cell in wanted}
    axes = [list(dict.fromkeys(axis)) for axis in zip(*places.values(), strict=True)]

    def depth(cell: Cell) -> int:
        indices = [(axis.index(at), len(axis)) for axis, at in zip(axes, places[cell], strict=True)]
        return sum(min(index, length - 1 - index) for index, length in indices)

    return sorted(wanted, key=depth)
