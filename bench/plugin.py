"""The batching strategy in an existing deployment: a real tritonserver, a model that is not ours, open-loop load.

A batch of the model costs a base and so much per token, in real work (bench/foreign_model). Short urgent and long
relaxed requests arrive at random (Poisson, 80 % of what the model could serve one by one), the same for all systems;
latency counts from the time at which a request was due. The model's profile is measured through Triton, the strategy
installed by `install-plugin`, as a user would. Three mixes:

  priority   priority_levels: 2, urgent requests first: what stands behind them can wait, and closing a batch helps
  fifo       one queue: a strategy cannot reorder, and closing a batch delays those behind
  equal      one size of request, one queue, more load than can be served: what does the strategy cost?

With and without the strategy alternate; each is reported at its better max_queue_delay. A violation is an answer later
than the request's SLO. `decision_us` is the strategy's own time per candidate request, from its C++ benchmark.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.foreign_models import ONE_THREAD, Cost, Variant, unit_seconds, write_model
from bench.link import pinned_to, two_cores
from bench.open_loop import Kind, LoadResult, Schedule, run_load
from bench.report import Progress, check_targets, finish, print_table
from triton_models.launcher import make_server
from triton_models.plugin_install import SOURCES, build_library
from triton_models.remote_profile import RemoteOptions
from triton_models.remote_profile import run as measure_profile
from wisp_plugin.errors import ConfigError, WispError
from wisp_plugin.home import wisp_home

TARGETS = {
    "violation_ratio": "<= 0.5",
    "throughput_ratio": ">= 0.9",
    "violation_ratio_fifo": "<= 1.0",
    "throughput_ratio_equal": ">= 0.98",
    "decision_us": "<= 2.0",
}
BASE_S, TOKEN_S = 0.004, 0.0002
URGENT = Kind("urgent", 10, 0.060, 1, 3.0)
RELAXED = Kind("relaxed", 200, 2.0, 2, 1.0)
EQUAL = Kind("equal", 20, 0.5, 2, 1.0)
LOAD, OVERLOAD = 0.8, 1.5
DELAYS_US = (0, 5_000)


@dataclass(frozen=True, slots=True)
class Mix:
    """What is sent to which models."""

    name: str
    kinds: tuple[Kind, ...]
    has_priorities: bool
    load: float

    def requests_per_s(self, cost: Cost) -> float:
        """Arrivals that make the load: of work done one request at a time."""
        shares = np.array([kind.share for kind in self.kinds])
        alone_s = np.array([cost.batch_s(kind.num_tokens) for kind in self.kinds])
        return self.load / float(shares @ alone_s / shares.sum())


MIXES = (
    Mix("priority", (URGENT, RELAXED), True, LOAD),
    Mix("fifo", (URGENT, RELAXED), False, LOAD),
    Mix("equal", (EQUAL,), False, OVERLOAD),
)
Results = dict[tuple[str, Variant], list[LoadResult]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `wisp-bench plugin`."""
    parser.add_argument("--seconds", type=float, default=20.0, metavar="S", help="of every run [%(default)s]")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="runs of every system [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the arrivals [%(default)s]")
    parser.add_argument("--quick", action="store_true", help="one round of 8 s")


def main(args: argparse.Namespace) -> int:
    """Exit code 1 if a target is missed."""
    if args.quick:
        args.seconds, args.rounds = 8.0, 1
    if not 1.0 <= args.seconds <= 3_600.0 or args.rounds < 1:
        raise ConfigError("--seconds is a time from 1 to 3600, --rounds a number from 1")
    server_core, client_core = two_cores()
    os.environ |= ONE_THREAD  # of the models' processes
    with pinned_to(server_core):
        cost = Cost(BASE_S, TOKEN_S, unit_seconds())
    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder)
        profile = make_repository(repository, cost, (server_core, client_core), quick=args.quick)
        results = measure(args, repository, cost, (server_core, client_core))
    figures = report(results, args.rounds) | {"decision_us": decision_us(), "profile_fit_error": profile}
    missed = check_targets(figures, TARGETS)
    finish("plugin", {**figures, "missed": missed}, vars(args) | {"mixes": [mix.name for mix in MIXES]}, args.seed)
    return 1 if missed else 0


def variants(mix: Mix) -> list[Variant]:
    """The models that a mix is sent to."""
    return [Variant(mix.has_priorities, delay, plugin) for delay in DELAYS_US for plugin in (False, True)]


def make_repository(repository: Path, cost: Cost, cores: tuple[int, int], quick: bool) -> float:
    """Models without the strategy, the profile of one of them, then those with it. The mean error of the profile."""
    everyone = {variant for mix in MIXES for variant in variants(mix)}
    for variant in everyone:
        if not variant.has_plugin:
            write_model(repository, variant, cost, None)
    measured = Variant(False, DELAYS_US[-1], False).name
    profile = repository / "profile.json"
    with pinned_to(cores[0]):
        server = make_server(repository, (measured,)).__enter__()
    try:
        with pinned_to(cores[1]):
            options = RemoteOptions(
                server.grpc_url, measured, profile, budget_s=6.0 if quick else 20.0, tokens_input="IDS"
            )
            print(measure_profile(options, _say))
    finally:
        server.stop()
    for variant in everyone:
        if variant.has_plugin:
            write_model(repository, variant, cost, profile)
    return float(json.loads(profile.read_text())["measured"]["fit_error"])


def measure(args: argparse.Namespace, repository: Path, cost: Cost, cores: tuple[int, int]) -> Results:
    """Every mix on every variant, the variants alternating within a round."""
    names = sorted({variant.name for mix in MIXES for variant in variants(mix)})
    results: Results = {}
    with pinned_to(cores[0]):
        server = make_server(repository, names).__enter__()
    try:
        runs = args.rounds * sum(len(variants(mix)) for mix in MIXES)
        with pinned_to(cores[1]), Progress(runs, "plugin") as progress:
            for turn in range(args.rounds):
                for mix in MIXES:
                    rate = mix.requests_per_s(cost)
                    schedule = Schedule.poisson(mix.kinds, rate, args.seconds, args.seed + turn)
                    for variant in variants(mix)[:: 1 if turn % 2 == 0 else -1]:
                        result = run_load(server.grpc_url, variant.name, schedule, mix.has_priorities)
                        results.setdefault((mix.name, variant), []).append(result)
                        progress.step(note=variant.name)
    finally:
        server.stop()
    return results


def report(results: Results, rounds: int) -> dict[str, Any]:
    """Tables and figures."""
    figures: dict[str, Any] = {}
    for mix in MIXES:
        mine = {variant: results[mix.name, variant] for variant in variants(mix)}
        print_mix(mix, mine, rounds)
        plain, wisp = (best(mine, has_plugin) for has_plugin in (False, True))
        suffix = "" if mix.name == "priority" else f"_{mix.name}"
        violations = [sum(result.violations() for result in found) for found in (plain, wisp)]
        speeds = [float(np.median([result.requests_per_s for result in found])) for found in (plain, wisp)]
        figures |= {
            f"violations_plain{suffix}": violations[0],
            f"violations_wisp{suffix}": violations[1],
            f"violation_ratio{suffix}": violations[1] / violations[0] if violations[0] else float(bool(violations[1])),
            f"throughput_ratio{suffix}": speeds[1] / speeds[0],
        }
    return figures


def best(found: Mapping[Variant, list[LoadResult]], has_plugin: bool) -> list[LoadResult]:
    """Runs with the max queue delay that gave the fewest violations, the most throughput among equals."""
    mine = [runs for variant, runs in found.items() if variant.has_plugin == has_plugin]
    return min(mine, key=lambda runs: (sum(r.violations() for r in runs), -np.median([r.requests_per_s for r in runs])))


def print_mix(mix: Mix, found: Mapping[Variant, Sequence[LoadResult]], rounds: int) -> None:
    """One row per variant."""
    rows = []
    for variant, runs in found.items():
        latencies = np.concatenate([result.latency_s for result in runs])
        kinds = np.concatenate([result.schedule.kind_of for result in runs])
        row: list[object] = ["strategy" if variant.has_plugin else "plain", variant.delay_us / 1e3]
        for index, _ in enumerate(mix.kinds):
            of_kind = latencies[kinds == index]
            late = sum(result.violations(index) for result in runs)
            row += [100.0 * late / len(of_kind), *(1e3 * np.quantile(of_kind, [0.5, 0.95])).tolist()]
        rows.append([*row, float(np.median([result.requests_per_s for result in runs]))])
    columns = ["system", "max queue delay, ms"]
    for kind in mix.kinds:
        columns += [f"{kind.name}: late, %", "median, ms", "p95, ms"]
    sizes = ", ".join(f"{kind.name} {kind.num_tokens} tokens in {1e3 * kind.slo_s:g} ms" for kind in mix.kinds)
    print_table(f"{mix.name}: {sizes}; load {mix.load:g}, {rounds} runs", [*columns, "requests/s"], rows)


def decision_us() -> float:
    """Median microseconds of a decision, from the strategy's own benchmark. Raises WispError if it cannot be built."""
    build_library(_say)
    command = ["make", "-s", "-C", str(SOURCES), f"BUILD={wisp_home() / 'plugin' / 'bench'}", "bench"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise WispError(f"the strategy's benchmark failed: {done.stderr.splitlines()[-1:]}")
    return float(json.loads(done.stdout.splitlines()[-1])["decision_us"])


def _say(line: str) -> None:
    print(f"wisp-bench: {line}", flush=True)
