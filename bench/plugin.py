"""The batching strategy in an existing deployment: a real tritonserver, a model that is not ours, open-loop load.

A batch of the model costs a base and so much per token (bench/foreign_model: half of it is computed, half waited for,
as with an accelerator): 4 ms and 0.2 ms, so a long request takes 44 ms by itself and the base is 9 % of that. Nine
short urgent requests to one long relaxed one arrive at random (Poisson, 80 % of what the server answers one by one),
the same for all systems; latency counts from the time at which a request was due. An urgent request has 1.5 times a
long one's own time: it can stand one long request before it, not two. The model's profile is measured through Triton,
the strategy installed by `install-plugin`, as a user would. Three mixes:

  priority   priority_levels: 2, urgent requests first: those behind can wait, and closing a batch helps
  fifo       one queue: a strategy cannot reorder, and closing a batch delays those behind. By default Triton fills
             batches ahead and asks the strategy about each request by itself; with a queue policy it does not, but then
             an instance that gets free waits for the next arrival. Both are measured
  equal      one size of request, one queue, more load than can be served: what does the strategy cost?

With and without the strategy take turns of a few seconds, in random order; each is reported at its better queue and
max_queue_delay. A violation is an answer later than the request's SLO. `decision_us` is the strategy's own time per
candidate request, from its C++ benchmark.

A machine with other work to do is slower all the same. So before every turn of all systems the time of single
requests is measured on one without the strategy; load and SLOs of the turn go by that. `slowdown` is that time
against the one intended. With every ratio of violations goes a 95 % interval, from drawing turns anew.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.foreign_models import ONE_THREAD, Cost, Variant, unit_seconds, write_model
from bench.link import pinned_to, two_cores
from bench.open_loop import Kind, LoadResult, Schedule, alone_seconds, run_load
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
URGENT = Kind("urgent", 10, 0.066, 1, 9.0)
RELAXED = Kind("relaxed", 200, 2.0, 2, 1.0)
EQUAL = Kind("equal", 20, 0.5, 2, 1.0)
LOAD, OVERLOAD = 0.8, 1.5
DELAYS_US = (0, 5_000)
NOISY = 1.2  # slowdown
TURN_S = 5.0  # variants take turns this short, so that a machine that gets slower is so for all of them


@dataclass(frozen=True, slots=True)
class Mix:
    """What is sent to which models."""

    name: str
    kinds: tuple[Kind, ...]
    queues: tuple[str, ...]
    load: float

    def requests_per_s(self, alone_s: Sequence[float]) -> float:
        """Arrivals that make the load: of work done one request at a time, in seconds for each kind."""
        shares = np.array([kind.share for kind in self.kinds])
        return self.load / float(shares @ np.array(alone_s) / shares.sum())

    def kinds_at(self, slowdown: float) -> tuple[Kind, ...]:
        """The kinds with their SLOs on a machine that is slower than intended."""
        return tuple(replace(kind, slo_s=kind.slo_s * slowdown) for kind in self.kinds)


MIXES = (
    Mix("priority", (URGENT, RELAXED), ("priority",), LOAD),
    Mix("fifo", (URGENT, RELAXED), ("ahead", "policy"), LOAD),
    Mix("equal", (EQUAL,), ("policy",), OVERLOAD),
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
        results, slowdown = measure(args, repository, (server_core, client_core))
    figures = report(results) | {"decision_us": decision_us(), "profile_fit_error": profile, "slowdown": slowdown}
    if slowdown > NOISY:
        _say(f"batches took {slowdown:.2f} times as long as intended: the machine is busy, and the figures scatter")
    missed = check_targets(figures, TARGETS)
    finish("plugin", {**figures, "missed": missed}, vars(args) | {"mixes": [mix.name for mix in MIXES]}, args.seed)
    return 1 if missed else 0


def variants(mix: Mix) -> list[Variant]:
    """The models that a mix is sent to."""
    return [Variant(queue, delay, plugin) for queue in mix.queues for delay in DELAYS_US for plugin in (False, True)]


def make_repository(repository: Path, cost: Cost, cores: tuple[int, int], quick: bool) -> float:
    """Models without the strategy, the profile of one of them, then those with it. The mean error of the profile."""
    everyone = {variant for mix in MIXES for variant in variants(mix)}
    for variant in everyone:
        if not variant.has_plugin:
            write_model(repository, variant, cost, None)
    measured = variants(MIXES[0])[0].name
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


def measure(args: argparse.Namespace, repository: Path, cores: tuple[int, int]) -> tuple[Results, float]:
    """Every mix on every variant, the variants taking turns; and the median slowdown."""
    names = sorted({variant.name for mix in MIXES for variant in variants(mix)})
    results: Results = {}
    slowdowns = []
    with pinned_to(cores[0]):
        server = make_server(repository, names).__enter__()
    try:
        turns = args.rounds * max(1, round(args.seconds / TURN_S))
        runs = turns * sum(len(variants(mix)) for mix in MIXES)
        with pinned_to(cores[1]), Progress(runs, "plugin") as progress:
            for turn in range(turns):
                for mix in MIXES:
                    plain = variants(mix)[0].name
                    alone_s = [alone_seconds(server.grpc_url, plain, kind) for kind in mix.kinds]
                    slowdowns.append(alone_s[-1] / (BASE_S + TOKEN_S * mix.kinds[-1].num_tokens))
                    rate, duration_s = mix.requests_per_s(alone_s), args.rounds * args.seconds / turns
                    schedule = Schedule.poisson(mix.kinds_at(slowdowns[-1]), rate, duration_s, args.seed + turn)
                    for variant in np.random.default_rng(turn).permutation(np.array(variants(mix), object)):
                        result = run_load(server.grpc_url, variant.name, schedule, variant.queue == "priority")
                        results.setdefault((mix.name, variant), []).append(result)
                        progress.step(note=variant.name)
    finally:
        server.stop()
    return results, float(np.median(slowdowns))


def report(results: Results) -> dict[str, Any]:
    """Tables and figures."""
    figures: dict[str, Any] = {}
    for mix in MIXES:
        mine = {variant: results[mix.name, variant] for variant in variants(mix)}
        print_mix(mix, mine)
        plain, wisp = (best(mine, has_plugin) for has_plugin in (False, True))
        suffix = "" if mix.name == "priority" else f"_{mix.name}"
        violations = [sum(result.violations() for result in found) for found in (plain, wisp)]
        speeds = [float(np.median([result.requests_per_s for result in found])) for found in (plain, wisp)]
        figures |= {
            f"violations_plain{suffix}": violations[0],
            f"violations_wisp{suffix}": violations[1],
            f"violation_ratio{suffix}": violations[1] / violations[0] if violations[0] else float(bool(violations[1])),
            f"violation_ratio{suffix}_95": ratio_interval(plain, wisp),
            f"throughput_ratio{suffix}": speeds[1] / speeds[0],
        }
        low, high = figures[f"violation_ratio{suffix}_95"]
        print(f"violations with / without the strategy: 95 % interval {low:g} to {high:g}")
    return figures


def ratio_interval(plain: Sequence[LoadResult], wisp: Sequence[LoadResult], draws: int = 2_000) -> list[float]:
    """Where 95 % of the ratios of violations are when turns are drawn with replacement; no figures: [0, 0]."""
    counts = np.array([[result.violations() for result in found] for found in (plain, wisp)])
    drawn = counts[:, np.random.default_rng(0).integers(0, counts.shape[1], (draws, counts.shape[1]))].sum(axis=2)
    ratios = drawn[1][drawn[0] > 0] / drawn[0][drawn[0] > 0]
    return np.quantile(ratios, [0.025, 0.975]).round(3).tolist() if len(ratios) else [0.0, 0.0]


def best(found: Mapping[Variant, list[LoadResult]], has_plugin: bool) -> list[LoadResult]:
    """Runs with the queue and max queue delay that gave the fewest violations, the most throughput among equals."""
    mine = [runs for variant, runs in found.items() if variant.has_plugin == has_plugin]
    return min(mine, key=lambda runs: (sum(r.violations() for r in runs), -np.median([r.requests_per_s for r in runs])))


def print_mix(mix: Mix, found: Mapping[Variant, Sequence[LoadResult]]) -> None:
    """One row per variant."""
    rows = []
    for variant, runs in found.items():
        latencies = np.concatenate([result.latency_s for result in runs])
        kinds = np.concatenate([result.schedule.kind_of for result in runs])
        row: list[object] = [variant.queue, variant.delay_us / 1e3, "strategy" if variant.has_plugin else "plain"]
        for index, _ in enumerate(mix.kinds):
            of_kind = latencies[kinds == index]
            late = sum(result.violations(index) for result in runs)
            row += [100.0 * late / len(of_kind), *(1e3 * np.quantile(of_kind, [0.5, 0.95])).tolist()]
        rows.append([*row, float(np.median([result.requests_per_s for result in runs]))])
    columns = ["queue", "max queue delay, ms", "system"]
    for kind in mix.kinds:
        columns += [f"{kind.name}: late, %", "median, ms", "p95, ms"]
    sizes = ", ".join(f"{kind.name} {kind.num_tokens} tokens in {1e3 * kind.slo_s:g} ms" for kind in mix.kinds)
    turns = len(next(iter(found.values())))
    print_table(f"{mix.name}: {sizes}; load {mix.load:g}, {turns} turns", [*columns, "requests/s"], rows)


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
