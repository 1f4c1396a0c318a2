"""What passes really took, turned into factors on the prices of a profile, and into a margin (DESIGN.md section 7).

Recursive least squares with forgetting (a Kalman filter, e.g. Haykin, Adaptive Filter Theory, chapter 10) on the
logarithm of the prices: the log of measured / predicted is, to first order, the sum over the prices of (share of
the price in the prediction) x (log of its factor). Factors of logarithms keep prices non-negative.

Two speeds, because serving sees a narrow range of passes for hours:

    common   one factor on all prices, forgets within some 6 passes: the machine got slower or faster
    own      one factor per price, slow, and pulled back to 1: the profile is wrong about one of them

Plain RLS on the prices would, with the same kind of pass over and over, split a change between prices that this kind
cannot tell apart, and forgetting would wind its covariance up. Here a change goes to `common`, which moves all sizes
alike, and the covariance of `own` never exceeds its prior.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
MIN_NOISE, MAX_NOISE = 0.005, 0.7  # relative difference of a pass to its prediction
_CLIP = 3.0  # in units of the noise; what is further off is an outlier until it persists
_NOISE_GAIN = 0.1  # persisting outliers raise the noise, and with it the clip, 1.3-fold each: soon they are believed
# Variances are in units of that of a measurement. A common drift of 0.012 or 0.06 per pass made little difference in
# held-out passes on a machine with neighbours (online error 8.2 or 8.0 %, 17.1 or 14.1 % where noise was 25 %). An own
# variance of 4 learned a wrong price no better, but took half of a change that only one kind of pass had shown.
_COMMON_DRIFT = 0.03  # of `common`, per pass
_OWN_VARIANCE = 1.0  # prior of `own`
_OWN_MEMORY = 0.9995  # per pass: back to the profile within some 2,000 passes without evidence
_MAX_LOG_COMMON, _MAX_LOG_OWN = math.log(1e3), math.log(4.0)
_LATE_SHARE = 0.05
_MARGIN_GAIN, _LEAST_MARGIN, _MOST_MARGIN = 0.5, 2.0, 4.0  # in units of the noise


class CostCorrection:
    """Factors on `num_prices` prices, learnt from one pass after the other."""

    def __init__(self, num_prices: int, noise: float) -> None:
        """`noise`: relative difference to expect of a pass to its prediction."""
        self.noise = min(max(noise, MIN_NOISE), MAX_NOISE)
        self.num_clipped = 0
        self._logs = np.zeros(1 + num_prices)  # common, own ...
        self._drift = np.full(1 + num_prices, _OWN_VARIANCE * (1 - _OWN_MEMORY**2))
        self._drift[0] = _COMMON_DRIFT
        self._keep = np.full(1 + num_prices, _OWN_MEMORY)
        self._keep[0] = 1.0
        self._keep_pairs = np.outer(self._keep, self._keep)
        self._covariance = np.diag(np.full(1 + num_prices, _OWN_VARIANCE))
        self._limits = np.full(1 + num_prices, _MAX_LOG_OWN)
        self._limits[0] = _MAX_LOG_COMMON

    def learn(self, shares: Floats, log_ratio: float) -> None:
        """One pass: `shares` `[P]` of the prices in its prediction, `log_ratio` of measured to predicted time."""
        limit = _CLIP * self.noise
        believed = min(max(log_ratio, -limit), limit)
        self.num_clipped += believed != log_ratio
        noise = self.noise + _NOISE_GAIN * (1.25 * abs(believed) - self.noise)  # 1.25: mean deviation to standard
        self.noise = min(max(noise, MIN_NOISE), MAX_NOISE)
        regressors = np.concatenate(([1.0], shares))
        self._covariance *= self._keep_pairs
        self._covariance.reshape(-1)[:: len(self._logs) + 1] += self._drift
        spread = self._covariance @ regressors
        gain = spread / (1.0 + regressors @ spread)
        # The prediction was made before this pass's step back to the profile; that step is too small to matter here.
        self._logs = np.clip(self._keep * self._logs + gain * believed, -self._limits, self._limits)
        self._covariance -= np.outer(gain, spread)

    def factors(self) -> Floats:
        """Factor of each price, `[P]`."""
        result: Floats = np.exp(self._logs[0] + self._logs[1:])
        return result


@dataclass(slots=True)
class Margin:
    """The factor on predictions that 5 % of passes exceed, by stochastic quantile tracking.

    Late passes push it up 19 times as far as others let it sink, so it rests where 1 in 20 is late; for any
    sequence the late share over T passes differs from 5 % by at most (range of the margin) / (gain x noise x T)
    (Gibbs and Candes 2021, adaptive conformal inference).
    """

    log_factor: float = field(default=0.0)

    def learn(self, log_ratio: float, noise: float) -> None:
        """One pass: `log_ratio` of measured to predicted time, and the usual size of it."""
        late = log_ratio > self.log_factor
        moved = self.log_factor + _MARGIN_GAIN * noise * (late - _LATE_SHARE)
        # Bounded by the noise of now: what a sudden change pushed up must not stay for hours.
        self.log_factor = min(max(moved, -_LEAST_MARGIN * noise), _MOST_MARGIN * noise)
