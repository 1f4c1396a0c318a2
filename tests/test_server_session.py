"""One session on the server: what a pass commits, chunks, rounds, turns. The buffer: see test_draft_buffer."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.factories import GARBAGE, SESSION, give_pass, ids, make_draft, make_open, make_session
from tests.fakes import target_alone, target_token
from wisp_plugin.errors import InvalidRequest
from wisp_plugin.messages import Draft, Mode, Origin, PassItem, PassOutcome, Sampling, Status, Timing
from wisp_plugin.server_session import ServerSession

D, A, C, B = Origin.DECODED, Origin.ACCEPTED, Origin.CORRECTION, Origin.BONUS


def started(**values: Any) -> ServerSession:
    """A session with prompt 1, 2, 3 and the first token, 10, at position 3."""
    session = make_session(**({"max_new_tokens": 20} | values))
    give_pass(session, 10)
    return session


ENDS: list[tuple[list[int], list[int], list[int], list[Origin], Status]] = [
    # draft, chosen, committed, origins, status; EOS is 2, the last position 7
    ([], [5], [5], [D], Status.RUNNING),
    ([5], [5, 6], [5, 6], [A, B], Status.RUNNING),
    ([5, 6], [5, 8], [5, 8], [A, C], Status.RUNNING),
    ([5, 6], [8], [8], [C], Status.RUNNING),
    ([], [2], [2], [D], Status.EOS),
    ([2, 6], [2, 6, 7], [2], [A], Status.EOS),
    ([5, 2], [5, 2, 7], [5, 2], [A, A], Status.EOS),
    ([5], [5, 2], [5, 2], [A, B], Status.EOS),
    ([5, 6], [5, 2], [5, 2], [A, C], Status.EOS),
    ([5, 6, 8], [5, 6, 8, 9], [5, 6, 8, 9], [A, A, A, B], Status.LENGTH),
    ([5, 6, 8], [5, 6, 8, 2], [5, 6, 8, 2], [A, A, A, B], Status.EOS),
    ([5, 6, 8, 9], [5, 6, 8, 9, 1], [5, 6, 8, 9], [A, A, A, A], Status.LENGTH),
    ([5, 6, 8, 9, 1], [5, 6, 8, 9, 1, 1], [5, 6, 8, 9], [A, A, A, A], Status.LENGTH),
    ([5, 6, 8, 2], [5, 6, 8, 2, 1], [5, 6, 8, 2], [A, A, A, A], Status.EOS),
]


@pytest.mark.parametrize(("tokens", "chosen", "committed", "origins", "status"), ENDS)
def test_what_a_pass_commits(
    tokens: list[int], chosen: list[int], committed: list[int], origins: list[Origin], status: Status
) -> None:
    session = started(max_new_tokens=5, eos_token_ids=(2,))
    # Built by hand: the buffer itself never reaches the last position.
    item = PassItem(session.id, np.concatenate([session.committed, ids(*tokens)]), 3, len(tokens), Sampling())
    padded = (*chosen, *[GARBAGE] * item.num_choices)[: item.num_choices]
    logprobs = np.arange(item.num_choices, dtype=np.float32)
    commit = session.commit(item, PassOutcome(session.id, ids(*padded), logprobs), Timing(), 2.0)
    assert commit is not None
    assert (commit.start, commit.tokens.tolist()) == (4, committed)
    assert (commit.origin.tolist(), commit.status) == (origins, status)
    assert commit.logprobs is not None
    assert len(commit.logprobs) == len(committed)
    assert session.committed.tolist() == [1, 2, 3, 10, *committed]
    assert session.finished == (status is not Status.RUNNING)
    if not session.finished:
        assert session.num_uncached == 1


def test_prefill_in_chunks() -> None:
    session = make_session(prompt=range(10))
    assert give_pass(session, budget=4) is None
    assert (session.num_cached, session.num_committed) == (4, 10)
    item = session.pass_item(6, 0, "turn")
    assert (item.num_cached, item.num_new_tokens, item.is_prefill_chunk, item.reason) == (4, 6, False, "turn")
    commit = give_pass(session, 5, budget=6)
    assert commit is not None
    assert (commit.start, commit.tokens.tolist(), session.num_cached) == (10, [5], 10)


def test_sync_takes_one_draft_per_commit() -> None:
    session = make_session(mode=Mode.SYNC)
    assert session.is_due  # the prefill
    give_pass(session, 10, now_s=1.0)
    assert not session.is_due
    session.on_draft(make_draft(4, 5, seen=3), 1.5)  # drafted before it saw the last commit: not this round's
    assert not session.is_due
    session.on_draft(make_draft(4), 2.0)
    assert session.is_due
    assert session.ready_since_s == 2.0
    session.on_draft(make_draft(4, 5), 3.0)  # another one neither opens another round nor moves it back in the queue
    assert session.ready_since_s == 2.0
    give_pass(session, 5, 6)
    assert not session.is_due


def test_a_late_chain_does_not_open_a_sync_round() -> None:
    session = make_session(mode=Mode.SYNC, tokens=ids(1, 2, 3, 10, 11))
    assert not session.is_due  # resumed on a new server: the client owes a draft
    session.on_draft(make_draft(4, 11), 1.0)
    assert not session.is_due
    session.on_draft(make_draft(5), 1.0)
    assert session.is_due


@pytest.mark.parametrize("seen", [2, 5])
def test_seen_outside_the_generated_tokens(seen: int) -> None:
    with pytest.raises(InvalidRequest, match=f"SEEN is {seen}; allowed for this session: 3 to 4"):
        started().on_draft(make_draft(seen, 5), 1.0)


def test_drafts_behind_the_end_are_taken_without_effect() -> None:
    session = started(max_new_tokens=2)
    give_pass(session, 5)
    session.on_draft(make_draft(4, 5, 6), 1.0)
    assert (session.status, session.num_buffered, session.num_acked) == (Status.LENGTH, 0, 4)


def test_pause_until_acknowledged() -> None:
    session = started()
    give_pass(session, 5)
    assert session.is_paused(2)
    assert not session.is_paused(3)
    session.on_draft(make_draft(4), 1.0)
    assert not session.is_paused(2)
    session.on_draft(make_draft(3), 1.0)  # an old acknowledgement takes nothing back
    assert session.num_acked == 4


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(Mode),
    st.lists(
        st.tuples(st.integers(1, 30), st.integers(0, 6), st.lists(st.integers(0, 6), max_size=6), st.integers(0, 9)),
        max_size=40,
    ),
)
def test_no_draft_changes_what_is_committed(mode: Mode, steps: list[tuple[int, int, list[int], int]]) -> None:
    session = make_session(max_new_tokens=15, mode=mode, eos_token_ids=(4,))
    truth = target_alone(session.committed, 18, (4,))
    for start, ahead, tokens, budget in steps:
        # Two in three carry the target's own tokens where they stand, so that chains live.
        right = truth[start : start + len(tokens)] if budget % 3 else tokens
        seen = max(1, start - ahead)
        if 3 <= seen <= session.num_committed:
            session.on_draft(make_draft(start, *right, seen=seen), 0.0)
        if budget and session.is_due:
            num_uncached = min(budget, session.num_uncached)
            item = session.pass_item(num_uncached, min(budget - num_uncached, session.num_buffered))
            first = item.first_choice_position
            chosen = [target_token(item.tokens[: first + i]) for i in range(item.num_choices)]
            session.commit(item, PassOutcome(session.id, ids(*chosen)), Timing(), 0.0)
        assert session.committed.tolist() == truth[: session.num_committed]
        assert session.num_committed + session.num_buffered < session.opened.end or session.finished


# -- turns and what is expected of the client -------------------------------------------------------------------


def told(next_us: int, start: int = 4, *tokens: int) -> Draft:
    return Draft(SESSION, start, start, ids(*tokens), None, next_us)


def test_a_chunk_is_a_turn() -> None:
    session = make_session(prompt=range(10))
    give_pass(session, budget=4, now_s=3.0)
    assert (session.ready_since_s, session.newest_input_s, session.timeline.first_s) == (3.0, 0.0, None)


def test_turns_are_smoothed_from_the_second_commit_on() -> None:
    session = started()  # at 1.0
    assert (session.tokens_per_turn, session.turn_gap_s) == (1.0, 0.0)
    session.on_draft(make_draft(4, 5, 6), 1.0)
    give_pass(session, 5, 6, 7, now_s=1.5)
    assert session.tokens_per_turn == pytest.approx(1.4)
    assert session.turn_gap_s == 0.5  # the first gap is taken as it is
    give_pass(session, 8, now_s=1.6)
    assert session.turn_gap_s == pytest.approx(0.42)


def test_when_the_next_draft_is_expected() -> None:
    session = started()
    assert session.expected.next_s == math.inf
    session.on_draft(told(50_000, 4, 5, 6), 1.2)
    assert session.expected.next_s == pytest.approx(1.25)
    session.on_draft(told(-1, 4, 5, 6), 1.3)  # none before a commit
    assert session.expected.next_s == math.inf
    assert session.timeline.way_s == pytest.approx(0.1)  # half of 0.2 s between the commit and the first message
    give_pass(session, 5, 6, 7, now_s=2.0)
    assert session.expected.next_s == pytest.approx(2.0 + 0.2 + 0.05)


def test_a_message_that_is_expected_anyway_is_not_put_off_by_a_commit() -> None:
    session = started()
    session.on_draft(told(500_000, 4, 5, 6, 7), 1.2)
    give_pass(session, 5, budget=1, now_s=1.3)  # the chain goes on
    assert (session.num_buffered, session.expected.next_s) == (2, pytest.approx(1.7))


def test_resumption_forgets_drafts_on_their_way() -> None:
    session = started()
    session.on_draft(told(50_000, 4, 5, 6), 1.2)
    session.resume(session.opened, 2.0)
    assert (session.expected.next_s, session.num_buffered, session.ready_since_s) == (math.inf, 0, 2.0)


def test_resumption_tells_log_probabilities_where_all_are_known() -> None:
    """As asked for (DESIGN.md section 6); not of tokens that another client has brought."""
    session = make_session(prompt=(1, 2), max_new_tokens=8, logprobs=True)
    outcome = PassOutcome(session.id, ids(7), np.array([-1.5], np.float32))
    session.commit(session.pass_item(2, 0), outcome, Timing(), 1.0)
    told_again = session.resume(session.opened, 2.0)
    assert told_again is not None
    assert told_again.logprobs is not None
    assert told_again.logprobs.tolist() == [-1.5]
    session.resume(make_open(prompt=(1, 2), max_new_tokens=8, logprobs=True, tokens=ids(1, 2, 7, 8)), 3.0)
    both = session.resume(session.opened, 4.0)
    assert both is not None
    assert both.tokens.tolist() == [7, 8]
    assert both.logprobs is None
