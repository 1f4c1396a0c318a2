"""Capacity: how many devices each system serves with at least 95 % of sessions meeting their SLO.

capacity_SYSTEM                   devices, mean over the seeds; in `systems` with intervals, settings and all figures
capacity_vs_SYSTEM, _ci           capacity of WISP / that of the system, geometric mean over the seeds, 95 % interval
capacity_vs_best_other            ratio of the means against the best of the baselines (`capacity_best_other`)
capacity_vs_SYSTEM_published      the ratio in the paper; `_reaches_published`: whether ours does, baselines tuned
colocated_check                   co-located speculation against 1 + draft_length x draft_time / verify_time

The default mix: three SLO classes at 1.1, 1.5 and 2.5 times the unloaded pass, devices of 30, 60 and 120 drafted tokens
per second, RTT 10 to 40 ms. Every baseline is tuned by a sweep. With `--few` five seeds take half an hour on two cores,
else hours. The systems are described in bench/SIMULATION.md; `wisp-*` are ours without a part.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bench.arguments import make_report_folder, report_in
from bench.cells import Cell, Timing
from bench.comparison import SUMMARY_COLUMNS, Comparison, compare, ratio_figures, summary_rows
from bench.comparison_command import add_common, asked, assumptions, means_of, page_of, systems_figures
from bench.distance_check import CHECK_COLUMNS, check, rows_of
from bench.intervals import mean_interval
from bench.lab import Lab
from bench.report import finish, print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `wisp-bench capacity`."""
    add_common(parser)
    parser.add_argument("--no-check", action="store_true", help="leave out the analytic check")


def main(args: argparse.Namespace) -> int:
    """Find all capacities; the report is printed whatever they are."""
    make_report_folder(args.report)
    cell, kinds, timing, seeds = asked(args)
    with Lab(args.jobs) as lab:
        comparison = compare(lab, cell, kinds, timing, seeds, wants_peak=False, together=args.together)
        checked = [] if args.no_check else _checked(lab, cell, timing, comparison, args.seed)
    print("\n".join(["", *assumptions(cell, timing, seeds)]))
    print_table("Capacity, each system at its best", SUMMARY_COLUMNS, summary_rows(comparison))
    if checked:
        print_table("Co-located speculation, measured and analytic", CHECK_COLUMNS, rows_of(checked))
    figures: dict[str, Any] = {**means_of(comparison, "capacity", timing)}
    figures |= ratio_figures(comparison, "capacity")
    finish("capacity", {**figures, "colocated_check": checked, "systems": systems_figures(comparison)},
           {**vars(args), "cell": cell.as_dict()}, args.seed)  # fmt: skip
    if args.report:
        with report_in(args.report):
            _write(args.report, comparison, checked, timing, seeds)
    return 0


def _checked(lab: Lab, cell: Cell, timing: Timing, comparison: Comparison, seed: int) -> list[dict[str, Any]]:
    """The analytic check near the capacity of co-located speculation."""
    colocated = comparison.bests.get("colocated")
    return check(lab, cell, timing, seed, max(8, colocated[0].capacity)) if colocated else []


def _write(
    folder: Path, comparison: Comparison, checked: list[dict[str, Any]], timing: Timing, seeds: list[int]
) -> None:
    from bench import plots  # matplotlib is wanted for reports alone

    page = page_of("Capacity", comparison, timing, seeds, ["capacity"])
    intervals = {name: mean_interval(comparison.capacities(name)) for name in comparison.bests}
    errors = {n: (i.mean - i.low, i.high - i.mean) for n, i in intervals.items() if i.low is not None and i.high}
    means = {name: interval.mean for name, interval in intervals.items()}
    page.picture(plots.bars(folder / "capacity.png", means, errors, "devices at 95 % attainment"), "Capacity")
    series = {name: [(n, a) for _, n, a, _ in bests[0].runs] for name, bests in comparison.bests.items()
              if name in ("wisp", "centralized", "sled", "published", "colocated")}  # fmt: skip
    best_of = {name: _upper(points) for name, points in series.items()}
    page.picture(plots.curves(folder / "capacity-attainment.png", best_of, "devices", "attainment", 0.95),
                 "Attainment of the best setting tried at each number of devices, first seed")  # fmt: skip
    if checked:
        page.heading("Co-located speculation, measured and analytic")
        page.table(CHECK_COLUMNS, rows_of(checked))
    page.write(folder / "capacity.html")


def _upper(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    best: dict[int, float] = {}
    for at, value in points:
        best[at] = max(value, best.get(at, 0.0))
    return sorted(best.items())
