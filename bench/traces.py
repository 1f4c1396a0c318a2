"""The committed traces of the default pair, and the controller's shipped weights, by one command.

A real server generates texts of the target; the default drafts are recorded along them (`wisp-edge trace` does the
same for other models). Prompts of training and evaluation are disjoint: every third MT-bench question and every
seventh HumanEval task is for evaluation, all others are for training. Evaluation traces hold the whole chains, to 24
tokens behind each rejection; training needs only what is drafted behind a right prefix. Training is greedy and, on a
quarter of its prompts again, at temperature 0.8.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import wisp_plugin
from bench.prompts import human_eval_tasks, mt_bench_questions
from bench.traces_folder import FOLDER, trace_path
from edge_runtime.drafter import Drafter
from edge_runtime.tokenizer import Tokenizer
from edge_runtime.trace import CHAIN_LENGTH, Text, generate_texts, record
from edge_runtime.train_controller import train
from triton_models.launcher import make_server
from wisp_plugin.draft_trace import DraftTrace
from wisp_plugin.home import default_draft_dir, wisp_home
from wisp_plugin.messages import Sampling, Tokens

WEIGHTS = Path(wisp_plugin.__file__).with_name("weights")
SEED = 11
FALSE_ALARM_COST, EPOCHS = 1.0, 30
_CONCURRENCY = 16
SAMPLED = Sampling(seed=SEED, temperature=0.8)


@dataclass(frozen=True, slots=True)
class Part:
    """One file per draft: texts behind `prompts`, chosen by `sampling`."""

    name: str
    sampling: Sampling
    chain_length: int

    def prompts(self, tokenizer: Tokenizer) -> list[Tokens]:
        """The part's prompts in the model's chat template."""
        questions, tasks = mt_bench_questions(), human_eval_tasks()
        if self.name == "eval":
            chosen = questions[::3] + tasks[::7]
        else:
            chosen = [q for i, q in enumerate(questions) if i % 3] + [t for i, t in enumerate(tasks) if i % 7]
            chosen = chosen if self.sampling.greedy else chosen[::4]
        return [tokenizer.encode_chat([{"role": "user", "content": text}]) for text in chosen]


PARTS = (
    Part("eval", Sampling(), CHAIN_LENGTH),
    Part("train", Sampling(), 0),
    Part("train-sampled", SAMPLED, 0),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `wisp-bench traces`."""
    parser.add_argument("--drafts", nargs="+", default=["int4", "int8"], metavar="NAME", help="[int4 int8]")
    parser.add_argument(
        "--retime", action="store_true", help="record nothing: time the drafts again, on an idle machine"
    )
    parser.add_argument("--tokens", type=int, default=96, metavar="N", help="generated per prompt [%(default)s]")


def main(args: argparse.Namespace) -> int:
    """Record all parts, then train."""
    if args.retime:
        for draft in args.drafts:
            retime(draft)
        return 0
    tokenizer = Tokenizer.load(default_draft_dir(args.drafts[0]))
    texts = load_texts(tokenizer, args.tokens)
    for draft in args.drafts:
        drafter = Drafter.load(default_draft_dir(draft), num_threads=1)
        for part in PARTS:
            record_part(part, texts[part.name], draft, drafter)
        train_weights(draft)
        retime(draft)
    return 0


def retime(draft: str) -> None:
    """Measure the time of a draft step again, with all cores, and write it into the evaluation trace."""
    path = trace_path(draft, "eval")
    trace = DraftTrace.load(path)
    texts = [Text(text.tokens, text.prompt_len) for text in trace.texts[:4]]
    drafter = Drafter.load(default_draft_dir(draft))
    _, draft_s = record(texts, drafter, Sampling(), 0, functools.partial(_report, draft))
    DraftTrace(trace.texts, {**trace.about, "draft_s": draft_s}).save(path)
    _report(draft, f"{1e3 * draft_s:.2f} ms per draft token")


def train_weights(draft: str) -> None:
    """The shipped weights of a default draft, from its training traces."""
    traces = [DraftTrace.load(trace_path(draft, part.name)) for part in PARTS if part.name != "eval"]
    model, figures = train(traces, FALSE_ALARM_COST, EPOCHS, SEED, functools.partial(_report, draft))
    WEIGHTS.mkdir(exist_ok=True)
    model.save(WEIGHTS / f"{draft}.npz", f"wisp-bench traces: {draft}-train, {draft}-train-sampled")
    _report(draft, f"weights: AUC {figures['auc']:.4f}, calibration error {figures['ece']:.4f} on held-out texts")


def load_texts(tokenizer: Tokenizer, num_tokens: int) -> dict[str, list[Text]]:
    """The target's texts of all parts; generated once and kept in `$WISP_HOME`."""
    folder = wisp_home() / "traces"
    folder.mkdir(parents=True, exist_ok=True)
    paths = {part.name: folder / f"{part.name}-{num_tokens}.npz" for part in PARTS}
    missing = [part for part in PARTS if not paths[part.name].is_file()]
    if missing:
        # Sixteen at once, none refused: this is a batch job, not serving.
        with make_server(settings={"max_load": 0, "policy": "continuous"}) as server:
            for part in missing:
                report = functools.partial(_report, part.name)
                prompts = part.prompts(tokenizer)
                texts = generate_texts(
                    server.grpc_url, prompts, num_tokens, part.sampling, tokenizer, _CONCURRENCY, report
                )
                save_texts(texts, paths[part.name])
    return {name: read_texts(path) for name, path in paths.items()}


def save_texts(texts: Sequence[Text], path: Path) -> None:
    """Write texts as `.npz`, in one step."""
    scratch = path.with_suffix(".part.npz")
    np.savez_compressed(
        scratch,
        tokens=np.concatenate([text.tokens for text in texts]),
        lengths=np.array([len(text.tokens) for text in texts]),
        prompt_lens=np.array([text.prompt_len for text in texts]),
    )
    scratch.replace(path)


def read_texts(path: Path) -> list[Text]:
    """Read what `save_texts` wrote."""
    with np.load(path, allow_pickle=False) as data:
        parts = np.split(data["tokens"], np.cumsum(data["lengths"])[:-1])
        return [Text(tokens, int(length)) for tokens, length in zip(parts, data["prompt_lens"], strict=True)]


def record_part(part: Part, texts: Sequence[Text], draft: str, drafter: Drafter) -> DraftTrace:
    """Record one draft along the texts of a part and keep the trace."""
    traces, draft_s = record(
        texts, drafter, part.sampling, part.chain_length, functools.partial(_report, f"{draft} {part.name}")
    )
    about = {"draft": draft, "draft_s": draft_s, "temperature": part.sampling.temperature, "seed": part.sampling.seed}
    trace = DraftTrace(traces, about)
    FOLDER.mkdir(exist_ok=True)
    trace.save(trace_path(draft, part.name))
    _report(draft, f"{part.name}: {trace.acceptance:.3f} of {sum(len(t.drafted) for t in traces)} positions agree")
    return trace


def _report(label: str, line: str) -> None:
    print(f"{label}: {line}", file=sys.stderr, flush=True)
