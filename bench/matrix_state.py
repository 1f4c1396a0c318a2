"""Finished parts of a matrix, one JSON line each, so that a run of hours can be stopped and goes on where it was.

A part is a system in a cell. Its line holds what was asked (cell, length of runs, seed, settings of the system) and its
best. A line that was asked otherwise is left alone and not used, so that after a change of one system only that one
runs again. A half line without its end is what a stopped run was writing, and is dropped; a whole line that is no
finished part is an error, wherever it stands.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from bench.cells import DRAFTS, MIX, SPEEDS, Cell, Timing
from bench.gpu_profile import DEFAULT, draft_step_on
from bench.report import commit
from bench.search import HOW, Best, tight_interference_ms
from bench.systems import CHUNKS, LENGTHS, Kind
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
        """What was found on the first seed, without the figures of its runs."""
        capacity, (holder, leader) = int(self.capacity[0]), self.settings
        devices = capacity if self.peak_devices is None else self.peak_devices
        return Best(self.system, capacity, holder, {}, self.goodput[0], devices, leader, {}, [])

    def and_more(self, bests: Sequence[Best]) -> Part:
        """The same with more seeds."""
        more, now = Part.of(self.cell, bests), commit()
        made_by = self.made_by if now in self.made_by.split(", ") else f"{self.made_by}, {now}"
        return replace(
            self, capacity=self.capacity + more.capacity, goodput=self.goodput + more.goodput, made_by=made_by
        )

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


def load_parts(path: Path, keys: Mapping[str, str], warn: Callable[[str], None] = lambda line: None) -> Parts:
    """Finished parts in the file with the keys of these systems, the newest of each; none without a file.

    `warn` is told, in a line, if some of them were made by another commit than this one.

    Raises:
        ConfigError: the file cannot be read, or a line that has an end is malformed.
    """
    parts: Parts = {}
    systems = {key: system for system, key in keys.items()}
    for number, text in enumerate(_whole_lines(path), 1):
        try:
            document = json.loads(text)
            if document["key"] in systems:
                part = _part_of(document, systems[document["key"]])
                parts.pop((part.cell, part.system), None)  # `same_to` has to find the newest last
                parts[part.cell, part.system] = part
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise ConfigError(
                f"{path}, line {number}: no finished part ({reason}); remove the line, or take another file"
            ) from None
    if line := _other_commits(path, [part.made_by for part in parts.values()]):
        warn(line)
    return parts


def _whole_lines(path: Path) -> list[bytes]:
    """Lines of the file, but not what is behind the last end of a line: a run was stopped while it wrote that."""
    try:
        return path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}; a file of finished parts is needed") from None


def _other_commits(path: Path, makers: Sequence[str]) -> str | None:
    now = commit() if makers else ""
    others = [maker for maker in makers if maker != now or now.endswith("-dirty")]  # who knows which changes
    if not others:
        return None
    return (f"{len(others)} of {len(makers)} finished parts in {path} were made by another commit "
            f"({', '.join(sorted(set(others)))}; this is {now}); --fresh runs them again")  # fmt: skip


def append_part(path: Path, key: str, part: Part) -> None:
    """Add a line, on disk when this returns. A half line that a stopped run left is ended first.

    Raises:
        ConfigError: it cannot be written, say on a full disk.
    """
    line = json.dumps({"key": key, **asdict(part)})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    _drop_half_line(file)
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ConfigError(f"{path}: a finished part cannot be written: {error.strerror}; all before it are there, and "
                          "the same command goes on behind them") from None  # fmt: skip


def _drop_half_line(file: Any) -> None:
    file.seek(0)
    file.truncate(file.read().rfind(b"\n") + 1)


def result_of(document: Mapping[str, Any]) -> CellResult:
    """A result from its JSON."""
    settings = {name: (own[0], own[1]) for name, own in document["settings"].items()}
    return CellResult(_cell_of(document["cell"]), document["capacity"], document["goodput"], settings)


def _part_of(document: Mapping[str, Any], system: str) -> Part:
    """A part of `system` from its line. Raises ValueError, KeyError, IndexError or TypeError if it is none."""
    if document["system"] != system:
        raise ValueError(f"this is the key of {system}, not of {document['system']}")
    for figure in ("capacity", "goodput"):
        values = document[figure]
        if not isinstance(values, list) or not values or not all(_is_amount(value) for value in values):
            raise ValueError(f"{figure} is not a list of numbers from 0")
    if len(document["capacity"]) != len(document["goodput"]):
        raise ValueError("capacity and goodput are of different numbers of seeds")
    settings = (str(document["settings"][0]), str(document["settings"][1]))
    cell, made_by = _cell_of(document["cell"]), str(document["made_by"])
    noted = {name: document.get(name) for name in ("peak_devices", "wdt_share", "interference_ms")}  # not in old lines
    if strange := [name for name, value in noted.items() if value is not None and not _is_number(value)]:
        raise ValueError(f"{strange[0]} is not a number")
    if noted["peak_devices"] is not None and noted["peak_devices"] != abs(int(noted["peak_devices"])):
        raise ValueError("peak_devices is not a whole number from 0")
    return Part(cell, system, document["capacity"], document["goodput"], settings, made_by, **noted)


def _cell_of(cell: Mapping[str, Any]) -> Cell:
    tpot_passes, (low_ms, high_ms) = cell["tpot_passes"], cell["rtt_ms"]
    if not all(map(_is_amount, (tpot_passes, low_ms, high_ms))):
        raise ValueError("tpot_passes and the two rtt_ms of a cell are numbers from 0")
    if cell["speeds"] not in SPEEDS or cell["draft"] not in DRAFTS:
        raise ValueError(f"a cell has speeds of {', '.join(SPEEDS)}, and a draft of {', '.join(DRAFTS)}")
    return Cell(tpot_passes, cell["speeds"], (low_ms, high_ms), cell["draft"], str(cell["profile"]))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_amount(value: Any) -> bool:
    return _is_number(value) and value >= 0
