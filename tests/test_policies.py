"""`continuous`, `edf` and `fcfs`: who is chosen, in what order, and when a static batch fires."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.factories import make_candidates, make_config, make_estimator
from wisp_plugin.policies import BATCH, DEADLINE, NOBODY, PREFILL_WAIT_S, TURN, Choice, Policy, take_in_order
from wisp_plugin.roster import Candidates
from wisp_plugin.scheduler import POLICIES


def make_policy(name: str, **config: Any) -> Policy:
    return POLICIES[name](make_config(policy=name, **config), make_estimator())


def parts(choice: Choice) -> list[tuple[int, int, int]]:
    """(candidate, committed tokens, draft tokens) of each member."""
    return list(zip(choice.members.tolist(), choice.num_committed.tolist(), choice.num_drafts.tolist(), strict=True))


@st.composite
def candidates(draw: st.DrawFn) -> Candidates:
    """Any candidates, with ties."""
    num = draw(st.integers(1, 9))

    def column(values: st.SearchStrategy[float]) -> list[float]:
        return draw(st.lists(values, min_size=num, max_size=num))

    survival = np.zeros((num, 5))
    for row in range(num):
        chances = draw(st.lists(st.floats(0.01, 1), max_size=5))
        survival[row, : len(chances)] = sorted(chances, reverse=True)
    return make_candidates(
        num,
        survival,
        num_cached=column(st.sampled_from([0.0, 5.0, 900.0])),
        num_uncached=column(st.sampled_from([1.0, 1.0, 2.0, 16.0, 17.0, 100.0])),
        needed_s=column(st.sampled_from([-1e3, 0.0, 0.99, 1.0, 1.05, 3.0, 1e4])),
        tpot_s=column(st.sampled_from([1e-6, 0.01, 0.1, 1e4])),
        next_draft_s=column(st.sampled_from([math.inf, 0.5, 1.01, 1.1, 2e3])),
        ready_s=column(st.sampled_from([-5.0, 0.0, 0.95, 1.0])),
        tokens_per_turn=column(st.sampled_from([1.0, 2.5])),
        is_lost=column(st.sampled_from([0.0, 0.0, 1.0])),
        opened_s=column(st.floats(-1.0, 0.5)),
        draft_gap_s=column(st.sampled_from([0.0, 0.005, 3.0])),
        acceptance=column(st.sampled_from([0.0, 0.7, 1.0])),
        way_s=column(st.sampled_from([0.0, 0.05, 9.0])),
        worth_tokens=column(st.sampled_from([0.0, 4.0])),
        worth_gain=column(st.sampled_from([0.0, 3.0])),
        is_new_chain=column(st.sampled_from([0.0, 1.0])),
        is_sync=column(st.sampled_from([0.0, 0.0, 1.0])),
        num_turns=column(st.sampled_from([0.0, 1.0, 50.0])),
    )


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(list(POLICIES)),
    candidates(),
    st.sampled_from([1, 2, 5, 16, 17, 40, 512]),
    st.integers(1, 9),
    st.integers(1, 9),
)
def test_every_choice_keeps_to_limits_and_to_what_there_is(
    policy: str, c: Candidates, max_tokens: int, max_sessions: int, batch: int
) -> None:
    limits = {"max_pass_tokens": max_tokens, "max_pass_sessions": max_sessions, "static_batch_sessions": batch}
    with np.errstate(all="raise", under="ignore"):
        choice = make_policy(policy, **limits).choose(c, 1.0)
    assert len(choice.members) == len(set(choice.members.tolist())) == len(choice.reasons) <= max_sessions
    assert choice.num_committed.sum() + choice.num_drafts.sum() <= max_tokens
    for i, num_committed, num_drafts in parts(choice):
        assert 1 <= num_committed <= c.num_uncached[i]
        assert 0 <= num_drafts <= c.num_buffered[i]
        assert not num_drafts or num_committed == c.num_uncached[i], "a chunk carries no drafts"
    if not len(choice.members):
        assert 1.0 < choice.wake_s < math.inf
    again = make_policy(policy, **limits).choose(c, 1.0)
    assert (parts(choice), choice.reasons, choice.wake_s) == (parts(again), again.reasons, again.wake_s)


@pytest.mark.parametrize("policy", POLICIES)
def test_nobody_to_choose_from(policy: str) -> None:
    choice = make_policy(policy).choose(make_candidates(0), 1.0)
    assert (len(choice.members), choice.wake_s) == (0, math.inf)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(["continuous", "edf"]), candidates(), st.integers(1, 60), st.integers(1, 4))
def test_nobody_is_overtaken(policy: str, c: Candidates, max_tokens: int, max_sessions: int) -> None:
    """The bound on waiting of `edf` and `continuous`: who stays out comes behind every member in their order."""
    config = {"max_pass_tokens": max_tokens, "max_pass_sessions": max_sessions}
    choice = make_policy(policy, **config).choose(c, 1.0)
    is_young = (c.num_uncached > 1) & (c.ready_s > 1.0 - PREFILL_WAIT_S)
    rank = [(c.needed_s[i],) if policy == "edf" else (is_young[i], c.ready_s[i]) for i in range(len(c))]
    members = choice.members.tolist()
    assert members
    for i in set(range(len(c))) - set(members):
        assert all((*rank[m], m) < (*rank[i], i) for m in members)
    whole = [num_committed + num_drafts for _, num_committed, num_drafts in parts(choice)]
    assert whole[:-1] == [int(c.num_uncached[i] + c.num_buffered[i]) for i in members[:-1]]


def test_the_last_member_gets_what_is_left() -> None:
    c = make_candidates(4, [1.0, 0.5], num_uncached=[1, 1, 9, 1])
    order, config = np.array([2, 0, 1, 3]), make_config(max_pass_tokens=13)
    assert parts(take_in_order(c, order, config, TURN)) == [(2, 9, 2), (0, 1, 1)]
    config = make_config(max_pass_tokens=6)
    assert parts(take_in_order(c, order, config, TURN)) == [(2, 6, 0)]  # a chunk


def test_only_some_members_of_a_choice() -> None:
    choice = take_in_order(make_candidates(3), np.array([2, 0, 1]), make_config(), TURN)
    assert parts(choice.only(np.array([0, 2]))) == [(2, 1, 0), (1, 1, 0)]
    assert parts(choice.only(np.array([], np.int64))) == parts(NOBODY)


def test_continuous_puts_young_prefills_behind_those_who_decode() -> None:
    c = make_candidates(4, num_uncached=[30, 1, 30, 1], ready_s=[0.95, 0.98, 0.5, 0.7])
    choice = make_policy("continuous").choose(c, 1.0)
    assert choice.members.tolist() == [2, 3, 1, 0]  # 2 has waited longer than PREFILL_WAIT_S
    assert set(choice.reasons) == {TURN}


def test_edf_is_in_order_of_need() -> None:
    c = make_candidates(4, needed_s=[3.0, 1.0, 2.0, 1.0])
    choice = make_policy("edf").choose(c, 1.0)
    assert choice.members.tolist() == [1, 3, 2, 0]
    assert set(choice.reasons) == {DEADLINE}


def test_a_static_batch_fires_when_it_is_full() -> None:
    policy = make_policy("fcfs", static_batch_sessions=3, static_batch_wait_ms=50.0)
    few = policy.choose(make_candidates(2, ready_s=[0.99, 0.98]), 1.0)
    assert (len(few.members), few.wake_s) == (0, pytest.approx(1.03))
    full = policy.choose(make_candidates(4, ready_s=[0.99, 0.98, 1.0, 0.97]), 1.0)
    assert full.members.tolist() == [3, 1, 0]
    assert set(full.reasons) == {BATCH}


def test_a_static_batch_fires_when_its_oldest_has_waited_long_enough() -> None:
    policy = make_policy("fcfs", static_batch_sessions=3, static_batch_wait_ms=50.0)
    c = make_candidates(2, ready_s=[0.99, 0.98])
    held = policy.choose(c, 1.0)
    assert not len(held.members)
    assert policy.choose(c, held.wake_s).members.tolist() == [1, 0]  # exactly then, or the engine would spin


def test_a_static_batch_without_waiting_fires_at_once() -> None:
    policy = make_policy("fcfs", static_batch_wait_ms=0.0)
    assert len(policy.choose(make_candidates(1, ready_s=1.0), 1.0).members) == 1
