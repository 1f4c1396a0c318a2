"""Columns of sessions agree with the sessions, whatever comes, goes and is used again."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.factories import give_pass, make_draft, make_session, session_id
from wisp_plugin.roster import Candidates, Roster
from wisp_plugin.server_session import ServerSession

MAX_AHEAD = 8


def check(columns: Candidates, roster: Roster, expected: list[ServerSession]) -> None:
    """`columns` describe `expected`, in this order."""
    assert [roster.sessions[row] for row in columns.rows.tolist()] == expected
    assert columns.survival.shape == (len(expected), max((s.num_buffered for s in expected), default=0))
    for i, session in enumerate(expected):
        figures = {
            "num_cached": session.num_cached,
            "num_uncached": session.num_uncached,
            "num_buffered": session.num_buffered,
            "needed_s": session.timeline.needed_s,
            "tpot_s": session.timeline.tpot_s,
            "next_draft_s": session.expected.next_s,
            "ready_s": session.ready_since_s,
            "tokens_per_turn": session.tokens_per_turn,
            "is_lost": session.timeline.is_lost(session.num_left),
            "opened_s": session.opened_s,
        }
        assert {name: getattr(columns, name)[i] for name in figures} == figures
        num = session.num_buffered
        assert columns.survival[i, :num] == pytest.approx(session.drafts.survival(session.num_committed))
        assert not columns.survival[i, num:].any()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["add", "remove", "draft", "pass", "off"]), st.integers(0, 9), st.integers(0, 6)),
        max_size=60,
    )
)
def test_columns_agree_with_the_sessions(steps: list[tuple[str, int, int]]) -> None:
    roster, held, off = Roster(MAX_AHEAD), dict[str, ServerSession](), set[str]()
    for number, (kind, who, size) in enumerate(steps):
        session_key = session_id(who)
        session = held.get(session_key)
        if kind == "add" and session is None:
            session = held[session_key] = make_session(float(number), session=session_key, max_new_tokens=500)
            roster.add(session)
        elif session is None:
            roster.remove(session_key)  # unknown ones are ignored
            continue
        elif kind == "remove":
            roster.remove(session_key)
            del held[session_key]
            off.discard(session_key)
            continue
        elif kind == "draft":
            session.on_draft(make_draft(session.num_committed, *[5] * size, session=session_key), float(number))
        elif kind == "pass":
            give_pass(session, 5, budget=1 + size, now_s=float(number))
        elif kind == "off":
            off ^= {session_key}
        roster.note(session, session_key not in off)
        check(roster.everyone(), roster, list(held.values()))
        check(roster.candidates(), roster, [s for key, s in held.items() if key not in off])


def test_survival_of_a_row_that_is_used_again() -> None:
    roster = Roster(MAX_AHEAD)
    for num_drafts in (8, 3, 0, 5):
        session = make_session(max_new_tokens=50)
        session.on_draft(make_draft(3, *[5] * num_drafts), 0.0)
        roster.add(session)
        roster.note(session, True)
        check(roster.candidates(), roster, [session])
        roster.remove(session.id)
    assert not len(roster.candidates())
    assert not len(roster.everyone())


def test_more_sessions_than_rows_stay_in_order() -> None:
    roster = Roster(MAX_AHEAD)
    sessions = [make_session(session=session_id(number)) for number in range(300)]
    for session in sessions:
        session.on_draft(make_draft(3, *[5] * (len(session.id) % 4), session=session.id), 0.0)
        roster.add(session)
        roster.note(session, True)
    for session in sessions[::3]:
        roster.remove(session.id)
    for session in sessions[::3]:  # they come back behind the others, in rows of their own
        roster.add(session)
        roster.note(session, True)
    expected = [s for i, s in enumerate(sessions) if i % 3] + sessions[::3]
    check(roster.candidates(), roster, expected)
    assert len(set(roster.candidates().rows.tolist())) == 300


def test_adding_twice_keeps_row_and_place() -> None:
    roster, sessions = Roster(MAX_AHEAD), [make_session(session=session_id(number)) for number in range(3)]
    for session in [*sessions, *sessions]:
        roster.add(session)
        roster.note(session, True)
    check(roster.candidates(), roster, sessions)


def test_a_cut_is_a_copy() -> None:
    roster, session = Roster(MAX_AHEAD), make_session(max_new_tokens=50)
    session.on_draft(make_draft(3, 5, 5), 0.0)
    roster.add(session)
    roster.note(session, True)
    before = roster.candidates()
    kept = {f.name: np.copy(getattr(before, f.name)) for f in dataclasses.fields(before)}
    give_pass(session, 5, 5, 6)
    roster.note(session, True)
    assert all(np.array_equal(getattr(before, name), value) for name, value in kept.items())
