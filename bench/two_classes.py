"""Two SLO classes on one server: does the tight class keep its SLO while loose sessions load the machine?

Eight sessions on a real tritonserver, the same under every policy: `tight` ones (short prompts, thin clients, tpot a
little above an unloaded pass) and `loose` ones (prompts of some hundred tokens that arrive while the others run, long
draft chains, generous tpot). The run ends with the last tight session; what loose sessions have got by then counts.

Real: tritonserver, gRPC, the default target, scheduler, sessions, estimator, edge clients. Emulated: drafting (see
emulated_device.py; the target's own text, wrong at a given rate, at a given speed), so that the server's cores belong
to the server. Drafting is the same under every policy, and so are all settings but the policy.

The unit of time is an unloaded pass (one session, one token), measured on an idle server before every round: SLOs,
draft speed and the gaps between opens are multiples of it. So a slow or busy machine gets the same task; one that
becomes busier during a round does not, and `drift` (the pass after the last round over the one before the first) tells.

Nobody is refused (max_load 0). `fcfs` is SLED with the best of some batch sizes, waits and modes (--quick: fewer),
tried beforehand on shorter sessions: most tight sessions in SLO, then the lowest tpot of the tight class.

attainment_*    share of a class's sessions that met ttft and mean tpot at the client; median and worst of the rounds
interference    our own definition: measured time of the passes that gave a tight session its tokens, the first
                excluded, less that of an unloaded pass; mean
lossless        every token is the target's own, judged by transformers' unmodified model
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.class_figures import RunFigures, figures_over_rounds, show
from bench.class_workload import LOOSE, TIGHT, Drafts, Text, make_devices, make_prompts, write_texts
from bench.emulated_device import run_devices
from bench.live import Drafting, make_open, run_session
from bench.report import Progress, check_targets, finish, median
from bench.target_alone import TargetAlone
from triton_models.launcher import make_server
from triton_models.server_process import ServerProcess
from wisp_plugin.home import default_target_dir
from wisp_plugin.messages import Commit, Mode, Sampling, Slo, Tokens

POLICIES = ("wisp", "fcfs", "edf", "continuous")
TARGETS = {
    "attainment_tight_wisp": ">= 1.0",
    "attainment_loose_wisp": ">= 1.0",
    "attainment_tight_fcfs": "<= 0.5",
    "lossless": ">= 1.0",
}
LONE_TOKENS = 32  # of the session that measures an unloaded pass
WARM_UP_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Setting:
    """How a server is run: the policy, and what is tuned about `fcfs`."""

    policy: str
    mode: Mode = Mode.FREE
    batch_sessions: int = 8
    batch_wait_ms: float = 0.0

    @property
    def name(self) -> str:
        """For tables."""
        if self.policy != "fcfs":
            return self.policy
        return f"fcfs, {self.mode.value}, batch {self.batch_sessions} / {self.batch_wait_ms:g} ms"


SLED = (
    *(Setting("fcfs", Mode.FREE, num_sessions) for num_sessions in (8, 4, 2, 1)),
    Setting("fcfs", Mode.SYNC, 8, 20.0),
    Setting("fcfs", Mode.SYNC, 4, 20.0),
    Setting("fcfs", Mode.SYNC, 4, 0.0),
)
SLED_QUICK = (SLED[0], SLED[1], SLED[6])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `wisp-bench classes`."""
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="of all policies in turn [%(default)s]")
    parser.add_argument("--tight", type=int, default=3, metavar="N", help="tight sessions [%(default)s]")
    parser.add_argument("--loose", type=int, default=5, metavar="N", help="loose sessions [%(default)s]")
    parser.add_argument("--tight-tokens", type=int, default=200, metavar="N", help="of a tight session [%(default)s]")
    parser.add_argument("--loose-tokens", type=int, default=640, metavar="N", help="of a loose one [%(default)s]")
    parser.add_argument("--loose-prompt", type=int, default=200, metavar="N", help="at least so long [%(default)s]")
    passes = "in unloaded passes [%(default)s]"
    parser.add_argument("--tight-ttft", type=float, default=15.0, metavar="X", help=passes)
    parser.add_argument("--tight-tpot", type=float, default=1.75, metavar="X", help=passes)
    parser.add_argument("--loose-ttft", type=float, default=150.0, metavar="X", help=passes)
    parser.add_argument("--loose-tpot", type=float, default=8.0, metavar="X", help=passes)
    parser.add_argument(
        "--drafts-per-pass", type=float, default=5.0, metavar="X", help="of a loose device [%(default)s]"
    )
    parser.add_argument("--acceptance", type=float, default=0.85, metavar="X", help="of a draft token [%(default)s]")
    parser.add_argument("--ahead", type=int, default=12, metavar="N", help="draft tokens ahead [%(default)s]")
    parser.add_argument("--max-pass-tokens", type=int, default=128, metavar="N", help="of every policy [%(default)s]")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of the server's torch [%(default)s]")
    parser.add_argument("--trace", type=Path, metavar="DIR", help="keep one trace file per run there")
    parser.add_argument("--seed", type=int, default=0, help="of wrong drafts [%(default)s]")
    parser.add_argument("--quick", action="store_true", help="one round, fewer settings of fcfs")


def main(args: argparse.Namespace) -> int:
    """Exit code 1 only where a token is not the target's own: speed depends on the machine, and the table says it."""
    if args.quick:
        args.rounds = 1
    if args.trace:
        args.trace.mkdir(parents=True, exist_ok=True)
    with make_server(settings={"num_threads": args.threads, "max_load": 0}) as reference:
        prompts = make_prompts(args.tight, args.loose, args.loose_prompt)
        texts = write_texts(reference.grpc_url, prompts, {TIGHT: args.tight_tokens, LOOSE: args.loose_tokens})
        bench = Bench(args, reference, texts)
        sled = bench.best(SLED_QUICK if args.quick else SLED)
        settings = [sled if policy == "fcfs" else Setting(policy) for policy in POLICIES]
        runs = bench.run_rounds(settings)
        last_pass_s = bench.unloaded_pass_s()
    show("Two classes on one server, live", runs)
    num_ties, mismatches = bench.judge_tokens()
    print("\n".join(["", f"fcfs: {sled.name}; {num_ties} ties", *mismatches]))
    figures: dict[str, Any] = figures_over_rounds(runs) | {"lossless": float(not mismatches), "ties": num_ties}
    passes_s = [run.unloaded_pass_s for run in next(iter(runs.values()))]
    figures |= {"unloaded_pass_ms": 1e3 * median(passes_s), "drift": last_pass_s / passes_s[0]}
    missed = check_targets(figures, TARGETS)
    config = {**vars(args), "fcfs": sled}
    finish("classes", {**figures, "mismatches": mismatches, "missed": missed}, config, args.seed)
    return 1 if mismatches else 0


class Bench:
    """Runs of the same devices on fresh servers, and every session that came out of them."""

    def __init__(self, args: argparse.Namespace, reference: ServerProcess, texts: Sequence[Text]) -> None:
        """`reference` is an idle server of its own: unloaded passes are measured there."""
        self._args = args
        self._reference = reference
        self._texts = texts
        self._sessions: list[tuple[Text, Tokens]] = [(text, text.generated) for text in texts]
        self._num_runs = 0

    def unloaded_pass_s(self) -> float:
        """Median time of a pass over one session with one token."""
        times_s: list[float] = []

        def on_commit(commit: Commit) -> None:
            times_s.append(commit.timing.measured_us / 1e6)

        opened = make_open(self._texts[0].prompt, LONE_TOKENS, Mode.FREE, Sampling())
        run_session(self._reference.grpc_url, opened, Drafting(), on_commit=on_commit)
        return median(times_s[1:])  # the first one is the prefill

    def slos(self, unloaded_pass_s: float) -> dict[str, Slo]:
        """The SLO of each class."""
        args, pass_ms = self._args, 1e3 * unloaded_pass_s
        return {
            TIGHT: Slo(round(args.tight_ttft * pass_ms, 1), round(args.tight_tpot * pass_ms, 1), TIGHT),
            LOOSE: Slo(round(args.loose_ttft * pass_ms, 1), round(args.loose_tpot * pass_ms, 1), LOOSE),
        }

    def run(self, setting: Setting, unloaded_pass_s: float, tight_tokens: int) -> RunFigures:
        """One run on a fresh server; tight sessions have `tight_tokens`."""
        args, slos = self._args, self.slos(unloaded_pass_s)
        drafts = Drafts(args.drafts_per_pass / unloaded_pass_s, args.acceptance, args.ahead, args.seed)
        devices = make_devices(self._texts, drafts, unloaded_pass_s, tight_tokens)
        with make_server(settings=self._server_settings(setting, slos)) as server:
            warm_up = make_open(devices[0].prompt, WARM_UP_TOKENS, Mode.FREE, Sampling())
            run_session(server.grpc_url, warm_up, Drafting())
            results = run_devices(server.grpc_url, devices, setting.mode)
        self._sessions += [(text, result.tokens) for text, result in zip(self._texts, results, strict=True)]
        return RunFigures.of(results, slos, unloaded_pass_s)

    def _server_settings(self, setting: Setting, slos: Mapping[str, Slo]) -> dict[str, Any]:
        self._num_runs += 1
        trace = self._args.trace
        return {
            "policy": setting.policy,
            "num_threads": self._args.threads,
            "max_load": 0,
            "max_pass_tokens": self._args.max_pass_tokens,
            "static_batch_sessions": setting.batch_sessions,
            "static_batch_wait_ms": setting.batch_wait_ms,
            "slo_classes": ", ".join(f"{name}={slo.ttft_ms}/{slo.tpot_ms}" for name, slo in slos.items()),
            "trace_file": str(trace.absolute() / f"{self._num_runs:02d}-{setting.policy}.jsonl") if trace else "",
        }

    def best(self, settings: Sequence[Setting]) -> Setting:
        """The setting under which most tight sessions meet their SLO, and then the one with their lowest tpot."""
        num_tokens = max(2, self._args.tight_tokens // 2)
        unloaded_pass_s = self.unloaded_pass_s()
        tried: dict[str, list[RunFigures]] = {}
        with Progress(len(settings), "settings of fcfs") as progress:
            for setting in settings:
                tried[setting.name] = [self.run(setting, unloaded_pass_s, num_tokens)]
                progress.step()
        show("Settings of fcfs, shorter sessions", tried)
        tight = [runs[0].classes[TIGHT] for runs in tried.values()]
        return min(zip(settings, tight, strict=True), key=lambda pair: (-pair[1].attainment, pair[1].tpot_ms))[0]

    def run_rounds(self, settings: Sequence[Setting]) -> dict[str, list[RunFigures]]:
        """All policies in turn, round by round; the SLOs of a round come from an unloaded pass before it."""
        runs: dict[str, list[RunFigures]] = {setting.policy: [] for setting in settings}
        with Progress(self._args.rounds * len(settings), "runs") as progress:
            for _ in range(self._args.rounds):
                unloaded_pass_s = self.unloaded_pass_s()
                for setting in settings:
                    runs[setting.policy].append(self.run(setting, unloaded_pass_s, self._args.tight_tokens))
                    progress.step(note=setting.name)
        return runs

    def judge_tokens(self) -> tuple[int, list[str]]:
        """Ties and mismatches over all sessions. One that is a beginning of a text judged already needs no forward."""
        target = TargetAlone(default_target_dir(), self._args.threads)
        num_ties, mismatches = 0, []
        for at, (text, tokens) in enumerate(self._sessions):
            if at >= len(self._texts) and np.array_equal(tokens, text.generated[: len(tokens)]):
                continue
            ties, wrong = target.judge(text.prompt, tokens)
            num_ties += ties
            mismatches += [f"MISMATCH: {text.slo_class} session: token {i} is not the target's own" for i in wrong]
        return num_ties, mismatches
