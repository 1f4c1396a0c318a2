"""The draft buffer: its rules step by step, survival, and what becomes of every draft token."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.factories import GARBAGE, give_pass, ids, make_draft, make_session
from tests.fakes import VOCAB_SIZE, target_alone
from wisp_plugin.messages import Draft, Mode
from wisp_plugin.server_session import ServerSession


def started(**values: Any) -> ServerSession:
    """A session with prompt 1, 2, 3 and the first token, 10, at position 3."""
    session = make_session(**({"max_new_tokens": 20} | values))
    give_pass(session, 10)
    return session


def buffered(session: ServerSession) -> list[int]:
    """The draft tokens that the next pass would verify."""
    return session.pass_item(session.num_uncached, session.num_buffered).tokens[session.num_committed :].tolist()


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
            give_pass(session, *value[0], budget=value[1])
    assert buffered(session) == expected
    assert session.num_buffered == len(expected)


def test_drafts_never_reach_the_last_position() -> None:
    session = started(max_new_tokens=4)  # positions 4, 5, 6 are left; the token at 6 is the target's own
    session.on_draft(make_draft(4, 5, 6, 7, 8), 1.0)
    assert buffered(session) == [5, 6]
    session.on_draft(make_draft(8, 9, seen=4), 1.0)
    assert buffered(session) == [5, 6]


# -- counts -----------------------------------------------------------------------------------------------------


def test_a_draft_token_is_counted_once() -> None:
    session = started()
    session.on_draft(make_draft(4, 5, 6, 7), 1.0)
    give_pass(session, 5, 9, budget=3)  # verified: 5 and 6; accepted: 5; only 7 was drafted on a wrong prefix
    assert dataclasses.astuple(session.drafts.counts) == (3, 2, 1, 0, 1)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(-4, 4), st.integers(0, 3), st.integers(0, 5), st.booleans(), st.integers(0, 8)),
        max_size=40,
    )
)
def test_every_draft_token_has_one_end(steps: list[tuple[int, int, int, bool, int]]) -> None:
    """received = verified + late + stale + settled by a token of the target's own + still buffered."""
    session = make_session(max_new_tokens=400)
    truth = target_alone(session.committed, 403)
    num_settled = 0
    for offset, num_before, length, is_right, budget in steps:
        start = max(3, session.num_committed + offset)
        seen = max(3, start - num_before)
        tokens = truth[start : start + length]
        if seen <= session.num_committed:
            draft = tokens if is_right else [(t + 1) % VOCAB_SIZE for t in tokens]
            session.on_draft(make_draft(start, *draft, seen=seen), 0.0)
        if budget:
            num_buffered = session.num_buffered
            num_verified = min(num_buffered, max(0, budget - session.num_uncached))
            at = session.num_committed
            commit = give_pass(session, *truth[at : at + num_verified + 1], budget=budget)
            num_settled += max(0, min(num_buffered, len(commit.tokens) if commit else 0) - num_verified)
        counts = session.drafts.counts
        ends = counts.verified + counts.late + counts.stale + num_settled + session.num_buffered
        assert counts.received == ends
        assert counts.accepted <= counts.verified
        survival = session.drafts.survival(session.num_committed)
        assert len(survival) == session.num_buffered
        assert ((survival >= 0) & (survival <= 1)).all()
        assert (np.diff(survival) <= 0).all()


# -- survival ---------------------------------------------------------------------------------------------------


def survival(session: ServerSession) -> list[float]:
    return session.drafts.survival(session.num_committed).tolist()


def told(start: int, seen: int, tokens: list[int], survival_255: list[int]) -> Draft:
    return Draft("0" * 32, start, seen, ids(*tokens), np.array(survival_255, np.uint8))


def test_survival_follows_from_acceptance_where_nothing_is_told() -> None:
    session = started()
    session.on_draft(make_draft(4, 5, 6), 1.0)
    session.on_draft(make_draft(6, 7, seen=4), 1.0)
    assert session.drafts.acceptance == 0.75  # before anything is known
    assert survival(session) == pytest.approx([0.75, 0.75**2, 0.75**3])


def test_what_was_committed_meanwhile_is_certain() -> None:
    session = started()
    session.on_draft(told(4, 4, [5, 6, 7], [204, 102, 51]), 1.0)
    assert survival(session) == pytest.approx([0.8, 0.4, 0.2])
    give_pass(session, 5, budget=1)
    assert survival(session) == pytest.approx([0.5, 0.25])
    session.on_draft(told(7, 4, [8], [255]), 1.0)  # a chain does not become more likely further on
    assert survival(session) == pytest.approx([0.5, 0.25, 0.25])


def test_a_new_chain_starts_from_certainty() -> None:
    session = started()
    session.on_draft(told(4, 4, [5, 6], [102, 51]), 1.0)
    give_pass(session, 5, budget=1)
    session.on_draft(told(5, 5, [6, 7], [204, 102]), 1.0)
    assert survival(session) == pytest.approx([0.8, 0.4])


def test_a_chain_that_was_given_no_chance_has_none() -> None:
    session = started()
    session.on_draft(told(4, 4, [5, 6, 7], [0, 0, 0]), 1.0)
    give_pass(session, 5, budget=1)
    assert survival(session) == [0.0, 0.0]


def test_acceptance_is_learnt_and_forgotten() -> None:
    session = started(max_new_tokens=300)
    known = [session.drafts.acceptance]
    for is_right in [True] * 30 + [False] * 30:
        at = session.num_committed
        session.on_draft(make_draft(at, 5, 5), 1.0)
        give_pass(session, *([5, 5, 1] if is_right else [1]))
        known.append(session.drafts.acceptance)
    assert known == sorted(known[:31]) + sorted(known[31:], reverse=True)
    assert known[30] > 0.95
    assert known[60] < 0.6


def test_plain_decoding_teaches_nothing_about_acceptance() -> None:
    session = started()
    session.on_draft(make_draft(4, 5, 6), 1.0)
    give_pass(session, 9, budget=1)
    assert session.drafts.acceptance == 0.75


def test_tokens_beyond_the_end_are_left_out() -> None:
    session = started(max_new_tokens=4)
    session.on_draft(told(4, 4, [5, 6, 7, 8, 9], [250, 240, 230, 220, 210]), 1.0)
    assert len(survival(session)) == 2
    session.on_draft(told(9, 4, [1], [200]), 1.0)
    session.on_draft(told(7, 4, [1], [200]), 1.0)
    assert len(survival(session)) == 2


# -- devices that promise too much ------------------------------------------------------------------------------


def certain(start: int, *tokens: int) -> Draft:
    """A message of a device that is sure of every token."""
    return dataclasses.replace(make_draft(start, *tokens), survival=np.full(len(tokens), 255, np.uint8))


def test_a_device_that_promises_what_never_comes_true_is_not_believed() -> None:
    session = started(max_new_tokens=400)
    for _ in range(8):
        session.on_draft(certain(session.num_committed, *[GARBAGE] * 8), 1.0)
        give_pass(session, 5)
    session.on_draft(certain(session.num_committed, *[GARBAGE] * 8), 1.0)
    survival = session.drafts.survival(session.num_committed)
    assert survival[0] == pytest.approx(session.drafts.acceptance)
    assert survival[-1] < 0.01


def test_promises_count_though_the_last_message_makes_none() -> None:
    session = started(max_new_tokens=400)
    for _ in range(8):
        at = session.num_committed
        session.on_draft(certain(at, *[GARBAGE] * 8), 1.0)
        session.on_draft(make_draft(at + 8, GARBAGE, seen=at), 1.0)
        give_pass(session, 5)
    session.on_draft(certain(session.num_committed, *[GARBAGE] * 8), 1.0)
    assert survival(session)[-1] < 0.01


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from([0.6, 0.8, 0.9, 0.97]), min_size=1, max_size=60), st.integers(0, 1000))
def test_a_device_that_promises_what_it_can_keep_is_believed(rates: list[float], seed: int) -> None:
    """Also with luck as it is, and where easy and hard stretches follow each other."""
    rng, session = np.random.default_rng(seed), started(max_new_tokens=2000)
    for rate in rates:
        told = np.rint(255 * rate ** np.arange(1, 9)).astype(np.uint8)
        session.on_draft(dataclasses.replace(make_draft(session.num_committed, *[7] * 8), survival=told), 1.0)
        assert session.drafts.survival(session.num_committed)[-1] == pytest.approx(told[-1] / 255, abs=1e-5)
        num_right = min(8, int(rng.geometric(1 - rate)) - 1)
        give_pass(session, *[7] * num_right, 9)


@pytest.mark.parametrize("message_tokens", [64, 7, 1])
def test_of_rounds_that_hardly_ever_hold_little_is_verified(message_tokens: int) -> None:
    session = started(max_new_tokens=4000, mode=Mode.SYNC)
    lengths = []
    for _ in range(40):
        at = session.num_committed
        for i in range(0, 64, message_tokens):
            num_tokens = min(message_tokens, 64 - i)
            session.on_draft(make_draft(at + i, *[GARBAGE] * num_tokens, seen=at), 1.0)
        lengths.append(session.num_buffered)
        give_pass(session, 5)
    assert lengths[0] == 64
    assert lengths[-1] <= 2
    counts = session.drafts.counts
    assert counts.received == 40 * 64 == counts.verified + counts.stale
    for _ in range(20):  # it may come back
        session.on_draft(make_draft(session.num_committed, *[7] * 64), 1.0)
        give_pass(session, *[7] * session.num_buffered, 9)
    assert session.num_buffered == 0
    session.on_draft(make_draft(session.num_committed, *[7] * 16), 1.0)
    assert session.num_buffered == 16
