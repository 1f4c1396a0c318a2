"""The runs of a matrix: cell after cell, the corners of the axes first, finished parts kept in a file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.cells import Cell, Timing, corners_first
from bench.comparison import compare
from bench.gpu_profile import DEFAULT
from bench.matrix_figures import against_best
from bench.matrix_state import CellResult, Part, Parts, append_part, key_of, load_parts, same_to, whole_results
from bench.report import Progress, format_cell
from bench.scheduler_systems import Lab
from bench.systems import Kind

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
        """Results in the order of `wanted`; systems that the file has in a cell are taken from there."""
        keys = self._keys()
        done = {} if self.fresh else self.finished_parts()
        results = {}
        with Lab(self.num_jobs) as lab, Progress(len(wanted), "matrix") as progress:
            for cell in corners_first(wanted):
                for part in self._missing_parts(lab, cell, done):
                    done[cell, part.system] = part
                    append_part(self.path, keys[part.system], part)
                results[cell] = CellResult.of([done[cell, kind.name] for kind in self.systems])
                ratio = against_best(results[cell], "goodput")
                progress.step(note=f"{cell.name}: {format_cell(ratio.value)} of {ratio.other}")
        return [results[cell] for cell in wanted]

    def finished(self, wanted: Sequence[Cell]) -> list[CellResult]:
        """Results of those cells of `wanted` that the file has whole."""
        done = self.finished_parts()
        return whole_results(wanted, self.systems, lambda kind, cell: done.get((cell, kind.name)))

    def finished_parts(self) -> Parts:
        """All that the file has."""
        return load_parts(self.path, self._keys(), self.warn)

    def _keys(self) -> dict[str, str]:
        return {kind.name: key_of(self.timing, self.seeds, kind, self.profile) for kind in self.systems}

    def _missing_parts(self, lab: Lab, cell: Cell, done: Parts) -> list[Part]:
        """The parts of a cell that are not done: from cells that are the same to a system, or found now."""
        missing = [kind for kind in self.systems if (cell, kind.name) not in done]
        shared = [part for kind in missing if (part := same_to(kind, cell, done))]
        asked = [kind for kind in missing if kind.name not in {part.system for part in shared}]
        if not asked:
            return shared
        found = compare(lab, cell, asked, self.timing, self.seeds, first=_FIRST.get(cell.tpot_passes, 32))
        return [*shared, *(Part.of(cell, bests) for bests in found.bests.values())]
