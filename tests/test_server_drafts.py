"""Drafts of the server's own: worth their time, and behind those of devices."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.factories import ids, make_candidates, make_draft, make_session
from wisp_plugin.draft_rates import AcceptanceRate
from wisp_plugin.estimator import Costs, Estimator
from wisp_plugin.messages import Origin, PassOutcome, Status, Timing
from wisp_plugin.policies import Choice
from wisp_plugin.roster import Candidates
from wisp_plugin.server_drafts import ServerDrafts, draft_weights
from wisp_plugin.wisp_parameters import WispParameters


def steps_of(step_s: float) -> Estimator:
    return Estimator(Costs(memory=(step_s, 0, 0, 0, 0, 0), arithmetic=(0, 0, 0, 0, 0, 0)))


def target() -> Estimator:
    """10 ms a pass, and not much for a token."""
    return Estimator(Costs(memory=(0.01, 0, 0, 0, 0, 0), arithmetic=(0.002, 0, 2e-4, 0, 0, 0)))


def everyone(c: Candidates) -> Choice:
    """All candidates, with all that is buffered."""
    num_sessions = len(c)
    members, committed = np.arange(num_sessions), c.num_uncached.astype(np.int64)
    return Choice(members, committed, c.num_buffered.astype(np.int64), ("turn",) * num_sessions)


def settled(
    c: Candidates, step_s: float, max_tokens: int = 4, rounds: int = 4, verifies: Estimator | None = None
) -> tuple[Choice, float]:
    """What is settled on after some passes in which everybody took part with everything."""
    drafts = ServerDrafts(verifies or target(), steps_of(step_s), max_tokens)
    for _ in range(rounds):
        offered = drafts.offer(c)
        choice = drafts.settle(c, offered, everyone(offered))
    return choice, drafts.seconds(c, choice)


class TestWorth:
    def test_cheap_steps_are_taken_as_far_as_they_win_and_dear_ones_are_not(self) -> None:
        c = make_candidates(4, own_acceptance=0.9)
        cheap, cheap_s = settled(c, 1e-4)
        assert cheap.num_to_draft is not None
        assert (cheap.num_to_draft >= 2).all()
        assert cheap_s == pytest.approx(1e-4 * cheap.num_to_draft.max())
        dear, dear_s = settled(c, 0.05)
        assert dear.num_to_draft is None
        assert dear_s == 0.0

    def test_among_many_sessions_a_step_has_to_win_more(self) -> None:
        few, _ = settled(make_candidates(4, own_acceptance=0.7), 6.2e-3, max_tokens=1)
        many, _ = settled(make_candidates(5, own_acceptance=0.7), 6.2e-3, max_tokens=1)
        assert few.num_to_draft is not None
        assert many.num_to_draft is None

    def test_the_likelier_are_drafted_for_first(self) -> None:
        choice, _ = settled(make_candidates(20, own_acceptance=[0.95, 0.02] * 10), 1e-4)
        assert choice.num_to_draft is not None
        assert choice.num_to_draft[1::2].max() == 0
        assert choice.num_to_draft[::2].min() > 0

    def test_who_gets_little_from_a_turn_is_drafted_for_first(self) -> None:
        """0.5 ms per token of a pass: too much for a token of the usual session, not for one of a poor one."""
        costly = Estimator(Costs(memory=(0, 0, 0, 0, 0, 0), arithmetic=(0.01, 0, 5e-4, 0, 0, 0)))
        alike, _ = settled(make_candidates(12, own_acceptance=0.4), 1e-4, verifies=costly)
        assert alike.num_to_draft is None
        two_poor = make_candidates(12, own_acceptance=0.4, tpot_s=[0.02] * 2 + [0.1] * 10)
        mixed, _ = settled(two_poor, 1e-4, verifies=costly)
        assert mixed.num_to_draft is not None
        assert mixed.num_to_draft[:2].min() > 0
        assert mixed.num_to_draft[2:].max() == 0

    def test_the_policy_is_told_how_long_drafting_takes(self) -> None:
        c = make_candidates(4, own_acceptance=0.9)
        drafts = ServerDrafts(target(), steps_of(1e-4), 4)
        assert drafts.offer(c).drafting_s == 0.0
        for _ in range(20):
            drafts.note(0.012)
        assert drafts.offer(c).drafting_s == pytest.approx(0.012, rel=0.01)
        for _ in range(20):
            drafts.note(0.0)
        assert drafts.offer(c).drafting_s == pytest.approx(0.0, abs=1e-4)

    def test_a_pass_that_wants_none_is_one_that_none_paid_in(self) -> None:
        c = make_candidates(2, own_acceptance=0.95)
        drafts = ServerDrafts(target(), steps_of(1e-4), 4)
        for _ in range(4):
            offered = drafts.offer(c)
            drafts.settle(c, offered, everyone(offered))
        assert drafts.offer(c).num_buffered.tolist() == [4.0, 4.0]
        drafts.settle(c, offered, everyone(c))
        assert drafts.offer(c).num_buffered.tolist() == [1.0, 1.0]

    def test_one_step_more_than_paid_is_offered(self) -> None:
        drafts, c = ServerDrafts(target(), steps_of(1e-4), 4), make_candidates(2, own_acceptance=0.95)
        depths = []
        for _ in range(6):
            offered = drafts.offer(c)
            depths.append(int(offered.num_buffered[0]))
            drafts.settle(c, offered, everyone(offered))
        assert depths[:3] == [1, 2, 3]
        assert max(depths) <= 4

    def test_what_does_not_pay_is_offered_seldom(self) -> None:
        drafts, c = ServerDrafts(target(), steps_of(1.0), 4), make_candidates(2)
        offers = []
        for _ in range(200):
            offered = drafts.offer(c)
            offers.append(bool(offered.num_buffered.any()))
            drafts.settle(c, offered, everyone(offered))
        assert offers[:9] == [True, True, False, True, False, False, False, True, False]
        assert sum(offers) < 15

    def test_nothing_for_prompts_nor_for_who_got_none(self) -> None:
        c = make_candidates(3, own_acceptance=[0.9, 0.9, 0.0], num_uncached=[1.0, 9.0, 1.0])
        offered = ServerDrafts(target(), steps_of(1e-4), 4).offer(c)
        assert offered.num_buffered.tolist() == [1.0, 0.0, 0.0]

    def test_nothing_for_sync_nor_behind_the_end(self) -> None:
        c = make_candidates(3, own_acceptance=0.95, is_sync=[1.0, 0.0, 0.0], num_left=[50.0, 1.0, 50.0])
        choice, _ = settled(c, 1e-4)
        assert choice.num_to_draft is not None
        assert choice.num_to_draft[:2].tolist() == [0, 0]
        assert choice.num_to_draft[2] > 0

    def test_survival_goes_on_where_the_devices_draft_ends(self) -> None:
        c = make_candidates(2, survival=[[0.9, 0.6], [0.0, 0.0]], own_acceptance=0.5)
        offered = ServerDrafts(target(), steps_of(1e-4), 1).offer(c)
        assert offered.survival.tolist() == [pytest.approx([0.9, 0.6, 0.3]), pytest.approx([0.5, 0.0, 0.0])]
        assert offered.num_buffered.tolist() == [3.0, 1.0]

    @settings(max_examples=60, deadline=None)
    @given(st.data())
    def test_what_is_settled_is_part_of_what_was_wanted(self, data: st.DataObject) -> None:
        num_sessions = data.draw(st.integers(1, 6))
        levels = st.lists(st.floats(0.05, 1.0), min_size=3, max_size=3).map(lambda row: sorted(row, reverse=True))
        survival = np.array(data.draw(st.lists(levels, min_size=num_sessions, max_size=num_sessions)))
        survival *= np.arange(3) < np.array(data.draw(_counts(num_sessions, 3)))[:, None]
        c = make_candidates(
            num_sessions,
            survival=survival,
            own_acceptance=data.draw(st.lists(st.floats(0.01, 1.0), min_size=num_sessions, max_size=num_sessions)),
            num_left=np.array(data.draw(_counts(num_sessions, 9))) + 1.0 + 3.0,
        )
        drafts = ServerDrafts(target(), steps_of(data.draw(st.sampled_from([1e-5, 1e-3, 0.1]))), 3)
        for _ in range(3):
            offered = drafts.offer(c)
            wanted = everyone(offered)
            choice = drafts.settle(c, offered, wanted)
            drafting_s = drafts.seconds(c, choice)
            assert (choice.num_drafts == c.num_buffered).all()  # what devices have sent is left alone
            assert (choice.all_drafts <= wanted.num_drafts).all()
            assert (choice.all_drafts < c.num_left).all()
            assert (drafting_s > 0) == (choice.num_to_draft is not None and bool(choice.num_to_draft.any()))


def _counts(length: int, most: int) -> Any:
    return st.lists(st.integers(0, most), min_size=length, max_size=length)


class TestCommits:
    def give(self, chosen: tuple[int, ...], drafts: tuple[int, ...], drafted: tuple[int, ...]) -> tuple[Any, Any]:
        """A pass in which the device's draft is `drafts` and the server's `drafted`; the commit and the session."""
        session = make_session()
        if drafts:
            session.on_draft(make_draft(3, *drafts), 0.0)
        item = session.pass_item(session.num_uncached, len(drafts), "", len(drafted))
        assert item.num_choices == len(drafts) + len(drafted) + 1
        outcome = PassOutcome(session.id, ids(*chosen), drafted=ids(*drafted))
        return session.commit(item, outcome, Timing(), 1.0), session

    def test_tokens_of_the_server_are_decoded_ones_to_the_device(self) -> None:
        commit, session = self.give((5, 6, 7, 8), (5,), (6, 7))
        assert commit.tokens.tolist() == [5, 6, 7, 8]
        assert commit.origin.tolist() == [Origin.ACCEPTED, Origin.DECODED, Origin.DECODED, Origin.BONUS]
        assert session.num_cached == 6
        assert session.drafts.counts.accepted == session.drafts.counts.verified == 1

    def test_without_a_draft_of_the_device_all_are_decoded(self) -> None:
        commit, session = self.give((5, 6, 7), (), (5, 9))
        assert commit.tokens.tolist() == [5, 6]
        assert commit.origin.tolist() == [Origin.DECODED, Origin.DECODED]
        assert session.own_rate.acceptance < 0.75
        assert session.drafts.acceptance == 0.75  # the device's is another

    def test_behind_a_rejection_nothing_of_the_server_counts(self) -> None:
        commit, session = self.give((4, 6, 7), (5,), (6,))
        assert commit.tokens.tolist() == [4]
        assert commit.origin.tolist() == [Origin.CORRECTION]
        assert session.own_rate.acceptance == 0.75

    def test_what_was_planned_and_not_made_is_not_planned_again_at_once(self) -> None:
        session = make_session()
        item = session.pass_item(session.num_uncached, 0, "", 2)
        session.commit(item, PassOutcome(session.id, ids(5)), Timing(), 1.0)
        assert session.own_rate.acceptance == 0.0
        for token in range(3):
            assert session.own_rate.acceptance == 0.0
            session.commit(session.pass_item(1, 0), PassOutcome(session.id, ids(token)), Timing(), 1.0)
        assert session.own_rate.acceptance == pytest.approx(0.75)

    def test_an_acceptance_that_is_old_fades(self) -> None:
        rate = AcceptanceRate()
        for _ in range(20):
            rate.learn(0, 1)
        low = rate.value
        for _ in range(200):
            rate.fade()
        assert low < 0.2 < 0.5 < rate.value < 0.75

    def test_the_end_of_the_session_cuts_them(self) -> None:
        session = make_session(max_new_tokens=3, eos_token_ids=(6,))
        item = session.pass_item(session.num_uncached, 0, "", 2)
        commit = session.commit(item, PassOutcome(session.id, ids(5, 6, 7), drafted=ids(5, 6)), Timing(), 1.0)
        assert commit is not None
        assert commit.tokens.tolist() == [5, 6]
        assert session.status is Status.EOS


class TestWeights:
    def test_who_tells_nothing_counts_like_the_others_and_changes_nothing(self) -> None:
        """Prompts and newcomers are no poor sessions, and a burst of them makes nobody rich."""
        c = make_candidates(
            7, tpot_s=0.02, tokens_per_turn=[2.0, 3.0, 4.0, 1.0, 1.0, 1.0, 1.0],
            num_turns=[50, 50, 50, 0, WispParameters().young_turns - 1, 50, 50], is_lost=[0, 0, 0, 0, 0, 1, 0],
            is_sync=[0, 0, 0, 0, 0, 0, 1],
        )  # fmt: skip
        assert draft_weights(c, np.arange(7)).tolist() == pytest.approx([1.5, 1.0, 0.75, 1.0, 1.0, 1.0, 1.0])
        assert draft_weights(c, np.array([3, 4])).tolist() == [1.0, 1.0]

    def test_a_token_counts_more_for_who_gets_less_from_a_turn(self) -> None:
        c = make_candidates(5, tpot_s=[0.02, 0.02, 0.04, 0.04, 9.0], tokens_per_turn=[1.0, 3.0, 2.0, 1.5, 3.0])
        # Turns of 20, 60, 80, 60 ms and 27 s; the median is 60.
        assert draft_weights(c, np.arange(5)).tolist() == pytest.approx([2.0, 1.0, 0.75, 1.0, 0.6])
