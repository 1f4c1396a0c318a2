"""Surplus, tokens that nobody needs yet, ends where the session that bears least would fall behind."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.factories import make_candidates, make_config
from wisp_plugin.estimator import EMPTY_PASS, Costs, Estimator, item_features
from wisp_plugin.policies import TURN, Choice
from wisp_plugin.roster import Candidates
from wisp_plugin.wisp_parameters import WispParameters
from wisp_plugin.wisp_policy import Wisp
from wisp_plugin.wisp_prefill import WispPrefill
from wisp_plugin.wisp_surplus import SurplusLimit

P = WispParameters()
NOW_S = 1.0
# Nothing but arithmetic: a pass of 10 ms, and so little per new token that surplus is worth taking.
TOKEN_S = 0.0001
LINEAR = Costs((0.0, 0, 0, 0, 0, 0), (0.01, 0, TOKEN_S, 0, 0, 0))
TIGHT_S, LOOSE_S = 0.014, 1.0


def make_limit(costs: Costs = LINEAR) -> SurplusLimit:
    estimator = Estimator(costs)
    return SurplusLimit(estimator, WispPrefill(make_config(), estimator, P), P)


def tight_and_loose(num_loose: int, num_drafts: int = 8) -> Candidates:
    """One session that just keeps its pace, and others with sure drafts that are far ahead of theirs."""
    survival = np.ones((1 + num_loose, num_drafts))
    survival[0] = 0.0
    return make_candidates(
        1 + num_loose, survival,
        needed_s=[NOW_S + TIGHT_S, *[NOW_S + 30.0] * num_loose], tpot_s=[TIGHT_S, *[LOOSE_S] * num_loose],
        ready_s=NOW_S,
    )  # fmt: skip


def limit_of(limit: SurplusLimit, c: Candidates, is_prefill: bool = False) -> float:
    return limit.limit_s(c, np.full(len(c), is_prefill), NOW_S)


def test_surplus_ends_where_the_tightest_would_fall_behind() -> None:
    c = tight_and_loose(num_loose=8)
    choice = Wisp(make_config(), Estimator(LINEAR)).choose(c, NOW_S)
    pass_s = 0.01 + TOKEN_S * float(choice.num_committed.sum() + choice.num_drafts.sum())
    borne_s = TIGHT_S * (1.0 + 1.0 / P.spend_passes)
    assert 0 in choice.members
    assert borne_s - 2 * TOKEN_S < pass_s <= borne_s + 1e-9
    # All of it is taken where that session bears more.
    bears = make_candidates(9, c.survival, needed_s=c.needed_s, tpot_s=c.tpot_s, tokens_per_turn=9.0, ready_s=NOW_S)
    choice = Wisp(make_config(), Estimator(LINEAR)).choose(bears, NOW_S)
    assert choice.num_drafts.sum() == 64


def test_who_cannot_be_helped_limits_nobody() -> None:
    limit = make_limit()
    assert limit_of(limit, tight_and_loose(4)) < math.inf
    hopeless = make_candidates(3, needed_s=NOW_S, tpot_s=0.5 * 0.01)
    assert limit_of(limit, hopeless) == math.inf
    lost = make_candidates(3, needed_s=NOW_S, tpot_s=[TIGHT_S, LOOSE_S, LOOSE_S], is_lost=[1.0, 0.0, 0.0])
    assert limit_of(limit, lost) > 0.5
    assert limit_of(limit, tight_and_loose(4), is_prefill=True) == math.inf


def test_many_prompts_lately_make_the_pace_of_all_slower() -> None:
    """Twenty sessions at 14 ms per token: decoding alone fits; with four prompt tokens to each it does not."""
    c = make_candidates(20, needed_s=NOW_S + TIGHT_S, tpot_s=TIGHT_S)
    limit = make_limit()
    assert limit_of(limit, c) < math.inf
    prompts = Choice(np.arange(20), np.full(20, 4), np.zeros(20, np.int64), (TURN,) * 20)
    uncached = make_candidates(20, num_uncached=4.0)
    for step in range(50):
        limit.note(uncached, prompts, NOW_S + 0.1 * step)
    assert limit_of(limit, c) == math.inf


def test_passes_are_forgotten_and_empty_ones_are_none() -> None:
    limit = make_limit()
    c = make_candidates(2, [0.5, 0.25], num_uncached=[1.0, 40.0])
    limit.note(c, Choice(np.array([0, 1]), np.array([1, 20]), np.array([2, 0]), (TURN, TURN)), 1e6)
    assert limit._num_new == pytest.approx(23.0)
    assert limit._num_committed == pytest.approx(1.75)  # a prefill that goes on commits nothing
    limit.note(c, Choice(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.int64), ()), 1e6)
    assert limit._num_new == pytest.approx(23.0)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(0, 8), st.floats(0.012, 0.2), st.floats(0.0, 40.0))
def test_what_is_needed_is_never_limited(num_loose: int, num_drafts: int, tight_s: float, ahead_s: float) -> None:
    """Own tokens of those who need one are in the pass, whatever the limit says."""
    c = make_candidates(
        1 + num_loose, np.full((1 + num_loose, num_drafts), 0.9), tpot_s=[tight_s, *[LOOSE_S] * num_loose],
        needed_s=[NOW_S, *[NOW_S + ahead_s] * num_loose], ready_s=NOW_S,
    )  # fmt: skip
    members = set(Wisp(make_config(), Estimator(LINEAR)).choose(c, NOW_S).members.tolist())
    own = item_features(c.num_cached, c.num_uncached, 1.0).sum(axis=0)
    everyone_s = float(Estimator(LINEAR).predict(EMPTY_PASS + own))
    needs = c.needed_s - NOW_S - everyone_s <= P.need_tokens * c.tpot_s
    assert set(np.flatnonzero(needs).tolist()) <= members
