"""Finished cells of a matrix, one JSON line each, so that a run of hours can be stopped and goes on where it was.

A line holds what was asked (cell, length of runs, seed, settings of all systems) and the bests of all systems. A line
that was asked otherwise is left alone and not used. A half line without its end is what a stopped run was writing, and
is dropped; a whole line that is no finished cell is an error, wherever it stands.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bench.cells import Cell, Timing
from bench.report import commit
from bench.search import Best
from bench.systems import Kind
from wisp_plugin.errors import ConfigError
from wisp_plugin.wisp_parameters import WispParameters


@dataclass(frozen=True, slots=True)
class CellResult:
    """A finished cell: the bests of all systems, by seed."""

    cell: Cell
    capacity: dict[str, list[float]]
    goodput: dict[str, list[float]]
    settings: dict[str, tuple[str, str]]  # of capacity and peak, first seed

    def of_system(self, name: str) -> tuple[list[float], list[float], tuple[str, str]]:
        """Capacity, goodput and settings of a system."""
        return self.capacity[name], self.goodput[name], self.settings[name]

    def filled_up(self, kinds: Sequence[Kind], others: Iterable[CellResult]) -> CellResult:
        """With all of `kinds`, in their order: what is missing is taken from cells that are the same to it."""
        found = {name: self.of_system(name) for name in self.capacity}
        found |= {kind.name: same.of_system(kind.name) for kind in kinds
                  if kind.name not in found and (same := same_to(kind, self.cell, others))}  # fmt: skip
        columns = [{kind.name: found[kind.name][i] for kind in kinds} for i in range(3)]
        return replace(self, capacity=columns[0], goodput=columns[1], settings=columns[2])  # type: ignore[arg-type]

    @classmethod
    def of(cls, cell: Cell, bests: dict[str, list[Best]]) -> CellResult:
        """From what a comparison found."""
        return cls(
            cell,
            {name: [float(b.capacity) for b in own] for name, own in bests.items()},
            {name: [b.peak_goodput for b in own] for name, own in bests.items()},
            {name: (own[0].capacity_setting, own[0].peak_setting) for name, own in bests.items()},
        )


def same_to(kind: Kind, cell: Cell, results: Iterable[CellResult]) -> CellResult | None:
    """A finished cell that differs from `cell` in nothing that the system sees, if there is one."""
    unseen = {name: getattr(cell, name) for name in ("speeds", "draft") if name not in kind.sees}
    return next((r for r in results if kind.name in r.capacity and replace(r.cell, **unseen) == cell), None)


def key_of(timing: Timing, seeds: Sequence[int], kinds: Sequence[Kind]) -> str:
    """What decides about results besides the cell and the code: 12 hex digits."""
    settings = [[kind.name, *map(str, kind.settings)] for kind in kinds]
    asked = json.dumps([asdict(timing), list(seeds), settings, asdict(WispParameters())], sort_keys=True)
    return hashlib.sha256(asked.encode()).hexdigest()[:12]


def load_results(
    path: Path, key: str, systems: Iterable[str] = (), warn: Callable[[str], None] = lambda line: None
) -> dict[Cell, CellResult]:
    """Finished cells in the file with this key, which have all `systems`; none without a file.

    `warn` is told, in a line, if some of them were made by another commit than this one.

    Raises:
        ConfigError: the file cannot be read, or a line that has an end is malformed.
    """
    results: dict[Cell, CellResult] = {}
    makers: dict[Cell, str] = {}
    for number, text in enumerate(_whole_lines(path), 1):
        try:
            document = json.loads(text)
            if document["key"] != key:
                continue
            result = result_of(document, systems)
            results[result.cell], makers[result.cell] = result, str(document.get("commit", "unknown"))
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise ConfigError(
                f"{path}, line {number}: no finished cell ({reason}); remove the line, or take another file"
            ) from None
    if line := _other_commits(path, list(makers.values())):
        warn(line)
    return results


def _whole_lines(path: Path) -> list[bytes]:
    """Lines of the file, but not what is behind the last end of a line: a run was stopped while it wrote that."""
    if not path.exists():
        return []
    try:
        return path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}; a file of finished cells is needed") from None


def _other_commits(path: Path, makers: Sequence[str]) -> str | None:
    now = commit() if makers else ""
    others = [maker for maker in makers if maker != now]
    if not others:
        return None
    return (f"{len(others)} of {len(makers)} finished cells in {path} were made by another commit "
            f"({', '.join(sorted(set(others)))}; this is {now}); --fresh runs them again")  # fmt: skip


def append_result(path: Path, key: str, result: CellResult) -> None:
    """Add a line, on disk when this returns. A half line that a stopped run left is ended first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"key": key, "commit": commit(), **asdict(result)})
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                _drop_half_line(file)
        file.write(line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _drop_half_line(file: Any) -> None:
    file.seek(0)
    file.truncate(file.read().rfind(b"\n") + 1)


def result_of(document: Mapping[str, Any], systems: Iterable[str] = ()) -> CellResult:
    """A result from its JSON. Raises ValueError, KeyError or TypeError if it is none, or lacks one of `systems`."""
    cell = document["cell"]
    settings = {name: (own[0], own[1]) for name, own in document["settings"].items()}
    for figure in ("capacity", "goodput"):
        if missing := (set(systems) | set(settings)) - set(document[figure]):
            raise ValueError(f"{figure} has no {', '.join(sorted(missing))}")
        for name, values in document[figure].items():
            if name not in settings:
                raise ValueError(f"settings have no {name}")
            if not values or not all(_is_amount(value) for value in values):
                raise ValueError(f"{figure} of {name} is not a list of numbers from 0")
    return CellResult(
        Cell(cell["tpot_passes"], cell["speeds"], tuple(cell["rtt_ms"]), cell["draft"], cell["profile"]),
        document["capacity"],
        document["goodput"],
        settings,
    )


def _is_amount(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
