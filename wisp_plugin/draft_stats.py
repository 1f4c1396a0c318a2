"""Statistics of draft logits: what a speculation controller sees of a draft token (DESIGN.md section 8)."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]
_HEAD_GAP = 11.0  # in logits


class DraftStats(NamedTuple):
    """Four statistics of the draft logits at temperature 1, and how likely the chosen token is in them."""

    confidence: float  # probability of the most likely token
    entropy: float  # nats
    margin: float  # probability of the most likely token minus that of the second
    spread: float  # standard deviation of the logits
    chosen: float  # probability of the token that was drafted; below `confidence` only when sampling

    @classmethod
    def of(cls, logits: Logits, token: int) -> DraftStats:
        """Statistics of finite `logits` `[vocab_size]`, at least two, of which `token` was drafted.

        Over the tokens within `_HEAD_GAP` of the best logit: the others, together about a hundredth of the
        probability, would cost more time than all the rest.
        """
        best = float(logits.max())
        head = logits[np.flatnonzero(logits > best - _HEAD_GAP)] - np.float32(best)
        weights = np.exp(head)
        total = float(weights.sum())
        entropy = math.log(total) - float(np.dot(weights, head)) / total
        weights[head.argmax()] = 0.0
        runner_up = float(weights.max())
        mean = float(logits.sum()) / len(logits)
        variance = float(np.dot(logits, logits)) / len(logits) - mean * mean
        return cls(
            confidence=1.0 / total,
            entropy=max(0.0, entropy),
            margin=(1.0 - runner_up) / total,
            spread=math.sqrt(max(0.0, variance)),
            chosen=math.exp(float(logits[token]) - best) / total,
        )


NUM_STATS = len(DraftStats._fields)
