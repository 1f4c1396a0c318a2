"""One session on the server: the rules of the draft buffer, rounds, ends, resumption."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.factories import ids, make_draft, make_session
from tests.fakes import target_alone, target_token
from wisp_plugin.errors import InvalidRequest
from wisp_plugin.messages import Commit, Mode, Origin, PassItem, PassOutcome, Sampling, Status, Timing
from wisp_plugin.server_session import ServerSession

D, A, C, B = Origin.DECODED, Origin.ACCEPTED, Origin.CORRECTION, Origin.BONUS
GARBAGE = 77  # a choice behind the first difference: it means nothing


def give(session: ServerSession, *chosen: int, budget: int = 100, now_s: float = 1.0) -> Commit | None:
    """A pass in which the target chooses `chosen`."""
    item = session.pass_item(budget)
    padded = (*chosen, *[GARBAGE] * item.num_choices)[: item.num_choices]
    return session.commit(item, PassOutcome(session.id, ids(*padded)), Timing(), now_s)


def started(**values: Any) -> ServerSession:
    """A session with prompt 1, 2, 3 and the first token, 10, at position 3."""
    session = make_session(**({"max_new_tokens": 20} | values))
    give(session, 10)
    return session


def buffered(session: ServerSession) -> list[int]:
    """The draft tokens that the next pass would verify."""
    return session.pass_item(100).tokens[session.num_committed :].tolist()


def draft(start: int, seen: int, *tokens: int) -> tuple[str, Any]:
    return "draft", make_draft(start, *tokens, seen=seen)


def run(*chosen: int, budget: int = 100) -> tuple[str, Any]:
    return "pass", (chosen, budget)


BUFFER_RULES: dict[str, tuple[list[tuple[str, Any]], list[int]]] = {
    "a new chain": ([draft(4, 4, 5, 6)], [5, 6]),
    "START = SEEN replaces": ([draft(4, 4, 5, 6), draft(4, 4, 7)], [7]),
    "START = SEEN replaces, also by nothing": ([draft(4, 4, 5, 6), draft(4, 4)], []),
    "START > SEEN continues": ([draft(4, 4, 5), draft(5, 4, 6, 7)], [5, 6, 7]),
    "continues an empty chain of START = SEEN only at its end": ([draft(4, 4), draft(5, 4, 6)], []),
    "a gap is stale": ([draft(4, 4, 5), draft(6, 4, 7)], [5]),
    "an overlap is stale": ([draft(4, 4, 5, 6), draft(5, 4, 6, 7)], [5, 6]),
    "a stale message does not end the chain": ([draft(4, 4, 5), draft(6, 4, 9), draft(5, 4, 6)], [5, 6]),
    "without a chain nothing continues": ([draft(4, 3, 5)], []),
    "a decoded token equal to the first keeps the tail": ([draft(4, 4, 5, 6, 7), run(5, budget=1)], [6, 7]),
    "a decoded token that differs clears": ([draft(4, 4, 5, 6, 7), run(9, budget=1)], []),
    "a bonus equal to the next keeps the tail": ([draft(4, 4, 5, 6, 7), run(5, 6, budget=2)], [7]),
    "a bonus that differs clears": ([draft(4, 4, 5, 6, 7), run(5, 9, budget=2)], []),
    "a correction clears": ([draft(4, 4, 5, 6, 7), run(5, 9)], []),
    "a bonus behind the whole chain": ([draft(4, 4, 5), run(5, 6)], []),
    "the chain lives behind a bonus: late and equal": ([draft(4, 4, 5), run(5, 6), draft(5, 4, 6, 7)], [7]),
    "all late, all equal, then on": ([draft(4, 4), run(5), run(6), draft(4, 4, 5), draft(5, 4, 6, 7)], [7]),
    "late and different drops the rest": ([draft(4, 4, 5), run(5, 6), draft(5, 4, 9, 7)], []),
    "a chain broken by late tokens stays dead": (
        [draft(4, 4, 5), run(5, 6), draft(5, 4, 9, 7), draft(7, 4, 8), draft(6, 5, 8)],
        [],
    ),
    "START = SEEN starts again behind a broken chain": ([draft(4, 4, 5), run(9), draft(5, 5, 8)], [8]),
    "a broken chain takes nothing": ([draft(4, 4, 5, 6), run(9), draft(6, 4, 7)], []),
    "START = SEEN that is late itself": ([run(5), draft(4, 4, 5, 6)], [6]),
    "START = SEEN that is late and different": ([run(5), draft(4, 4, 9, 6)], []),
    "a late different START = SEEN also drops what was there": ([run(5), draft(5, 5, 6), draft(4, 4, 9)], []),
    "plain decoding overtakes the whole chain": ([draft(4, 4, 5), run(5, 6), run(7), draft(5, 4, 6, 7, 8)], [8]),
}


@pytest.mark.parametrize("name", BUFFER_RULES)
def test_draft_buffer(name: str) -> None:
    steps, expected = BUFFER_RULES[name]
    session = started()
    for kind, value in steps:
        if kind == "draft":
            session.on_draft(value, 1.0)
        else:
            give(session, *value[0], budget=value[1])
    assert buffered(session) == expected
    assert session.num_buffered == len(expected)


def test_drafts_never_reach_the_last_position() -> None:
    session = started(max_new_tokens=4)  # positions 4, 5, 6 are left; the token at 6 is the target's own
    session.on_draft(make_draft(4, 5, 6, 7, 8), 1.0)
    assert buffered(session) == [5, 6]
    session.on_draft(make_draft(8, 9, seen=4), 1.0)
    assert buffered(session) == [5, 6]


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
    assert give(session, budget=4) is None
    assert (session.num_cached, session.num_committed) == (4, 10)
    item = session.pass_item(6)
    assert (item.num_cached, item.num_new_tokens, item.is_prefill_chunk) == (4, 6, False)
    commit = give(session, 5, budget=6)
    assert commit is not None
    assert (commit.start, commit.tokens.tolist(), session.num_cached) == (10, [5], 10)


def test_sync_takes_one_draft_per_commit() -> None:
    session = make_session(mode=Mode.SYNC)
    assert session.is_due  # the prefill
    give(session, 10, now_s=1.0)
    assert not session.is_due
    session.on_draft(make_draft(4, 5, seen=3), 1.5)  # drafted before it saw the last commit: not this round's
    assert not session.is_due
    session.on_draft(make_draft(4), 2.0)
    assert session.is_due
    assert session.ready_since_s == 2.0
    session.on_draft(make_draft(4, 5), 3.0)  # another one neither opens another round nor moves it back in the queue
    assert session.ready_since_s == 2.0
    give(session, 5, 6)
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
    give(session, 5)
    session.on_draft(make_draft(4, 5, 6), 1.0)
    assert (session.status, session.num_buffered, session.num_acked) == (Status.LENGTH, 0, 4)


def test_pause_until_acknowledged() -> None:
    session = started()
    give(session, 5)
    assert session.is_paused(2)
    assert not session.is_paused(3)
    session.on_draft(make_draft(4), 1.0)
    assert not session.is_paused(2)
    session.on_draft(make_draft(3), 1.0)  # an old acknowledgement takes nothing back
    assert session.num_acked == 4


def test_a_draft_token_is_counted_once() -> None:
    session = started()
    session.on_draft(make_draft(4, 5, 6, 7), 1.0)
    give(session, 5, 9, budget=3)  # verified: 5 and 6; accepted: 5; only 7 was drafted on a wrong prefix
    assert dataclasses.astuple(session.counts) == (3, 2, 1, 0, 1)


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
            item = session.pass_item(budget)
            first = item.first_choice_position
            chosen = [target_token(item.tokens[: first + i]) for i in range(item.num_choices)]
            session.commit(item, PassOutcome(session.id, ids(*chosen)), Timing(), 0.0)
        assert session.committed.tolist() == truth[: session.num_committed]
        assert session.num_committed + session.num_buffered < session.opened.end or session.finished


