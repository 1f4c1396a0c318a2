"""What the estimator learns from: features of a pass that was planned, and of one that has run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from wisp_plugin.estimator import EMPTY_PASS, Floats, item_features
from wisp_plugin.messages import BatchPlan, PassItem, PassOutcome


def plan_features(plan: BatchPlan) -> Floats:
    """Features of a planned pass, `[F]`."""
    columns = np.array([(item.num_cached, item.num_new_tokens, item.num_choices) for item in plan.items]).T
    result: Floats = EMPTY_PASS + item_features(*columns).sum(axis=0)
    return result


def pass_features(items: Sequence[PassItem], outcomes: Sequence[PassOutcome]) -> Floats:
    """Features of a pass that has run, `[F]`: the server may have drafted less than was planned."""
    short = [
        item.num_to_draft - (0 if outcome.drafted is None else len(outcome.drafted))
        for item, outcome in zip(items, outcomes, strict=True)
    ]
    columns = [
        (item.num_cached, item.num_new_tokens - less, item.num_choices - less)
        for item, less in zip(items, short, strict=True)
    ]
    result: Floats = EMPTY_PASS + item_features(*np.array(columns).T).sum(axis=0)
    return result
