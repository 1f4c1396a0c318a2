"""Time of a target pass on this device: how it grows with sessions, new tokens and cached tokens.

The design's gains depend on it (section 4). Plain torch and transformers with random weights: a forward of
B sessions with K new tokens each behind L cached ones, lm_head for every new token included, the choice of
tokens not. KV lies in one contiguous buffer per layer, attention is torch's fused kernel: what a good engine
would need, without paging. As many layers as fit are built; the rest is scaled linearly per layer.

On CUDA `ms` is the time of the kernels with all launches queued ahead, as under CUDA graphs; `eager ms` is what
plain eager launching needs. On the CPU `ms` is the eager time.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bench.pass_fit import MIN_PASSES, PassFeatures, PassFit, best, fit_norms
from bench.pass_model import DTYPES, SHAPES, PassModel, build, device_name, layers_that_fit, resolve_device
from bench.report import Progress, finish, median, print_table

_NUM_WARMUPS = 2
_HEAT_S = 1.5  # of the largest pass before measuring on a GPU: clocks rise, libraries choose their kernels
_SPIN_CYCLES_PER_S = 2.2e9  # above the clock of today's GPUs, so that the spin outlasts the launches


@dataclass(frozen=True, slots=True)
class CellTime:
    """Medians of one cell. `full_ms`: `ms` scaled to all layers; `launch_share`: (eager - ms) / eager, CUDA only."""

    ms: float
    full_ms: float
    eager_ms: float
    launch_share: float | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `wisp-bench pass-cost`."""
    add = parser.add_argument
    add("--shape", choices=list(SHAPES), default="qwen3-32b", help="model shape (default: qwen3-32b)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add("--dtype", choices=list(DTYPES), default="bf16", help="of weights and KV (default: bf16)")
    add("--layers", type=_count, metavar="N", help="layers to build (default: as many as fit)")
    add("--sessions", type=_counts, default=[1, 2, 4, 8, 16, 32, 64], metavar="B,..", help="sessions of a pass")
    add("--tokens-per-session", type=_counts, default=[1, 2, 4, 8], metavar="K,..", help="new tokens of each")
    add("--chunks", type=_counts, default=[16, 64, 256, 512], metavar="K,..", help="new tokens of a session alone")
    add("--cached", type=_counts, default=[128, 512, 2048], metavar="L,..", help="cached tokens of each session")
    add("--repeats", type=_count, default=7, metavar="N", help="timed passes per cell (default: 7)")
    add("--budget-s", type=_seconds, default=360.0, metavar="S", help="start no cell after this time (default: 360)")
    add("--seed", type=_seed, default=0, help="of weights, tokens and the order of cells (default: 0)")


def main(args: argparse.Namespace) -> int:
    """Measure, print the tables and the report. Raises ConfigError if the shape does not fit the device."""
    shape, device, dtype = SHAPES[args.shape], resolve_device(args.device), DTYPES[args.dtype]
    cells = grid(args.sessions, args.tokens_per_session, args.chunks, args.cached)
    kv_tokens, max_new_tokens = max(c.context for c in cells), max(c.num_new_tokens for c in cells)
    num_layers = layers_that_fit(shape, device, dtype, kv_tokens, max_new_tokens, args.layers)
    torch.manual_seed(args.seed)
    model = build(shape, num_layers, device, dtype, kv_tokens)
    times = measure_cells(model, cells, args.repeats, args.budget_s, args.seed)
    fits = {}
    if len(times) >= MIN_PASSES:
        fits = fit_norms(list(times), [cell.full_ms for cell in times.values()])
    what = f"{args.shape}, {num_layers} of {shape.num_layers} layers, {args.dtype}, {device_name(device)}"
    print_results(what, times, fits)
    config = {**vars(args), "layers": num_layers, "layers_full": shape.num_layers, "device": device_name(device)}
    finish("pass-cost", figures(cells, times, fits), config, args.seed)
    return 0


def grid(
    sessions: list[int], tokens_per_session: list[int], chunks: list[int], cached: list[int]
) -> list[PassFeatures]:
    """Every combination, and the prefill chunks of a session alone; by cached, then new tokens."""
    pairs = {(num, tokens) for num in sessions for tokens in tokens_per_session} | {(1, tokens) for tokens in chunks}
    cells = [PassFeatures(num, tokens, length) for num, tokens in pairs for length in cached]
    return sorted(cells, key=lambda c: (c.cached_tokens, c.num_new_tokens, c.num_sessions))


def measure_cells(
    model: PassModel, cells: list[PassFeatures], repeats: int, budget_s: float, seed: int
) -> dict[PassFeatures, CellTime]:
    """Times by cell, in the order of `cells`. Cells that the budget left no time for are missing.

    Measured in random order, so that a drift of the clocks hits no corner of the grid.
    """
    deadline_s = time.monotonic() + budget_s
    if model.device.type == "cuda":
        _heat(model, max(cells, key=lambda c: c.num_new_tokens))
    num_missing = model.shape.num_layers - model.num_layers
    head_ms: dict[int, float] = {}
    times: dict[PassFeatures, CellTime] = {}
    with Progress(len(cells), "pass-cost") as progress:
        for index in np.random.default_rng(seed).permutation(len(cells)):
            if time.monotonic() > deadline_s:
                break
            cell = cells[index]
            if num_missing and cell.num_new_tokens not in head_ms:
                head_ms[cell.num_new_tokens], _ = measure(model, model.prepare_head(cell.num_new_tokens), repeats)
            ms, eager_ms = measure(model, model.prepare(cell), repeats)
            per_layer_ms = max(0.0, ms - head_ms.get(cell.num_new_tokens, 0.0)) / model.num_layers
            share = max(0.0, 1 - ms / eager_ms) if model.device.type == "cuda" else None
            times[cell] = CellTime(ms, ms + num_missing * per_layer_ms, eager_ms, share)
            progress.step()
    return {cell: times[cell] for cell in cells if cell in times}


def measure(model: PassModel, run: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median `ms` and `eager_ms` of `run` (see the top of this file), after warm-up."""
    for _ in range(_NUM_WARMUPS):
        run()
    eager_s, launch_s = [], []
    for _ in range(repeats):
        model.synchronize()
        start_s = time.perf_counter()
        run()
        launch_s.append(time.perf_counter() - start_s)
        model.synchronize()
        eager_s.append(time.perf_counter() - start_s)
    eager_ms = 1e3 * median(eager_s)
    if model.device.type != "cuda":
        return eager_ms, eager_ms
    return median([_queued_ms(model, run, max(launch_s)) for _ in range(repeats)]), eager_ms


def _queued_ms(model: PassModel, run: Callable[[], object], launch_s: float) -> float:
    """Time of the kernels alone: the GPU spins until the host has queued the launches, then works without gaps."""
    with torch.cuda.device(model.device):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(int(_SPIN_CYCLES_PER_S * launch_s))
        start.record()
        run()
        end.record()
        end.synchronize()
    return float(start.elapsed_time(end))


def _heat(model: PassModel, cell: PassFeatures) -> None:
    run, end_s = model.prepare(cell), time.monotonic() + _HEAT_S
    while time.monotonic() < end_s:
        run()
        model.synchronize()


def figures(
    cells: list[PassFeatures], times: dict[PassFeatures, CellTime], fits: dict[float, PassFit]
) -> dict[str, Any]:
    """The figures of the report."""
    shares = [t.launch_share for t in times.values() if t.launch_share is not None]
    by_norm = {f"{norm:g}": fit.figures()["fit_error_median"] for norm, fit in fits.items()}
    return {
        **(best(fits).figures() if fits else {}),
        "fit_error_median_by_norm": by_norm,
        "launch_share_median": median(shares) if shares else None,
        "launch_share_max": max(shares) if shares else None,
        "cells_skipped": len(cells) - len(times),
        "cell_columns": list(_COLUMNS),
        "cells": [_row(cell, time_) for cell, time_ in times.items()],
    }


_COLUMNS = ("sessions", "new tokens", "cached per session", "ms", "ms all layers", "eager ms", "launch share")


def _row(cell: PassFeatures, t: CellTime) -> tuple[float | None, ...]:
    sizes = (cell.num_sessions, cell.num_new_tokens, cell.cached_tokens)
    share = None if t.launch_share is None else round(t.launch_share, 4)
    return *sizes, round(t.ms, 4), round(t.full_ms, 4), round(t.eager_ms, 4), share


def print_results(what: str, times: dict[PassFeatures, CellTime], fits: dict[float, PassFit]) -> None:
    """The cells, the fits, and what launching costs."""
    predicted = best(fits).predicted_ms.tolist() if fits else [None] * len(times)
    rows = [(*_row(cell, t), p) for (cell, t), p in zip(times.items(), predicted, strict=True)]
    print_table(f"Time of a pass: {what}", (*_COLUMNS, "fitted ms"), rows)
    errors = [(f"p = {norm:g}", *list(fit.figures().values())[2:]) for norm, fit in fits.items()]
    if fits:
        chosen = best(fits)
        title = "Relative error of the fit by norm (p = 1: costs add; large p: the larger one counts)"
        print_table(title, ("norm", "median", "p90", "max"), errors)
        print_table(f"Coefficients, p = {chosen.norm:g}", ("coefficient", "ms"), list(chosen.coefficients.items()))
    else:
        print(f"\nNo fit: {len(times)} passes measured, {MIN_PASSES} are needed")
    shares = [t.launch_share for t in times.values() if t.launch_share is not None]
    if shares:
        verdict = "dominates" if median(shares) > 0.5 else "does not dominate"
        print(f"\nLaunch overhead {verdict}: median {median(shares):.0%} of eager time, at most {max(shares):.0%}")


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0")
    return value


def _counts(text: str) -> list[int]:
    return [_count(part.strip()) for part in text.split(",")]
