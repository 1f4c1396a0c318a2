"""How fast the simulator is: seconds of one core for a minute of serving, with more and more devices.

    wisp-bench simulator

The mix of the comparison (bench/SIMULATION.md), served by WISP: every draft step, message, decision and commit goes
through the real sessions of both sides, scheduler and estimator, devices drafting alone. KV memory is that of the mix:
of 1,000 devices some forty are served at a time, and the others wait. Asked: a minute of them in at most 60 s of one
core. `us_per_token`: of a core, for a committed token and all that belongs to it.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from bench.arguments import MOST_S, not_negative_int, number, positive_int
from bench.cells import DRAFTS, MIX, Timing
from bench.report import Progress, check_targets, finish, print_table
from bench.simulator import simulate
from bench.systems import WISP
from bench.trace_walk import load_ring

_ASKED_DEVICES, _ASKED_SECONDS = 1_000, 60.0
_COLUMNS = ("devices", "core s", "simulated s per core s", "passes", "committed", "us per token")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `wisp-bench simulator`."""
    add = parser.add_argument
    add("--devices", type=positive_int, nargs="+", default=[50, 250, _ASKED_DEVICES], metavar="N", help="[50 250 1000]")
    add("--seconds", type=number(0.0, MOST_S, above=True), default=_ASKED_SECONDS, metavar="S",
        help="simulated, a third of them warm-up [60]")  # fmt: skip
    add("--draft", choices=DRAFTS, default=MIX.draft, help=f"traces that say what is drafted [{MIX.draft}]")
    add("--seed", type=not_negative_int, default=0, help="[0]")


def main(args: argparse.Namespace) -> int:
    """Run each number of devices once, in this process. Exit code 1 if the asked run takes too long."""
    load_ring(args.draft)  # read once, before the clock runs
    rows = []
    with Progress(len(args.devices), "simulator") as progress:
        for num_devices in args.devices:
            rows.append(measure(num_devices, args))
            progress.step(note=f"{num_devices} devices: {rows[-1][1]:.1f} s")
    print_table(f"{args.seconds:g} simulated seconds on one core", _COLUMNS, rows)
    figures: dict[str, Any] = {f"core_s_{row[0]}": row[1] for row in rows}
    figures |= {f"us_per_token_{row[0]}": row[5] for row in rows}
    is_asked = args.seconds == _ASKED_SECONDS and _ASKED_DEVICES in args.devices
    missed = check_targets(figures, {f"core_s_{_ASKED_DEVICES}": "<= 60"}) if is_asked else []
    finish("simulator", figures, vars(args), args.seed)
    return int(bool(missed))


def measure(num_devices: int, args: argparse.Namespace) -> list[float]:
    """A row of the table."""
    base = MIX.scenario(Timing(args.seconds, args.seconds / 3), args.seed)
    scenario = WISP.settings[0].serve(base, args.draft).with_devices(num_devices)
    start_s = time.process_time()  # of this core: what else runs on the machine does not count
    result = simulate(scenario)
    core_s = time.process_time() - start_s
    num_tokens = sum(session.num_tokens for session in result.sessions)
    per_token_us = 1e6 * core_s / max(1, num_tokens)
    return [num_devices, core_s, args.seconds / core_s, result.server.num_passes, num_tokens, per_token_us]
