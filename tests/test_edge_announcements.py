"""What a draft message tells about the next one: when it comes, if it comes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.factories import make_commit, make_draft, make_open, same
from tests.test_edge_session import NOW_S, draft, drafted, make_edge
from wisp_plugin.controller import Chain, SpeculationController
from wisp_plugin.edge_session import ACK_TOKENS, EdgeSession, Step
from wisp_plugin.messages import Mode
from wisp_plugin.pace import Pace
from wisp_plugin.wire import WireLimits, decode_request, encode_request


@pytest.mark.parametrize(("message_tokens", "next_us"), [(1, 20_000), (2, 40_000), (3, 60_000)])
def test_a_message_tells_when_the_next_one_comes(message_tokens: int, next_us: int) -> None:
    messages = drafted(make_edge(64, message_tokens, max_new_tokens=60), *[5] * 12, seconds=0.02)
    assert {message.next_us for message in messages} == {next_us}


def test_the_last_message_before_the_device_stops_announces_none() -> None:
    assert [m.next_us for m in drafted(make_edge(max_ahead=3), 5, 6, 7, seconds=0.5)] == [500_000, 500_000, -1]
    end_token = drafted(make_edge(eos_token_ids=(2,)), 5, 2, seconds=0.5)
    assert [message.next_us for message in end_token] == [500_000, -1]
    last_position = drafted(make_edge(max_new_tokens=4), 5, 6, 7, seconds=0.5)
    assert [message.next_us for message in last_position] == [500_000, 500_000, -1]


def test_the_last_message_of_a_session_is_announced_as_short_as_it_will_be() -> None:
    messages = drafted(make_edge(64, 3, max_new_tokens=5), 5, 6, 7, 8, seconds=0.01)
    assert [(len(message.tokens), message.next_us) for message in messages] == [(3, 10_000), (1, -1)]


@pytest.mark.parametrize("position", range(1, 12))
def test_one_slow_token_does_not_change_what_is_announced(position: int) -> None:
    session, announced = make_edge(64, max_new_tokens=60), []
    for number in range(12):
        assert draft(session, 5, 3.0 if number == position else 0.01)
        announced.append(session.take_message(NOW_S).next_us)
    assert set(announced) == {10_000}


def test_a_slow_first_token_is_forgotten_with_the_second() -> None:
    session = make_edge(64, max_new_tokens=60)
    assert draft(session, 5, 3.0)
    assert session.take_message(NOW_S).next_us == 3_000_000
    assert draft(session, 5, 0.01)
    assert session.take_message(NOW_S).next_us == 10_000


def test_a_device_that_becomes_slower_says_so_after_some_tokens() -> None:
    session = make_edge(64, max_new_tokens=60)
    drafted(session, *[5] * 20, seconds=0.01)
    assert drafted(session, *[5] * 5, seconds=0.03)[-1].next_us == 30_000


@pytest.mark.parametrize(("seconds", "next_us"), [(0.0, 0), (1e-7, 0), (1e6, 2**31 - 1)])
def test_what_is_announced_fits_the_wire(seconds: float, next_us: int) -> None:
    (message,) = drafted(make_edge(), 5, seconds=seconds)
    assert message.next_us == next_us
    assert same(decode_request(*encode_request(message), WireLimits(50, 64, max_draft_ahead=8)), message)


def test_sync_announces_nothing() -> None:
    session = make_edge(mode=Mode.SYNC)
    session.on_commit(make_commit(3, 5), NOW_S)
    assert [message.next_us for message in drafted(session, 6, 7, 8, 9)] == [-1]
    session.on_commit(make_commit(4, 5), NOW_S)
    assert draft(session, 6, 1.0)
    assert session.take_message(NOW_S).next_us == -1  # not even if the chain could go on


def test_an_acknowledgement_announces_nothing_even_if_drafting_pays_again() -> None:
    class Moody:
        pays = False

        def draft_on(self, chain: Chain, pace: Pace, now_s: float) -> bool:
            return self.pays

        def waits(self, chain: Chain, pace: Pace) -> bool:
            return True

        def on_commit(self, num_right: int, num_drafted: int) -> None:
            pass

    rule = Moody()
    session = EdgeSession(make_open(max_new_tokens=300), SpeculationController(rule))
    session.on_commit(make_commit(3, *[1] * ACK_TOKENS), NOW_S)
    assert session.next_step(NOW_S) is Step.SEND
    rule.pays = True
    assert same(session.take_message(NOW_S), make_draft(3 + ACK_TOKENS))


@settings(deadline=None)
@given(
    st.integers(0, 8),
    st.integers(1, 4),
    st.lists(st.tuples(st.integers(0, 4), st.floats(0.0, 100.0)) | st.lists(st.integers(0, 4), min_size=1, max_size=3)),
)
def test_a_next_message_is_announced_if_and_only_if_drafting_goes_on(
    max_ahead: int, message_tokens: int, events: list[Any]
) -> None:
    """A draft token with its time, or the tokens of a commit; after each, all that is due is sent."""
    session = make_edge(max_ahead, message_tokens, eos_token_ids=(2,))
    for event in events:
        if isinstance(event, tuple) and session.next_step(NOW_S) is Step.DRAFT:
            assert draft(session, *event)
        elif isinstance(event, list) and len(session.committed) + len(event) <= 23:
            session.on_commit(make_commit(len(session.committed), *event), NOW_S)
        while session.next_step(NOW_S) is Step.SEND:
            message = session.take_message(NOW_S)
            assert (message.next_us >= 0) == (session.next_step(NOW_S) is Step.DRAFT)
            assert len(message.tokens) or message.next_us == -1
