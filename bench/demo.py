"""One prompt end to end: a real tritonserver verifies what this process drafts with ONNX Runtime.

Starts the server on free ports, streams the text of one prompt in the default mode, generates the same tokens by
the server alone, prints a small table and stops the server.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import numpy as np

from bench.live import (
    Drafting,
    ServerShare,
    SessionResult,
    half_the_cores,
    make_open,
    run_session,
    server_totals,
)
from bench.report import finish, print_table
from edge_runtime.drafter import Drafter
from edge_runtime.tokenizer import Tokenizer
from triton_models.launcher import make_server
from triton_models.server_process import ServerProcess
from wisp_plugin.home import DEFAULT_DRAFT, DRAFT_NAMES, default_draft_dir
from wisp_plugin.messages import Mode, Open, Sampling, Tokens

PROMPT = "Explain in a few sentences why the sky is blue."
WARM_UP_TOKENS = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `wisp-bench demo`."""
    parser.add_argument("--prompt", default=PROMPT, help="[%(default)s]")
    parser.add_argument("--max-new-tokens", type=int, default=96, metavar="N", help="[%(default)s]")
    parser.add_argument("--draft", choices=DRAFT_NAMES, default=DEFAULT_DRAFT, help="draft graph [%(default)s]")
    parser.add_argument("--mode", choices=["free", "sync"], default="free", help="[%(default)s]")
    parser.add_argument("--draft-length", type=int, default=12, metavar="N", help="[%(default)s]")


def main(args: argparse.Namespace) -> int:
    """Run the demo; exit code 0 if both generations gave the same tokens."""
    folder = default_draft_dir(args.draft)
    num_threads = half_the_cores()
    tokenizer, drafter = Tokenizer.load(folder), Drafter.load(folder, num_threads)
    prompt = tokenizer.encode_chat([{"role": "user", "content": args.prompt}])
    drafting = Drafting(drafter, Mode(args.mode), args.draft_length)
    with make_server(settings={"num_threads": num_threads}) as server:
        print(f"tritonserver is ready: gRPC {server.grpc_url}, process {server.pid}", file=sys.stderr)
        for warm_up in (drafting, Drafting()):
            run_session(server.grpc_url, make_open(prompt, WARM_UP_TOKENS, warm_up.mode, Sampling()), warm_up)
        print(f"\n> {args.prompt}\n")
        opened = make_open(prompt, args.max_new_tokens, drafting.mode, Sampling(), tokenizer.eos_token_ids)
        drafted, drafted_share = _measure(server, opened, drafting, _printer(tokenizer))
        print("\n")
        opened = make_open(prompt, args.max_new_tokens, Mode.FREE, Sampling(), tokenizer.eos_token_ids)
        alone, alone_share = _measure(server, opened, Drafting())
    equal = np.array_equal(drafted.tokens, alone.tokens)
    _print(args, [(f"{args.draft} drafts, {args.mode}", drafted, drafted_share), ("server alone", alone, alone_share)])
    print(f"\nthe {len(alone.tokens)} tokens of both are {'equal' if equal else 'DIFFERENT'}")
    figures = {
        "tokens_per_s": drafted.tokens_per_s,
        "tokens_per_s_alone": alone.tokens_per_s,
        "equal": equal,
        "acceptance_rate": drafted_share.acceptance_rate,
        "wdt_share": drafted.stats.wdt_share,
    }
    finish("demo", figures, vars(args), seed=0)
    return 0 if equal else 1


def _measure(
    server: ServerProcess, opened: Open, drafting: Drafting, on_tokens: Callable[[Tokens], None] = lambda tokens: None
) -> tuple[SessionResult, ServerShare]:
    before = server_totals(server)
    result = run_session(server.grpc_url, opened, drafting, on_tokens)
    return result, ServerShare.between(before, server_totals(server))


def _printer(tokenizer: Tokenizer) -> Callable[[Tokens], None]:
    text = tokenizer.detokenizer()
    return lambda tokens: print(text.push(tokens), end="", flush=True)


def _print(args: argparse.Namespace, rows: list[tuple[str, SessionResult, ServerShare]]) -> None:
    print_table(
        f"{args.max_new_tokens} tokens at most, greedy, device and server on half the cores each",
        ["", "tokens/s", "tokens per pass", "acceptance rate", "WDT share", "first token, ms"],
        [
            [
                name,
                result.tokens_per_s,
                share.tokens_per_commit,
                share.acceptance_rate,
                result.stats.wdt_share if result.stats.num_drafted else None,
                1e3 * result.first_token_s,
            ]
            for name, result, share in rows
        ],
    )
    print("WDT share: drafting time of tokens that were not accepted / all drafting time (our definition)")
