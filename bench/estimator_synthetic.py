"""The synthetic part of `wisp-bench estimator`: known costs, noise, and a machine that slows down to half its speed.

coefficient_error      largest relative error of a price, in %, after a fit to 3,000 passes with 2 % noise
error_after_doubling   mean relative error, in %, 50 passes after the true cost has doubled (5 % noise)
predict_1000_us        median time of predicting 1,000 candidates, in microseconds
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from bench.report import median, print_table
from wisp_plugin.cost_fit import fit_costs
from wisp_plugin.estimator import EMPTY_PASS, Costs, Estimator, Floats, item_features

TARGETS = {"coefficient_error": "<= 2", "error_after_doubling": "<= 15", "predict_1000_us": "<= 1000"}
# A GPU as in section 4 of the design, with a price on everything that the fit looks for.
TRUE = Costs((0.036, 0.0020, 0.0, 0.0, 0.0, 2.6e-6), (0.040, 0.0020, 3e-4, 6e-4, 4e-7, 0.0), 4.0)
_FIT_PASSES, _FIT_NOISE = 3000, 0.02
_SERVE_NOISE = 0.05
_TIMED = 200


def run(seed: int) -> dict[str, Any]:
    """All synthetic figures, with a table."""
    random = np.random.default_rng(seed)
    figures: dict[str, Any] = {"coefficient_error": coefficient_error(random), **doubling(random), **speed(random)}
    print_table("Synthetic", ("figure", "value"), list(figures.items()))
    return figures


def coefficient_error(random: np.random.Generator) -> float:
    """See the top of this file. Prices that are zero in truth have no relative error and are left out."""
    features = wide_passes(random, _FIT_PASSES)
    fit = fit_costs(features, noisy_times(random, features, _FIT_NOISE))
    true = np.array([TRUE.memory, TRUE.arithmetic])
    found = np.array([fit.costs.memory, fit.costs.arithmetic])
    return 100 * float(np.abs(found[true > 0] / true[true > 0] - 1).max())


def doubling(random: np.random.Generator) -> dict[str, Any]:
    """Serve 300 passes, double the cost, serve 50 more; `passes_to_15` of them until the error stays under 15 %."""
    estimator, others = Estimator(TRUE, noise=_SERVE_NOISE), wide_passes(random, 200)
    errors = []
    for factor, num_passes in ((1.0, 300), (2.0, 50)):
        features = wide_passes(random, num_passes)
        true_s = factor * Estimator(TRUE).predict(others)
        for row, time_s in zip(features, factor * noisy_times(random, features, _SERVE_NOISE), strict=True):
            estimator.observe(row, float(time_s))
            errors.append(100 * float(np.abs(estimator.predict(others) / true_s - 1).mean()))
    over = [i + 1 for i, error in enumerate(errors[300:]) if error > 15]
    return {"error_after_doubling": errors[-1], "passes_to_15": max(over, default=0) + 1}


def speed(random: np.random.Generator) -> dict[str, float]:
    """Medians in microseconds."""
    features, estimator = wide_passes(random, 1000), Estimator(TRUE)
    few, one = features[:64], features[0]
    return {
        "predict_1000_us": _median_us(lambda: estimator.predict(features)),
        "predict_64_us": _median_us(lambda: estimator.predict(few)),
        "gradient_us": _median_us(lambda: estimator.gradient(one)),
        "observe_us": _median_us(lambda: estimator.observe(one, 0.05)),
    }


def _median_us(run_once: Callable[[], object]) -> float:
    taken_s = []
    for _ in range(_TIMED):
        start_s = time.perf_counter()
        run_once()
        taken_s.append(time.perf_counter() - start_s)
    return 1e6 * median(taken_s)


def wide_passes(random: np.random.Generator, num_passes: int) -> Floats:
    """Passes of 1 to 128 sessions, contexts of 16 to 4,000, 1 to 32 new tokens, any part of them choices, `[N, F]`.

    Half of the passes carry a chunk up to 2,048. So wide that every price decides about the time of some passes: what
    always hides behind another cannot be found.
    """
    rows = []
    for _ in range(num_passes):
        size = round(float(2 ** random.uniform(0, 7)))
        cached = np.round(2 ** random.uniform(4, 12, size))
        new = random.integers(1, 1 + round(float(2 ** random.uniform(0, 5))), size)
        choices = random.integers(0, 1 + (new if random.random() < 0.5 else 1), size)
        if random.random() < 0.5:
            new[0], choices[0] = round(float(2 ** random.uniform(4, 11))), 0
        rows.append(EMPTY_PASS + item_features(cached, new, choices).sum(axis=0))
    return np.array(rows)


def noisy_times(random: np.random.Generator, features: Floats, noise: float) -> Floats:
    """Seconds of passes under TRUE with log-normal noise, `[N]`."""
    result: Floats = Estimator(TRUE).predict(features) * np.exp(random.normal(0, noise, len(features)))
    return result
