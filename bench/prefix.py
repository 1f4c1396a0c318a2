"""Prefix: what sessions with the same system prompt cost together, in KV memory and in prefill time.

Sessions with one system prompt and private parts of different lengths are opened at once at the real engine, scheduler
and verifier, without a wire. They run in `sync`: the prefill commits a token, then nothing runs, so that only prefills
are timed. Four things are measured in turn, with fresh random tokens in every round (a matchable block of the round
before would else be found):

    together    all sessions, prefixes shared
    separate    the same without sharing
    one         the first session alone
    private     the private parts of the others alone, as if the system prompt did not exist

kv_ratio       blocks in use after `together` / (blocks of one session + blocks of the private parts of the others)
prefill_ratio  time of `together` / (time of `one` + time of `private`)
decode_*_ms    one pass in which every session decodes one token: shared blocks are not neighbours of the session's
               own, so attention on a CPU gathers its KV instead of reading it in place

The table of costs is that of the accounting alone, on 256 sessions.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench import report
from bench.live import make_open
from bench.lossless_schedule import Stream
from triton_models.torch_verifier import TorchVerifier, load_verifier
from wisp_plugin.config import EngineConfig, VerifierConfig
from wisp_plugin.engine import Engine
from wisp_plugin.errors import WispError
from wisp_plugin.estimator import Costs, Estimator
from wisp_plugin.kv_blocks import BlockPool
from wisp_plugin.messages import Draft, Mode, Open, Sampling, Tokens
from wisp_plugin.scheduler import make_scheduler

TARGETS = {"kv_ratio": "<= 1.3", "prefill_ratio": "<= 1.3"}
_MIN_PRIVATE, _MAX_PRIVATE = 20, 60
_NUM_POOL_SESSIONS = 256
_MAX_NEW_TOKENS = 8
_COSTS = Costs(memory=(0.03, 0, 0, 0, 0, 0), arithmetic=(0.01, 0, 0.003, 0, 0, 0))  # `continuous` does not look at them
_NO_TOKENS = np.empty(0, np.int32)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `wisp-bench prefix`."""
    parser.add_argument("--target", default="default", help="Hugging Face id or folder (default: the embedded model)")
    parser.add_argument("--sessions", type=int, default=16, help="sessions with the same system prompt")
    parser.add_argument("--system-tokens", type=int, default=300, help="length of the system prompt")
    parser.add_argument("--rounds", type=int, default=5, help="repetitions of every measurement; medians are shown")
    parser.add_argument("--quick", action="store_true", help="2 repetitions")
    parser.add_argument("--threads", type=int, default=1, help="torch threads; 0: one per core")
    parser.add_argument("--seed", type=int, default=0, help="of tokens and lengths")


def main(args: argparse.Namespace) -> int:
    """Exit code 1 if memory is not shared as asked; time depends on the machine."""
    rounds = 2 if args.quick else args.rounds
    verifier = load_verifier(VerifierConfig(target=args.target, device="cpu", num_threads=args.threads))
    figures = measure_prefills(verifier, args.sessions, args.system_tokens, rounds, args.seed)
    figures |= measure_accounting(args.system_tokens, verifier.pool.block_tokens, args.seed)
    missed = report.check_targets(figures, TARGETS)
    config = {
        "target": args.target,
        "sessions": args.sessions,
        "system_tokens": args.system_tokens,
        "private_tokens": [_MIN_PRIVATE, _MAX_PRIVATE],
        "block_tokens": verifier.pool.block_tokens,
        "rounds": rounds,
        "threads": args.threads,
        "dtype": verifier.dtype_name,
    }
    report.finish("prefix", {**figures, "missed": missed}, config, args.seed)
    return 1 if any("kv_ratio" in line for line in missed) else 0


@dataclass(frozen=True, slots=True)
class Prefill:
    """Figures of one run: all prefills, then one pass of decoding."""

    prefill_s: float
    decode_s: float
    num_blocks: int  # in use behind the prefills


def measure_prefills(
    verifier: TorchVerifier, num_sessions: int, num_system: int, rounds: int, seed: int
) -> dict[str, Any]:
    """The four runs in turn; medians and the two ratios."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(_MIN_PRIVATE, _MAX_PRIVATE + 1, num_sessions).tolist()

    def prompts() -> list[Tokens]:
        system = rng.integers(0, verifier.vocab_size, num_system)
        return [np.append(system, rng.integers(0, verifier.vocab_size, n)).astype(np.int32) for n in lengths]

    runs: dict[str, Callable[[], Prefill]] = {
        "together": lambda: run_prefills(verifier, prompts(), True),
        "separate": lambda: run_prefills(verifier, prompts(), False),
        "one": lambda: run_prefills(verifier, prompts()[:1], True),
        "private": lambda: run_prefills(verifier, [p[num_system:] for p in prompts()[1:]], True),
    }
    runs["one"]()  # warms up
    results = report.alternate(runs, rounds)
    seconds = {name: report.median(r.prefill_s for r in results[name]) for name in runs}
    decode_s = {name: report.median(r.decode_s for r in results[name]) for name in runs}
    num_blocks = {name: max(r.num_blocks for r in results[name]) for name in runs}
    rows = [(name, 1e3 * seconds[name], 1e3 * decode_s[name], num_blocks[name]) for name in runs]
    report.print_table("Prefill and one decoding pass", ("run", "prefill_ms", "decode_ms", "kv_blocks"), rows)
    return {
        "kv_ratio": num_blocks["together"] / (num_blocks["one"] + num_blocks["private"]),
        "prefill_ratio": seconds["together"] / (seconds["one"] + seconds["private"]),
        "prefill_speedup": seconds["separate"] / seconds["together"],
        "kv_saving": num_blocks["separate"] / num_blocks["together"],
        **{f"prefill_{name}_ms": 1e3 * seconds[name] for name in runs},
        **{f"decode_{name}_ms": 1e3 * decode_s[name] for name in ("together", "separate")},
        **{f"kv_blocks_{name}": num_blocks[name] for name in runs},
    }


def run_prefills(verifier: TorchVerifier, prompts: list[Tokens], prefix_sharing: bool) -> Prefill:
    """Open a session per prompt at once and serve them until each has its first token, then one token more."""
    config = EngineConfig(policy="continuous", prefix_sharing=prefix_sharing, max_load=0.0)  # nobody is refused
    engine = Engine(make_scheduler(config, verifier.pool, Estimator(_COSTS)), verifier, config)
    sessions = [(make_open(prompt, _MAX_NEW_TOKENS, Mode.SYNC, Sampling()), Stream()) for prompt in prompts]
    for opened, stream in sessions:
        engine.submit(opened, stream)
    prefill_s = _serve(engine, sessions, num_tokens=1)
    num_blocks = verifier.pool.num_blocks - verifier.pool.num_free
    for opened, stream in sessions:
        at = opened.prompt_len + len(stream.tokens)
        engine.submit(Draft(opened.session, at, at, _NO_TOKENS), Stream())
    decode_s = _serve(engine, sessions, num_tokens=2)
    for opened, _ in sessions:
        verifier.release(opened.session)
    return Prefill(prefill_s, decode_s, num_blocks)


def _serve(engine: Engine, sessions: list[tuple[Open, Stream]], num_tokens: int) -> float:
    """Seconds until every session has `num_tokens`."""
    start_s = time.perf_counter()
    while any(len(stream.tokens) < num_tokens for _, stream in sessions):
        if not engine.step():
            raise WispError("the scheduler has nothing to run, but not every session has its tokens")
    return time.perf_counter() - start_s


def measure_accounting(num_system: int, block_tokens: int, seed: int) -> dict[str, float]:
    """Microseconds per call of the accounting that planning and every pass make for each session."""
    rng = np.random.default_rng(seed)
    system = rng.integers(0, 50_000, num_system)
    prompts = [
        np.append(system, rng.integers(0, 50_000, _MAX_PRIVATE)).astype(np.int32) for _ in range(_NUM_POOL_SESSIONS)
    ]
    pool = BlockPool(_NUM_POOL_SESSIONS * (len(prompts[0]) // block_tokens + 2), block_tokens)
    names = [f"{i:032x}" for i in range(_NUM_POOL_SESSIONS)]

    def first_turn(i: int) -> None:
        pool.adopt(names[i], prompts[i])
        pool.extend(names[i], len(prompts[i]))
        pool.remember(names[i], prompts[i])

    def prefix_again(i: int) -> None:
        pool.adopt(f"{names[i]}b", prompts[i][: num_system + 1])

    def grow(i: int) -> None:
        pool.extend(names[i], pool.length(names[i]) + 1)

    calls: dict[str, Callable[[int], object]] = {
        "first_turn": first_turn,  # adopt, extend with a copy, remember
        "adopt": prefix_again,
        "remember": lambda i: pool.remember(names[i], prompts[i]),  # nothing new is complete
        "prefill_key": lambda i: hash(pool.prefill_key(prompts[i], num_system)),
        "num_missing": lambda i: pool.num_missing(names[i], len(prompts[i]) + 1),
        "extend": grow,
    }
    figures = {f"us_per_{name}": _us_per_call(call) for name, call in calls.items()}
    rows = [(name.removeprefix("us_per_"), us) for name, us in figures.items()]
    report.print_table(f"Accounting of {_NUM_POOL_SESSIONS} sessions", ("call", "us"), rows)
    return figures


def _us_per_call(call: Callable[[int], object]) -> float:
    """Mean over all sessions, once each."""
    start_s = time.perf_counter()
    for i in range(_NUM_POOL_SESSIONS):
        call(i)
    return 1e6 * (time.perf_counter() - start_s) / _NUM_POOL_SESSIONS
