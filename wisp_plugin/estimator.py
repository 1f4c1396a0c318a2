"""Verification time estimator: how long would this pass take? (DESIGN.md section 7)

    seconds = (memory ** norm + arithmetic ** norm) ** (1 / norm)

`memory` (weights and KV that must be read) and `arithmetic` (products that must be computed) are non-negative lines
over FEATURES. norm 1 adds them, because nothing overlaps; a large norm is the plain maximum, everything overlaps.
`cost_fit` finds prices and norm from measured passes, `profile` keeps them in a file, `cost_correction` keeps them
true while serving.

Forms tried with SmolLM2-135M on an AMD EPYC with avx512, one torch thread: fitted to a grid and half of 150 (bf16: 200)
random ragged passes, mean error in % on the other half, over six splits. CPU time, because of neighbours; equal passes
differed from their median by 11.1 (10.1):

                                                              fp32                    bf16
    norm 1, 2, 4, 16                                          10.3, 9.8, 9.6, 9.5     12.7, 12.5, 12.4, 12.8
    norm 4, choices not told from new tokens                  10.1                    12.5
    norm 4, all features in both lines                        10.1                    12.6
    norm 4, new tokens piecewise linear (4, 9, 17 pieces)     9.7, 9.6, 9.8           12.4, 12.4, 12.5
    norm 4, choices piecewise linear (4 pieces)               9.8                     12.3
    norm 4, contexts of sessions with one new token apart     9.6                     12.1

So steps in new tokens do not show in whole passes, and the two plain lines are at the noise. The last row is torch's
bf16 attention, which takes more than twice as long for one query as for two: a matter for the attention, not for here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from wisp_plugin.cost_correction import CostCorrection, Margin

Floats = npt.NDArray[np.float64]
# Columns of a pass: sums over its members of the features of each (see `item_features`).
FEATURES = ("passes", "sessions", "new_tokens", "choices", "new_x_context", "context")
NUM_FEATURES = len(FEATURES)
MAX_NORM = 32.0  # lines to this power still are good numbers for any time from a nanosecond to a year


def item_features(num_cached: npt.ArrayLike, num_new: npt.ArrayLike, num_choices: npt.ArrayLike) -> Floats:
    """Features of sessions in a pass, `[..., F]`: column 0 is 0, because the pass counts once (`EMPTY_PASS`).

    A session computes `num_new` tokens behind `num_cached` and chooses `num_choices` tokens. `new_x_context` counts
    pairs of a new token and a token that it attends to, `context` the tokens whose KV is read.
    """
    cached, new = np.asarray(num_cached, np.float64), np.asarray(num_new, np.float64)
    features = np.zeros((*new.shape, NUM_FEATURES))
    features[..., 1] = 1.0
    features[..., 2] = new
    features[..., 3] = num_choices
    features[..., 4] = new * (cached + (new + 1.0) / 2.0)
    features[..., 5] = cached + new
    return features


EMPTY_PASS: Floats = np.array([1.0, 0.0, 0.0, 0.0, 0.0, 0.0])


def token_features(context: npt.ArrayLike) -> Floats:
    """Features `[..., F]` of one more token, say of a draft, of a session that takes part: it attends to `context`."""
    attended = np.asarray(context, np.float64)
    features = np.zeros((*attended.shape, NUM_FEATURES))
    features[..., [2, 3, 5]] = 1.0
    features[..., 4] = attended
    return features


@dataclass(frozen=True, slots=True)
class Costs:
    """The smooth maximum of two lines, `norm` sharp; each line has one price in seconds per unit of FEATURES."""

    memory: tuple[float, ...]
    arithmetic: tuple[float, ...]
    norm: float = 4.0

    def __post_init__(self) -> None:
        """ValueError unless there is one finite price from 0 per feature, a pass costs something, and 1 <= norm."""
        for line in (self.memory, self.arithmetic):
            if len(line) != NUM_FEATURES or not all(0.0 <= price < math.inf for price in line):
                raise ValueError(f"a line has {NUM_FEATURES} finite prices from 0, not {line}")
        if not 1.0 <= self.norm <= MAX_NORM:
            raise ValueError(f"norm is {self.norm}; allowed: 1 to {MAX_NORM:g}")
        if not any(self.memory) and not any(self.arithmetic):
            raise ValueError("a pass has to cost something")


@dataclass(slots=True)
class Estimator:
    """Predicted time of a pass, kept true by what passes really took.

    `costs` are those of the profile; `learned_costs` those that predictions are made with. `margin` is the factor
    that about 5 % of passes exceed, and `noise` the usual relative difference of a pass to its prediction. Belongs
    to one thread.
    """

    costs: Costs
    margin: float = 1.0
    noise: float = 0.05
    num_observed: int = 0
    num_rejected: int = 0  # observations that cannot be times: NaN, infinite, zero, negative
    _lines: Floats = field(init=False, repr=False)
    _correction: CostCorrection = field(init=False, repr=False)
    _margin: Margin = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """ValueError for a margin or a noise that is not a positive number."""
        if not (0.0 < self.margin < math.inf and 0.0 < self.noise < math.inf):
            raise ValueError(f"margin {self.margin} and noise {self.noise} have to be positive numbers")
        self._lines = self._base_lines()
        self._correction = CostCorrection(self._lines.size, self.noise)
        self._margin = Margin(math.log(self.margin))

    @property
    def num_clipped(self) -> int:
        """Observations that were so far from their prediction that only a part of the difference was believed."""
        return self._correction.num_clipped

    def predict(self, features: Floats) -> Floats:
        """Expected seconds of passes with the features `[..., F]`."""
        return self.seconds(self.work(features))

    def work(self, features: Floats) -> Floats:
        """Seconds of memory and of arithmetic, `[..., 2]`, of features `[..., F]`. Work of parts of a pass adds up."""
        result: Floats = features @ self._lines
        return result

    def seconds(self, work: Floats) -> Floats:
        """Expected seconds of passes with the work `[..., 2]`."""
        norm = self.costs.norm
        result: Floats = _power(_power(work[..., 0], norm) + _power(work[..., 1], norm), 1.0 / norm)
        return result

    def pass_s(self, work: Floats) -> float:
        """Expected seconds of one pass with the work `[2]`: `seconds` to the last bit, and quick
        for usual norms: a decision asks ten times."""
        norm = self.costs.norm
        if norm not in (1.0, 2.0, 4.0):
            return float(self.seconds(work))
        memory, arithmetic = work.tolist()
        if norm == 1.0:
            return float(memory + arithmetic)
        memory, arithmetic = memory * memory, arithmetic * arithmetic
        if norm == 4.0:
            memory, arithmetic = memory * memory, arithmetic * arithmetic
        return math.sqrt(memory + arithmetic) if norm == 2.0 else math.sqrt(math.sqrt(memory + arithmetic))

    def weights(self, work: Floats) -> Floats:
        """Seconds of the pass per further second of its memory and of its arithmetic, `[2]`, at `work` `[2]`."""
        result: Floats = (work / self.pass_s(work)) ** (self.costs.norm - 1.0)
        return result

    def predict_quantile(self, features: Floats) -> Floats:
        """Seconds that about 5 % of passes with the features `[..., F]` exceed."""
        return self.predict(features) * self.margin

    def gradient(self, features: Floats) -> Floats:
        """Seconds per further unit of each feature `[F]`, at a pass with `features` `[F]`."""
        result: Floats = self._lines @ self.weights(self.work(features))
        return result

    def observe(self, features: Floats, measured_s: float) -> None:
        """Learn from a pass with `features` `[F]` that took `measured_s`. What is not a time is counted and ignored."""
        if not 0.0 < measured_s < math.inf:  # also refuses NaN
            self.num_rejected += 1
            return
        self.num_observed += 1
        predicted_s = float(self.predict(features))
        log_ratio = math.log(measured_s / predicted_s)
        # The share of each price in the prediction: how much 1 % on the price alone changes it. They add up to 1.
        shares = self._lines * features[:, None] * (self.weights(self.work(features)) / predicted_s)
        self._margin.learn(log_ratio, self._correction.noise)
        self.margin = math.exp(self._margin.log_factor)
        self._correction.learn(shares.reshape(-1), log_ratio)
        self.noise = self._correction.noise
        self._lines = self._base_lines() * self._correction.factors().reshape(self._lines.shape)

    def learned_costs(self) -> Costs:
        """The costs that predictions are made with: those of the profile times what was learnt."""
        memory, arithmetic = self._lines.T.tolist()
        return Costs(tuple(memory), tuple(arithmetic), self.costs.norm)

    def _base_lines(self) -> Floats:
        return np.array([self.costs.memory, self.costs.arithmetic]).T  # [F, 2]


def _power(values: Floats, exponent: float) -> Floats:
    """`values ** exponent`, much faster for the exponents that norms of 1, 2 and 4 need."""
    if exponent == 1.0:
        return values
    if exponent == 2.0:
        return values * values
    if exponent == 4.0:
        return _power(_power(values, 2.0), 2.0)
    if exponent == 0.5:
        return np.sqrt(values)
    if exponent == 0.25:
        return _power(_power(values, 0.5), 0.5)
    result: Floats = values**exponent
    return result
