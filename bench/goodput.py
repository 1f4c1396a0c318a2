"""Goodput against the number of devices, and its peak: every system at its best.

goodput_SYSTEM                tokens per second of sessions that met their SLO, at the best number of devices
goodput_vs_SYSTEM, _ci        peak of WISP / that of the system, geometric mean over the seeds, 95 % interval
goodput_vs_best_other         ratio of the means against the best of the baselines (`goodput_best_other`)
goodput_vs_SYSTEM_published   the ratio in the paper; `_reaches_published`: whether ours does, baselines tuned
goodput_ceiling               what no system that serves all prompts alike can exceed here: every prompt and output
                              token computed once, nothing else
sensitivity                   the ratios with other traces and other forms of the cost (`--sensitivity`)
curves                        per system: first seed, setting of its peak, columns as `curve_columns` says

The same runs tell the capacity, so all figures of `wisp-bench capacity` but the analytic check are there too. With
`--few` five seeds take half an hour on two cores, else hours.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.arguments import make_report_folder, report_in
from bench.cells import Cell, Timing
from bench.comparison import SUMMARY_COLUMNS, Comparison, compare, ratio_figures, summary_rows
from bench.comparison_command import add_common, asked, assumptions, lists, means_of, page_of, systems_figures
from bench.lab import Lab
from bench.report import finish, print_table
from bench.search import measure_in
from bench.sensitivity import SENSITIVITY_COLUMNS, sensitivity, table_rows, variants
from bench.settings import Kind, reachable

GRID = (8, 16, 24, 32, 40, 56, 68, 80, 104)
_SHOWN = ("goodput", "attainment", "wdt_share", "busy_share", "mean_pass_ms")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `wisp-bench goodput`."""
    add_common(parser)
    parser.add_argument("--sensitivity", action="store_true", help="also with other traces and forms of the cost")


def main(args: argparse.Namespace) -> int:
    """Find all peaks, then run the curves; the report is printed whatever they are."""
    make_report_folder(args.report)
    cell, kinds, timing, seeds = asked(args)
    with Lab(args.jobs) as lab:
        comparison = compare(lab, cell, kinds, timing, seeds, together=args.together)
        lines = curves(lab, comparison, kinds, timing, seeds[0], GRID[1::3] if args.quick else GRID)
        others = sensitivity(lab, variants(cell), timing, args.seed, lists(args)) if args.sensitivity else []
    print("\n".join(["", *assumptions(cell, timing, seeds)]))
    print_table("Goodput, each system at its best", SUMMARY_COLUMNS, summary_rows(comparison))
    rows = [(name, n, *(f[k] for k in _SHOWN)) for name, line in lines.items() for n, f in line.items()]
    print_table("Goodput over devices, first seed", ("system", "devices", *_SHOWN), rows)
    if others:
        print_table("Other assumptions, first seed", SENSITIVITY_COLUMNS, table_rows(others))
    figures: dict[str, Any] = {**means_of(comparison, "goodput", timing)}
    figures |= ratio_figures(comparison, "goodput") | ratio_figures(comparison, "capacity")
    points = {name: [[n, *(round(f[k], 4) for k in _SHOWN)] for n, f in line.items()] for name, line in lines.items()}
    finish("goodput", {**figures, "curve_columns": ["devices", *_SHOWN], "curves": points,
                       "sensitivity": others, "systems": systems_figures(comparison)},
           {**vars(args), "cell": cell.as_dict()}, args.seed)  # fmt: skip
    if args.report:
        with report_in(args.report):
            _write(args.report, comparison, lines, others, timing, seeds)
    return 0


@dataclass(frozen=True, slots=True)
class _Point:
    cell: Cell
    kind: Kind
    timing: Timing
    seed: int
    num_devices: int


def _measure(point: _Point) -> dict[str, float]:
    measure = measure_in(point.cell, point.timing, point.seed)
    return measure(point.kind.settings[0], point.num_devices)


def curves(
    lab: Lab, comparison: Comparison, kinds: list[Kind], timing: Timing, seed: int, grid: tuple[int, ...]
) -> dict[str, dict[int, dict[str, float]]]:
    """Figures by system and number of devices, each system with the setting of its peak."""
    best = {}
    for kind in kinds:
        wanted = comparison.bests[kind.name][0].peak_setting
        best[kind.name] = kind.only(reachable(kind.settings)[wanted])
    points = [_Point(comparison.cell, kind, timing, seed, n) for kind in best.values() for n in grid]
    answers = iter(lab.map("curves", _measure, points))
    return {name: {n: next(answers) for n in grid} for name in best}


def _write(
    folder: Path, comparison: Comparison, lines: dict[str, dict[int, dict[str, Any]]], others: list[dict[str, Any]],
    timing: Timing, seeds: list[int],
) -> None:  # fmt: skip
    from bench import plots  # matplotlib is wanted for reports alone

    page = page_of("Goodput", comparison, timing, seeds, ["goodput", "capacity"])
    captions = {
        "goodput": "Goodput, tokens per second", "attainment": "Attainment", "wdt_share": "WDT share",
        "mean_pass_ms": "Mean pass, ms",
    }  # fmt: skip
    for key, caption in captions.items():
        series = {name: [(n, f[key]) for n, f in line.items()] for name, line in lines.items()}
        page.picture(plots.curves(folder / f"{key}.png", series, "devices", caption), f"{caption}, first seed")
    tight = {name: [(n, next(v for k, v in f.items() if k.startswith("interference_ms_"))) for n, f in line.items()]
             for name, line in lines.items()}  # fmt: skip
    page.picture(plots.curves(folder / "interference.png", tight, "devices", "interference of the first class, ms"),
                 "Mean interference of the tightest class, first seed")  # fmt: skip
    if others:
        page.heading("Other assumptions, first seed")
        page.table(SENSITIVITY_COLUMNS, table_rows(others))
    page.write(folder / "goodput.html")
