"""Confidence intervals over seeds: Student's t, of a mean and of a ratio of paired runs (on logarithms)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and the ends of its 95 % confidence interval; with one value the ends are None."""

    mean: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.mean:.3g}"
        return f"{self.mean:.3g} ({self.low:.3g} to {self.high:.3g})"


def mean_interval(values: Sequence[float]) -> Interval:
    """Of the mean of independent values, none of which is below 0: nor is an end. Raises ValueError without any."""
    if not values:
        raise ValueError("an interval needs values")
    mean, half = float(np.mean(values)), _half_width(values)
    return Interval(mean, None, None) if half is None else Interval(mean, max(0.0, mean - half), mean + half)


def ratio_interval(values: Sequence[float], others: Sequence[float]) -> Interval | None:
    """Of the geometric mean of `values / others`, which belong together pair by pair.

    None if another value is 0 (the ratio is without bound) or a value is.
    """
    if len(values) != len(others) or not values:
        raise ValueError("a ratio needs as many values as others, and at least one")
    if min(others) <= 0 or min(values) <= 0:
        return None
    logs = np.log(np.asarray(values, float) / np.asarray(others, float))
    mean, half = float(logs.mean()), _half_width(logs.tolist())
    if half is None:
        return Interval(math.exp(mean), None, None)
    return Interval(math.exp(mean), math.exp(mean - half), math.exp(mean + half))


def _half_width(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    quantile = float(stats.t.ppf(0.5 + CONFIDENCE / 2, len(values) - 1))
    return quantile * float(np.std(values, ddof=1)) / math.sqrt(len(values))
