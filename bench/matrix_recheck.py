"""Cells of a matrix in which WISP seems to lose, on more seeds: a peak with one seed holds to some 3 %.

WISP runs, and every system that may be the best other one in what seems lost, with what was best for each on the first
seed. What is found is kept in the file of finished parts, and taken from there only where it goes on from what is the
first result now.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from bench.cells import Cell
from bench.lab import Lab
from bench.matrix_figures import NO_REGRET, mean
from bench.matrix_parts import CellResult, Part, Parts, best_known, key_of, same_to, whole_results
from bench.matrix_run import MatrixRuns
from bench.matrix_state import append_part, load_parts
from bench.more_seeds import on_seeds
from bench.report import Progress
from bench.settings import Kind
from bench.systems import BASELINES, WISP

_CONTENDS = 0.9  # of the best other's; who has less on the first seed will not be the best on several


@dataclass(frozen=True, slots=True)
class Recheck:
    """How lost cells of `runs`, which are in its file, are run again: on `more_seeds`, which come behind its own."""

    runs: MatrixRuns
    more_seeds: Sequence[int]

    def run(self, lost: Sequence[Cell]) -> list[CellResult]:
        """Results with all seeds, in the order of `lost`; those of systems far behind stay as they are.

        Raises:
            ConfigError: the file has settings that no search of today comes to.
        """
        if not lost:
            return []
        keys, first, done = self._keys(), self._first_parts(), self._finished_parts()
        with Lab(self.runs.num_jobs) as lab, Progress(len(lost), "recheck") as progress:
            for cell in lost:
                for part in self._missing_parts(lab, cell, first, done):
                    done[cell, part.system] = part
                    append_part(self.runs.path, keys[part.system], part)
                progress.step(note=cell.name)
        return self._whole(lost, first, done)

    def finished(self, lost: Sequence[Cell]) -> list[CellResult]:
        """The results that the file has whole."""
        first, done = self._first_parts(), self._finished_parts()
        return self._whole(lost, first, done)

    def _whole(self, lost: Sequence[Cell], first: Parts, done: Parts) -> list[CellResult]:
        contenders = {cell: _contenders(cell, first) for cell in lost}

        def find(kind: Kind, cell: Cell) -> Part | None:
            runs_again = kind.name in contenders[cell]
            return _going_on(kind, cell, first, done) if runs_again else first[cell, kind.name]

        return whole_results(lost, self.runs.systems, find)

    def _keys(self) -> dict[str, str]:
        seeds = [*self.runs.seeds, *self.more_seeds]
        return {
            kind.name: key_of(self.runs.timing, seeds, kind, self.runs.profile, rechecked=True)
            for kind in self.runs.systems
        }

    def _first_parts(self) -> Parts:
        return replace(self.runs, warn=lambda line: None).finished_parts()  # who ran them has been warned

    def _finished_parts(self) -> Parts:
        return {} if self.runs.fresh else load_parts(self.runs.path, self._keys(), self.runs.warn)

    def _missing_parts(self, lab: Lab, cell: Cell, first: Parts, done: Parts) -> list[Part]:
        names = _contenders(cell, first)
        contenders = [kind for kind in self.runs.systems if kind.name in names]
        missing = [kind for kind in contenders if not _going_on(kind, cell, first, done)]
        tuned = {kind.name: best_known(kind, first[cell, kind.name]) for kind in missing}
        found = on_seeds(lab, cell, missing, tuned, self.runs.timing, self.more_seeds)
        return [first[cell, name].and_more(bests) for name, bests in found.items()]


def _contenders(cell: Cell, first: Parts) -> set[str]:
    """WISP, and who may be the best other system on more seeds, in a figure in which WISP seems to lose."""
    names = {WISP.name}
    for figure in ("capacity", "goodput"):
        values = {name: mean(getattr(part, figure)) for (where, name), part in first.items() if where == cell}
        others = {name: value for name, value in values.items() if name in BASELINES}
        best = max(others.values())
        if values[WISP.name] < NO_REGRET * best:
            names |= {name for name, value in others.items() if value >= _CONTENDS * best}
    return names


def _going_on(kind: Kind, cell: Cell, first: Parts, done: Parts) -> Part | None:
    """What is done of a system in a cell, or in one that is the same to it, if it goes on from the first result."""
    part = done.get((cell, kind.name)) or same_to(kind, cell, done)
    return part if part and part.goes_on_from(first[cell, kind.name]) else None
