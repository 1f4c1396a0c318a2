"""Fit of `Costs` to measured passes: non-negative prices and the norm, least squares of the logarithm of time.

Relative errors count, because a short pass matters as much as a long one. For one norm: Gauss-Newton steps with
damping (Levenberg-Marquardt), each a non-negative least squares problem (Lawson and Hanson 1974, chapter 23), with
Huber weights, so that a pass that the machine disturbed does not bend the rest. The form is not convex: it is
started from several splits of the time between memory and arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from wisp_plugin.estimator import FEATURES, NUM_FEATURES, Costs, Estimator

Floats = npt.NDArray[np.float64]
NORMS = (1.0, 2.0, 4.0, 16.0)
# What each line may depend on. With all features in both lines the fit was no better, and not unique.
MEMORY_FEATURES = ("passes", "sessions", "context")
ARITHMETIC_FEATURES = ("passes", "sessions", "new_tokens", "choices", "new_x_context")
MIN_PASSES = len(MEMORY_FEATURES) + len(ARITHMETIC_FEATURES) + 2
_NUM_MEMORY = len(MEMORY_FEATURES)
_COLUMNS = [FEATURES.index(name) for name in MEMORY_FEATURES + ARITHMETIC_FEATURES]
_STARTS = (0.1, 0.5, 0.9)  # part of the shortest passes that is memory
_MAX_STEPS = 60
_HUBER = 2.5  # in units of the residuals' standard deviation
_TIE = 1.01  # errors closer than this are equal: then the smaller norm, which is smoother, is taken


@dataclass(frozen=True, slots=True)
class Fit:
    """Costs and how well they fit: mean of |predicted / measured - 1| over the passes they were fitted to."""

    costs: Costs
    error: float


def fit_costs(features: Floats, measured_s: Floats, norms: Sequence[float] = NORMS) -> Fit:
    """The best of one fit per norm to passes with `features` `[N, F]` that took `measured_s` `[N]`.

    Raises ValueError with fewer than MIN_PASSES passes or a time that is not a positive number.
    """
    if features.shape != (len(measured_s), NUM_FEATURES) or len(measured_s) < MIN_PASSES:
        raise ValueError(f"a fit needs one time per pass and at least {MIN_PASSES} passes, not {len(measured_s)}")
    if not (np.isfinite(measured_s) & (measured_s > 0)).all():
        raise ValueError("a fit needs times above zero")
    fits = [_fit_norm(features, measured_s, norm) for norm in norms]
    least = min(fit.error for fit in fits)
    return next(fit for fit in fits if fit.error <= least * _TIE)


def _fit_norm(features: Floats, measured_s: Floats, norm: float) -> Fit:
    """The best of the fits from several starts."""
    columns = features[:, _COLUMNS]
    scale = np.maximum(columns.max(axis=0), 1e-12)
    problem = _Problem(columns / scale, np.log(measured_s), norm)
    starts = [problem.start(share) for share in _STARTS]
    found = [_costs(problem.descend(start) / scale, norm) for start in starts]
    errors = [float(np.abs(Estimator(costs).predict(features) / measured_s - 1).mean()) for costs in found]
    best = int(np.argmin(errors))
    return Fit(found[best], errors[best])


def _costs(prices: Floats, norm: float) -> Costs:
    lines = np.zeros((2, NUM_FEATURES))
    lines[0, _COLUMNS[:_NUM_MEMORY]] = prices[:_NUM_MEMORY]
    lines[1, _COLUMNS[_NUM_MEMORY:]] = prices[_NUM_MEMORY:]
    return Costs(tuple(lines[0].tolist()), tuple(lines[1].tolist()), norm)


@dataclass(frozen=True, slots=True)
class _Problem:
    """`columns` `[N, P]` of both lines, each at most 1, and the logarithms of the times `[N]`."""

    columns: Floats
    log_s: Floats
    norm: float

    def start(self, memory_share: float) -> Floats:
        """Prices to start from: a plain sum fitted to the passes, with something in every price."""
        times_s = np.exp(self.log_s)
        prices = non_negative_least_squares(self.columns / times_s[:, None], np.ones(len(times_s)))
        prices = np.maximum(prices, 0.01 * times_s.min())
        prices[0] = memory_share * times_s.min()
        return prices

    def descend(self, prices: Floats) -> Floats:
        """Prices at the local minimum below `prices`."""
        damping = 1e-2
        residuals, jacobian = self._linearize(prices)
        for _ in range(_MAX_STEPS):
            weights = _huber_weights(residuals)
            loss = _loss(residuals, weights)
            step = self._step(prices, residuals * weights, jacobian * weights[:, None], damping)
            new_residuals, new_jacobian = self._linearize(step)
            gained = loss - _loss(new_residuals, weights)
            if gained < 0:
                damping *= 8
                if damping > 1e6:
                    break
                continue
            prices, residuals, jacobian, damping = step, new_residuals, new_jacobian, max(damping / 8, 1e-9)
            if gained <= 1e-8 * loss:
                break
        return prices

    def _linearize(self, prices: Floats) -> tuple[Floats, Floats]:
        """log of measured to predicted `[N]`, and the derivative of log predicted by the prices `[N, P]`."""
        tiny = 1e-12 * float(np.exp(self.log_s.min()))  # a line may be all zero: then only the other counts
        memory = self.columns[:, :_NUM_MEMORY] @ prices[:_NUM_MEMORY] + tiny
        arithmetic = self.columns[:, _NUM_MEMORY:] @ prices[_NUM_MEMORY:] + tiny
        time_s = (memory**self.norm + arithmetic**self.norm) ** (1 / self.norm)
        slopes = np.empty_like(self.columns)
        slopes[:, :_NUM_MEMORY] = ((memory / time_s) ** (self.norm - 1) / time_s)[:, None]
        slopes[:, _NUM_MEMORY:] = ((arithmetic / time_s) ** (self.norm - 1) / time_s)[:, None]
        return self.log_s - np.log(time_s), self.columns * slopes

    def _step(self, prices: Floats, residuals: Floats, jacobian: Floats, damping: float) -> Floats:
        """Non-negative prices at the minimum of the damped linear model."""
        brake = np.sqrt(damping * (np.square(jacobian).sum(axis=0) + 1e-12))
        matrix = np.concatenate([jacobian, np.diag(brake)])
        return non_negative_least_squares(matrix, np.concatenate([residuals + jacobian @ prices, brake * prices]))


def _huber_weights(residuals: Floats) -> Floats:
    """Square roots of the weights of Huber's loss, with the residuals' own robust deviation as unit."""
    limit = _HUBER * 1.4826 * float(np.median(np.abs(residuals))) + 1e-9
    weights: Floats = np.sqrt(np.minimum(1.0, limit / np.maximum(np.abs(residuals), 1e-12)))
    return weights


def _loss(residuals: Floats, weights: Floats) -> float:
    return float(np.square(residuals * weights).sum())


def non_negative_least_squares(matrix: Floats, target: Floats) -> Floats:
    """argmin |matrix x - target| over x >= 0, `[N, P]` and `[N]` -> `[P]` (Lawson and Hanson 1974, chapter 23)."""
    gram, correlation = matrix.T @ matrix, matrix.T @ target
    solution = np.zeros(len(correlation))
    free = np.zeros(len(correlation), dtype=bool)
    tolerance = 1e-11 * float(np.abs(correlation).max(initial=0.0))
    for _ in range(10 * len(correlation)):
        slope = np.where(free, -np.inf, correlation - gram @ solution)
        if slope.max() <= tolerance:
            break
        free[int(slope.argmax())] = True
        while free.any():
            candidate = np.zeros_like(solution)
            candidate[free] = np.linalg.lstsq(gram[np.ix_(free, free)], correlation[free], rcond=None)[0]
            negative = free & (candidate <= 0)
            if not negative.any():
                solution = candidate
                break
            # As far towards the candidate as all stay non-negative; what reaches zero is fixed there.
            ways = solution[negative] / (solution[negative] - candidate[negative])
            solution = solution + ways.min() * (candidate - solution)
            free &= solution > 1e-15 * max(1.0, float(solution.max()))
            solution[~free] = 0.0
    return solution
