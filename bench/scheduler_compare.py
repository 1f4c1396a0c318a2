"""Policies side by side: timed arrivals, three SLO classes, the same sessions for all (and what their interference is).

attainment_wisp                     share of sessions that met their SLO under `wisp`
goodput_vs_fcfs, _edf, _continuous  goodput of `wisp` / that of a baseline with drafts, at its best
interference_ratio                  mean interference of the tight class, `wisp` / `fcfs`
*_fcfs_chunked, *_ratio_chunked     the same against SLED with chunked prefill, which it is not published with
compare_devices                     devices of the comparison: 90 % of `continuous_timed_capacity`
comparison                          all systems at 1 and 1.5 times as many devices

`continuous_timed_capacity` is the capacity of `continuous` without drafts under the same arrivals, with its best chunk
size. At every number of devices each baseline is tuned anew; `wisp` has one set of constants. Runs are drained, and
goodput is that of arrivals (`SimResult.arrivals_goodput`): a system that keeps every SLO reaches what was asked for.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from bench.lab import Figures, Lab
from bench.report import print_table
from bench.scenario import Scenario
from bench.scheduler_systems import (
    BASELINES,
    CHUNKS,
    SLED_WAIT_MS,
    WARM_UP_S,
    WISP,
    WISP_ALONE,
    System,
    best_centralized,
    tune,
)
from bench.workload import Workload

TARGETS = {
    "attainment_wisp": ">= 0.95",
    "goodput_vs_fcfs": ">= 1.25",
    "goodput_vs_fcfs_chunked": ">= 1.25",
    "goodput_vs_edf": ">= 1.0",
    "goodput_vs_continuous": ">= 1.0",
    "interference_ratio": "<= 0.5",
}
_LOADS = (1.0, 1.5)
_SHARE_OF_CAPACITY = 0.9
_COLUMNS = {
    "attainment": "attainment", "attainment_tight": "tight", "strict_attainment": "strict",
    "arrivals_goodput": "goodput", "throughput": "tok/s", "mean_pass_ms": "pass ms", "mean_pass_sessions": "sessions",
    "mean_pass_new_tokens": "new", "interference_ms_tight": "interf. ms", "wdt_share": "WDT",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Served:
    """A system, its setting, and its figures at a number of devices, mean over the seeds."""

    load: float
    num_devices: int
    system: System
    figures: Figures


def run(lab: Lab, quick: bool, seed: int) -> dict[str, Any]:
    """All figures, with the sweeps and a table per load."""
    base = Scenario(Workload(timed=True, stagger_s=WARM_UP_S), duration_s=26.0, warm_up_s=WARM_UP_S).with_seed(seed)
    chunks = (96,) if quick else CHUNKS
    _, capacity = best_centralized(lab, base, chunks, 1 if quick else 2)
    first = max(1, round(_SHARE_OF_CAPACITY * capacity))
    served = []
    for load in _LOADS[:1] if quick else _LOADS:
        served += serve_all(lab, base, load, round(load * first), quick)
    figures = figures_at_first(served) | {"continuous_timed_capacity": capacity, "compare_devices": first}
    return figures | {"comparison": [_row(one) for one in served]}


def serve_all(lab: Lab, base: Scenario, load: float, num_devices: int, quick: bool) -> list[Served]:
    """Every system at a number of devices, baselines at their best."""
    short = replace(base, drain=True).with_devices(num_devices)
    sled, *others = BASELINES
    step = 5 if quick else 1 if load == _LOADS[0] else len(SLED_WAIT_MS)  # waits are tried at the first load alone
    bests = tune(lab, short, [sled[::step], *others], (96, 256) if quick else CHUNKS)
    systems = [*bests, WISP_ALONE, WISP]
    long = replace(short, duration_s=26.0 if quick else 60.0)
    runs = lab.means(f"{num_devices} devices", [s.serve(long) for s in systems], 1 if quick else 2)
    served = [Served(load, num_devices, *pair) for pair in zip(systems, runs, strict=True)]
    title = f"{num_devices} devices, timed arrivals: {load:g} x {_SHARE_OF_CAPACITY:.0%} of the capacity of continuous"
    rows = [(s.system.name, s.system.setting, *(s.figures[name] for name in _COLUMNS)) for s in served]
    print_table(title, ("system", "setting", *_COLUMNS.values()), rows)
    return served


def figures_at_first(served: list[Served]) -> dict[str, Any]:
    """The figures asked for, at the first load. None where `fcfs` has no interference to compare with."""
    at_first = {s.system.name: s.figures for s in served if s.load == _LOADS[0]}
    wisp = at_first["wisp"]
    names = {"fcfs": "fcfs", "fcfs_chunked": "fcfs, chunked", "edf": "edf", "continuous": "continuous"}

    def ratio(figure: str, system: str) -> float | None:
        return _ratio(wisp[figure], at_first[system][figure])

    return {
        "attainment_wisp": wisp["attainment"],
        **{f"goodput_vs_{key}": ratio("arrivals_goodput", system) for key, system in names.items()},
        "interference_ratio": ratio("interference_ms_tight", "fcfs"),
        "interference_ratio_chunked": ratio("interference_ms_tight", "fcfs, chunked"),
    }


def _ratio(value: float, other: float) -> float | None:
    return value / other if other else None


def _row(served: Served) -> dict[str, Any]:
    figures = {name: round(served.figures[name], 4) for name in _COLUMNS}
    setting = {k: v for k, v in asdict(served.system).items() if v is not None}
    return {"load": served.load, "devices": served.num_devices, **setting, **figures}
