"""The scheduler: how long it takes to decide, how good its decisions are, and what policy `wisp` is worth.

plan      time of a decision (real time)
optimum   value per second of a pass against exhaustive search
compare   attainment, goodput and interference against fcfs (SLED), edf and continuous, each at its best
capacity  devices at 95 % attainment, and peak goodput against plain goodput density
hold      committed tokens per busy second of the server with holding and without

All but `plan` runs in virtual time: the real engine, scheduler, sessions and estimator on a GPU-like cost (a model of
32 G parameters on an A100), with modelled devices, links and pass times. The figures are exact and the same on every
machine. Goodput, capacity and interference are our own definitions (DESIGN.md section 2).
"""

from __future__ import annotations

import argparse
from typing import Any

from bench import report, scheduler_capacity, scheduler_compare, scheduler_hold, scheduler_optimum, scheduler_plan
from bench.lab import Lab
from edge_runtime.cores import usable_cores

_TARGETS = {
    "plan": scheduler_plan.TARGETS,
    "optimum": scheduler_optimum.TARGETS,
    "compare": scheduler_compare.TARGETS,
    "capacity": scheduler_capacity.TARGETS,
    "hold": scheduler_hold.TARGETS,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `wisp-bench scheduler`."""
    parser.add_argument("--parts", nargs="+", choices=list(_TARGETS), default=list(_TARGETS), help="default: all")
    parser.add_argument("--jobs", type=int, default=usable_cores(), metavar="N", help="processes (default: the cores)")
    parser.add_argument("--seed", type=int, default=0, help="first of the seeds of sessions and instances")
    parser.add_argument("--quick", action="store_true", help="short runs, one seed, few settings: shows that it works")


def main(args: argparse.Namespace) -> int:
    """Exit code 1 if a figure in virtual time misses its target; the time of a decision is only reported."""
    figures = run(args.parts, args.jobs, args.quick, args.seed)
    targets = {name: asked for part in args.parts for name, asked in _TARGETS[part].items()}
    missed = report.check_targets(figures, targets)
    report.finish("scheduler", {**figures, "missed": missed}, vars(args), args.seed)
    return 1 if any(not line.startswith(tuple(scheduler_plan.TARGETS)) for line in missed) else 0


def run(parts: list[str], num_jobs: int, quick: bool, seed: int) -> dict[str, Any]:
    """Figures of `parts`. The time of a decision is measured first, while nothing else runs."""
    figures: dict[str, Any] = {}
    if "plan" in parts:
        figures |= scheduler_plan.run(200 if quick else 1000, seed)
    if "optimum" in parts:
        figures |= scheduler_optimum.run(100 if quick else 400, seed)
    with Lab(num_jobs) as lab:
        if "compare" in parts:
            figures |= scheduler_compare.run(lab, quick, seed)
        if "capacity" in parts:
            figures |= scheduler_capacity.run(lab, quick, seed)
        if "hold" in parts:
            figures |= scheduler_hold.run(lab, quick, seed)
    return figures
