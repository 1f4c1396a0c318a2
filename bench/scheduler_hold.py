"""Holding: slow devices far away (8 to 30 drafted tokens per second, RTT 50 ms), loose SLOs, timed arrivals.

hold_gain          committed tokens per busy second of the server, `wisp` / `wisp` that holds nobody; the lowest over
                   the numbers of devices
hold_attainment    attainment with holding and without, by number of devices
hold_attainment_change  the lowest difference of the two
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from bench.lab import Lab
from bench.report import print_table
from bench.scenario import Scenario
from bench.scheduler_systems import WARM_UP_S, WISP
from bench.workload import SloClass, Workload
from wisp_plugin.wisp_policy import WispParameters

TARGETS = {"hold_gain": ">= 1.2", "hold_attainment_change": ">= 0"}
EAGER = replace(WISP, name="wisp, holds nobody", parameters=WispParameters(holds=False))
WORKLOAD = Workload(
    drafted_tokens_per_s=(8.0, 30.0),
    rtt_s=(0.050, 0.050),
    classes=(SloClass("loose", 2.5), SloClass("looser", 4.0)),
    median_output_tokens=100,
    stagger_s=WARM_UP_S,
    timed=True,
)
_DEVICES = (24, 48)
_COLUMNS = {
    "attainment": "attainment", "committed_per_busy_s": "tok per busy s", "busy_share": "busy", "goodput": "goodput",
    "throughput": "tok/s", "mean_pass_ms": "pass ms", "mean_pass_sessions": "sessions", "acceptance_rate": "accepted",
    "median_ttft_ms": "ttft ms",
}  # fmt: skip


def run(lab: Lab, quick: bool, seed: int) -> dict[str, Any]:
    """All figures, with a table."""
    base = Scenario(WORKLOAD, duration_s=30.0 if quick else 60.0, warm_up_s=WARM_UP_S).with_seed(seed)
    systems = (WISP, EAGER)
    scenarios = [system.serve(base).with_devices(n) for n in _DEVICES for system in systems]
    runs = lab.means("holding", scenarios, 1 if quick else 2)
    labels = [(n, system.name) for n in _DEVICES for system in systems]
    rows = [(*label, *(f[name] for name in _COLUMNS)) for label, f in zip(labels, runs, strict=True)]
    print_table("Holding, slow devices", ("devices", "system", *_COLUMNS.values()), rows)
    pairs = list(zip(runs[::2], runs[1::2], strict=True))
    attainments = [(held["attainment"], eager["attainment"]) for held, eager in pairs]
    return {
        "hold_gain": min(held["committed_per_busy_s"] / eager["committed_per_busy_s"] for held, eager in pairs),
        "hold_attainment": {str(n): pair for n, pair in zip(_DEVICES, attainments, strict=True)},
        "hold_attainment_change": min(held - eager for held, eager in attainments),
    }
