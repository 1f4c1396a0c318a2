"""`wisp_generate`: what drafting from the text itself (prompt lookup) gives, and what the way through it costs.

Replay: the committed texts of the default target (51 evaluation prompts, greedy; 49 sampled ones, on which the lookup's
constants were chosen together with the greedy training texts), token by token through the real lookup. A pass with n
draft tokens is taken to last 1 + n x cost of one without, where cost is that of a token in a pass, and the lookup is
told this price. So nothing is measured here, and nothing disturbs it.

Live: a real tritonserver with the default target. Requests with lookup `auto` and `off` alternate, and their texts must
be equal; medians of the paired ratios of their times. Three kinds of prompts: questions (MT-bench), code (HumanEval),
and requests to copy a text with a small change, for which the lookup is meant.

Path: time of a request of one token and of 32 to `wisp_generate` over HTTP, and of a bare session of `wisp_verifier`
over gRPC by our own client, in turns. The difference: tokenizer, the way from model to model, HTTP, and our client.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
import urllib.request
from collections.abc import Iterable
from typing import Any

import numpy as np

from bench.live import Drafting, make_open, run_session
from bench.prompts import human_eval_tasks, mt_bench_questions
from bench.report import Progress, alternate, check_targets, finish, median, print_table
from bench.traces_folder import trace_path
from edge_runtime.tokenizer import Tokenizer
from triton_models.launcher import make_server
from wisp_plugin.draft_trace import DraftTrace, TextTrace
from wisp_plugin.home import default_draft_dir
from wisp_plugin.messages import Commit, Mode, Sampling, Status
from wisp_plugin.prompt_lookup import PromptLookup

TARGETS = {"lookup_replay_worst": ">= 0.98", "lookup_plain": ">= 0.98", "lookup_copy": ">= 1.3"}
COSTS = (0.05, 0.1, 0.2)  # of a draft token, in passes without drafts
PARTS = {"eval": "greedy", "train-sampled": "sampled"}
FIRST_PROMPT = 8
PATH_PROMPT = "The capital of France is"
_COPY = "Repeat this text, but write {new} instead of {old}:\n\n{text}"
_TEXTS = (
    ("water", "rain", "The water flows from the hills to the sea. In the sea the water is warmed by the sun, and the "
     "warm water rises as steam. The steam becomes clouds, and the clouds bring the water back to the hills."),
    ("total", "result", "def add_all(values):\n    total = 0\n    for value in values:\n        total = total + value\n"
     "    return total\n\n\ndef mean(values):\n    total = add_all(values)\n    return total / len(values)\n"),
    ("Monday", "Tuesday", "On Monday the shop opens at nine and closes at six. On Monday fresh bread is sold at nine. "
     "Please call the shop before nine if you want fresh bread on Monday."),
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `wisp-bench generate`."""
    parser.add_argument("--prompts", type=int, default=5, metavar="N", help="of each kind but `copy` [%(default)s]")
    parser.add_argument("--tokens", type=int, default=96, metavar="N", help="at most, per request [%(default)s]")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="repetitions of every prompt [%(default)s]")
    parser.add_argument("--replay", action="store_true", help="the replay alone: no server")


def main(args: argparse.Namespace) -> int:
    """Exit code 0 also where a target is missed: the table says it."""
    figures = report_replay()
    if not args.replay:
        with make_server(models=["wisp_verifier", "wisp_generate"]) as server:
            figures |= report_live(args, server.http_url)
            figures |= report_path(server.http_url, server.grpc_url, args.rounds)
    missed = check_targets(figures, {name: asked for name, asked in TARGETS.items() if name in figures})
    finish("generate", {**figures, "missed": missed}, vars(args), seed=0)
    return 0


# -- replay -----------------------------------------------------------------------------------------------------


def replay(text: TextTrace, cost: float) -> float:
    """Speed of a text with the lookup over that without."""
    lookup = PromptLookup("", text.tokens[: text.prompt_len], len(text.tokens))
    at, time_passes, draft = text.prompt_len, 0.0, None
    while at < len(text.tokens):
        drafted = np.empty(0, np.int32) if draft is None else draft.tokens
        left = text.tokens[at:]
        shared = min(len(drafted), len(left))
        num_right = int(np.cumprod(drafted[:shared] == left[:shared]).sum())
        tokens = left[: num_right + 1]
        time_passes += 1.0 + cost * len(drafted)
        origin = np.zeros(len(tokens), np.uint8)
        draft = lookup.on_commit(Commit("", at, tokens, origin, Status.RUNNING, load_price=cost))
        at += len(tokens)
    return (len(text.tokens) - text.prompt_len) / time_passes


def report_replay() -> dict[str, float]:
    """Table and figures of the replay."""
    rows, figures, all_speeds = [], {}, []
    for part, name in PARTS.items():
        texts = [text for text in DraftTrace.load(trace_path("int8", part)).texts if len(text.generated) > 1]
        for cost in COSTS:
            speeds = [replay(text, cost) for text in texts]
            rows.append([name, len(texts), cost, geometric_mean(speeds), median(speeds), min(speeds), max(speeds)])
            figures[f"lookup_replay_{name}_{cost:g}"] = geometric_mean(speeds)
            all_speeds += speeds
    columns = ["texts", "number", "cost of a draft token, passes", "geometric mean", "median", "slowest", "fastest"]
    print_table("Replay: speed with prompt lookup, times that without", columns, rows)
    return figures | {"lookup_replay_worst": min(all_speeds)}


def geometric_mean(values: Iterable[float]) -> float:
    """Of positive values."""
    return float(np.exp(np.mean(np.log(list(values)))))


# -- live -------------------------------------------------------------------------------------------------------


def generate(http_url: str, text: str, **fields: Any) -> tuple[float, dict[str, Any]]:
    """Seconds and answer of one request."""
    body = json.dumps({"text_input": text, **fields}).encode()
    begin_s = time.monotonic()
    with urllib.request.urlopen(f"http://{http_url}/v2/models/wisp_generate/generate", body, timeout=300.0) as answer:
        return time.monotonic() - begin_s, json.load(answer)


def report_live(args: argparse.Namespace, http_url: str) -> dict[str, float]:
    """Table and figures of `auto` against `off`."""
    prompts = {
        "questions": mt_bench_questions()[FIRST_PROMPT : FIRST_PROMPT + args.prompts],
        "code": human_eval_tasks()[FIRST_PROMPT : FIRST_PROMPT + args.prompts],
        "copy": [_COPY.format(old=old, new=new, text=text) for old, new, text in _TEXTS],
    }
    ratios: dict[str, list[float]] = {}
    with Progress(sum(map(len, prompts.values())), "generate") as progress:
        for kind, texts in prompts.items():
            ratios[kind] = [compare(http_url, text, args.tokens, args.rounds) for text in texts]
            progress.step(len(texts))
    columns = ["prompts", "number", "geometric mean", "slowest", "fastest"]
    rows = [[kind, len(v), geometric_mean(v), min(v), max(v)] for kind, v in ratios.items()]
    print_table("Live: speed with lookup `auto`, times that with `off` (medians of pairs)", columns, rows)
    plain = ratios["questions"] + ratios["code"]
    figures = {f"lookup_{kind}": geometric_mean(v) for kind, v in ratios.items()}
    return figures | {"lookup_plain": geometric_mean(plain), "lookup_plain_worst": min(plain)}


def compare(http_url: str, text: str, num_tokens: int, rounds: int) -> float:
    """Median over pairs of the time with `off` over that with `auto`; AssertionError if their texts differ."""

    def ask(lookup: str) -> tuple[float, dict[str, Any]]:
        return generate(http_url, text, chat=True, max_tokens=num_tokens, seed=0, lookup=lookup)

    ask("off")  # the prompt's KV is held from now on: neither of the two pays for it
    found = alternate({name: functools.partial(ask, name) for name in ("off", "auto")}, rounds)
    answers = {json.dumps(answer, sort_keys=True) for results in found.values() for _, answer in results}
    assert len(answers) == 1, f"lookup changes the text of {text[:60]!r}"
    return median(off / auto for (off, _), (auto, _) in zip(found["off"], found["auto"], strict=True))


# -- path -------------------------------------------------------------------------------------------------------


def report_path(http_url: str, grpc_url: str, rounds: int) -> dict[str, float]:
    """Table and figures of one way and the other."""
    prompt = Tokenizer.load(default_draft_dir("int8")).encode(PATH_PROMPT)

    def bare(num_tokens: int) -> float:
        return run_session(grpc_url, make_open(prompt, num_tokens, Mode.FREE, Sampling()), Drafting()).elapsed_s

    def text(num_tokens: int) -> float:
        asked = {"max_tokens": num_tokens, "ignore_eos": True, "lookup": "off"}
        return generate(http_url, PATH_PROMPT, **asked)[0]

    rows: list[list[Any]] = []
    figures: dict[str, Any] = {}
    for num_tokens in (1, 32):
        ways = {"bare": lambda n=num_tokens: bare(n), "generate": lambda n=num_tokens: text(n)}
        times_s = alternate(ways, 4 * rounds)
        bare_ms, generate_ms = (1e3 * median(times_s[name]) for name in ("bare", "generate"))
        extra_ms = 1e3 * median(g - b for b, g in zip(times_s["bare"], times_s["generate"], strict=True))
        rows.append([num_tokens, bare_ms, generate_ms, extra_ms])
        figures |= {f"path_extra_ms_{num_tokens}": extra_ms}
    columns = ["tokens", "wisp_verifier, ms", "wisp_generate, ms", "difference of pairs, ms"]
    print_table("Path: a whole request, median", columns, rows)
    return figures
