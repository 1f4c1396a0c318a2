"""A matrix as a picture: SLO and draft downwards, device speed and RTT across."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench import plots
from bench.cells import DRAFTS, SPEEDS
from bench.matrix_figures import against_best
from bench.matrix_parts import CellResult


def heat_map(path: Path, results: Sequence[CellResult], figure: str) -> Path:
    """WISP / the best other system in `capacity` or `goodput`, of all cells."""
    speeds, rtts = _speeds(results), _rtts(results)
    columns = [f"{speed}, {rtt:g} ms" for speed in speeds for rtt in rtts]
    rows = [(tpot, draft) for draft in DRAFTS for tpot in sorted({r.cell.tpot_passes for r in results})]
    rows = [row for row in rows if any((r.cell.tpot_passes, r.cell.draft) == row for r in results)]
    values = [[_at(results, figure, *row, speed, rtt) for speed in speeds for rtt in rtts] for row in rows]
    names = [f"{draft}, tpot x{tpot:g}" for tpot, draft in rows]
    return plots.heat_map(path, values, names, columns, f"{figure}, WISP / best other")


def _speeds(results: Sequence[CellResult]) -> list[str]:
    return [speeds for speeds in SPEEDS if any(r.cell.speeds == speeds for r in results)]


def _rtts(results: Sequence[CellResult]) -> list[float]:
    return sorted({r.cell.rtt_ms[0] for r in results})


def _at(
    results: Sequence[CellResult], figure: str, tpot: float, draft: str, speeds: str, rtt: float
) -> float | None:
    wanted = (tpot, draft, speeds, rtt)
    for r in results:
        if (r.cell.tpot_passes, r.cell.draft, r.cell.speeds, r.cell.rtt_ms[0]) == wanted:
            return against_best(r, figure).value
    return None
