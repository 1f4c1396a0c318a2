"""The runs of a matrix: system after system, in the corners of the axes first; finished parts are kept in a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench.cells import Cell, Timing, corners_first
from bench.gpu_profile import DEFAULT
from bench.lab import Lab
from bench.matrix_figures import against_best
from bench.matrix_parts import CellResult, Part, Parts, best_known, key_of, same_to, seen_by, whole_results
from bench.matrix_state import append_part, load_parts
from bench.more_seeds import on_seed
from bench.report import Progress, format_cell
from bench.search import Question, find_best
from bench.settings import Kind

_FIRST = {1.05: 16, 1.1: 24, 1.5: 48, 2.0: 64, 4.0: 96}  # devices that a search begins with, by tpot


@dataclass(frozen=True, slots=True)
class MatrixRuns:
    """How cells are run, and the file of finished parts. `fresh`: it is written to, but nothing is taken from it."""

    timing: Timing
    seeds: Sequence[int]
    systems: Sequence[Kind]
    path: Path
    num_jobs: int = 1
    fresh: bool = False
    profile: str = DEFAULT
    warn: Callable[[str], None] = lambda line: None  # is told if another commit made some of what the file has

    def run(self, wanted: Sequence[Cell]) -> list[CellResult]:
        """Results in the order of `wanted`; systems that the file has in a cell are taken from there.

        Systems of different cells run beside each other: no core waits for the last system of a cell. Where the file
        has a system without the last of its settings, that one is searched alone.
        """
        keys, done = self._keys(), {} if self.fresh else self.finished_parts()
        with Lab(self.num_jobs) as lab, Progress(len(wanted) * len(self.systems), "matrix") as progress:
            progress.step(sum((cell, kind.name) in done for cell in wanted for kind in self.systems))
            for part in self._missing_parts(lab, corners_first(wanted), done, self._parts_before_last()):
                done[part.cell, part.system] = part
                append_part(self.path, keys[part.system], part)
                progress.step(note=self._said_of(part, done))
        return self._whole(wanted, done)

    def _missing_parts(self, lab: Lab, cells: Sequence[Cell], done: Parts, known: Parts) -> Iterator[Part]:
        """What is not done: at once where it is the same to a system as what is, all else as it is found, once for
        cells that are the same to it. `known`: parts without the last setting."""
        alike: dict[tuple[str, Cell], list[Cell]] = {}
        kinds = {kind.name: kind for kind in self.systems}
        for cell in cells:
            for kind in self.systems:
                if (cell, kind.name) in done:
                    continue
                if part := same_to(kind, cell, done):
                    yield part
                else:
                    alike.setdefault((kind.name, seen_by(kind, cell)), []).append(cell)
        asked = [
            _Asked(own[0], kinds[name], self.timing, self.seeds, same_to(kinds[name], own[0], known))
            for (name, _), own in alike.items()
        ]
        for found in lab.as_they_come(_find, asked):
            for cell in alike[found.system, seen_by(kinds[found.system], found.cell)]:
                yield replace(found, cell=cell)

    def _said_of(self, part: Part, done: Parts) -> str:
        """A part for people, and its cell if that is whole now."""
        for result in self._whole([part.cell], done):
            ratio = against_best(result, "goodput")
            return f"{part.cell.name}: {format_cell(ratio.value)} of {ratio.other}"
        return f"{part.cell.name}: {part.best()}"

    def _whole(self, wanted: Sequence[Cell], done: Parts) -> list[CellResult]:
        return whole_results(wanted, self.systems, lambda kind, cell: done.get((cell, kind.name)))

    def finished(self, wanted: Sequence[Cell]) -> list[CellResult]:
        """Results of those cells of `wanted` that the file has whole."""
        return self._whole(wanted, self.finished_parts())

    def finished_parts(self) -> Parts:
        """All that the file has."""
        return load_parts(self.path, self._keys(), self.warn)

    def _parts_before_last(self) -> Parts:
        if self.fresh:
            return {}
        return load_parts(self.path, self._keys_of([kind.before_last for kind in self.systems if kind.before_last]))

    def _keys(self) -> dict[str, str]:
        return self._keys_of(self.systems)

    def _keys_of(self, kinds: Sequence[Kind]) -> dict[str, str]:
        return {kind.name: key_of(self.timing, self.seeds, kind, self.profile) for kind in kinds}


@dataclass(frozen=True, slots=True)
class _Asked:
    """A system in a cell, on all seeds; can be sent to another process. `known`: the same without the last setting."""

    cell: Cell
    kind: Kind
    timing: Timing
    seeds: Sequence[int]
    known: Part | None


def _find(asked: _Asked) -> Part:
    cell, kind, timing, seeds, known = asked.cell, asked.kind, asked.timing, asked.seeds, asked.known
    first = _FIRST.get(cell.tpot_passes, 32)
    tuned = find_best(Question(cell, kind, timing, seeds[0], first, known=best_known(kind, known) if known else None))
    found = Part.of(cell, [tuned, *(on_seed(cell, kind, tuned, timing, seed) for seed in seeds[1:])])
    return found.made_behind(known) if known else found
