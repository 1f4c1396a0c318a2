"""The speculation controller on recorded traces of held-out prompts: what each stop rule makes of them.

Plain 4-bit draft (keys without suffix) and 8-bit draft (`_int8`), the shipped weights, 12 settings of a modelled link
(RTT 5, 20, 50, 100 ms) and verification (10, 40, 80 ms). A draft token takes what
DESIGN section 10 gives for two cores at rest, 4.9 and 6.4 ms; `--draft-ms` sets other times.

sync   all rules, rounds over the traces; baselines (fixed, svip, adaedl, paper) each at the best of a sweep in each
       setting; the oracle knows the first rejection. `speed_*` and `oracle_share` are geometric means.
free   the real engine with policy `wisp` (it holds), rule `price`, simulated; the energy price is swept.
model  AUC, calibration after learning online, time of a decision; what each feature adds.

WDT share and drafting cost are our own definitions: draft tokens that were not accepted over all draft tokens; draft
tokens per committed token over those of the oracle.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bench.controller_free import report_free, run_all
from bench.controller_model import report_model
from bench.controller_sync import num_sync_runs, report_sync, run_sync
from bench.report import Progress, check_targets, finish
from bench.traces_folder import trace_path
from edge_runtime.cores import usable_cores
from wisp_plugin.acceptance_model import AcceptanceModel, shipped_model
from wisp_plugin.draft_trace import DraftTrace

DRAFTS = {"int4": "", "int8": "_int8"}  # and the suffix of their keys
DRAFT_MS = {"int4": 4.9, "int8": 6.4}
TARGETS = {
    "speed_vs_best_fixed_min": ">= 1.03", "speed_vs_best_fixed_gm": ">= 1.08",
    "speed_vs_best_fixed_min_int8": ">= 0.99", "speed_vs_best_fixed_gm_int8": ">= 1.03",
    "speed_vs_fixed8": ">= 1.15", "speed_vs_fixed8_int8": ">= 1.2", "oracle_share": ">= 0.80",
    "acceptance_gain_vs_fixed8": ">= 1.5", "wdt_cut_vs_fixed8": ">= 0.4", "wdt_cut_low_delay": ">= 0.6",
    "free_vs_sync_gm": ">= 1.3", "free_vs_sync_min": ">= 1.0", "free_vs_decode_min": ">= 0.99",
    "drafting_cost_parity": "<= 4.0", "drafting_cost_idle": "<= 1.6",
    "auc_gain": ">= 0.0", "ece": "<= 0.05", "decision_us": "<= 60", "decision_share": "<= 0.03",
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `wisp-bench controller`."""
    parser.add_argument("--parts", nargs="+", choices=("sync", "free", "model"), default=["sync", "free", "model"])
    parser.add_argument("--drafts", nargs="+", choices=list(DRAFTS), default=list(DRAFTS))
    parser.add_argument(
        "--free-drafts", nargs="+", choices=list(DRAFTS), default=["int4"], help="drafts of the part `free` [int4]"
    )
    parser.add_argument("--draft-ms", type=float, metavar="MS", help="time of a draft token [4.9 int4, 6.4 int8]")
    parser.add_argument("--weights", type=Path, metavar="NPZ", help="instead of the shipped ones, for all drafts")
    parser.add_argument("--quick", action="store_true", help="every sixth text")


def main(args: argparse.Namespace) -> int:
    """Exit code 1 if a target is missed."""
    figures: dict[str, Any] = {}
    config: dict[str, Any] = {"parts": args.parts, "drafts": args.drafts, "quick": args.quick}
    for draft in args.drafts:
        trace = DraftTrace.load(trace_path(draft, "eval"))
        if args.quick:
            trace = DraftTrace(trace.texts[::6], trace.about)
        model = AcceptanceModel.load(args.weights) if args.weights else shipped_model(draft)
        trace = DraftTrace(trace.texts, {**trace.about, "draft_s": (args.draft_ms or DRAFT_MS[draft]) / 1e3})
        config[f"draft_ms_{draft}"] = 1e3 * trace.draft_s
        config[f"texts_{draft}"] = len(trace.texts)
        config[f"agreement_{draft}"] = trace.acceptance
        parts = [part for part in args.parts if part != "free" or draft in args.free_drafts]
        figures |= measure(parts, draft, trace, model)
    missed = check_targets(figures, {name: asked for name, asked in TARGETS.items() if name in figures})
    finish("controller", {**figures, "missed": missed}, config, seed=0)
    return 1 if missed else 0


def measure(parts: list[str], draft: str, trace: DraftTrace, model: AcceptanceModel) -> dict[str, Any]:
    """The figures of one draft."""
    suffix = DRAFTS[draft]
    figures: dict[str, Any] = {}
    if "model" in parts:
        figures |= report_model(draft, trace, model, suffix)
    if "sync" in parts or "free" in parts:
        with Progress(num_sync_runs(), f"{draft}: sync") as progress:
            sync = run_sync(trace, model, trace.draft_s, progress)
        figures |= report_sync(draft, sync, suffix) if "sync" in parts else {}
    if "free" in parts:
        num_processes = usable_cores()
        free = run_all(trace, model, trace.draft_s, num_processes, f"{draft}: free")
        figures |= report_free(draft, free, sync, suffix)
    return figures
