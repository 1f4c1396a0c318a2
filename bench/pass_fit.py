"""The estimator's fit (`wisp_plugin.cost_fit`) for passes of equal sessions, once per norm p.

Every new token is a choice in these passes, so the choices are left out and their price is in that of new tokens.
p = 1 adds the two costs (nothing overlaps), a large p is the plain maximum (everything overlaps); which p fits
decides how dear a draft token is in a pass that is bound by memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from wisp_plugin.cost_fit import MIN_PASSES, NORMS, fit_costs
from wisp_plugin.estimator import FEATURES, Costs, Estimator, Floats

__all__ = ["MIN_PASSES", "NORMS", "PassFeatures", "PassFit", "best", "fit_norms"]

_UNITS = (  # name of each coefficient, its line and feature, and the amount of the feature that it is the price of
    ("memory_base_ms", "memory", "passes", 1.0),
    ("memory_ms_per_session", "memory", "sessions", 1.0),
    ("memory_ms_per_1k_context", "memory", "context", 1e3),
    ("arithmetic_base_ms", "arithmetic", "passes", 1.0),
    ("arithmetic_ms_per_session", "arithmetic", "sessions", 1.0),
    ("arithmetic_ms_per_new_token", "arithmetic", "new_tokens", 1.0),
    ("arithmetic_ms_per_1m_new_x_context", "arithmetic", "new_x_context", 1e6),
)


@dataclass(frozen=True, slots=True)
class PassFeatures:
    """A pass: each of `num_sessions` computes `tokens_per_session` new tokens behind `cached_tokens` of its own."""

    num_sessions: int
    tokens_per_session: int
    cached_tokens: int

    @property
    def num_new_tokens(self) -> int:
        """Tokens that the pass computes."""
        return self.num_sessions * self.tokens_per_session

    @property
    def context(self) -> int:
        """Tokens whose KV the pass reads, over all sessions."""
        return self.num_sessions * (self.cached_tokens + self.tokens_per_session)

    @property
    def new_x_context(self) -> float:
        """Pairs of a new token and a token that it attends to."""
        return self.num_new_tokens * (self.cached_tokens + (self.tokens_per_session + 1) / 2)


@dataclass(frozen=True, slots=True)
class PassFit:
    """Coefficients by name (see `_UNITS`), the norm p, the passes' predicted times and relative errors."""

    norm: float
    coefficients: dict[str, float]
    predicted_ms: Floats
    relative_errors: Floats

    def figures(self) -> dict[str, Any]:
        """The fit as figures of a report; errors are |predicted / measured - 1|."""
        return {
            "fit_norm": self.norm,
            "fit_coefficients": self.coefficients,
            "fit_error_median": float(np.median(self.relative_errors)),
            "fit_error_p90": float(np.percentile(self.relative_errors, 90)),
            "fit_error_max": float(self.relative_errors.max()),
        }


def fit_norms(passes: Sequence[PassFeatures], measured_ms: Sequence[float]) -> dict[float, PassFit]:
    """One fit per norm in NORMS. Raises ValueError with fewer than MIN_PASSES passes or a time of zero."""
    rows = [(1.0, p.num_sessions, p.num_new_tokens, 0.0, p.new_x_context, p.context) for p in passes]
    features, measured_s = np.asarray(rows, dtype=np.float64), np.asarray(measured_ms, dtype=np.float64) / 1e3
    return {norm: _named(fit_costs(features, measured_s, (norm,)).costs, features, measured_s) for norm in NORMS}


def best(fits: dict[float, PassFit]) -> PassFit:
    """The fit with the smallest median error."""
    return min(fits.values(), key=lambda fit: float(np.median(fit.relative_errors)))


def _named(costs: Costs, features: Floats, measured_s: Floats) -> PassFit:
    predicted_s = Estimator(costs).predict(features)
    lines = {"memory": costs.memory, "arithmetic": costs.arithmetic}
    named = {name: 1e3 * amount * lines[line][FEATURES.index(feature)] for name, line, feature, amount in _UNITS}
    return PassFit(costs.norm, named, 1e3 * predicted_s, np.abs(predicted_s / measured_s - 1))
