"""Drafts of the default model by precision: agreement with the target, time per token, and what they are worth.

Agreement: the share of positions in the fp32 target's greedy text where the draft's greedy token behind that same text
equals the target's. Prompts: MT-bench questions with odd numbers. Those with even numbers chose what is mixed into
`mixed48` and the damping of its quantizer; calibration.json holds neither. Time: one token of decoding through
`Drafter`, all graphs in turn in one run, medians; time_vs_plain_int4 is the median of the paired ratios.

Expected end-to-end tokens/s: one device and an idle server, one chain of k tokens per round, the best k. A round takes
k drafts, the way there and back (20 ms) and a pass of the target over k + 1 tokens (42 + 3 (k + 1) ms: the fp32 target
on two cores); it commits 1 + a + ... + a^k tokens at agreement a. The classes are this machine (laptop) and devices
that take 4 times (phone) and 10 times (board) as long per token. Drafting on while the server verifies makes slow
drafts cheaper than this says. Times are those of all cores here, as `wisp-edge` uses them.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from bench import report
from bench.prompts import mt_bench_questions
from edge_runtime.drafter import Drafter
from edge_runtime.export import PRECISIONS, export_draft
from edge_runtime.tokenizer import Tokenizer
from triton_models.artifacts import ensure, folder_size_bytes
from triton_models.default_models import TARGET_RECIPE, ensure_default_draft, ensure_default_target
from wisp_plugin.errors import ConfigError
from wisp_plugin.home import DEFAULT_DRAFT, DRAFT_NAMES, default_draft_dir, default_target_dir
from wisp_plugin.messages import Sampling, Tokens

PLAIN, BEST = "int4", "mixed48"  # the baseline, and the draft whose figures the targets are about
TARGETS = {"agreement": ">= 0.85", "time_vs_plain_int4": "<= 1.15"}
DEVICE_CLASSES = {"laptop": 1.0, "phone": 4.0, "board": 10.0}  # times this machine's time per token
_WAY_MS, _PASS_MS, _PASS_MS_PER_TOKEN = 20.0, 42.0, 3.0
_LONGEST_CHAIN = 16
_BATCH = 8  # prompts that the target continues at once
_TIMED_TOKENS = 4  # per graph and round
_RECIPE = "bench-draft-1"  # raise whenever the exporter gives other files


@dataclass(frozen=True, slots=True)
class Text:
    """A prompt and what the target makes of it."""

    prompt: Tokens
    generated: Tokens


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `wisp-bench draft`."""
    parser.add_argument("--prompts", type=int, default=40, metavar="N", help="odd MT-bench questions, 40 at most [40]")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="of the target, per prompt [%(default)s]")
    parser.add_argument("--rounds", type=int, default=60, metavar="N", help="timings of every graph [%(default)s]")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="of the draft model [all cores]")
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), metavar="NAME", help="[all]")
    parser.add_argument("--quick", action="store_true", help="16 prompts, 20 timings, without fp32")


def main(args: argparse.Namespace) -> int:
    """Exit code 0 also where a target is missed: it depends on the machine, and the table says it."""
    if args.quick:
        args.prompts, args.rounds = 16, 20
        args.precisions = [name for name in args.precisions if name != "fp32"]
    unknown = [name for name in args.precisions if name not in PRECISIONS]
    if unknown or not {PLAIN, BEST} <= set(args.precisions):
        raise ConfigError(f"--precisions must name {PLAIN}, {BEST} and others of: {', '.join(PRECISIONS)}")
    if not 1 <= args.prompts <= 40 or args.tokens < 1 or args.rounds < 1:
        raise ConfigError("--prompts must be 1 to 40, --tokens and --rounds at least 1")
    folders = {name: draft_of(name) for name in args.precisions}
    drafters = {name: Drafter.load(folder, args.threads) for name, folder in folders.items()}
    texts = target_texts(default_target_dir(), report_prompts(args.prompts), args.tokens)
    agreements = {name: agreement(drafter, texts, name) for name, drafter in drafters.items()}
    times_ms = measure_times(drafters, texts[0], args.rounds)
    figures = summary(folders, agreements, times_ms)
    missed = report.check_targets(figures, TARGETS)
    report.finish("draft", {**figures, "missed": missed}, vars(args), seed=None)
    return 0


def draft_of(precision: str) -> Path:
    """The draft folder of the default model, made now if it is not there."""
    ensure_default_target(_show, check_hashes=False)
    if precision in DRAFT_NAMES:
        return ensure_default_draft(precision, _show).folder
    folder = default_draft_dir(precision)
    ensure(
        folder,
        f"{_RECIPE} {precision} of {TARGET_RECIPE}",
        lambda out: export_draft(default_target_dir(), out, precision, _show),
        _show,
    )
    return folder


def report_prompts(num_prompts: int) -> list[Tokens]:
    """Questions with odd numbers (the first is 81), spread over all categories."""
    tokenizer = Tokenizer.load(default_target_dir())
    odd = mt_bench_questions()[::2]
    chosen = np.linspace(0, len(odd), num_prompts, endpoint=False).astype(int)
    return [tokenizer.encode_chat([{"role": "user", "content": odd[i]}]) for i in chosen]


@torch.inference_mode()
def target_texts(target: Path, prompts: Sequence[Tokens], num_tokens: int) -> list[Text]:
    """What the fp32 target generates greedily, to its end token or `num_tokens`, by transformers."""
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    ends = Tokenizer.load(target).eos_token_ids
    texts: dict[int, Text] = {}
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    with report.Progress(len(prompts), "target's texts") as progress:
        for start in range(0, len(by_length), _BATCH):
            batch = by_length[start : start + _BATCH]
            for i, generated in zip(batch, _continue([prompts[i] for i in batch], model, num_tokens), strict=True):
                at_end = np.flatnonzero(np.isin(generated, ends))
                texts[i] = Text(prompts[i], generated[: at_end[0] + 1] if len(at_end) else generated)
            progress.step(len(batch))
    return [texts[i] for i in range(len(prompts))]


def _continue(prompts: Sequence[Tokens], model: Any, num_tokens: int) -> list[Tokens]:
    """Greedy continuations of a batch, padded on the left."""
    width = max(map(len, prompts))
    ids, mask = (torch.zeros((len(prompts), width), dtype=torch.int64) for _ in range(2))
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask[row, width - len(prompt) :] = 1
    found = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=num_tokens, do_sample=False)
    return list(found[:, width:].numpy().astype(np.int32))


def agreement(drafter: Drafter, texts: Sequence[Text], name: str) -> float:
    """Share of generated positions where the draft's greedy token is the target's."""
    num_equal = num_all = 0
    with report.Progress(len(texts), f"agreement of {name}") as progress:
        for text in texts:
            whole = np.concatenate([text.prompt, text.generated])
            for end in range(len(text.prompt), len(whole)):
                num_equal += drafter.draft_token(whole[:end], Sampling()) == whole[end]
            num_all += len(text.generated)
            progress.step()
    return num_equal / num_all


def measure_times(drafters: Mapping[str, Drafter], text: Text, rounds: int) -> dict[str, list[float]]:
    """ms per token of every draft, one value per round, behind the first half of `text`."""
    whole = np.concatenate([text.prompt, text.generated])
    start = max(1, len(whole) - _TIMED_TOKENS)
    with report.Progress(rounds * len(drafters), "time per token") as progress:

        def timed(drafter: Drafter) -> Callable[[], float]:
            def run() -> float:
                drafter.next_logits(whole[:start])  # the weights of the graph before are out of the caches now
                start_s = time.perf_counter()
                for end in range(start + 1, len(whole) + 1):
                    drafter.next_logits(whole[:end])
                elapsed_ms = 1000 * (time.perf_counter() - start_s)
                progress.step()
                return elapsed_ms / (len(whole) - start)

            return run

        return report.alternate({name: timed(drafter) for name, drafter in drafters.items()}, rounds)


def expected_tokens_per_s(agreed: float, draft_ms: float) -> float:
    """The model of this module's docstring; no draft at all (k = 0) is one of the choices."""
    best = 0.0
    for length in range(_LONGEST_CHAIN + 1):
        committed = sum(agreed**i for i in range(length + 1))
        round_ms = length * draft_ms + _WAY_MS + _PASS_MS + _PASS_MS_PER_TOKEN * (length + 1)
        best = max(best, 1000 * committed / round_ms)
    return best


def summary(
    folders: Mapping[str, Path], agreements: Mapping[str, float], times_ms: Mapping[str, Sequence[float]]
) -> dict[str, Any]:
    """Print the table; the figures of the report."""
    rows: dict[str, dict[str, Any]] = {}
    for name, folder in folders.items():
        ms = report.median(times_ms[name])
        rows[name] = {
            "agreement": agreements[name],
            "ms_per_token": ms,
            "time_vs_plain_int4": report.median(np.array(times_ms[name]) / np.array(times_ms[PLAIN])),
            "size_mb": folder_size_bytes(folder) / 1e6,
            "tokens_per_s": {
                kind: expected_tokens_per_s(agreements[name], ms * times) for kind, times in DEVICE_CLASSES.items()
            },
        }
    best = {kind: max(rows, key=lambda name: rows[name]["tokens_per_s"][kind]) for kind in DEVICE_CLASSES}
    report.print_table(
        "Drafts of the default model (expected tokens/s by device class)",
        ("precision", "agreement", "ms/token", "times int4", "MB", *DEVICE_CLASSES),
        [(name, *list(row.values())[:4], *row["tokens_per_s"].values()) for name, row in rows.items()],
    )
    report.print_table(
        "Best by device class", ("class", "draft"), [*best.items(), ("default of wisp-edge --draft", DEFAULT_DRAFT)]
    )
    chosen = {key: rows[BEST][key] for key in ("agreement", "time_vs_plain_int4")}
    return {**chosen, "chosen": BEST, "best_by_class": best, "default_draft": DEFAULT_DRAFT, "precisions": rows}


def _show(line: str) -> None:
    print(f"wisp-bench: {line}", file=sys.stderr, flush=True)
