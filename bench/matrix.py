"""WISP against the best other system in every cell of SLO x draft speed x RTT x draft, each system at its best there.

matrix_min                        the worse of the next two
matrix_min_goodput, _capacity     worst cell of WISP / best other
matrix_min_*_without_colocated    the same without co-located speculation
cells_lost_*                      cells below 0.97, with the ratio and the best other system
*_vs_centralized_median, _share   over cells where centralized holds at least 16 devices: median, and share of cells
                                  in which the published ratio holds; likewise `sled`
*_vs_SYSTEM_gm                    geometric mean over the `_gm_cells` cells in which that system has anything; 0 if WISP
                                  has nothing in one of them; against WISP as published also by the speed of devices

tpot is in unloaded passes: one class per cell. Without `--full`: 12 cells, few settings of each system, one seed. Each
system of a cell is a JSON line in `--state` once it is found; with the same file a stopped run goes on. The corners of
the matrix come first, its middle last; `--finished` tells what there is so far, of cells with all their systems.

A peak with one seed holds to some 3 %. `--recheck N` runs every cell below 0.97 on N seeds, WISP and all systems that
are not far from the best other one, with what was best for each on the first, and their means stand for the cell:
`cells_rechecked` has both, `cells_to_recheck` counts lost cells that have no more seeds yet. The first seed, for which
they were picked, counts among the N; cells that luck has lifted above 0.97 are not looked at again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.arguments import (
    check_appendable,
    make_report_folder,
    not_negative_int,
    num_processes,
    num_seeds,
    positive_int,
    report_folder,
    report_in,
)
from bench.cells import DRAFTS, FULL_AXES, MEDIUM, REDUCED_AXES, SHORT, Cell, Timing, cells
from bench.comparison import chosen_kinds
from bench.comparison_command import assumptions
from bench.gpu_profile import DEFAULT
from bench.html_report import DEFINITIONS, Page
from bench.matrix_figures import (
    MEDIAN_COLUMNS,
    NO_REGRET,
    SETTING_COLUMNS,
    TABLE_COLUMNS,
    WASTE_COLUMNS,
    before_and_after,
    is_lost,
    matrix_figures,
    median_rows,
    setting_rows,
    table_rows,
    waste_rows,
)
from bench.matrix_parts import CellResult
from bench.matrix_recheck import Recheck
from bench.matrix_run import MatrixRuns
from bench.report import check_targets, commit, finish, print_table
from bench.systems import BASELINES, FEW, FULL
from edge_runtime.cores import usable_cores
from wisp_plugin.errors import ConfigError
from wisp_plugin.home import wisp_home

TARGETS = {
    **{f"matrix_min_{figure}": f">= {NO_REGRET}" for figure in ("capacity", "goodput")},
    **{f"{figure}_vs_published_gm": ">= 1.3" for figure in ("capacity", "goodput")},
}
RUNS = {"short": SHORT, "medium": MEDIUM, "long": Timing()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `wisp-bench matrix`."""
    add = parser.add_argument
    add("--full", action="store_true", help="135 cells, all settings: hours; stop it and go on as you like")
    add("--few", action="store_true", help="with --full: few settings of each system, as without it")
    add("--cells", type=positive_int, metavar="N", help="only the first N cells")
    add("--profile", default=DEFAULT, metavar="P", help=f"of bench/profiles, or a file [{DEFAULT}]")
    add("--drafts", nargs="+", choices=DRAFTS, help="only these traces")
    add("--runs", choices=RUNS, help="short: 12 s, which begin in the wave of first prompts, and systems "
        "that let prompts go first look better in them; medium: 36 s; long: with a finer search too "
        "[short; long with --full]")  # fmt: skip
    add("--seeds", type=num_seeds, default=1, metavar="N", help="runs of everything with other sessions [1]")
    add("--seed", type=not_negative_int, default=0, help="the first of them [0]")
    add("--recheck", type=num_seeds, metavar="N", help="run cells below 0.97 on N seeds in all: one may be noise")
    add("--state", type=Path, metavar="FILE", help="finished parts, one JSON line each; those of other "
        "code count too, with a warning [$WISP_HOME/bench/matrix-COMMIT.jsonl]")  # fmt: skip
    add("--fresh", action="store_true", help="take no finished parts from the file, of whatever code")
    add("--finished", action="store_true", help="run nothing: only the cells that the file has whole")
    add("--jobs", type=num_processes, default=usable_cores(), metavar="N", help="processes [the cores]")
    add("--report", type=report_folder, metavar="DIR", help="write PNG plots and one HTML page there")


def main(args: argparse.Namespace) -> int:
    """Run the cells that are not finished; the report is printed whatever they give."""
    wanted = wanted_cells(args)
    if args.recheck and args.recheck <= args.seeds:
        raise ConfigError(f"--recheck {args.recheck} adds no seed to --seeds {args.seeds}; allowed: more than that")
    timing, kinds = RUNS[args.runs or ("long" if args.full else "short")], FULL if args.full and not args.few else FEW
    path = args.state or wisp_home() / "bench" / f"matrix-{commit()}.jsonl"
    make_report_folder(args.report)
    systems = chosen_kinds(BASELINES, kinds)
    runs = MatrixRuns(timing, _seeds(args, args.seeds), systems, path, args.jobs, args.fresh, args.profile, _warn)
    if args.finished:
        first = runs.finished(wanted)
        if not first:
            raise ConfigError(f"--finished: {path} has no whole cell of these options; run them without it first")
    else:
        check_appendable("--state", path)
        first = runs.run(wanted)
    results, rechecked = _recheck(runs, first, args)
    print_table("WISP against the best other system", TABLE_COLUMNS, table_rows(results))
    print_table("Medians over cells", MEDIAN_COLUMNS, median_rows(results))
    figures = {**matrix_figures(results), "medians": median_rows(results), "cells_rechecked": rechecked,
               "cells_to_recheck": sum(map(is_lost, first)) - len(rechecked)}  # fmt: skip
    missed = check_targets(figures, {name: asked for name, asked in TARGETS.items() if figures[name] is not None})
    finish("matrix", {**figures, "missed": missed, "columns": list(TABLE_COLUMNS), "matrix": table_rows(results),
                      "results": [asdict(r) for r in results]}, vars(args), args.seed)  # fmt: skip
    if args.report:
        with report_in(args.report):
            _write(args.report, results, figures, timing, runs.seeds)
    return 0


def _warn(line: str) -> None:
    print(f"matrix: {line}", file=sys.stderr)


def _seeds(args: argparse.Namespace, num_seeds: int) -> list[int]:
    return [args.seed + i for i in range(num_seeds)]


def _recheck(
    runs: MatrixRuns, first: Sequence[CellResult], args: argparse.Namespace
) -> tuple[list[CellResult], list[dict[str, Any]]]:
    """Results with those of more seeds in place of lost ones, and both ratios of every such cell."""
    if not args.recheck:
        return list(first), []
    lost = {result.cell: result for result in first if is_lost(result)}
    again = Recheck(runs, _seeds(args, args.recheck)[args.seeds :])
    found = again.finished(list(lost)) if args.finished else again.run(list(lost))
    rechecked = {result.cell: result for result in found}
    rows = [before_and_after(result, rechecked[cell]) for cell, result in lost.items() if cell in rechecked]
    return [rechecked.get(result.cell, result) for result in first], rows


def wanted_cells(args: argparse.Namespace) -> list[Cell]:
    """Cells that the options ask for. Raises ConfigError for a draft that is not among them."""
    axes = FULL_AXES if args.full else REDUCED_AXES
    drafts = args.drafts or list(axes[3])
    if strange := [draft for draft in drafts if draft not in axes[3]]:
        raise ConfigError(f"--drafts {strange[0]} needs --full; allowed without: {', '.join(axes[3])}")
    return [cell for cell in cells(axes, args.profile) if cell.draft in drafts][: args.cells]


def _about(results: Sequence[CellResult]) -> list[str]:
    """What a reader has to know of these cells besides."""
    cells, commits = [r.cell for r in results], sorted({made_by for r in results for made_by in r.made_by.values()})
    axes = {"drafts": [c.draft for c in cells], "devices": [c.speeds for c in cells],
            "RTT, ms": [f"{c.rtt_ms[0]:g}" for c in cells], "tpot": [f"{c.tpot_passes:g}" for c in cells]}  # fmt: skip
    points = "; ".join(f"{name} {', '.join(dict.fromkeys(values))}" for name, values in axes.items())
    made_by = [f"Made by commits {', '.join(commits)}."] if commits else []
    said = f"That is said of the first of {len(results)} cells, each with one SLO class, tpot in passes: {points}."
    return [said, *made_by]


def _write(
    folder: Path, results: Sequence[CellResult], figures: dict[str, Any], timing: Timing, seeds: Sequence[int]
) -> None:
    from bench import matrix_plots  # matplotlib is wanted for reports alone

    page = Page("WISP against the best other system, cell by cell")
    page.text(DEFINITIONS, is_note=True)
    page.heading("What was assumed")
    page.points([*assumptions(results[0].cell, timing, seeds, has_finals=False), *_about(results)])
    for figure in ("goodput", "capacity"):
        page.heading(f"{figure.capitalize()}: WISP / best other")
        picture = matrix_plots.heat_map(folder / f"matrix-{figure}.png", results, figure)
        page.picture(picture, f"{figure.capitalize()} of WISP over that of the best other system; below 1 it loses")
        lost = figures[f"cells_lost_{figure}"]
        page.text(f"{len(lost)} of {len(results)} cells below 0.97." if lost else "No cell below 0.97.")
    if rechecked := figures["cells_rechecked"]:
        page.heading("Cells below 0.97 with the first seed, and what they are with more")
        page.table(list(rechecked[0]), [list(row.values()) for row in rechecked])
    page.heading("All cells")
    lost_names = {c["cell"] for figure in ("goodput", "capacity") for c in figures[f"cells_lost_{figure}"]}
    page.table(TABLE_COLUMNS, table_rows(results), [i for i, r in enumerate(results) if r.cell.name in lost_names])
    page.heading("Wasted drafting time and interference at the peak of goodput, first seed")
    page.table(WASTE_COLUMNS, waste_rows(results))
    page.heading("Settings at the peak of goodput, first seed")
    page.table(SETTING_COLUMNS, setting_rows(results))
    page.heading("Figures")
    numbers = [(k, v) for k, v in figures.items() if isinstance(v, int | float) or v is None]
    page.table(("figure", "value"), numbers)
    page.write(folder / "matrix.html")
