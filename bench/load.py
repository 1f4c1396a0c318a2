"""Open-loop load on `wisp_verifier` by hundreds of emulated devices, with real sessions over real gRPC.

The server is a real tritonserver with the real engine and scheduler, whose target is emulated: passes take what a
profile says, tokens come from recorded texts (triton_models/emulated_verifier.py). Devices are the seeded workload of
the simulator; each drafts at its own speed what the recorded draft model drafted there, under the real controller.

Sessions start at their times (at the pace of their SLOs, whatever has happened before; with `--no-timed` when the
device's last one has ended, as in the comparisons), and latency counts from the time at which a session was to start or
a message was to leave, so a client that falls behind makes figures worse and never better (no coordinated omission).

goodput and the rest are our own definitions (DESIGN.md section 2, bench/sim_result.py). Figures are in the emulated
GPU's time; commits_per_s, messages_per_s, *_cores, lag_* and between_* are in this machine's.

lag_ms       how much later than due messages left this process
*_cores      processor time per second: of the clients here, of tritonserver, and of the Python stub with our engine
between_ms   from the end of a pass to the start of the next: what engine, Python and the machine add to each
way_ms       from the end of a pass to a commit's arrival in this process, before the link of its device
mismatches   sessions with a token that is not the target's own; there must be none
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from bench.arguments import MOST_S, host_and_port, number, positive_int
from bench.load_figures import ServerCpu, load_figures, machine_figures, pass_figures
from bench.load_options import PASSES, Load, add_load_arguments
from bench.load_run import LiveRun, run_load
from bench.report import finish, print_table

_SHOWN = (
    "goodput", "throughput", "request_goodput", "requests_per_s", "attainment", "strict_attainment", "commit_gap_ms",
    "commit_gap_p95_ms", "median_ttft_ms", "wdt_share", "pass_ms", "pass_sessions",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `wisp-bench load`."""
    parser.add_argument("--devices", type=positive_int, default=32, metavar="N", help="[%(default)s]")
    parser.add_argument("--server", type=host_and_port, metavar="HOST:PORT",
        help="one that runs already, with the same target [own]")  # fmt: skip
    add_load_arguments(parser)
    parser.add_argument("--think", type=number(0.0, MOST_S), default=0.0, metavar="S",
        help="mean pause between a device's sessions [%(default)s]")  # fmt: skip
    parser.add_argument("--stagger", type=number(0.0, MOST_S), default=20.0, metavar="S",
        help="devices start within this time [%(default)s]")  # fmt: skip
    parser.set_defaults(timed=True)


def main(args: argparse.Namespace) -> int:
    """Exit code 1 if a token was not the target's own."""
    load = Load.of(args, args.devices)
    if args.server:
        run = run_load(args.server, load.scenario, args.processes)
        machine = machine_figures(run, {})
    else:
        run, machine = run_on_own_server(load, args.processes)
    figures = load_figures(run.result, run.log, load.dilation)
    print_table(f"{args.devices} devices on an emulated GPU", ("figure", "value"), [(n, figures[n]) for n in _SHOWN])
    classes = run.result.class_names
    print_table("Attainment by class", classes, [[figures[f"attainment_{name}"] for name in classes]])
    print_table("This machine", ("figure", "value"), list(machine.items()))
    finish("load", finite({**figures, **machine}), vars(args), args.seed)
    return int(run.num_mismatches > 0)


def run_on_own_server(load: Load, num_processes: int, label: str = "") -> tuple[LiveRun, dict[str, float]]:
    """A run on a server of its own, and the machine's figures of it, those of the server included. `label`: of its
    progress."""
    with tempfile.TemporaryDirectory(prefix="wisp-load-") as folder:
        with load.server(Path(folder)) as server:
            before = ServerCpu.now(server.pid)
            run = run_load(server.grpc_url, load.scenario, num_processes, label)
            cpu_s = ServerCpu.now(server.pid).since(before)
        return run, machine_figures(run, cpu_s) | pass_figures(Path(folder) / PASSES, run.received_s)


def finite(figures: dict[str, float]) -> dict[str, Any]:
    """The same with None for what was not seen."""
    return {name: value if abs(value) < float("inf") else None for name, value in figures.items()}
