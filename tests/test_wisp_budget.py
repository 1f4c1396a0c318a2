"""How long a pass of a busy server may take, and how likely drafts have to be in it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from tests.factories import make_candidates, make_config
from tests.test_wisp_turns import LINEAR, NOW_S, TOKEN_S, P, seconds_of
from wisp_plugin.estimator import EMPTY_PASS, Costs, Estimator, item_features, token_features
from wisp_plugin.policies import TURN, Choice
from wisp_plugin.roster import Candidates
from wisp_plugin.wisp_budget import Budget, OwnTokens, PassBudget
from wisp_plugin.wisp_policy import Wisp

TIGHT_S, LOOSE_S = 0.014, 1.0
LONGEST_S = 0.01 / P.least_saving  # of which a pass of LINEAR costs loses no more than that share


def tight_and_loose(num_loose: int, num_drafts: int = 8) -> Candidates:
    """One session that just keeps its pace, and others with sure drafts that are far ahead of theirs."""
    survival = np.ones((1 + num_loose, num_drafts))
    survival[0] = 0.0
    return make_candidates(
        1 + num_loose, survival,
        needed_s=[NOW_S + TIGHT_S, *[NOW_S + 30.0] * num_loose], tpot_s=[TIGHT_S, *[LOOSE_S] * num_loose],
        ready_s=NOW_S,
    )  # fmt: skip


class TestBudget:
    def test_a_pass_is_as_long_as_the_tightest_bears(self) -> None:
        c = tight_and_loose(num_loose=8)
        choice = Wisp(make_config(), Estimator(LINEAR), P).choose(c, NOW_S)
        assert 0 in choice.members
        assert TIGHT_S - 2 * TOKEN_S < seconds_of(c, choice) <= TIGHT_S + 1e-9
        bears = make_candidates(9, c.survival, needed_s=c.needed_s, tpot_s=c.tpot_s, tokens_per_turn=9.0, ready_s=NOW_S)
        assert Wisp(make_config(), Estimator(LINEAR)).choose(bears, NOW_S).num_drafts.sum() == 64

    def test_passes_are_longer_while_everybody_is_ahead_and_it_saves_something(self) -> None:
        budget, nobody = PassBudget(Estimator(LINEAR), P), np.zeros(3, bool)

        def seconds(*ahead_s: float, drafting_s: float = 0.0) -> float:
            c = make_candidates(3, tpot_s=TIGHT_S, needed_s=[NOW_S + one for one in ahead_s])
            return budget.of(replace(c, drafting_s=drafting_s), nobody, NOW_S).seconds

        reserve_s = P.reserve_tokens * TIGHT_S
        assert seconds(-1.0, 9.0, 9.0) == pytest.approx(TIGHT_S)
        assert seconds(reserve_s, 9.0, 9.0) == pytest.approx(TIGHT_S)
        assert seconds(reserve_s + 0.4, 9.0, 9.0) == pytest.approx(TIGHT_S + 0.4 / P.spend_passes)
        assert seconds(0.4, 9.0, 9.0, drafting_s=1e-6) == pytest.approx(TIGHT_S + 0.4 / P.spend_passes, rel=1e-3)
        most_s = 0.01 / P.least_saving_ahead
        assert most_s <= seconds(9.0, 9.0, 9.0) < 1.2 * most_s

    def test_who_cannot_be_helped_sets_no_budget(self) -> None:
        budget = PassBudget(Estimator(LINEAR), P)
        nobody = np.zeros(3, bool)
        assert LONGEST_S <= budget.of(make_candidates(3, tpot_s=0.5 * 0.01), nobody, NOW_S).seconds < 1.2 * LONGEST_S
        lost = make_candidates(3, tpot_s=[TIGHT_S, 0.05, 0.05], is_lost=[1.0, 0.0, 0.0])
        assert budget.of(lost, nobody, NOW_S).seconds == pytest.approx(0.05)
        one_hopeless = make_candidates(3, tpot_s=[0.005, TIGHT_S, LOOSE_S])
        assert budget.of(one_hopeless, nobody, NOW_S).seconds == pytest.approx(TIGHT_S)
        assert LONGEST_S <= budget.of(lost, ~nobody, NOW_S).seconds < 1.2 * LONGEST_S

    def test_newcomers_are_expected_to_get_what_others_get(self) -> None:
        budget, nobody = PassBudget(Estimator(LINEAR), P), np.zeros(3, bool)
        some = make_candidates(3, tpot_s=TIGHT_S, tokens_per_turn=[1.0, 3.0, 4.0], num_turns=[2, 50, 60])
        assert budget.of(some, nobody, NOW_S).seconds == pytest.approx(3.0 * TIGHT_S)
        slow = make_candidates(3, tpot_s=TIGHT_S, tokens_per_turn=[1.0, 3.0, 4.0], num_turns=50)
        assert budget.of(slow, nobody, NOW_S).seconds == pytest.approx(TIGHT_S)
        all_young = make_candidates(3, tpot_s=TIGHT_S, tokens_per_turn=[1.0, 3.0, 4.0], num_turns=1)
        assert budget.of(all_young, nobody, NOW_S).seconds == pytest.approx(TIGHT_S)

    def test_drafting_on_the_server_is_part_of_what_is_borne(self) -> None:
        budget, nobody = PassBudget(Estimator(LINEAR), P), np.zeros(3, bool)
        c = make_candidates(3, tpot_s=0.02, tokens_per_turn=2.0, num_turns=50)
        assert budget.of(c, nobody, NOW_S).seconds == pytest.approx(0.04)
        assert budget.of(replace(c, drafting_s=0.012), nobody, NOW_S).seconds == pytest.approx(0.028)
        one = c.only(np.array([1]))
        assert budget.of(replace(one, drafting_s=0.012), nobody[:1], NOW_S).seconds == pytest.approx(0.028)
        much, more = (budget.of(replace(c, drafting_s=seconds), nobody, NOW_S).seconds for seconds in (0.03, 9.0))
        assert 0.01 < more <= much < 0.028  # nobody is given up for it, and passes do not become longer

    def test_a_prompt_that_waits_has_room_for_a_chunk(self) -> None:
        """A pass of 40.9 ms, 45.7 with a chunk, and sessions that bear 44."""
        estimator = Estimator(Costs((0.04, 0, 0, 0, 0, 0), (0.0, 0, 3e-4, 0, 0, 0), norm=1.0))

        needed_s = [*[NOW_S] * 3, NOW_S + 9.0]

        def budget_s(num_prefill: int) -> float:
            c = make_candidates(4, tpot_s=0.044, num_uncached=[1.0, 1.0, 1.0, 300.0], needed_s=needed_s)
            return PassBudget(estimator, P).of(c, np.arange(4) >= 4 - num_prefill, NOW_S).seconds

        assert budget_s(1) == pytest.approx(0.04 + 3e-4 * (3 + P.prefill_tokens))
        assert budget_s(0) == pytest.approx(0.044)

    def test_prompts_that_are_due_make_the_pace_of_all_slower(self) -> None:
        """Three sessions at 44 ms are given up for one at 60 and a prompt that no pass of 44 ms has room for."""
        estimator = Estimator(Costs((0.04, 0, 0, 0, 0, 0), (0.0, 0, 3e-4, 0, 0, 0), norm=1.0))

        def budget_s(due_s: float) -> float:
            c = make_candidates(
                5, tpot_s=[0.044, 0.044, 0.044, 0.06, 0.06], num_uncached=[1.0, 1.0, 1.0, 1.0, 500.0],
                needed_s=[*[NOW_S] * 4, NOW_S + due_s],
            )  # fmt: skip
            return PassBudget(estimator, P).of(c, np.arange(5) == 4, NOW_S).seconds

        assert budget_s(0.6) == pytest.approx(0.06)
        assert budget_s(10.0) == budget_s(-1.0) < 0.047  # in time anyway; late, so that it makes nobody else late

    def test_many_prompts_lately_make_the_pace_of_all_slower(self) -> None:
        """Twenty sessions at 14 ms per token: decoding alone fits; with four prompt tokens to each it does not."""
        c = make_candidates(20, tpot_s=TIGHT_S)
        budget, nobody = PassBudget(Estimator(LINEAR), P), np.zeros(20, bool)
        assert budget.of(c, nobody, NOW_S).seconds == pytest.approx(TIGHT_S, rel=0.02)
        prompts = Choice(np.arange(20), np.full(20, 4), np.zeros(20, np.int64), (TURN,) * 20)
        for step in range(50):
            budget.note(make_candidates(20, num_uncached=4.0), prompts, NOW_S + 0.1 * step)
        assert LONGEST_S <= budget.of(c, nobody, NOW_S).seconds < 1.2 * LONGEST_S

    @pytest.mark.parametrize("norm", [1.0, 4.0])
    def test_no_pass_is_longer_than_what_saves_time(self, norm: float) -> None:
        """All but a tenth of the longest pass is what its tokens cost anyway, whatever has been seen of prompts."""
        estimator = Estimator(Costs((0.03, 0, 0, 0, 0, 1e-8), (0.0, 0, 3e-4, 0, 0, 0), norm))
        c = make_candidates(40, num_cached=300.0, tpot_s=0.02)
        budget_s = PassBudget(estimator, P).of(c, np.ones(40, bool), NOW_S).seconds
        features = item_features(c.num_cached, np.ones(40), 1.0).sum(axis=0) + EMPTY_PASS
        sizes = np.arange(1.0, 5000.0)
        seconds = estimator.predict(features + (sizes - 40)[:, None] * token_features(300.0))
        useful = sizes * 3e-4 / seconds
        longest_s = seconds[np.searchsorted(useful, 1.0 - P.least_saving)]
        assert longest_s * 0.99 <= budget_s < 1.2 * longest_s
        burst = PassBudget(estimator, P)
        prompts = Choice(np.arange(40), np.full(40, 90), np.zeros(40, np.int64), (TURN,) * 40)
        for step in range(50):
            burst.note(make_candidates(40, num_uncached=100.0), prompts, NOW_S + 0.1 * step)
        assert burst.of(c, np.zeros(40, bool), NOW_S).seconds == pytest.approx(budget_s)

    def test_a_burst_leaves_the_tight_ones_helped(self) -> None:
        """Whatever the mean pass at everybody's pace comes to, passes stay as long as is useful."""
        c = make_candidates(20, tpot_s=0.05, tokens_per_turn=[2.4, *[20.0] * 19], num_turns=50)
        budget, nobody = PassBudget(Estimator(LINEAR), P), np.zeros(20, bool)
        for step in range(50):  # 1.5 times what fits: mean passes would be longer than the tightest bears
            prompt = Choice(np.array([0]), np.array([40]), np.array([0]), (TURN,))
            budget.note(make_candidates(1, num_uncached=40.0), prompt, NOW_S + 0.1 * step)
        assert budget.of(c, nobody, NOW_S).seconds == pytest.approx(2.4 * 0.05)

    def test_a_pass_has_room_for_a_chunk_beside_the_own_tokens(self) -> None:
        dear = Estimator(Costs((0.0, 0, 0, 0, 0, 0), (0.002, 0, 0.01, 0, 0, 0)))  # 2 ms a pass, 10 ms a token
        c = make_candidates(10, tpot_s=0.4)
        assert PassBudget(dear, P).of(c, np.zeros(10, bool), NOW_S).seconds == pytest.approx(0.002 + 0.01 * (10 + 16))

    def test_who_needs_no_drafts_gets_no_longer_passes_for_them(self) -> None:
        budget, nobody = PassBudget(Estimator(LINEAR), P), np.zeros(3, bool)
        loose = make_candidates(3, tpot_s=LOOSE_S, tokens_per_turn=5.0, num_turns=50)
        assert LONGEST_S <= budget.of(loose, nobody, NOW_S).seconds < 1.2 * LONGEST_S
        one_tighter = make_candidates(3, tpot_s=[0.09, LOOSE_S, LOOSE_S], tokens_per_turn=5.0, num_turns=50)
        assert budget.of(one_tighter, nobody, NOW_S).seconds == pytest.approx(5.0 * 0.09)

    def test_where_nobody_needs_drafts_passes_are_alike(self) -> None:
        """With eight prompt tokens to each committed one, 20 sessions bring 180 new tokens: passes have a few more."""
        estimator = Estimator(Costs((0.03, 0, 0, 0, 0, 0), (0.0, 0, 3e-4, 0, 0, 0), norm=4.0))
        c = make_candidates(20, tpot_s=0.2, num_turns=50, needed_s=NOW_S + 1.0)
        budget, nobody = PassBudget(estimator, P), np.zeros(20, bool)
        for step in range(400):
            prompts = Choice(np.arange(20), np.full(20, 120), np.zeros(20, np.int64), (TURN,) * 20)
            decodes = Choice(np.arange(20), np.full(20, 1), np.zeros(20, np.int64), (TURN,) * 20)
            own, others = make_candidates(20, num_uncached=1.0), make_candidates(20, num_uncached=200.0)
            budget.note(*((others, prompts) if step % 15 == 0 else (own, decodes)), NOW_S + 0.05 * step)
        found = budget.of(c, nobody, NOW_S)
        ratio = budget._recent[0] / budget._recent[2]
        assert ratio == pytest.approx(9.5, rel=0.1)
        num_new = np.array([1.0, P.level_margin]) * 20 * ratio
        level_s, longer_s = ((0.03**4 + (3e-4 * num_new) ** 4) ** 0.25).tolist()
        assert found.seconds == pytest.approx(longer_s)
        assert found.own_tokens is OwnTokens.DO
        token_s = 3e-4 * (3e-4 * num_new[0] / level_s) ** 3
        price = token_s / ((level_s - 20 * (ratio - 1.0) * token_s) / 20)
        assert found.draft_price == pytest.approx(P.draft_margin * price, rel=1e-6)
        # Nor do they take longer than the tightest bears, however far ahead of its schedule it is.
        bound_s = 0.95 * longer_s
        tighter = make_candidates(20, tpot_s=[bound_s, *[0.2] * 19], num_turns=50, needed_s=NOW_S + 1.0)
        assert budget.of(tighter, nobody, NOW_S) == Budget(pytest.approx(bound_s), found.draft_price, OwnTokens.DO)

    def test_prompts_come_before_drafts_where_own_tokens_nearly_keep_the_pace(self) -> None:
        """0.95 of the longest pass that saves time is near enough."""
        budget, nobody = PassBudget(Estimator(LINEAR), P), np.zeros(2, bool)
        work = budget._work(make_candidates(2).num_cached)
        longest_s = budget._longest_s(work, budget._seconds_by_size(work), P.least_saving)
        by_share = {0.94: OwnTokens.FALL_SHORT, 0.96: OwnTokens.NEARLY_DO, 1.01: OwnTokens.DO}
        for share, own_tokens in by_share.items():
            c = make_candidates(2, tpot_s=[share * longest_s, 1.0], num_turns=50)
            assert budget.of(c, nobody, NOW_S).own_tokens is own_tokens, share

    def test_where_own_tokens_nearly_keep_the_pace_a_turn_is_worth_what_it_would_bring_now(self) -> None:
        """Its drafts that wait and are likely count, whatever turns brought before; else turns as they were."""
        budget, nobody = PassBudget(Estimator(LINEAR), P), np.zeros(2, bool)
        work = budget._work(make_candidates(2).num_cached)
        longest_s = budget._longest_s(work, budget._seconds_by_size(work), P.least_saving)

        def bearable_s(share: float, survival: list[float], tokens_per_turn: float = 1.0) -> float:
            c = make_candidates(2, [survival, [0.0] * 2], tpot_s=[share * longest_s, 1.0],
                                tokens_per_turn=[tokens_per_turn, 1.0])  # fmt: skip
            return budget.of(c, nobody, NOW_S).seconds / (share * longest_s)

        assert bearable_s(0.96, [0.98, 0.96]) == pytest.approx(2.94)
        assert bearable_s(0.96, [0.98, 0.7]) == pytest.approx(1.98)  # the second is not worth its time
        assert bearable_s(0.96, [0.98, 0.96], 4.0) == pytest.approx(4.0)
        assert bearable_s(0.96, [0.0, 0.0]) == bearable_s(0.96, [0.1, 0.1]) < 1.1
        assert bearable_s(0.9, [0.98, 0.96]) == bearable_s(0.9, [0.0, 0.0])
        assert bearable_s(1.1, [0.98, 0.96]) == bearable_s(1.1, [0.0, 0.0])  # nor where they do keep it

    def test_passes_are_forgotten_and_empty_ones_are_none(self) -> None:
        budget = PassBudget(Estimator(LINEAR), P)
        c = make_candidates(2, [0.5, 0.25], num_uncached=[1.0, 40.0])
        first = budget._recent.copy()
        choice = Choice(np.array([0, 1]), np.array([1, 20]), np.array([2, 0]), (TURN, TURN))
        of_pass = [23.0, 20.0, 1.75]  # a prefill that goes on commits nothing
        budget.note(c, choice, 1e6)
        assert budget._recent == pytest.approx(first + of_pass)  # whatever the clock shows
        budget.note(c, choice, 2e6)
        assert budget._recent == pytest.approx(first + of_pass)  # behind a pause as at the start
        budget.note(c, Choice(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.int64), ()), 2e6 + 5.0)
        assert budget._recent == pytest.approx(first + of_pass)
        budget.note(c, choice, 2e6 + 10.0)
        assert budget._recent == pytest.approx(first + np.multiply(of_pass, 1.0 + math.exp(-1.0)))

    def test_the_price_of_a_draft_is_its_time_in_that_of_a_committed_token_prompts_apart(self) -> None:
        """Of LINEAR's 20 ms, 10 are spent on 100 tokens, of which 50 belong to prompts and 25 are committed."""
        budget, nobody = PassBudget(Estimator(LINEAR), P), np.zeros(2, bool)
        c = make_candidates(2, num_cached=0.0, tpot_s=0.0201, tokens_per_turn=1.0, num_turns=50)
        found = budget.of(c, nobody, NOW_S)
        assert found.own_tokens is OwnTokens.FALL_SHORT
        num_new = (found.seconds - 0.01) / TOKEN_S
        committing_s = found.seconds - 0.5 * num_new * TOKEN_S
        assert found.draft_price == pytest.approx(TOKEN_S * 0.5 * num_new / committing_s, rel=0.05)
