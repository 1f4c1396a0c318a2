"""One draft graph for many sessions: turns in order, seats by need, and chains that a dealer may stop."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from edge_runtime.gateway.drafting import LEAD_SHARE, LEAD_TOKENS, DraftDealer, DraftShare, Turns
from edge_runtime.gateway.speculation import NO_SEAT, NOT_DRAFTING, WAITING, GatedController
from tests.edge_fakes import SleepingDrafter, wait_until
from wisp_plugin.controller import SpeculationController
from wisp_plugin.errors import ModelError
from wisp_plugin.messages import Sampling
from wisp_plugin.pace import Pace
from wisp_plugin.stop_rules import Fixed

GREEDY = Sampling()


def dealer_of(num_seats: int, step_s: float = 0.0) -> DraftDealer:
    return DraftDealer(lambda: SleepingDrafter(step_s), num_seats)


def test_turns_come_in_the_order_of_asking() -> None:
    turns, order = Turns(), []
    threads = []
    with turns.turn():
        for number in range(5):

            def work(number: int = number) -> None:
                with turns.turn():
                    order.append(number)

            threads.append(threading.Thread(target=work))
            threads[-1].start()
            wait_until(lambda n=number: len(turns._waiting) == n + 1)
    for thread in threads:
        thread.join(5.0)
    assert order == list(range(5))
    with turns.turn(0.0):
        pass


def test_a_turn_that_does_not_come_is_an_error() -> None:
    turns = Turns()
    with turns.turn(), pytest.raises(ModelError, match=r"busy for 0\.01 s"), turns.turn(0.01):
        pass
    with turns.turn(0.01):
        pass


def test_with_seats_enough_everybody_drafts_as_far_as_it_likes() -> None:
    dealer = dealer_of(2)
    first, second = dealer.join(10), dealer.join(10)
    first.num_tokens = 500
    assert first.may_draft(30)
    assert second.may_draft(0)
    assert first.seat is not second.seat
    assert dealer.num_seated == 2
    dealer.leave(first)
    assert dealer.join(10).may_draft(0)


def test_when_seats_are_scarce_nobody_gets_far_ahead() -> None:
    dealer = dealer_of(1)
    ahead, behind = dealer.join(10), dealer.join(10)
    assert ahead.may_draft(0)
    assert ahead.may_draft(LEAD_TOKENS - 1)
    assert not behind.may_draft(0), "there is one seat"
    ahead.num_tokens = LEAD_TOKENS - 2
    assert ahead.may_draft(1)
    assert not ahead.may_draft(2)
    assert behind.may_draft(0), "the seat is free now"
    behind.num_tokens = ahead.num_tokens = 200
    assert behind.may_draft(round(LEAD_SHARE * 200) - 1)
    assert not behind.may_draft(round(LEAD_SHARE * 200))


def test_a_seat_is_taken_only_where_feeding_the_context_pays() -> None:
    dealer = dealer_of(1)
    short, long = dealer.join(20), dealer.join(400)
    assert not long.may_draft(0)
    assert short.may_draft(0)
    dealer.leave(short)
    assert long.may_draft(0), "alone it need not ask what feeding costs"


def test_who_comes_later_counts_as_the_slowest() -> None:
    dealer = dealer_of(1)
    old = dealer.join(10)
    old.num_tokens = 300
    late = dealer.join(10)
    assert late.progress == 300
    assert old.may_draft(LEAD_TOKENS)


def test_simulated_sessions_stay_together() -> None:
    """Eight sessions, two seats, every draft right: a pass gives one token, or the chain and one more."""
    dealer = dealer_of(2)
    shares = [dealer.join(10) for _ in range(8)]
    given = [0] * 8
    for _ in range(60):
        for index, share in enumerate(shares):
            chain = 0
            while chain < 4 and share.may_draft(chain):
                chain += 1
            share.num_tokens += chain + 1
            given[index] += chain
        counts = [share.num_tokens for share in shares]
        if min(counts) >= 2 * LEAD_TOKENS:
            assert max(counts) < 1.5 * min(counts) + 1
    assert min(given) > 0, "everybody got drafts"


def controller_of(share: DraftShare | None, length: int = 2) -> GatedController:
    return GatedController(SpeculationController(Fixed(length)), share)


def test_the_controller_shows_chain_and_choice() -> None:
    dealer = dealer_of(1)
    share = dealer.join(10)
    controller = controller_of(share)
    assert controller.draft_on(Pace(), 0.0)
    for token in (5, 6):
        controller.on_drafted(token, None)
    assert controller.window.chain.tokens == (5, 6)
    assert len(controller.window.chain.survival) == 2
    assert not controller.draft_on(Pace(rtt_s=0.5), 0.0)
    assert controller.window.choice == WAITING
    assert controller.window.rtt_s == 0.5
    controller.on_commit(1, False, True)
    assert (controller.window.chain.num_commits, controller.window.chain.tokens) == (1, (6,))
    controller.on_commit(0, True, False)
    assert controller.window.num_struck == 1
    assert controller.window.chain.tokens == ()


def test_the_controller_says_why_it_waits() -> None:
    dealer = dealer_of(1)
    holder, other = dealer.join(1), dealer.join(1)
    assert holder.may_draft(0)
    controller = controller_of(other)
    assert not controller.draft_on(Pace(), 0.0)
    assert controller.window.choice == NO_SEAT
    resting = controller_of(holder, length=0)
    assert not resting.draft_on(Pace(), 0.0)
    assert resting.window.choice == NOT_DRAFTING
    assert holder.seat is None, "who does not draft leaves its seat to others"
    assert controller.draft_on(Pace(), 0.0)
    assert not controller_of(None).draft_on(Pace(), 0.0)


def test_threads_use_the_graph_one_at_a_time() -> None:
    drafter = SleepingDrafter(0.002)  # notices two users at once
    dealer = DraftDealer(lambda: drafter, 4)
    shares = [dealer.join(4) for _ in range(4)]
    done: list[int] = []

    def work(share: DraftShare) -> None:
        assert share.may_draft(0)
        for _ in range(10):
            share.draft_token_with_stats(np.arange(1, 5, dtype=np.int32), GREEDY)
        done.append(1)

    threads = [threading.Thread(target=work, args=(share,)) for share in shares]
    began_s = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10.0)
    assert len(done) == 4
    assert drafter.num_steps == 40
    assert time.monotonic() - began_s >= 0.08
