"""Fit of the design's form for the time of a pass (sections 4 and 7) to measured passes.

    time = (memory ** p + arithmetic ** p) ** (1 / p)
    memory     = non-negative line over (1, sessions, context)             weights and KV that must be read
    arithmetic = non-negative line over (1, new tokens, new x context)     products that must be computed

p = 1 adds the two costs (nothing overlaps), a large p is the plain maximum (everything overlaps); which p fits
decides how dear a draft token is in a pass that is bound by memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Floats = npt.NDArray[np.float64]
NORMS = (1.0, 2.0, 4.0, 16.0)
MIN_PASSES = 8  # two more than there are coefficients
_UNITS = (  # name of each coefficient, and the amount of its feature that it is the price of
    ("memory_base_ms", 1.0),
    ("memory_ms_per_session", 1.0),
    ("memory_ms_per_1k_context", 1e3),
    ("arithmetic_base_ms", 1.0),
    ("arithmetic_ms_per_new_token", 1.0),
    ("arithmetic_ms_per_1m_new_x_context", 1e6),
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
    if len(passes) != len(measured_ms) or len(passes) < MIN_PASSES:
        raise ValueError(f"a fit needs one time per pass and at least {MIN_PASSES} passes, not {len(passes)}")
    if min(measured_ms) <= 0:
        raise ValueError("a fit needs times above zero")
    return {norm: _fit(passes, np.asarray(measured_ms, dtype=np.float64), norm) for norm in NORMS}


def best(fits: dict[float, PassFit]) -> PassFit:
    """The fit with the smallest median error."""
    return min(fits.values(), key=lambda fit: float(np.median(fit.relative_errors)))


def _fit(passes: Sequence[PassFeatures], measured_ms: Floats, norm: float) -> PassFit:
    """Least squares of log time; coefficients are exponentials of the free variables, so never negative."""
    rows = [(1.0, p.num_sessions, p.context, 1.0, p.num_new_tokens, p.new_x_context) for p in passes]
    features = np.asarray(rows, dtype=np.float64)
    scale = features.max(axis=0)
    x, log_ms = torch.from_numpy(features / scale), torch.from_numpy(np.log(measured_ms))
    low, high = measured_ms.min(), measured_ms.max()
    start = torch.tensor([low, 0.1 * low, 0.1 * low, 0.1 * low, high, 0.1 * high], dtype=torch.float64)
    free = start.log().requires_grad_(True)

    def log_time() -> torch.Tensor:
        terms = x * free.exp()
        # In logarithms, because a line to the power of 16 leaves the range of good numbers.
        lines = torch.stack([terms[:, :3].sum(1).log(), terms[:, 3:].sum(1).log()])
        return torch.logsumexp(norm * lines, dim=0) / norm

    optimizer = torch.optim.LBFGS([free], max_iter=1000, tolerance_change=1e-12, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (log_time() - log_ms).square().mean()
        torch.autograd.backward(loss)
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        predicted_ms = log_time().exp().numpy()
        prices = free.exp().numpy() / scale
    named = {name: float(price * amount) for (name, amount), price in zip(_UNITS, prices, strict=True)}
    return PassFit(norm, named, predicted_ms, np.abs(predicted_ms / measured_ms - 1))
