"""Is the simulator right? The same workload on a real tritonserver with an emulated GPU, and in virtual time.

Both sides have the same devices and sessions, texts, drafts, link delays, controller, scheduler settings and cost of
a pass; only the server around the pass differs: real gRPC, tritonserver, Python stub, threads and clocks on one side,
nothing on the other. Of many devices about `--active` have a session at a time, the others pause: what a GPU of the
default profile serves. Passes have noise, as those of a GPU have, the same on both sides: without it the simulated
estimator knows every pass exactly, and the live one learns this machine's own noise. See `wisp-bench load` for how
devices are played, and for `--dilation`.

The noise of a run is one draw of many, and decides about some figures: of 32 devices the p95 between commits, a handful
of passes, moves by up to 13 %, and live the median between commits of 128 by 5 %. So both sides are means, of
`--simulations` draws and of `--runs` live runs.

max_error      largest relative difference of goodput, median and p95 time between commits and attainment, live
               against simulated, over all numbers of devices
spread_*       how far the draws are apart, largest less smallest, over their mean; spread_*_live of the live runs
between_share  time between two passes over that of a pass: what the live server adds and the simulation does not have
informed_error the same as max_error against a second simulation, which is told two things that were measured live: that
               time between passes, as longer passes, and the way of a commit out of the server, as a longer link
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Mapping, Sequence

from bench.arguments import positive_int
from bench.commit_log import simulate_logged
from bench.lab import Lab, mean_figures
from bench.load import finite, run_on_own_server
from bench.load_figures import load_figures
from bench.load_options import Load, add_load_arguments, dilated
from bench.report import check_targets, finish, print_table
from bench.scenario import Scenario

COMPARED = ("goodput", "commit_gap_ms", "commit_gap_p95_ms", "attainment")
ALSO_SHOWN = ("throughput", "strict_attainment", "median_ttft_ms", "wdt_share", "pass_ms", "pass_sessions", "sessions")
_SEEDS_APART = 1000
_SESSION_S = 10.0  # about what a session takes, in the GPU's time
TARGETS = {"max_error": "<= 0.10"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `wisp-bench validate`."""
    add = parser.add_argument
    add("--devices", type=positive_int, nargs="+", default=[32, 128], metavar="N", help="[32 128]")
    add("--active", type=positive_int, default=32, metavar="N", help="of them at a time, about [%(default)s]")
    add("--simulations", type=positive_int, default=5, metavar="N", help="draws of the noise [%(default)s]")
    add("--runs", type=positive_int, default=2, metavar="N", help="live runs [%(default)s]")
    add_load_arguments(parser)
    parser.set_defaults(dilation=4.0, warm_up=15.0, noise=0.03)


def main(args: argparse.Namespace) -> int:
    """Exit code 1 if a token was not the target's own, or a figure differs by more than TARGETS allow."""
    document: dict[str, float] = {}
    errors: dict[str, float] = {}
    informed = 0.0
    for num_devices in args.devices:
        figures, differences = compare(args, num_devices)
        document |= {f"{name}_{num_devices}": value for name, value in figures.items()}
        errors |= {f"{name}_{num_devices}": value for name, value in differences.items() if name in COMPARED}
        informed = max(informed, *[value for name, value in differences.items() if name not in COMPARED])
    worst = max(errors, key=lambda name: errors[name])
    document |= {
        "max_error": errors[worst],
        "informed_error": informed,
        **{f"error_{name}": value for name, value in errors.items()},
    }
    missed = check_targets(document, TARGETS)
    finish("validate", {**finite(document), "worst": worst, "missed": missed}, vars(args), args.seed)
    mismatches = sum(value for name, value in document.items() if name.startswith("mismatches"))
    return int(bool(missed or mismatches))


def compare(args: argparse.Namespace, num_devices: int) -> tuple[dict[str, float], dict[str, float]]:
    """Figures of both sides, and the relative differences of COMPARED, also `informed_` ones."""
    load = Load.of(with_pauses(args, num_devices), num_devices)
    simulated, spreads = simulated_figures(f"{num_devices} devices, simulated", load.scenario, load.dilation,
                                           args.simulations)  # fmt: skip
    live, machine, live_spreads = live_figures(load, args.processes, args.runs)
    informed = informed_scenario(load, machine, simulated["pass_ms"])
    told, _ = simulated_figures(f"{num_devices} devices, informed", informed, load.dilation, args.simulations)
    errors = {name: relative(live[name], simulated[name]) for name in COMPARED}
    errors |= {f"informed_{name}": relative(live[name], told[name]) for name in COMPARED}
    rows = [(n, simulated[n], live[n], relative(live[n], simulated[n]), told[n]) for n in (*COMPARED, *ALSO_SHOWN)]
    print_table(f"{num_devices} devices", ("figure", "simulated", "live", "difference", "informed simulation"), rows)
    print_table("This machine", ("figure", "value"), list(machine.items()))
    sides = {"simulated": simulated, "live": live, "informed": told}
    figures = {f"{n}_{side}": values[n] for side, values in sides.items() for n in (*COMPARED, *ALSO_SHOWN)}
    return {
        **figures,
        **spreads,
        **{f"{name}_live": value for name, value in live_spreads.items()},
        "think_s": load.scenario.workload.think_s / load.dilation,
        "stagger_s": load.scenario.workload.stagger_s / load.dilation,
        "between_share": machine["between_ms"] / (load.dilation * simulated["pass_ms"]),
        **machine,
    }, errors


def live_figures(
    load: Load, num_processes: int, num_runs: int
) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """Means over live runs, each on a server of its own with its own draw of the noise: figures, and what the machine
    had to do. And how far the runs are apart."""
    runs, machines = [], []
    for i in range(num_runs):
        label = f"{load.scenario.workload.num_devices} devices, live run {i + 1} of {num_runs}, seconds"
        draw = dataclasses.replace(load, noise_seed=load.noise_seed + _SEEDS_APART * i)
        run, machine = run_on_own_server(draw, num_processes, label)
        runs.append(load_figures(run.result, run.log, load.dilation))
        machines.append(machine)
    return mean_figures(runs), mean_figures(machines), _spreads(runs)


def simulated_figures(
    label: str, scenario: Scenario, dilation: float, num_draws: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Means over draws of the noise, and how far these are apart for COMPARED; the workload is the same in all."""
    scenarios = [dataclasses.replace(scenario, seed=scenario.seed + _SEEDS_APART * i) for i in range(num_draws)]
    with Lab(1) as lab:  # with its progress
        draws = lab.map(label, lambda one: load_figures(*simulate_logged(one), dilation), scenarios)
    return mean_figures(draws), _spreads(draws)


def _spreads(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    """Largest less smallest over the mean, of COMPARED."""
    values, means = {name: [run[name] for run in runs] for name in COMPARED}, mean_figures(runs)
    return {f"spread_{n}": (max(v) - min(v)) / means[n] if means[n] else 0.0 for n, v in values.items()}


def informed_scenario(load: Load, machine: Mapping[str, float], pass_ms: float) -> Scenario:
    """The scenario with this machine's own time between passes and on the way of a commit; `pass_ms` of the GPU."""
    scenario = load.scenario
    workload, way_s = scenario.workload, machine["way_ms"] / 1e3
    nearest_s, farthest_s = workload.rtt_s
    return dataclasses.replace(
        scenario,
        workload=dataclasses.replace(workload, rtt_s=(nearest_s + way_s, farthest_s + way_s)),
        costs=dilated(scenario.costs, 1.0 + machine["between_ms"] / (load.dilation * pass_ms)),
        believed_costs=scenario.costs,
    )


def with_pauses(args: argparse.Namespace, num_devices: int) -> argparse.Namespace:
    """Pauses between sessions, and starts so far apart, that about `args.active` of the devices are active."""
    rate_s = _SESSION_S * num_devices / args.active  # a session of each device in so long
    return argparse.Namespace(**vars(args) | {"think": max(0.0, rate_s - _SESSION_S), "stagger": rate_s})


def relative(live: float, simulated: float) -> float:
    """|live / simulated - 1|; 0 if both are 0, infinite if one is no number."""
    if live == simulated:
        return 0.0
    error = abs(live / simulated - 1.0) if simulated else math.inf
    return math.inf if math.isnan(error) else error
