"""A busy server: passes are filled by need, within their budget."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.factories import make_candidates, make_config
from tests.test_policies import candidates, parts
from wisp_plugin.estimator import EMPTY_PASS, Costs, Estimator, item_features
from wisp_plugin.policies import PREFILL, Choice
from wisp_plugin.roster import Candidates
from wisp_plugin.wisp_budget import Budget, OwnTokens
from wisp_plugin.wisp_parameters import WispParameters
from wisp_plugin.wisp_turns import Turns

P = WispParameters()
NOW_S = 1.0
# Nothing but arithmetic: a pass of 10 ms, 0.1 ms per new token.
TOKEN_S = 0.0001
LINEAR = Costs((0.0, 0, 0, 0, 0, 0), (0.01, 0, TOKEN_S, 0, 0, 0))


def take(
    c: Candidates, budget_s: float, must_s: Any = math.inf, draft_price: float = 0.4,
    own_tokens: OwnTokens = OwnTokens.FALL_SHORT, **config: Any,
) -> Choice:  # fmt: skip
    is_prefill = c.num_uncached > min(P.prefill_tokens, make_config(**config).max_pass_tokens)
    turns = Turns(make_config(**config), Estimator(LINEAR), P)
    budget = Budget(budget_s, draft_price, own_tokens)
    return turns.choose(c, is_prefill, np.full(len(c), must_s, np.float64), NOW_S, budget)


def seconds_of(c: Candidates, choice: Choice) -> float:
    new = choice.num_committed + choice.num_drafts
    features = item_features(c.num_cached[choice.members], new, 1.0 + choice.num_drafts)
    return float(Estimator(LINEAR).predict(EMPTY_PASS + features.sum(axis=0)))


class TestDraftWeights:
    def test_a_pass_without_room_takes_what_the_poorer_need(self) -> None:
        """Drafts that are alike: all of a session whose turns are worth a part of a pass, none of the richest one; and
        none of anybody if nobody needs any."""
        c = make_candidates(3, [[0.45, 0.3]] * 3, tpot_s=[0.004, 0.0108, 0.2])
        assert take(c, 0.0108, draft_price=0.6).num_drafts.tolist() == [2, 1, 0]
        assert take(c, 0.0108, draft_price=0.6, own_tokens=OwnTokens.DO).num_drafts.tolist() == [0, 0, 0]

    def test_drafts_count_alike_where_own_tokens_nearly_keep_the_pace(self) -> None:
        c = make_candidates(2, [[0.45], [0.9]], tpot_s=0.004)
        assert take(c, 0.0103, draft_price=0.6).num_drafts.tolist() == [1, 0]
        assert take(c, 0.0103, draft_price=0.6, own_tokens=OwnTokens.NEARLY_DO).num_drafts.tolist() == [0, 1]

    def test_who_tells_nothing_counts_once_however_short_its_turns_are(self) -> None:
        """Newcomers, lost sessions and `sync`: what their turns are worth is not known, or sets no length."""
        for told in ({"num_turns": P.young_turns - 1.0}, {"is_lost": 1.0}, {"is_sync": 1.0}):
            c = make_candidates(2, [[0.45], [0.9]], tpot_s=0.004, **told)
            num_drafts = take(c, 0.0103, draft_price=0.6).num_drafts.tolist()
            assert num_drafts[0] == ("is_sync" in told), told  # there a draft is whole
        assert take(make_candidates(2, [[0.45], [0.9]], tpot_s=0.004), 0.0103, draft_price=0.6).num_drafts[0] == 1

    def test_prompts_come_before_drafts_of_who_is_ahead(self) -> None:
        """Drafts of who needs its next token now stay, and in `sync`; all of them if there is room, or no prompt."""
        ahead_s = NOW_S + 0.021
        c = make_candidates(
            4, [[0.9]] * 3 + [[0.0]], num_uncached=[1, 1, 1, 400], is_sync=[0, 0, 1, 0], tpot_s=0.02,
            needed_s=[ahead_s, NOW_S, ahead_s, ahead_s],
        )  # fmt: skip
        running = c.only(np.arange(3))
        assert take(c, 0.0125).num_drafts.tolist() == [1, 1, 1, 0]
        assert take(c, 0.0125, own_tokens=OwnTokens.NEARLY_DO).num_drafts.tolist() == [0, 1, 1, 0]
        assert take(c, 1.0, own_tokens=OwnTokens.NEARLY_DO).num_drafts.tolist() == [1, 1, 1, 0]
        assert take(running, 0.01055, own_tokens=OwnTokens.NEARLY_DO).num_drafts.sum() == 2  # for want of room

    def test_nobody_gives_up_drafts_for_a_prompt_that_is_lost(self) -> None:
        c = make_candidates(
            2, [[0.9], [0.0]], num_uncached=[1, 400], needed_s=NOW_S + 0.021, tpot_s=0.02, is_lost=[0, 1]
        )
        assert take(c, 0.0125, own_tokens=OwnTokens.NEARLY_DO).num_drafts.tolist() == [1, 0]


class TestOrder:
    def test_prefill_waits_for_those_in_need_and_then_takes_what_is_left(self) -> None:
        c = make_candidates(3, num_uncached=[1, 200, 1], needed_s=[1.01, 1.5, 3.0], num_cached=[10.0, 0.0, 10.0])
        assert parts(take(c, 0.015)) == [(0, 1, 0), (1, 49, 0)]
        assert parts(take(c, 1.0)) == [(0, 1, 0), (1, 200, 0), (2, 1, 0)]
        assert take(c, 1.0).reasons[1] == PREFILL

    def test_a_crumb_of_prefill_is_not_worth_it_and_an_empty_pass_is_none(self) -> None:
        c = make_candidates(2, num_uncached=[1, 200], needed_s=[1.01, 1.5])
        assert parts(take(c, 0.0115)) == [(0, 1, 0)]
        assert parts(take(c.only(np.array([1])), 0.001)) == [(0, P.prefill_tokens, 0)]

    def test_lost_sessions_come_last_and_late_first_tokens_before_what_is_far_ahead(self) -> None:
        c = make_candidates(
            4, num_uncached=[1, 40, 1, 1], needed_s=[0.1, 0.2, 1.5, 5.0], tpot_s=0.1, is_lost=[1.0, 0.0, 0.0, 0.0],
            num_cached=[9.0, 0.0, 9.0, 9.0],
        )  # fmt: skip
        assert parts(take(c, 0.01015)) == [(2, 1, 0)]
        assert parts(take(c, 0.01415)) == [(1, 40, 0), (2, 1, 0)]
        assert parts(take(c, 0.01425)) == [(1, 40, 0), (2, 1, 0), (3, 1, 0)]
        assert parts(take(c, 0.01015, must_s=[0.5, np.inf, np.inf, np.inf])) == [(0, 1, 0)]

    def test_doubtful_drafts_give_way_when_there_is_no_room_for_all(self) -> None:
        c = make_candidates(2, [0.9, 0.3], needed_s=[1.01, 1.02])
        assert parts(take(c, 1.0)) == [(0, 1, 2), (1, 1, 2)]
        assert parts(take(c, 0.01045)) == [(0, 1, 1), (1, 1, 1)]

    def test_where_nobody_needs_drafts_only_those_worth_their_price_take_part(self) -> None:
        c = make_candidates(3, [0.9, 0.5], needed_s=[1.01, 1.02, 1.03], tpot_s=0.1)
        assert parts(take(c, 0.0106, draft_price=0.6, own_tokens=OwnTokens.DO)) == [(0, 1, 1), (1, 1, 1), (2, 1, 1)]
        assert parts(take(c, 0.0106)) == [(0, 1, 2), (1, 1, 2)]
        assert parts(take(c, 1.0, draft_price=0.6, own_tokens=OwnTokens.DO)) == [(0, 1, 1), (1, 1, 1), (2, 1, 1)]
        assert parts(take(c, 1.0, draft_price=0.4, own_tokens=OwnTokens.DO)) == [(0, 1, 2), (1, 1, 2), (2, 1, 2)]

    def test_where_nobody_needs_drafts_prompts_with_time_take_what_is_left(self) -> None:
        """Running sessions that are far ahead come before a prompt, until it is due within a few passes."""
        late_s, soon_s = NOW_S + 9.0, NOW_S + 0.9 * P.first_token_passes * 0.01235
        c = make_candidates(3, num_uncached=[1, 200, 1], needed_s=[30.0, late_s, 30.0], num_cached=[9.0, 0.0, 9.0])
        assert parts(take(c, 0.01235, draft_price=0.6, own_tokens=OwnTokens.DO)) == [(0, 1, 0), (1, 21, 0), (2, 1, 0)]
        urgent = replace(c, needed_s=np.array([30.0, soon_s, 30.0]))
        assert parts(take(urgent, 0.01235, draft_price=0.6, own_tokens=OwnTokens.DO)) == [(1, 23, 0)]
        assert parts(take(c, 0.01235)) == [(1, 23, 0)]

    def test_a_prompt_behind_which_another_would_be_late_comes_later(self) -> None:
        """Of 400 and 100 prompt tokens, due in 40 ms, 50 ms: 0.1 ms each."""
        c = make_candidates(2, num_uncached=[400.0, 100.0], num_cached=0.0, needed_s=[1.04, 1.049], tpot_s=0.1)
        assert parts(take(c, 0.0202)) == [(1, 100, 0)]
        both = make_candidates(2, num_uncached=[400.0, 100.0], num_cached=0.0, needed_s=[1.04, 1.051], tpot_s=0.1)
        assert take(both, 0.0202).members.tolist() == [0]

    def test_a_late_prompt_does_not_wait_for_ever(self) -> None:
        """New prompts that can be in time come first, until it is too far behind its due time."""
        due_s = NOW_S - P.latest_first_tokens * 0.1
        waits = make_candidates(
            2, num_uncached=50.0, num_cached=0.0, needed_s=[due_s + 0.2, NOW_S + 0.1], tpot_s=0.1
        )  # fmt: skip
        assert take(waits, 0.0151).members.tolist() == [1]
        too_long = make_candidates(2, num_uncached=50.0, num_cached=0.0, needed_s=[due_s, NOW_S + 0.1], tpot_s=0.1)
        assert take(too_long, 0.0151).members.tolist() == [0]

    def test_a_sync_draft_is_whole_or_waits(self) -> None:
        c = make_candidates(2, [0.9, 0.8, 0.1], needed_s=[1.01, 1.02], is_sync=1.0)
        assert parts(take(c, 0.0106)) == [(0, 1, 3)]
        assert parts(take(c, 0.0105, must_s=[0.9, 0.9])) == [(0, 1, 3), (1, 1, 3)]


@settings(max_examples=150, deadline=None)
@given(
    candidates(), st.floats(0.0, 0.2), st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from(OwnTokens),
    st.sampled_from([1, 7, 16, 60, 512]), st.integers(1, 9),
)  # fmt: skip
def test_a_pass_keeps_to_its_budget_but_for_those_who_must(
    c: Candidates, budget_s: float, price: float, own_tokens: OwnTokens, max_tokens: int, max_sessions: int
) -> None:
    must_s = np.where(c.needed_s < NOW_S, c.ready_s, np.inf)
    choice = take(c, budget_s, must_s, price, own_tokens, max_pass_tokens=max_tokens, max_pass_sessions=max_sessions)
    new = choice.num_committed + choice.num_drafts
    assert len(choice.members) >= 1
    assert len(choice.members) <= max_sessions
    assert new.sum() <= max_tokens
    assert (choice.num_committed >= 1).all()
    is_chunk = choice.num_committed < c.num_uncached[choice.members]
    assert not choice.num_drafts[is_chunk].any()
    is_must = must_s[choice.members] <= NOW_S
    if not is_must.any() and len(choice.members) > 1:
        assert seconds_of(c, choice) <= budget_s + 1e-9
