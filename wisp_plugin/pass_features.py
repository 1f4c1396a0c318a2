"""Features of a pass that is planned, from which its time is predicted, and of one that has run, to learn from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from wisp_plugin.estimator import EMPTY_PASS, Estimator, Floats, item_features, token_features
from wisp_plugin.messages import PassItem, PassOutcome
from wisp_plugin.policies import Choice, expected_tokens
from wisp_plugin.roster import Candidates


def choice_features(c: Candidates, choice: Choice) -> Floats:
    """Features of the pass that is chosen, `[F]`."""
    members, num_drafts = choice.members, choice.all_drafts
    commits = choice.num_committed == c.num_uncached[members]  # the others compute a chunk and choose nothing
    num_choices = np.where(commits, num_drafts + 1, 0)
    parts = item_features(c.num_cached[members], choice.num_committed + num_drafts, num_choices)
    result: Floats = EMPTY_PASS + parts.sum(axis=0)
    return result


def predict_pass(estimator: Estimator, c: Candidates, choice: Choice, drafting_s: float) -> tuple[float, float]:
    """Predicted seconds of a pass, drafting on the server included, and the price: commits displaced by one more draft
    token (section 7). `c` with the draft tokens that the server offers."""
    if not len(choice.members):
        return 0.0, 0.0
    features = choice_features(c, choice)
    predicted_s = estimator.pass_s(estimator.work(features)) + drafting_s
    one_more = token_features(features[5] / len(choice.members))
    per_s = float(expected_tokens(c, choice).sum()) / predicted_s
    return predicted_s, per_s * float(one_more @ estimator.gradient(features))


def member_features(items: Sequence[PassItem]) -> Floats:
    """Features of each member of a pass, `[len(items), F]`."""
    columns = [(item.num_cached, item.num_new_tokens, item.num_choices) for item in items]
    return item_features(*np.array(columns, np.float64).reshape(-1, 3).T)


def pass_features(items: Sequence[PassItem], outcomes: Sequence[PassOutcome]) -> Floats:
    """Features of a pass that has run, `[F]`: the server may have drafted less than was planned."""
    columns = []
    for item, outcome in zip(items, outcomes, strict=True):
        less = item.num_to_draft - (0 if outcome.drafted is None else len(outcome.drafted))
        columns.append((item.num_cached, item.num_new_tokens - less, item.num_choices - less))
    result: Floats = EMPTY_PASS + item_features(*np.array(columns).T).sum(axis=0)
    return result
