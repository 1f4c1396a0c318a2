"""What `wisp-bench plan` simulates: what is asked, the server alone, every change by itself, and how long runs are."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from bench.arguments import LEAST_KV_TOKENS, PROMPTS
from bench.cells import DRAFTS
from bench.gpu_cost import unloaded_pass_s
from bench.gpu_profile import draft_step_on, find_profile, knows_draft_step, kv_tokens
from bench.scenario import Scenario
from bench.settings import Setting
from bench.systems import SLO_CENTRAL, WISP
from bench.trace_walk import WalkOf
from bench.workload import DeviceKind, SloClass, Throttling, Workload

AS_ASKED, WITHOUT_DRAFTS = "as asked", "without drafts"
SECOND_SERVER = "a second server, half of the devices each"
_WANTED_SESSIONS = 100
_LEAST_SECONDS, _MOST_SECONDS = 36.0, 600.0
_MOST_DEVICE_SECONDS = 4 * 3600.0  # of few devices: 20 sessions of a single one, with pauses, of 8 minutes each


@dataclass(frozen=True, slots=True)
class PlanTiming:
    """How long runs are: `seconds`, or (None) as long as the sessions of so many devices want, each of which takes
    about `session_s` with its pause, within bounds."""

    session_s: float
    seconds: float | None = None

    def lengths_s(self, num_devices: int) -> Iterator[float]:
        """Seconds of a run of so many devices, and of those that follow as long as one judges too few sessions: twice
        as long each time, up to ten minutes, or four hours of devices' time if that is more."""
        wanted_s = 1.5 * _WANTED_SESSIONS * self.session_s / num_devices
        seconds = self.seconds or min(max(_LEAST_SECONDS, wanted_s), _MOST_SECONDS)
        yield seconds
        most_s = max(_MOST_SECONDS, _MOST_DEVICE_SECONDS / num_devices)
        while seconds < most_s:
            seconds = min(2.0 * seconds, most_s)
            yield seconds


@dataclass(frozen=True, slots=True)
class Plan:
    """One way to serve: its name, its scenario, the devices that are asked about on each of its servers (0: it has
    none), and how long runs are."""

    name: str
    scenario: Scenario
    loads: tuple[int, ...]
    timing: PlanTiming

    @property
    def has_room(self) -> bool:
        """Whether the KV memory that its draft model leaves to the target holds the longest session."""
        return self.scenario.kv_tokens >= LEAST_KV_TOKENS

    def runs(self, num_devices: int) -> Iterator[Scenario]:
        """The scenario with so many devices, in longer and longer runs. A third is warm-up, over which they start."""
        for seconds in self.timing.lengths_s(num_devices):
            workload = replace(self.scenario.workload, num_devices=num_devices, stagger_s=seconds / 3)
            yield replace(self.scenario, workload=workload, duration_s=seconds, warm_up_s=seconds / 3)


def make_plans(args: argparse.Namespace) -> list[Plan]:
    """What is asked, the server alone, and every change by itself (of what can be halved)."""
    base, asked = base_scenario(args), args.devices
    timing = PlanTiming(args.output_tokens * args.tpot_ms / 1e3 + args.think_s, args.seconds)

    def served(setting: Setting, scenario: Scenario, draft: str = args.draft) -> Scenario:
        return setting.serve(scenario, draft)

    def with_workload(**changes: Any) -> Scenario:
        return served(WISP.settings[0], replace(base, workload=replace(base.workload, **changes)))

    workload, (ours, *with_server_draft) = base.workload, WISP.settings
    relaxed = tuple(replace(c, tpot_passes=1.25 * c.tpot_passes) for c in workload.classes)
    scenarios = {
        AS_ASKED: served(ours, base),
        WITHOUT_DRAFTS: served(SLO_CENTRAL.settings[0], base),
        "tpot 25 % longer": with_workload(classes=relaxed),
        "devices that draft twice as fast": with_workload(kinds=(DeviceKind(2 * args.speed),)),
    }
    if args.rtt_ms:
        scenarios["half the round trip"] = with_workload(rtt_s=tuple(0.5 * r for r in workload.rtt_s))
    if args.prompt // 2 >= PROMPTS[0]:
        scenarios["prompts half as long"] = with_workload(median_prompt_tokens=args.prompt // 2)
    for draft in DRAFTS[DRAFTS.index(args.draft) + 1 :]:
        better = replace(base, tokens=WalkOf(draft, args.seed))
        scenarios[f"the better draft {draft}"] = served(ours, better, draft)
    for setting in with_server_draft if knows_draft_step(args.profile) else ():
        drafts = f"up to {setting.server_drafts} drafts" if setting.server_drafts > 1 else "one draft"
        name = f"{drafts} of the server as well, KV for {setting.draft_kv_share:.0%}"
        scenarios[name] = served(setting, base)
    plans = [Plan(name, scenario, (asked,), timing) for name, scenario in scenarios.items()]
    return [*plans, Plan(SECOND_SERVER, scenarios[AS_ASKED], (asked // 2, asked - asked // 2), timing)]


def base_scenario(args: argparse.Namespace) -> Scenario:
    """The workload that is asked about, on the profile."""
    costs = find_profile(args.profile).costs
    pass_s = unloaded_pass_s(costs)
    workload = Workload(
        rtt_s=(args.rtt_ms / 1e3, args.rtt_ms / 1e3), jitter_s=0.05 * args.rtt_ms / 1e3,
        classes=(SloClass("asked", args.tpot_ms / 1e3 / pass_s),), unloaded_pass_s=pass_s,
        median_prompt_tokens=args.prompt, median_output_tokens=args.output_tokens,
        kinds=(DeviceKind(args.speed),), throttling=Throttling(), think_s=args.think_s, seed=args.seed,
    )  # fmt: skip
    return Scenario(
        workload, tokens=WalkOf(args.draft, args.seed), costs=costs, noise_sigma=0.03,
        kv_tokens=args.kv_tokens or kv_tokens(), seed=args.seed,
        draft_step=draft_step_on(args.profile, costs.norm) if knows_draft_step(args.profile) else None,
    )  # fmt: skip
