"""Cells of a matrix in which WISP seems to lose, on more seeds: a peak with one seed holds to some 3 %.

WISP and every system that may be the best other one run with what was best for each on the first seed. What is found is
kept in the file of finished parts, and taken from there only where it goes on from what is the first result now.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from bench.best import Best
from bench.cells import Cell
from bench.lab import Lab
from bench.matrix_figures import mean
from bench.matrix_parts import CellResult, Part, Parts, key_of, same_to, whole_results
from bench.matrix_run import MatrixRuns
from bench.matrix_state import append_part, load_parts
from bench.more_seeds import on_seeds
from bench.report import Progress
from bench.settings import Kind, reachable
from bench.systems import BASELINES, WISP
from wisp_plugin.errors import ConfigError

_CONTENDS = 0.85  # of the best other's capacity or goodput; what has less on the first seed has it on all


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
        def find(kind: Kind, cell: Cell) -> Part | None:
            return _going_on(kind, cell, first, done) if _contends(kind, cell, first) else first[cell, kind.name]

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
        contenders = [kind for kind in self.runs.systems if _contends(kind, cell, first)]
        missing = [kind for kind in contenders if not _going_on(kind, cell, first, done)]
        tuned = {kind.name: _best(kind, first[cell, kind.name]) for kind in missing}
        found = on_seeds(lab, cell, missing, tuned, self.runs.timing, self.more_seeds)
        return [first[cell, name].and_more(bests) for name, bests in found.items()]


def _contends(kind: Kind, cell: Cell, first: Parts) -> bool:
    """Whether the system is WISP, or may be the best other one of the cell on more seeds."""
    own = first[cell, kind.name]
    others = [part for (where, name), part in first.items() if where == cell and name in BASELINES]
    most_held, most_tokens = max(mean(part.capacity) for part in others), max(mean(part.goodput) for part in others)
    held, tokens = mean(own.capacity), mean(own.goodput)
    return kind.name == WISP.name or held >= _CONTENDS * most_held or tokens >= _CONTENDS * most_tokens


def _going_on(kind: Kind, cell: Cell, first: Parts, done: Parts) -> Part | None:
    """What is done of a system in a cell, or in one that is the same to it, if it goes on from the first result."""
    part = done.get((cell, kind.name)) or same_to(kind, cell, done)
    return part if part and part.goes_on_from(first[cell, kind.name]) else None


def _best(kind: Kind, part: Part) -> Best:
    strange = set(part.settings) - reachable(kind.settings).keys()
    if strange:
        raise ConfigError(f"{part.cell.name}: {kind.name} has no setting {min(strange)!r} today; --fresh runs it again")
    return part.best()
