"""One policy, both ends: capacity and peak goodput in a closed loop of always active devices.

capacity_wisp, capacity_continuous   devices at 95 % attainment; `continuous` without drafts, best chunk size
capacity_vs_continuous               their ratio
goodput_vs_density                   peak goodput over the number of devices, `wisp` / plain goodput density

60 to 120 drafted tokens per second, RTT 20 ms, acceptance 0.75. Plain goodput density is the same policy with every
token worth 1: nobody is in need, nobody is held.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from bench.lab import Lab
from bench.report import print_table
from bench.scenario import Scenario
from bench.scheduler_systems import CHUNKS, WISP, best_centralized
from bench.workload import Workload
from wisp_plugin.wisp_policy import WispParameters

TARGETS = {"capacity_vs_continuous": ">= 2.0", "goodput_vs_density": ">= 0.95"}
DENSITY = replace(
    WISP,
    name="plain density",
    parameters=WispParameters(
        least_value=1.0, most_value=1.0, lost_value=1.0, need_tokens=-1e9, hold_load=1e9
    ),
)
_DEVICES = (24, 32, 40, 48, 56, 64)


def run(lab: Lab, quick: bool, seed: int) -> dict[str, Any]:
    """All figures, with tables."""
    short = Scenario(Workload(), duration_s=20.0, warm_up_s=6.0).with_seed(seed)
    _, continuous = best_centralized(lab, short, (96,) if quick else CHUNKS, 1 if quick else 2)
    long = short if quick else replace(short, duration_s=40.0, warm_up_s=10.0)
    wisp = lab.capacity("capacity of wisp", WISP.serve(long), 1 if quick else 2)
    print_table("Capacity, closed loop", ("system", "devices"), [("continuous, no drafts", continuous), ("wisp", wisp)])
    ratio = wisp / continuous if continuous else None
    figures = {"capacity_wisp": wisp, "capacity_continuous": continuous, "capacity_vs_continuous": ratio}
    return figures | peaks(lab, long, (40, 48) if quick else _DEVICES, 1 if quick else 2)


def peaks(lab: Lab, base: Scenario, devices: tuple[int, ...], num_seeds: int) -> dict[str, Any]:
    """`goodput_vs_density`, with a table over the number of devices."""
    systems = (WISP, DENSITY)
    scenarios = [system.serve(base).with_devices(n) for n in devices for system in systems]
    runs = lab.means("peak goodput", scenarios, num_seeds)
    pairs = list(zip(runs[::2], runs[1::2], strict=True))
    names = ("attainment", "goodput", "throughput")
    rows = [(n, *(f[name] for f in pair for name in names)) for n, pair in zip(devices, pairs, strict=True)]
    columns = [f"{system.name}: {name}" for system in systems for name in names]
    print_table("Goodput, closed loop", ("devices", *columns), rows)
    peak, peak_density = (max(pair[i]["goodput"] for pair in pairs) for i in (0, 1))
    return {
        "peak_goodput": peak,
        "peak_goodput_density": peak_density,
        "goodput_vs_density": peak / peak_density if peak_density else None,
    }
