"""What `wisp-bench load` and `validate` have in common: from a command line to devices, the emulated GPU and a server.

Dilation: a small machine cannot play a GPU that answers thousands of times per second. With `--dilation K` everything
takes K times as long, passes, draft steps, links, SLOs and pauses, and all figures are given in the GPU's own time
again, so that what the machine itself needs per message counts K times less (time dilation, Gupta et al., NSDI 2006).
"""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.arguments import (
    MOST_RTT_MS,
    MOST_S,
    MOST_SPEED,
    check_range,
    num_kv_tokens,
    num_processes,
    number,
    positive_int,
    share,
    whole_number,
)
from bench.gpu_cost import unloaded_pass_s
from bench.gpu_profile import DEFAULT, find_profile
from bench.load_run import MakeController
from bench.load_tokens import LoadTokens
from bench.scenario import Scenario
from bench.trace_walk import TraceRing
from bench.traces_folder import FOLDER
from bench.workload import CLASSES, Workload
from triton_models.emulated_verifier import MAX_NOISE, Emulation
from triton_models.launcher import make_server
from triton_models.server_process import ServerProcess
from wisp_plugin.draft_trace import DraftTrace
from wisp_plugin.errors import ConfigError
from wisp_plugin.estimator import Costs, Estimator
from wisp_plugin.messages import Mode
from wisp_plugin.profile import Profile, save_profile
from wisp_plugin.scheduler import POLICIES
from wisp_plugin.speculation import RULES

PASSES = "passes.jsonl"
_MOST_DILATION, _MOST_SLO = 1e3, 1e3
MOST_SEED = (1 << 23) - 1  # seeds of sessions are made from it and go over the wire in 64 bits


def add_load_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of both commands; what they give besides is how far apart devices start, and how long they pause."""
    add = parser.add_argument
    add("--profile", default=DEFAULT, metavar="P", help=f"emulated GPU: of bench/profiles, or a file [{DEFAULT}]")
    add("--trace", metavar="FILE", default="int4-eval.npz", help="of drafts, or in bench/traces; none: [%(default)s]")
    add("--acceptance", type=share, default=0.75, metavar="X", help="per token without a trace [%(default)s]")
    add("--noise", type=number(0.0, MAX_NOISE), default=0.0, metavar="SIGMA",
        help="lognormal, on the time of a pass [%(default)s]")  # fmt: skip
    add("--policy", default="wisp", choices=sorted(POLICIES), help="of the server [%(default)s]")
    add("--mode", default="free", choices=[mode.value for mode in Mode], help="of the sessions [%(default)s]")
    add("--rule", default="auto", metavar="RULE", help=f"of drafting: none, {', '.join(RULES)} [%(default)s]")
    add("--message-tokens", type=positive_int, default=4, metavar="N", help="draft tokens in a message [%(default)s]")
    add("--speed", type=number(0.0, MOST_SPEED, above=True), nargs=2, default=(60.0, 120.0), metavar="X",
        help="lowest and highest, drafted tokens/s [60 120]")  # fmt: skip
    add("--rtt", type=number(0.0, MOST_RTT_MS), nargs=2, default=(20.0, 20.0), metavar="MS",
        help="lowest and highest of the links, ms [20 20]")  # fmt: skip
    add("--jitter", type=number(0.0, MOST_RTT_MS), default=0.0, metavar="MS", help="on each way, ms [%(default)s]")
    add("--slo", type=number(0.0, _MOST_SLO, above=True), default=1.0, metavar="X",
        help="factor on the tpot of all classes [%(default)s]")  # fmt: skip
    add("--timed", action=argparse.BooleanOptionalAction, default=False,
        help="sessions start at the pace of their SLO, whatever happened before; else behind the last one "
        "[%(default)s]")  # fmt: skip
    add("--duration", type=number(0.0, MOST_S, above=True), default=45.0, metavar="S",
        help="in the GPU's time [%(default)s]")  # fmt: skip
    add("--warm-up", type=number(0.0, MOST_S), default=25.0, metavar="S", help="of that, not counted [%(default)s]")
    add("--kv-tokens", type=num_kv_tokens, default=131_072, metavar="N",
        help="KV memory of the GPU [%(default)s]")  # fmt: skip
    add("--dilation", type=number(0.0, _MOST_DILATION, above=True), default=1.0, metavar="K",
        help="everything takes K times as long [%(default)s]")  # fmt: skip
    add("--processes", type=num_processes, default=1, metavar="N", help="of clients [%(default)s]")
    add("--seed", type=whole_number(0, MOST_SEED), default=0, help="of devices and sessions [%(default)s]")


def trace_path(name: str) -> Path | None:
    """A file, or one of bench/traces; None for `none`. Raises ConfigError for a file that is not there."""
    if name == "none":
        return None
    try:
        for path in (Path(name), FOLDER / name):
            if path.is_file():
                return path
    except (OSError, ValueError) as error:  # of what no file can be called
        raise ConfigError(f"--trace: {error}; the name of a file is needed") from None
    known = ", ".join(sorted(path.name for path in FOLDER.glob("*.npz")))
    raise ConfigError(f"--trace {name}: no such file; in bench/traces are {known}; or none")


@dataclass(frozen=True, slots=True)
class Load:
    """A scenario in the machine's time, the profile and the trace of the server, and the dilation between both."""

    scenario: Scenario
    profile: Profile
    trace: Path | None
    dilation: float
    noise_seed: int  # of the server's passes

    @classmethod
    def of(cls, args: argparse.Namespace, num_devices: int) -> Load:
        """From `add_load_arguments`, `stagger` and `think` (seconds, in the GPU's time).

        Raises:
            ModelError, ConfigError: a file that cannot be read, a stop rule that is none or not for the mode, options
                that do not go together.
        """
        _check_together(args)
        scale = args.dilation
        profile = find_profile(args.profile)
        costs = dilated(profile.costs, scale)
        trace = trace_path(args.trace)
        ring = _ring(trace) if trace else None
        mode = Mode(args.mode)
        make_controller = MakeController(args.rule, mode, (trace.stem if trace else "int4").partition("-")[0])
        make_controller()  # the rule is one that there is
        workload = Workload(
            num_devices=num_devices,
            drafted_tokens_per_s=tuple(speed / scale for speed in args.speed),
            rtt_s=tuple(scale * rtt / 1e3 for rtt in args.rtt),
            jitter_s=scale * args.jitter / 1e3,
            classes=tuple(dataclasses.replace(c, tpot_passes=args.slo * c.tpot_passes) for c in CLASSES),
            unloaded_pass_s=unloaded_pass_s(costs),
            prefill_allowance_s=scale * Workload().prefill_allowance_s,
            stagger_s=scale * args.stagger,
            timed=args.timed,
            think_s=scale * args.think,
            seed=args.seed,
        )
        scenario = Scenario(
            workload, args.policy, mode, controller=make_controller,
            message_tokens=args.message_tokens, acceptance=args.acceptance,
            tokens=LoadTokens(ring, args.acceptance, args.seed), duration_s=scale * args.duration,
            warm_up_s=scale * args.warm_up, costs=costs, noise_sigma=args.noise, kv_tokens=args.kv_tokens,
            seed=args.seed,
        )  # fmt: skip
        start = Estimator(costs)  # as it starts in the simulation
        profile = dataclasses.replace(profile, costs=costs, margin=start.margin, noise=start.noise)
        return cls(scenario, profile, trace, scale, args.seed)

    def settings(self, profile: Path) -> dict[str, Any]:
        """Of the server, with the profile kept in `profile`: what the simulation gives to its engine."""
        scenario, room = self.scenario, max(256, 2 * self.scenario.workload.num_devices)
        trace = self.trace.absolute() if self.trace else None
        return {
            "target": Emulation(profile.absolute(), trace, scenario.noise_sigma, self.noise_seed).target,
            "policy": scenario.policy,
            "kv_tokens": scenario.kv_tokens,
            "max_sessions": room,
            "max_pass_sessions": room,
            "max_load": 0.0,
            **scenario.engine,
        }

    def server(self, folder: Path) -> ServerProcess:
        """An emulated server for this load, not started. Its profile and the trace of its passes are in `folder`."""
        profile = folder / "profile.json"
        save_profile(self.profile, profile)
        return make_server(settings={**self.settings(profile), "trace_file": str(folder / PASSES)})


def _check_together(args: argparse.Namespace) -> None:
    check_range("--speed", args.speed)
    check_range("--rtt", args.rtt)
    if args.warm_up >= args.duration:
        raise ConfigError(f"--warm-up {args.warm_up:g} has to be below --duration, which is {args.duration:g}")


def _ring(trace: Path) -> TraceRing:
    try:
        Emulation.parse(Emulation(Path(PASSES), trace.absolute()).target)  # as the server will
        return TraceRing(DraftTrace.load(trace))
    except (ConfigError, ValueError) as error:
        raise ConfigError(f"--trace {trace}: {error}") from None


def dilated(costs: Costs, scale: float) -> Costs:
    """The same with everything `scale` times as long."""
    memory, arithmetic = (tuple(scale * price for price in line) for line in (costs.memory, costs.arithmetic))
    return Costs(memory, arithmetic, costs.norm)
