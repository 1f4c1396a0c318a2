"""What a matrix is made of: parts, each a system in a cell, and results, which are the whole cells.

`key_of` tells parts that were asked alike: what it leaves out does not change them. A system does not see everything of
a cell, so parts stand for several cells (`same_to`).
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace

from bench.best import Best, tight_interference_ms
from bench.cells import DRAFTS, MIX, Cell, Timing
from bench.gpu_profile import DEFAULT, draft_step_on
from bench.report import commit
from bench.search import HOW
from bench.settings import CHUNKS, LENGTHS, Kind, reachable
from bench.traces_folder import trace_path
from wisp_plugin.errors import ConfigError
from wisp_plugin.wisp_parameters import WispParameters


@dataclass(frozen=True, slots=True)
class Part:
    """A system in a cell, finished: capacity and goodput by seed, and for the first seed the settings of both, the
    devices of the peak, and WDT and interference there (None: nobody noted them)."""

    cell: Cell
    system: str
    capacity: list[float]
    goodput: list[float]
    settings: tuple[str, str]
    made_by: str = field(default_factory=lambda: commit(), compare=False)  # a commit, or several
    peak_devices: int | None = None
    wdt_share: float | None = None
    interference_ms: float | None = None

    @classmethod
    def of(cls, cell: Cell, bests: Sequence[Best]) -> Part:
        """From what a comparison found of a system, by seed."""
        first = bests[0]
        return cls(
            cell, first.system, [float(best.capacity) for best in bests], [best.peak_goodput for best in bests],
            (first.capacity_setting, first.peak_setting), peak_devices=first.peak_devices,
            wdt_share=first.peak_figures.get("wdt_share"), interference_ms=tight_interference_ms(first.peak_figures),
        )  # fmt: skip

    def best(self) -> Best:
        """What was found on the first seed, with no other figures than a part has."""
        capacity, (holder, leader) = int(self.capacity[0]), self.settings
        devices = capacity if self.peak_devices is None else self.peak_devices
        noted = {"goodput": self.goodput[0], "wdt_share": self.wdt_share, "interference_ms_": self.interference_ms}
        figures = {name: value for name, value in noted.items() if value is not None}
        return Best(self.system, capacity, holder, {}, self.goodput[0], devices, leader, figures, [])

    def and_more(self, bests: Sequence[Best]) -> Part:
        """The same with more seeds."""
        more = Part.of(self.cell, bests).made_behind(self)
        return replace(
            self, capacity=self.capacity + more.capacity, goodput=self.goodput + more.goodput, made_by=more.made_by
        )

    def made_behind(self, other: Part) -> Part:
        """The same, made by the commit of `other` too."""
        makers = [*other.made_by.split(", "), *self.made_by.split(", ")]
        return replace(self, made_by=", ".join(dict.fromkeys(makers)))

    def goes_on_from(self, other: Part) -> bool:
        """True if this is `other` with more seeds."""
        num_seeds = len(other.capacity)
        same = (self.capacity[:num_seeds], self.goodput[:num_seeds]) == (other.capacity, other.goodput)
        return same and len(self.capacity) > num_seeds and self.settings == other.settings


Parts = dict[tuple[Cell, str], Part]


@dataclass(frozen=True, slots=True)
class CellResult:
    """A finished cell: capacity and goodput by system and seed; by system for the first seed the settings of both, and
    WDT and interference at the peak of goodput."""

    cell: Cell
    capacity: dict[str, list[float]]
    goodput: dict[str, list[float]]
    settings: dict[str, tuple[str, str]]
    made_by: dict[str, str] = field(default_factory=dict, compare=False)  # commits
    wdt_share: dict[str, float | None] = field(default_factory=dict, compare=False)
    interference_ms: dict[str, float | None] = field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, parts: Sequence[Part]) -> CellResult:
        """From all parts of a cell."""
        return cls(
            parts[0].cell,
            {part.system: part.capacity for part in parts},
            {part.system: part.goodput for part in parts},
            {part.system: part.settings for part in parts},
            {part.system: part.made_by for part in parts},
            {part.system: part.wdt_share for part in parts},
            {part.system: part.interference_ms for part in parts},
        )


def whole_results(
    wanted: Sequence[Cell], systems: Sequence[Kind], find: Callable[[Kind, Cell], Part | None]
) -> list[CellResult]:
    """Results of those cells of `wanted` in which every system has a part."""
    parts = [[part for kind in systems if (part := find(kind, cell))] for cell in wanted]
    return [CellResult.of(own) for own in parts if len(own) == len(systems)]


def seen_by(kind: Kind, cell: Cell) -> Cell:
    """The cell without what makes no difference to a system: equal for cells that are the same to it."""
    speeds, draft = (getattr(cell, name) if name in kind.sees else "any" for name in ("speeds", "draft"))
    return replace(cell, speeds=speeds, draft=draft)


def best_known(kind: Kind, part: Part) -> Best:
    """What a search of `kind` goes on from.

    Raises:
        ConfigError: the part has a setting that no search of today comes to.
    """
    strange = set(part.settings) - reachable(kind.settings).keys()
    if strange:
        raise ConfigError(f"{part.cell.name}: {kind.name} has no setting {min(strange)!r} today; --fresh runs it again")
    return part.best()


def same_to(kind: Kind, cell: Cell, parts: Parts) -> Part | None:
    """What is finished of a system in a cell that differs from `cell` in nothing that the system sees, if anything."""
    for (other, name), part in reversed(parts.items()):
        if name == kind.name and seen_by(kind, other) == seen_by(kind, cell):
            return replace(part, cell=cell)
    return None


def key_of(timing: Timing, seeds: Sequence[int], kind: Kind, profile: str = DEFAULT, rechecked: bool = False) -> str:
    """What decides about the results of a system besides the cell and the code: 12 hex digits.

    Of the profile and the traces it is what is in them, not how they are called. `rechecked`: the last seeds were run
    behind the others, because the cell seemed lost.

    Raises:
        ConfigError: there is no such profile.
    """
    settings = [kind.name, *map(repr, kind.settings)]  # `str` leaves out what a person need not see
    if any(kind.neighbours(setting) for setting in kind.settings):
        settings += ["and", *map(str, CHUNKS), *map(str, LENGTHS)]
    parameters = asdict(WispParameters()) if any(setting.policy == "wisp" for setting in kind.settings) else {}
    base = replace(MIX, profile=profile).scenario(timing, 0)
    costs = [asdict(base.costs), asdict(draft_step_on(profile, base.costs.norm)), base.noise_sigma, base.kv_tokens]
    world = [asdict(base.workload), costs, *map(_trace_digest, DRAFTS)]
    asked = json.dumps(
        [asdict(timing), HOW, list(seeds), settings, parameters, world, *["rechecked"] * rechecked],
        sort_keys=True,
    )
    return hashlib.sha256(asked.encode()).hexdigest()[:12]


@functools.cache
def _trace_digest(draft: str) -> str:
    return hashlib.sha256(trace_path(draft, "eval").read_bytes()).hexdigest()
