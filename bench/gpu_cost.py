"""What a pass costs on a GPU that is only modelled (DESIGN.md section 4): the true cost behind a simulated verifier."""

from __future__ import annotations

import numpy as np

from wisp_plugin.estimator import EMPTY_PASS, FEATURES, Costs, Estimator, item_features


def line(**prices_s: float) -> tuple[float, ...]:
    """One line of `Costs` from seconds per unit of named FEATURES; those not named cost nothing."""
    unknown = set(prices_s) - set(FEATURES)
    if unknown:
        raise ValueError(f"no such feature of a pass: {', '.join(sorted(unknown))}; there are {', '.join(FEATURES)}")
    return tuple(prices_s.get(name, 0.0) for name in FEATURES)


_KV_BYTES_PER_TOKEN = 256 * 1024  # 64 layers x 8 KV heads x 128 x (key, value) x bf16
_MEMORY_BYTES_PER_S = 2.04e12  # A100 80 GB

# A model of 32 G parameters on an A100: weights and KV are read, and every new token is computed.
A100_32G = Costs(
    memory=line(passes=0.036, context=_KV_BYTES_PER_TOKEN / _MEMORY_BYTES_PER_S),
    arithmetic=line(passes=0.004, new_tokens=0.0003),
    norm=4.0,
)


def unloaded_pass_s(costs: Costs) -> float:
    """Seconds of a pass of one session with one new token and nothing cached."""
    return float(Estimator(costs).predict(EMPTY_PASS + item_features(np.zeros(()), np.ones(()), np.ones(()))))
