"""Capacity planner: how many devices does this server hold, at what attainment, and what is worth changing first?

    wisp-bench plan --profile a100-qwen3-32b --devices 40 --tpot-ms 45
    wisp-bench plan --profile my-gpu.json --devices 8 --tpot-ms 60 --speed 20 --rtt-ms 60 --draft int4

Simulates policy `wisp` with rule `price` on the profile (that of `wisp-server profile` or `wisp-bench profile`, or one
that is shipped), then each change by itself. `capacity_without_drafts` is what the server would hold alone; `changes`
are sorted by the devices that they win, and `change_first` is the first one that takes no second server, if any wins
something. `hold_at_least` names those whose capacity is only known to be no less, as all that was tried holds (up to
1,024 devices of a server), `left_out` those that leave the target too little KV memory. The first token of a session is
wanted within 10 tpot + 1 ms per prompt token. "As asked" is devices alone.
Goodput and capacity are our own definitions. Runs take from 36 s to 10 minutes (simulated), as long as it takes to
judge about a hundred sessions, or `--seconds`. One that judges fewer than 20 tells nothing: it is made longer, up to
four hours for a single device, and what still judges fewer is refused. All of it takes some minutes on two cores.
Exit code 1: the devices that are asked for cannot be served.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from bench.arguments import (
    LEAST_KV_TOKENS,
    MOST_RTT_MS,
    MOST_S,
    MOST_SPEED,
    OUTPUTS,
    PROMPTS,
    not_negative_int,
    num_kv_tokens,
    num_processes,
    number,
    whole_number,
)
from bench.best import ATTAINMENT, Figures
from bench.cells import DRAFTS, Timing
from bench.gpu_cost import unloaded_pass_s
from bench.gpu_profile import DEFAULT, find_profile, is_derived
from bench.lab import Lab
from bench.plans import AS_ASKED, SECOND_SERVER, WITHOUT_DRAFTS, Plan, make_plans
from bench.report import finish, print_table
from bench.search import MOST_DEVICES, Search
from bench.simulator import simulate
from bench.systems import WISP
from edge_runtime.cores import usable_cores
from wisp_plugin.errors import ConfigError
from wisp_plugin.estimator import Costs

LEAST_SESSIONS = 20  # that a verdict needs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `wisp-bench plan`."""
    add = parser.add_argument
    add("--profile", default=DEFAULT, metavar="P", help=f"of bench/profiles, or a file [{DEFAULT}]")
    add("--devices", type=whole_number(1, MOST_DEVICES), required=True, metavar="D",
        help="devices that are to be served")  # fmt: skip
    add("--tpot-ms", type=number(0.0, 1e3 * MOST_S, above=True), required=True, metavar="T",
        help="time per output token that sessions ask for")  # fmt: skip
    add("--speed", type=number(0.0, MOST_SPEED, above=True), default=60.0, metavar="V",
        help="draft tokens per second of a device [60]")  # fmt: skip
    add("--rtt-ms", type=number(0.0, MOST_RTT_MS), default=25.0, metavar="R", help="round trip [25]")
    add("--draft", choices=DRAFTS, default="int4", help="traces that say how good the draft is [int4]")
    add("--prompt", type=whole_number(*PROMPTS), default=250, metavar="N", help="median tokens of a prompt [250]")
    add("--output-tokens", type=whole_number(*OUTPUTS), default=200, metavar="N",
        help="median tokens of an answer [200]")  # fmt: skip
    add("--think-s", type=number(0.0, MOST_S), default=2.0, metavar="S",
        help="mean pause of a user between sessions [2]")  # fmt: skip
    add("--kv-tokens", type=num_kv_tokens, metavar="N",
        help="tokens whose KV the server holds; a draft model beside the target takes the share of them that one of "
        "0.6 G parameters takes beside [49,552: a model of 32 G parameters in 80 GB]")  # fmt: skip
    add("--seconds", type=number(0.0, MOST_S, above=True), metavar="S",
        help=f"simulated, a third of them warm-up; more where they judge less than {LEAST_SESSIONS} sessions [36, "
        "longer for few devices]")  # fmt: skip
    add("--seed", type=not_negative_int, default=0)
    add("--jobs", type=num_processes, default=usable_cores(), metavar="N", help="processes [the cores]")


@dataclass(frozen=True, slots=True)
class Answer:
    """Figures at the devices that were asked about, and the capacity. `is_least`: more were not tried, all hold."""

    attainment: float
    goodput: float
    capacity: int
    figures: Figures
    is_least: bool = False

    @property
    def held(self) -> int | str:
        """The capacity as it is told."""
        return f"at least {self.capacity}" if self.is_least else self.capacity


def main(args: argparse.Namespace) -> int:
    """Answer; exit code 1 if the devices cannot be served."""
    every_plan = make_plans(args)
    plans = [plan for plan in every_plan if plan.has_room]
    left_out = [plan for plan in every_plan if not plan.has_room]
    with Lab(args.jobs) as lab:
        answers = dict(zip([p.name for p in plans], lab.map("plan", solve, plans), strict=True))
    now, alone = answers.pop(AS_ASKED), answers.pop(WITHOUT_DRAFTS)
    fits = now.attainment >= ATTAINMENT
    changes = sorted(answers.items(), key=lambda pair: -pair[1].capacity)
    rows = [(AS_ASKED, now), (WITHOUT_DRAFTS, alone), *changes]
    print(_verdict(args, now, alone))
    _print_changes(rows, left_out)
    figures = {
        "fits": fits, "attainment": now.attainment, "goodput": now.goodput, "capacity": now.capacity,
        "sessions_judged": now.figures["sessions"], "simulated_s": now.figures["simulated_s"],
        "capacity_without_drafts": alone.capacity, "attainment_without_drafts": alone.attainment,
        "busy_share": now.figures["busy_share"], "wdt_share": now.figures["wdt_share"],
        "change_first": _first_change(now, changes),
        "changes": [{"change": n, "capacity": a.capacity, "attainment": a.attainment} for n, a in changes],
        "hold_at_least": [name for name, answer in rows if answer.is_least],
        "left_out": [plan.name for plan in left_out],
    }  # fmt: skip
    finish("plan", figures, vars(args), args.seed)
    return 0 if fits else 1


def solve(plan: Plan) -> Answer:
    """Simulate a plan: the devices asked about, and the capacity from there. Raises as `measure` does."""
    search = Search(lambda _, num_devices: measure(plan, num_devices), max(plan.loads))
    capacity, setting = search.capacity(WISP.only(WISP.settings[0]))  # the scenario has its setting already
    is_least = capacity == max(num_devices for _, num_devices in search.runs)  # nothing was found to be too many
    loads = [num_devices for num_devices in plan.loads if num_devices]
    runs = [search.run(setting, num_devices) for num_devices in loads]
    attainment = sum(n / sum(loads) * run["attainment"] for n, run in zip(loads, runs, strict=True))
    goodput = sum(run["goodput"] for run in runs)
    return Answer(attainment, goodput, len(plan.loads) * capacity, runs[-1], is_least)


def measure(plan: Plan, num_devices: int) -> Figures:
    """Figures of the first run of so many devices that judges enough sessions, and its length as `simulated_s`.

    Raises:
        ConfigError: not even the longest one does.
    """
    figures: Figures = {}
    for scenario in plan.runs(num_devices):
        figures = simulate(scenario).figures() | {"simulated_s": scenario.duration_s}
        if figures["sessions"] >= LEAST_SESSIONS:
            return figures
    devices = f"{num_devices} device{'s' * (num_devices > 1)}"
    raise ConfigError(
        f"{plan.name}, with {devices}: {figures['simulated_s']:,.0f} s judge {figures['sessions']:.0f} sessions, and "
        f"at least {LEAST_SESSIONS} are needed: give longer runs (--seconds), or shorter sessions or pauses"
    )


def _print_changes(rows: Sequence[tuple[str, Answer]], left_out: Sequence[Plan]) -> None:
    print_table("What would change it", ("change", "devices held", "attainment at the devices asked", "goodput, tok/s"),
                [(name, a.held, a.attainment, a.goodput) for name, a in rows])  # fmt: skip
    for plan in left_out:
        print(f"Left out: {plan.name}. The target would have KV of {plan.scenario.kv_tokens:,} tokens, and the longest "
              f"session takes {LEAST_KV_TOKENS:,}.")  # fmt: skip


def _first_change(now: Answer, changes: list[tuple[str, Answer]]) -> str | None:
    """The change that wins most devices, a second server only if no other wins any; None if none does. What lies
    within the resolution of a capacity is no gain."""
    least = (1.0 + Timing().resolution) * now.capacity
    winning = [name for name, answer in changes if answer.capacity > least]
    return next((name for name in winning if name != SECOND_SERVER), winning[0] if winning else None)


def _verdict(args: argparse.Namespace, now: Answer, alone: Answer) -> str:
    profile = find_profile(args.profile)
    kind = "derived from published figures" if is_derived(profile) else "measured"
    word = "can" if now.attainment >= ATTAINMENT else "cannot"
    return (
        f"\n{args.devices} devices at {args.tpot_ms:g} ms per token {word} be served by {profile.fingerprint.model} on "
        f"{profile.fingerprint.device} ({kind}):\n{now.attainment:.1%} of sessions meet their SLO, "
        f"{now.goodput:.0f} tokens/s count ({now.figures['sessions']:.0f} sessions were judged, in "
        f"{now.figures['simulated_s']:.0f} s). The server holds "
        f"{now.held} such devices, {alone.held} without drafts.{_floor(args.tpot_ms, profile.costs)}"
    )


def _floor(tpot_ms: float, costs: Costs) -> str:
    """What is to be said of an SLO that asks for more than a pass per token."""
    pass_ms = 1e3 * unloaded_pass_s(costs)
    if tpot_ms >= pass_ms:
        return ""
    return f"\nA pass takes {pass_ms:.1f} ms with a single session: below that every turn needs drafts that are right."
