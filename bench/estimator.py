"""Estimator: does it know how long a pass takes, on this machine and on costs that are known exactly?

Per dtype: a start-up sweep as `wisp-server profile` makes it, then held-out random ragged passes (1 to 16 sessions, 1
to 9 new tokens each, contexts of 16 to 1000 tokens; three in ten with a prefill chunk of 16 to 256 tokens) as the
engine runs them: predict, run, observe. A few of them come back again and again, each time twice in a row: how far
those two lie apart is the noise that no estimator can predict, how far all lie apart has the machine's drift in it.
The KV of the contexts is accounted for but not computed, as in the sweep.

    mape           mean |predicted / measured - 1|, in %, of the estimator that learns as it serves
    mape_frozen    the same for the profile as the sweep left it
    repeat_noise   mean relative difference of equal passes to their expectation, in %: from the two in a row
    repeat_drift   mean |measured / median of its repeats - 1| of the passes that come back over the whole run, in %
    late_rate      passes slower than the quantile prediction, in %; asked: 5

The synthetic part is in `bench.estimator_synthetic`. One torch thread by default: two on a shared machine with two
cores measure its other users.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bench import estimator_synthetic, report
from triton_models.profile_fit import repeat_noise
from triton_models.profile_origin import fingerprint_of
from triton_models.profile_passes import Cell, Member, cell_features, make_items
from triton_models.profiling import fit_profile, measure_sweep
from triton_models.torch_verifier import TorchVerifier, load_verifier
from wisp_plugin.config import EngineConfig, VerifierConfig
from wisp_plugin.estimator import Floats
from wisp_plugin.profile import Profile

DTYPES = ("float32", "bfloat16")
_NUM_REPEATED, _NUM_PAIRS = 6, 5  # different passes that come back, and how often two in a row
_CHUNK_SHARE = 0.3


@dataclass(frozen=True, slots=True)
class Served:
    """One held-out pass: what was predicted before it ran, and what it took."""

    cell: Cell
    predicted_s: float
    frozen_s: float
    quantile_s: float
    measured_s: float
    repeated: int | None  # which of the repeated passes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `wisp-bench estimator`."""
    parser.add_argument("--target", default="default", help="Hugging Face id or folder (default: the embedded model)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--dtype", choices=["both", *DTYPES], default="both", help="default: both")
    parser.add_argument("--threads", type=int, default=1, help="torch threads; 0: one per core (default: 1)")
    parser.add_argument("--passes", type=int, default=400, metavar="N", help="held-out passes (default: 400)")
    parser.add_argument("--sweep-s", type=float, default=60.0, metavar="S", help="time of the sweep (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="of the held-out passes")
    parser.add_argument("--quick", action="store_true", help="100 held-out passes after a sweep of 20 s")


def main(args: argparse.Namespace) -> int:
    """Exit code 1 if a synthetic figure misses its target; what the machine decides about is only reported."""
    if args.quick:
        args.passes, args.sweep_s = 100, 20.0
    figures = estimator_synthetic.run(args.seed)
    dtypes = DTYPES if args.dtype == "both" else (args.dtype,)
    for dtype in dtypes:
        figures |= {f"{name}_{dtype}": value for name, value in run_dtype(args, dtype).items()}
    figures |= worst(figures, dtypes)
    missed = check(figures)
    config = {**vars(args), "threads": torch.get_num_threads(), "max_pass_tokens": EngineConfig().max_pass_tokens}
    report.finish("estimator", {**figures, "missed": missed}, config, args.seed)
    return 1 if any(line.startswith(tuple(estimator_synthetic.TARGETS)) for line in missed) else 0


def worst(figures: dict[str, Any], dtypes: tuple[str, ...]) -> dict[str, float]:
    """Over the dtypes: the largest error with the noise of that dtype, and the late rate furthest from 5 %."""
    dtype = max(dtypes, key=lambda name: figures[f"mape_{name}"] - allowed_mape(figures[f"repeat_noise_{name}"]))
    rates = [figures[f"late_rate_{name}"] for name in dtypes]
    return {
        "mape": figures[f"mape_{dtype}"],
        "repeat_noise": figures[f"repeat_noise_{dtype}"],
        "late_rate": max(rates, key=lambda rate: abs(rate - 5.0)),
    }


def allowed_mape(noise: float) -> float:
    """The error asked for, in %: 10, or the noise of equal passes and 5 points where that is larger."""
    return max(10.0, noise + 5.0)


def check(figures: dict[str, Any]) -> list[str]:
    """Print the targets; one line per target that is missed."""
    targets = {**estimator_synthetic.TARGETS, "mape": f"<= {allowed_mape(figures['repeat_noise']):.2f}"}
    missed = report.check_targets(figures, {**targets, "late_rate": ">= 3"})
    return missed + report.check_targets(figures, {"late_rate": "<= 7"})


def run_dtype(args: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """Sweep, serve, print; the figures of one dtype."""
    verifier = load_verifier(
        VerifierConfig(target=args.target, device=args.device, dtype=dtype, num_threads=args.threads)
    )
    sweep = measure_sweep(verifier, EngineConfig(), args.sweep_s, _tell)
    profile = fit_profile(sweep, fingerprint_of(verifier))
    served = serve(verifier, profile, args.passes, args.seed)
    figures = figures_of(served) | {
        "sweep_error": 100 * profile.measured.fit_error,
        "sweep_noise": 100 * profile.measured.repeat_noise,
        "sweep_passes": sum(map(len, sweep.repeats_s)),
        "profile": {"costs": profile.costs, "margin": profile.margin, "noise": profile.noise},
    }
    print_served(f"{profile.fingerprint.model}, {dtype}, {verifier.device_name}", served)
    return figures


def serve(verifier: TorchVerifier, profile: Profile, num_passes: int, seed: int) -> list[Served]:
    """Held-out passes in random order, through `observe` as in production."""
    random = np.random.default_rng(seed)
    turns: list[list[tuple[Cell, int | None]]] = [[(random_cell(random), None)] for _ in range(num_passes)]
    for i in range(_NUM_REPEATED):
        turns += [[(random_cell(random), i)] * 2] * _NUM_PAIRS
    order = [one for at in random.permutation(len(turns)).tolist() for one in turns[at]]
    estimator, frozen = profile.estimator(), profile.estimator()
    served = []
    with report.Progress(len(order), f"held-out passes, {verifier.dtype_name}") as progress:
        for cell, repeated in order:
            features = cell_features(cell)
            guesses = (estimator.predict, frozen.predict, estimator.predict_quantile)
            online, offline, quantile = (float(guess(features)) for guess in guesses)
            served.append(Served(cell, online, offline, quantile, run_pass(verifier, cell, random), repeated))
            estimator.observe(features, served[-1].measured_s)
            progress.step()
    return served


def random_cell(random: np.random.Generator) -> Cell:
    """A held-out pass, see the top of this file."""
    num_sessions = int(random.integers(1, 17))
    members = []
    for num_cached, num_new in zip(random.integers(16, 1001, num_sessions), random.integers(1, 10, num_sessions),
                                   strict=True):  # fmt: skip
        members.append(Member(int(num_cached), int(num_new), int(num_new)))
    if random.random() < _CHUNK_SHARE:
        members[0] = Member(int(random.integers(0, 745)), round(float(2 ** random.uniform(4, 8))), 0)
    return tuple(members)


def run_pass(verifier: TorchVerifier, cell: Cell, random: np.random.Generator) -> float:
    """Seconds of `TorchVerifier.run`, as the engine measures them."""
    items = make_items(cell, verifier.vocab_size, random)
    for item in items:
        if item.num_cached:
            verifier.pool.extend(item.session, item.num_cached)
    start_s = time.monotonic()
    verifier.run(items)
    measured_s = time.monotonic() - start_s
    for item in items:
        verifier.release(item.session)
    return measured_s


def figures_of(served: list[Served]) -> dict[str, float]:
    """Figures in %; errors over the random passes alone, so that those that come back do not count for more."""
    fresh = [s for s in served if s.repeated is None]
    repeats = [[s.measured_s for s in served if s.repeated == i] for i in range(_NUM_REPEATED)]
    return {
        "mape": mean_error([s.predicted_s for s in fresh], [s.measured_s for s in fresh]),
        "mape_frozen": mean_error([s.frozen_s for s in fresh], [s.measured_s for s in fresh]),
        "repeat_noise": 100 * pair_noise(np.array([s.measured_s for s in served if s.repeated is not None])),
        "repeat_drift": 100 * repeat_noise(repeats),
        "late_rate": 100 * float(np.mean([s.measured_s > s.quantile_s for s in served])),
    }


def pair_noise(measured_s: Floats) -> float:
    """Mean relative difference of a pass to its expectation, from passes of which each two in a row are equal, `[2 N]`.

    Half the difference of two is sqrt(2) times too small for it, because their mean follows both.
    """
    first_s, second_s = measured_s.reshape(-1, 2).T
    return float(np.sqrt(2) * np.mean(np.abs(first_s - second_s) / (first_s + second_s)))


def mean_error(predicted_s: list[float], measured_s: list[float]) -> float:
    """Mean absolute percentage error."""
    return 100 * float(np.mean(np.abs(np.array(predicted_s) / np.array(measured_s) - 1)))


def print_served(what: str, served: list[Served]) -> None:
    """Errors by kind of pass."""
    kinds = {
        "1 to 4 sessions": lambda cell: len(cell) <= 4,
        "5 to 16 sessions": lambda cell: len(cell) > 4,
        "with a prefill chunk": lambda cell: cell[0].num_choices == 0,
        "all": lambda cell: True,
    }
    rows = []
    for kind, holds in kinds.items():
        chosen = [s for s in served if holds(s.cell)]
        if chosen:
            measured_s = [s.measured_s for s in chosen]
            online = mean_error([s.predicted_s for s in chosen], measured_s)
            frozen = mean_error([s.frozen_s for s in chosen], measured_s)
            late = 100 * float(np.mean([s.measured_s > s.quantile_s for s in chosen]))
            rows.append((kind, len(chosen), 1e3 * report.median(measured_s), online, frozen, late))
    columns = ("passes", "number", "median ms", "error % online", "error % frozen", "late %")
    report.print_table(f"Held-out passes: {what}", columns, rows)


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
