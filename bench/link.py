"""One device far from its server: `free` against `sync` over a link with a delay, live, through a real tritonserver.

Committed tokens/s from the open to the last commit, greedy, plain 8-bit draft. All messages spend half of --rtt-ms on
the way (bench/delayed_link.py). `sync` drafts a chain by the rule `ratio`, sends it and waits for its commit; `free`
drafts on meanwhile by the rule `price` (DESIGN.md sections 4 and 8). Plain decoding, a thin client over the same link,
is the baseline. The three alternate in one run, prompt by prompt and in turning order; medians of the paired ratios.
Their texts must be equal. Every prompt is run once before, uncounted: device and server both hold its KV then, as in
the next turn of a conversation, and no system pays a prefill that the ones behind it find done.

Each side has one core: the server's process group is pinned to one, this process to another, and each computes with one
thread. So neither takes the other's time, as on two machines.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bench.delayed_link import DelayedLink
from bench.live import Drafting, SessionResult, make_open, run_session
from bench.prompts import mt_bench_questions
from bench.report import Progress, check_targets, finish, median, print_table
from edge_runtime.drafter import Drafter
from edge_runtime.tokenizer import Tokenizer
from edge_runtime.transport import GrpcStream
from triton_models.launcher import make_server
from wisp_plugin.acceptance_model import shipped_model
from wisp_plugin.controller import SpeculationController
from wisp_plugin.errors import ConfigError
from wisp_plugin.home import default_draft_dir
from wisp_plugin.messages import Mode, Sampling, Tokens
from wisp_plugin.speculation import AUTO, make_controller

TARGETS = {"free_speedup": ">= 1.3"}
DRAFT = "int8"
FIRST_PROMPT = 8  # MT-bench questions from here on
SYSTEMS = ("free", "sync", "decode")


def controller_for(mode: Mode) -> SpeculationController:
    """The controller of a session of each mode: rule `price` in `free`, `ratio` in `sync`."""
    return make_controller(AUTO, mode, shipped_model(DRAFT))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `wisp-bench link`."""
    parser.add_argument("--rtt-ms", type=float, default=40.0, metavar="MS", help="round trip of the link [%(default)s]")
    parser.add_argument("--jitter-ms", type=float, default=0.0, metavar="MS", help="at most so much more per way [0]")
    parser.add_argument("--prompts", type=int, default=8, metavar="N", help="MT-bench questions [%(default)s]")
    parser.add_argument("--tokens", type=int, default=96, metavar="N", help="generated per session [%(default)s]")
    parser.add_argument("--rounds", type=int, default=2, metavar="N", help="repetitions of every prompt [%(default)s]")
    parser.add_argument("--policy", metavar="NAME", help="of the server's scheduler [the server's default]")
    parser.add_argument("--quick", action="store_true", help="3 prompts of 64 tokens, once")


def main(args: argparse.Namespace) -> int:
    """Exit code 0 also where the target is missed: that depends on the machine, and the table says it."""
    if args.quick:
        args.prompts, args.tokens, args.rounds = 3, 64, 1
    if args.rtt_ms < 0 or args.jitter_ms < 0:
        raise ConfigError("--rtt-ms and --jitter-ms are times; allowed: 0 or more")
    device_core, server_core = two_cores()
    folder = default_draft_dir(DRAFT)
    tokenizer = Tokenizer.load(folder)
    questions = mt_bench_questions()[FIRST_PROMPT : FIRST_PROMPT + args.prompts]
    prompts = [tokenizer.encode_chat([{"role": "user", "content": question}]) for question in questions]
    with contextlib.ExitStack() as stack:
        with pinned_to(server_core):  # what is started in here stays there
            settings = {"num_threads": 1} | ({"policy": args.policy} if args.policy else {})
            server = stack.enter_context(make_server(settings=settings))
        stack.enter_context(pinned_to(device_core))
        results = measure(args, Drafter.load(folder, num_threads=1), prompts, server.grpc_url)
    figures = report(args, results, (device_core, server_core))
    missed = check_targets(figures, TARGETS)
    finish("link", {**figures, "missed": missed}, vars(args), seed=0)
    return 0


def two_cores() -> tuple[int, int]:
    """A core for the device and another one for the server."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise ConfigError("device and server need a core each; this process may use one only")
    return cores[0], cores[1]


@contextlib.contextmanager
def pinned_to(core: int) -> Iterator[None]:
    """All threads of this process, and what is started meanwhile, on one core; then as before."""
    before = os.sched_getaffinity(0)
    _pin({core})
    try:
        yield
    finally:
        _pin(before)


def _pin(cores: set[int]) -> None:
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            os.sched_setaffinity(int(thread.name), cores)


def measure(
    args: argparse.Namespace, drafter: Drafter, prompts: list[Tokens], server: str
) -> dict[str, list[SessionResult]]:
    """Results of every system, one per prompt and round, in the same order."""

    def connect(address: str) -> DelayedLink:
        return DelayedLink(GrpcStream(address), args.rtt_ms / 1e3, args.jitter_ms / 1e3)

    def run(system: str, prompt: Tokens) -> SessionResult:
        mode = Mode.SYNC if system == "sync" else Mode.FREE
        drafting = Drafting(make_controller=lambda: controller_for(mode), drafter=drafter, mode=mode)
        opened = make_open(prompt, args.tokens, mode, Sampling())
        return run_session(server, opened, Drafting() if system == "decode" else drafting, connect=connect)

    results: dict[str, list[SessionResult]] = {system: [] for system in SYSTEMS}
    with Progress(args.rounds * len(prompts) * (len(SYSTEMS) + 1), "link") as progress:
        for turn, prompt in enumerate(prompts * args.rounds):
            run("sync", prompt)
            progress.step()
            for system in (*SYSTEMS[turn % len(SYSTEMS) :], *SYSTEMS[: turn % len(SYSTEMS)]):
                results[system].append(run(system, prompt))
                progress.step()
            check_equal({system: results[system][-1].tokens for system in SYSTEMS})
    return results


def check_equal(texts: dict[str, Tokens]) -> None:
    """Raise AssertionError unless all texts are that of plain decoding."""
    for system, tokens in texts.items():
        if not np.array_equal(tokens, texts["decode"]):
            first = int(np.argmax(tokens != texts["decode"])) if len(tokens) == len(texts["decode"]) else -1
            raise AssertionError(f"{system} differs from plain decoding at generated token {first}")


def report(args: argparse.Namespace, results: dict[str, list[SessionResult]], cores: tuple[int, int]) -> dict[str, Any]:
    """Table and figures of `measure`."""
    speeds = {system: np.array([result.tokens_per_s for result in found]) for system, found in results.items()}
    wdt = {system: median(result.stats.wdt_share for result in results[system]) for system in ("free", "sync")}
    per_pass = {system: median(result.stats.tokens_per_pass for result in found) for system, found in results.items()}
    print_table(
        f"One device {args.rtt_ms:g} ms from its server, greedy, {DRAFT} draft; device on core {cores[0]}, server on "
        f"core {cores[1]}, one thread each",
        ["system", "tokens/s, median", "slowest", "fastest", "times plain decoding", "tokens per pass", "WDT share"],
        [
            [name, median(v), min(v), max(v), median(v / speeds["decode"]), per_pass[name], wdt.get(name)]
            for name, v in speeds.items()
        ],
    )
    print("WDT share: drafting time of tokens that were not accepted / all drafting time (our definition)")
    return {
        **{f"tokens_per_s_{system}": median(values) for system, values in speeds.items()},
        "free_speedup": median(speeds["free"] / speeds["sync"]),
        "free_vs_decode": median(speeds["free"] / speeds["decode"]),
        "sync_vs_decode": median(speeds["sync"] / speeds["decode"]),
        **{f"tokens_per_pass_{system}": value for system, value in per_pass.items()},
        **{f"wdt_share_{system}": value for system, value in wdt.items()},
        "cores": {"device": cores[0], "server": cores[1]},
    }
