"""One device end to end, both sides on this machine: speed against plain decoding and assisted generation, path cost.

Speed: committed tokens/s from the open to the last commit, warm, greedy, 8-bit draft, in both modes. The device and
the server compute at the same time, so each gets its share of the cores (--server-threads, --draft-threads). Plain
decoding is measured on that same server and on a second one that has all cores to itself; ratio_vs_server_decode is
taken against the faster of the two. transformers' assisted generation has all cores, too: the same target (fp32),
the same draft graph, its own defaults. All alternate in one run, prompt by prompt; medians of the paired ratios.

Path: see bench/path_cost.py; one client, and eight at once.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np

from bench.assisted import AssistedPeer
from bench.live import Drafting, SessionResult, half_the_cores, make_open, run_session
from bench.path_cost import FLOOR_MODEL, FLOOR_REPOSITORY, replay, replay_many
from bench.prompts import mt_bench_questions
from bench.report import Progress, alternate, check_targets, finish, median, percentile, print_table
from edge_runtime.drafter import Drafter
from edge_runtime.tokenizer import Tokenizer
from edge_runtime.transport import VERIFIER_MODEL
from triton_models.launcher import make_server
from wisp_plugin.home import default_draft_dir, default_target_dir
from wisp_plugin.messages import Mode, Sampling, Tokens

TARGETS = {
    "ratio_vs_server_decode": ">= 2.0",
    "ratio_vs_assisted": ">= 1.0",
    "overhead_ms_median": "<= 2.0",
    "overhead_ms_p99_8": "<= 8.0",
}
FIRST_PROMPT = 8  # MT-bench questions from here on
PATH_TOKENS = 240


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `wisp-bench e2e`."""
    parser.add_argument("--prompts", type=int, default=5, metavar="N", help="MT-bench questions [%(default)s]")
    parser.add_argument("--tokens", type=int, default=96, metavar="N", help="generated per session [%(default)s]")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="repetitions of every prompt [%(default)s]")
    half = half_the_cores()
    parser.add_argument("--server-threads", type=int, default=half, metavar="N", help="of the verifying server [half]")
    parser.add_argument("--draft-threads", type=int, default=half, metavar="N", help="of the draft model [half]")
    parser.add_argument("--free-length", type=int, default=12, metavar="N", help="draft tokens ahead in free [12]")
    parser.add_argument("--sync-length", type=int, default=8, metavar="N", help="draft tokens per round in sync [8]")
    parser.add_argument("--no-assisted", action="store_true", help="leave assisted generation out")
    parser.add_argument("--quick", action="store_true", help="2 prompts of 48 tokens, once")


def main(args: argparse.Namespace) -> int:
    """Exit code 0 also where a target of speed is missed: that depends on the machine, and the table says it."""
    if args.quick:
        args.prompts, args.tokens, args.rounds = 2, 48, 1
    folder = default_draft_dir("int8")
    tokenizer = Tokenizer.load(folder)
    questions = mt_bench_questions()[FIRST_PROMPT : FIRST_PROMPT + args.prompts]
    prompts = [tokenizer.encode_chat([{"role": "user", "content": question}]) for question in questions]
    figures = measure_path(args, prompts[0])
    with contextlib.ExitStack() as stack:
        shared = stack.enter_context(make_server(settings={"num_threads": args.server_threads}))
        whole = stack.enter_context(make_server())
        peer = None if args.no_assisted else AssistedPeer(default_target_dir(), Drafter.load(folder))
        figures |= report_speed(measure_speed(args, prompts, shared.grpc_url, whole.grpc_url, peer))
    missed = check_targets(figures, {k: v for k, v in TARGETS.items() if figures.get(k) is not None})
    finish("e2e", {**figures, "missed": missed}, vars(args), seed=0)
    return 0


def measure_speed(
    args: argparse.Namespace, prompts: list[Tokens], shared: str, whole: str, peer: AssistedPeer | None
) -> dict[str, list[float]]:
    """Tokens per second of every system, one value per prompt and round, in the same order."""
    drafter = Drafter.load(default_draft_dir("int8"), num_threads=args.draft_threads)
    free, sync = Drafting(drafter, Mode.FREE, args.free_length), Drafting(drafter, Mode.SYNC, args.sync_length)

    def live(server: str, drafting: Drafting) -> Callable[[Tokens], tuple[Tokens, float]]:
        def run(prompt: Tokens) -> tuple[Tokens, float]:
            opened = make_open(prompt, args.tokens, drafting.mode, Sampling())
            result: SessionResult = run_session(server, opened, drafting)
            return result.tokens, result.tokens_per_s

        return run

    systems = {
        "free": live(shared, free),
        "sync": live(shared, sync),
        "decode": live(shared, Drafting()),
        "decode_all_cores": live(whole, Drafting()),
    }
    if peer is not None:
        systems["assisted"] = peer.timed(args.tokens)
    for system in systems.values():
        system(prompts[0])  # warm
    speeds: dict[str, list[float]] = {name: [] for name in systems}
    with Progress(args.rounds * len(prompts) * len(systems), "speed") as progress:
        for prompt in prompts * args.rounds:
            texts = {}
            for name, system in systems.items():
                texts[name], speed = system(prompt)
                speeds[name].append(speed)
                progress.step()
            _check_equal(texts)
    return speeds


def _check_equal(texts: dict[str, Tokens]) -> None:
    """All systems are the same target, greedy; near ties may part assisted generation, never ours from ours."""
    ours = {name: tokens for name, tokens in texts.items() if name != "assisted"}
    for name, tokens in ours.items():
        if not np.array_equal(tokens, texts["decode"]):
            first = int(np.argmax(tokens != texts["decode"]))
            raise AssertionError(f"{name} differs from plain decoding at generated token {first}")


def report_speed(speeds: dict[str, list[float]]) -> dict[str, Any]:
    """Table and figures of `measure_speed`."""
    best_decode = np.maximum(speeds["decode"], speeds["decode_all_cores"])

    def ratio(name: str, base: Any) -> float | None:
        return median(np.array(speeds[name]) / np.array(base)) if name in speeds else None

    print_table(
        "One device, greedy, 8-bit draft, both sides on this machine",
        ["system", "tokens/s, median", "slowest", "fastest", "times plain decoding"],
        [[name, median(v), min(v), max(v), ratio(name, best_decode)] for name, v in speeds.items()],
    )
    assisted = speeds.get("assisted")
    return {
        **{f"tokens_per_s_{name}": median(values) for name, values in speeds.items()},
        "ratio_vs_server_decode": ratio("free", best_decode),
        "ratio_vs_server_decode_sync": ratio("sync", best_decode),
        "ratio_vs_same_threads_decode": ratio("free", speeds["decode"]),
        "ratio_vs_assisted": ratio("free", assisted) if assisted else None,
        "ratio_vs_assisted_sync": ratio("sync", assisted) if assisted else None,
    }


def measure_path(args: argparse.Namespace, prompt: Tokens) -> dict[str, Any]:
    """Overhead of the path, one client and eight, to the verifier and to a model that does nothing, alternately."""
    ours, floor = VERIFIER_MODEL, FLOOR_MODEL
    with (
        # However slow this machine is: what is replayed knows no refusal.
        make_server(settings={"num_threads": args.server_threads, "max_load": 0.0}) as server,
        make_server(FLOOR_REPOSITORY, (FLOOR_MODEL,)) as empty,
    ):
        opened = make_open(prompt, PATH_TOKENS, Mode.FREE, Sampling())
        truth = run_session(server.grpc_url, opened, Drafting()).tokens
        runs: dict[tuple[str, int], Callable[[], list[float]]] = {
            (ours, 1): lambda: replay(server.grpc_url, prompt, truth),
            (floor, 1): lambda: replay_many(empty.grpc_url, prompt, truth, 1, FLOOR_MODEL),
            (ours, 8): lambda: replay_many(server.grpc_url, prompt, truth, 8),
            (floor, 8): lambda: replay_many(empty.grpc_url, prompt, truth, 8, FLOOR_MODEL),
        }
        overheads_ms = {
            key: [1e3 * overhead_s for part in parts for overhead_s in part]
            for key, parts in alternate(runs, 1 if args.quick else 3).items()
        }
    print_table(
        "Path: send of a draft to its commit, less the pass and the wait for it",
        ["model", "clients", "rounds", "median, ms", "p90, ms", "p99, ms", "max, ms"],
        [[m, n, len(v), median(v), percentile(v, 90), percentile(v, 99), max(v)] for (m, n), v in overheads_ms.items()],
    )
    return {
        "overhead_ms_median": median(overheads_ms[ours, 1]),
        "overhead_ms_p99_8": percentile(overheads_ms[ours, 8], 99),
        "overhead_ms_median_8": median(overheads_ms[ours, 8]),
        "floor_ms_median": median(overheads_ms[floor, 1]),
        "floor_ms_p99_8": percentile(overheads_ms[floor, 8], 99),
        "floor_ms_median_8": median(overheads_ms[floor, 8]),
    }
