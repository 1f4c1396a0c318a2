"""Policy `wisp`: who needs a token takes part, nobody waits for ever, prefill goes on. Constants are not tested."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.factories import make_candidates, make_config, make_estimator
from tests.fakes import ServingLoop
from tests.test_policies import candidates, parts
from wisp_plugin.estimator import EMPTY_PASS, Costs, Estimator, item_features
from wisp_plugin.messages import Slo
from wisp_plugin.policies import PREFILL, Choice
from wisp_plugin.roster import Candidates
from wisp_plugin.wisp_hold import MAX_SESSIONS
from wisp_plugin.wisp_policy import Wisp, WispParameters

P = WispParameters()
NOW_S = 1.0


def choose(c: Candidates, costs: Costs | None = None, **config: Any) -> Choice:
    estimator = Estimator(costs) if costs else make_estimator()
    return Wisp(make_config(**config), estimator).choose(c, NOW_S)


def needs_a_token(c: Candidates) -> np.ndarray:
    """Sessions that decode and would be late without this pass, as a pass with all of them takes at least so long."""
    estimator = make_estimator()
    is_turn = c.num_uncached <= P.prefill_tokens
    own = item_features(c.num_cached[is_turn], c.num_uncached[is_turn], np.ones(int(is_turn.sum())))
    pass_s = float(estimator.predict(EMPTY_PASS + own.sum(axis=0)))
    return np.asarray(is_turn & (c.is_lost == 0) & (c.needed_s <= NOW_S + pass_s))


@settings(max_examples=100, deadline=None)
@given(candidates())
def test_who_needs_a_token_takes_part(c: Candidates) -> None:
    """... unless a few all wait for drafts on their way, for the sake of everybody's speed, and not for long."""
    choice, needs = choose(c), needs_a_token(c)
    if needs.any() and not len(choice.members):
        assert len(c) <= MAX_SESSIONS
        assert (c.num_uncached <= P.prefill_tokens).all()
        assert NOW_S < choice.wake_s <= min(c.next_draft_s.min() + P.draft_grace_s, c.ready_s.min() + P.max_hold_s)
    else:
        assert set(np.flatnonzero(needs).tolist()) <= set(choice.members.tolist())


@settings(max_examples=100, deadline=None)
@given(candidates(), st.integers(1, 4), st.sampled_from([1, 7, 16, 60]))
def test_who_has_waited_longest_is_served_first_when_there_is_not_room_for_all(
    c: Candidates, max_sessions: int, max_tokens: int
) -> None:
    """The bound on waiting beside sessions that decode: whoever has waited for `max_hold_s` is overtaken only by those
    whose last turn was before that, so by each once. (Of prefills it holds for the one that has waited longest; and a
    chunk may use what others leave, where there is no room for a whole turn.)"""
    is_prefill = c.num_uncached > min(P.prefill_tokens, max_tokens)
    is_younger = is_prefill & (c.ready_s > np.where(is_prefill, c.ready_s, np.inf).min())
    has_waited = (c.ready_s + P.max_hold_s <= NOW_S) & ~is_younger
    choice = choose(c, max_pass_sessions=max_sessions, max_pass_tokens=max_tokens)
    is_chunk = is_prefill[choice.members]
    turns, num_in_turns = choice.members[~is_chunk], (choice.num_committed + choice.num_drafts)[~is_chunk].sum()
    for i in np.flatnonzero(has_waited & ~np.isin(np.arange(len(c)), choice.members)).tolist():
        has_room = len(turns) < max_sessions and num_in_turns + c.num_uncached[i] <= max_tokens
        before = choice.members[~is_younger[choice.members]] if has_room or is_prefill[i] else turns
        assert len(before)
        assert (c.ready_s[before] <= c.ready_s[i] + P.max_hold_s).all()


def test_waiting_ends_for_all_when_everybody_is_hopelessly_late() -> None:
    loop = ServingLoop(policy="wisp", max_pass_sessions=2)
    for number in range(7):
        loop.add(prompt=[number], max_new_tokens=500, slo=Slo(0.001, 0.001 if number % 2 else 1.0))
    for _ in range(200):
        loop.step(0.02)
        for session in loop.all:
            assert loop.now_s - session.ready_since_s <= P.max_hold_s + 7 * 0.02
    turns = [session.timeline.num_tokens for session in loop.all]
    assert min(turns) >= 3  # in 4 s


def test_a_long_prefill_is_done_beside_sessions_without_slack() -> None:
    """A chunk may cost more than the others' slack: it is given all the same, at the latest after `max_hold_s`."""
    dear = Costs((0.01, 0, 0, 0, 0, 0), (0.002, 0, 0.01, 0, 0, 0), norm=16.0)
    loop = ServingLoop(policy="wisp", costs=dear, num_blocks=1000)
    loop.add(1, max_new_tokens=900, slo=Slo(100.0, 0.001))
    loop.step(0.02)
    long = loop.add(200, max_new_tokens=1)
    num_chunks = -(-200 // P.prefill_tokens)
    until_s = loop.now_s + num_chunks * (P.max_hold_s + 1.0)
    while loop.now_s < until_s and not long.finished:
        loop.step(loop.plan().predicted_s)
    assert long.finished


def test_prefill_alone_takes_the_whole_pass() -> None:
    c = make_candidates(2, num_cached=0, num_uncached=[700, 90], needed_s=[2.0, 1.5], ready_s=NOW_S)
    choice = choose(c, max_pass_tokens=512)
    assert parts(choice) == [(1, 90, 0), (0, 422, 0)]  # who is due first goes first
    is_late = make_candidates(2, num_uncached=[90, 700], ready_s=[NOW_S - P.max_hold_s, NOW_S], needed_s=[0.5, 1.5])
    assert parts(choose(is_late, max_pass_tokens=512)) == [(0, 90, 0), (1, 422, 0)]  # but nobody waits for ever
    assert set(choice.reasons) == {PREFILL}


@settings(max_examples=100, deadline=None)
@given(candidates())
def test_drafts_that_survive_more_often_are_not_taken_less(c: Candidates) -> None:
    """The last draft tokens are those left out: what is verified is the head of every buffer, dearest value first."""
    choice = choose(c)
    taken = dict(zip(choice.members.tolist(), choice.num_drafts.tolist(), strict=True))
    alike = (c.tpot_s == c.tpot_s[0]) & (c.needed_s == c.needed_s[0]) & (c.num_uncached == 1)
    alike &= (c.is_lost == c.is_lost[0]) & (c.num_cached == c.num_cached[0]) & (c.ready_s == c.ready_s[0])
    alike &= c.is_sync == 0  # in `sync` all of a draft is taken
    for i in np.flatnonzero(alike).tolist():
        for j in np.flatnonzero(alike).tolist():
            if i in taken and j in taken and c.num_buffered[i] == c.num_buffered[j]:
                length = int(c.num_buffered[i])
                if length and (c.survival[i, :length] > c.survival[j, :length] + 1e-9).all():
                    assert taken[i] >= taken[j]


def test_a_worthless_draft_is_trimmed_and_a_sure_one_is_not() -> None:
    dear = Costs((0.01, 0, 0, 0, 0, 0), (0.002, 0, 0.005, 0, 0, 0), norm=1.0)
    c = make_candidates(2, [[1.0, 1.0], [0.01, 0.001]], needed_s=NOW_S, num_uncached=1)
    assert parts(choose(c, dear)) == [(0, 1, 2), (1, 1, 0)]


def test_free_drafts_are_all_taken() -> None:
    """Where a further token costs nothing, nothing is trimmed and nothing is divided by zero."""
    flat = Costs((0.01, 0, 0, 0, 0, 0), (0, 0, 0, 0, 0, 0))
    with np.errstate(all="raise"):
        choice = choose(make_candidates(3, [0.9, 0.4, 0.1], needed_s=NOW_S), flat)
    assert parts(choice) == [(i, 1, 3) for i in range(3)]


@settings(max_examples=60, deadline=None)
@given(st.integers(MAX_SESSIONS + 1, MAX_SESSIONS + 6), st.floats(0.01, 3.0), st.floats(0.001, 3.0))
def test_who_is_held_is_looked_at_again_in_time(num_sessions: int, next_s: float, slack_s: float) -> None:
    """Held or not: nobody sleeps through its need, the end of its hold, or the arrival of its drafts."""
    c = make_candidates(num_sessions, needed_s=NOW_S + slack_s, tpot_s=0.02, next_draft_s=NOW_S + next_s, ready_s=0.9)
    choice = choose(c)
    if not len(choice.members):
        assert NOW_S < choice.wake_s <= min(NOW_S + slack_s, 0.9 + P.max_hold_s)
        assert choice.wake_s < NOW_S + next_s + 0.1
        late = make_candidates(num_sessions, needed_s=NOW_S, tpot_s=0.02, next_draft_s=NOW_S + next_s, ready_s=0.9)
        assert len(choose(late).members) == num_sessions


@settings(max_examples=60, deadline=None)
@given(st.integers(1, MAX_SESSIONS), st.floats(0.001, 3.0), st.floats(0.0, 1.0), st.floats(0.0, 0.2))
def test_few_who_wait_for_the_sake_of_speed_are_looked_at_again_in_time(
    num_sessions: int, next_s: float, acceptance: float, way_s: float
) -> None:
    c = make_candidates(
        num_sessions, needed_s=NOW_S - 1, next_draft_s=NOW_S + next_s, ready_s=0.9, draft_gap_s=0.005,
        acceptance=acceptance, way_s=way_s,
    )  # fmt: skip
    choice = choose(c)
    if len(choice.members):
        assert len(choice.members) == num_sessions
    else:
        assert NOW_S < choice.wake_s <= min(NOW_S + next_s + P.draft_grace_s, 0.9 + P.max_hold_s)
    since_s = NOW_S - P.max_hold_s
    waited = make_candidates(num_sessions, needed_s=NOW_S - 1, next_draft_s=NOW_S + next_s, ready_s=since_s)
    assert len(choose(waited).members) == num_sessions


def test_one_that_has_no_drafts_to_wait_for_takes_the_others_along() -> None:
    """A long pass, a near device: alone the session would wait; with another one that gains nothing it does not."""
    dear = Costs((0.08, 0, 0, 0, 0, 0), (0, 0, 1e-4, 0, 0, 0))
    drafting = {"draft_gap_s": 0.005, "way_s": 0.0025, "needed_s": NOW_S, "ready_s": NOW_S}
    assert not len(choose(make_candidates(1, next_draft_s=NOW_S + 0.01, **drafting), dear).members)
    c = make_candidates(2, next_draft_s=[NOW_S + 0.01, math.inf], **drafting)
    assert len(choose(c, dear).members) == 2


def test_a_sync_draft_is_verified_whole_or_lost() -> None:
    dear = Costs((0.01, 0, 0, 0, 0, 0), (0.002, 0, 0.005, 0, 0, 0), norm=1.0)
    c = make_candidates(2, [[0.5, 0.01], [0.5, 0.01]], needed_s=NOW_S, is_sync=[1.0, 0.0])
    assert parts(choose(c, dear)) == [(0, 1, 2), (1, 1, 1)]


def test_an_idle_server_verifies_what_a_loose_slo_does_not_need() -> None:
    """Twenty tokens ahead of a loose SLO: beside others these drafts are worth little, alone they cost nobody."""
    costs = Costs((0.04, 0, 0, 0, 0, 0), (0, 0, 0.001, 0, 0, 0))
    drafts = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]
    (part,) = parts(choose(make_candidates(1, drafts, needed_s=NOW_S + 10.0, tpot_s=0.5), costs))
    assert part == (0, 1, 6)


def test_nobody_is_held_for_drafts_that_do_not_come() -> None:
    c = make_candidates(3, needed_s=50.0, next_draft_s=math.inf)
    assert len(choose(c).members) >= 1


def test_an_old_session_computes_soon_again_what_it_has_lost() -> None:
    """Its age is not the time that it may take: it is as soon as a fresh one, nearly."""

    def seconds(age_s: float) -> float:
        costs = Costs((0.03, 0, 0, 0, 0, 0), (0.004, 0, 0.001, 0, 0, 0))
        loop = ServingLoop(policy="wisp", costs=costs, num_blocks=4000, max_load=0.0)
        for _ in range(4):
            loop.add(1, max_new_tokens=900, slo=Slo(2000.0, 200.0))
        loop.step(0.05)
        late = loop.add(500, loop.now_s - age_s, max_new_tokens=1, slo=Slo(2000.0, 200.0))
        if age_s:  # a little behind its pace
            late.timeline.on_commit(int((age_s - 1.0) / 0.2) - 3, late.num_committed, loop.now_s - age_s + 1.0)
            loop.scheduler.note(late)
        start_s = loop.now_s
        while not late.finished and loop.now_s < start_s + 30.0:
            loop.step(loop.plan().predicted_s)
        return loop.now_s - start_s

    assert seconds(60.0) < 2.0 * seconds(0.0) + 1.0
