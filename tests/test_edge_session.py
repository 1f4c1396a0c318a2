"""The device's side: what to draft, what to send, how commits change the chain."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from tests.factories import ids, make_commit, make_draft, make_open, same
from wisp_plugin.controller import SpeculationController
from wisp_plugin.edge_session import ACK_TOKENS, EdgeSession, Step
from wisp_plugin.errors import TransportError
from wisp_plugin.messages import Commit, Draft, Mode, Origin, Status
from wisp_plugin.stop_rules import Fixed

A, C, B = Origin.ACCEPTED, Origin.CORRECTION, Origin.BONUS
NOW_S = 10.0


def make_edge(max_ahead: int = 4, message_tokens: int = 1, **values: Any) -> EdgeSession:
    """A device behind the prompt 1, 2, 3; positions up to 22 are to come."""
    controller = SpeculationController(Fixed(max_ahead))
    return EdgeSession(make_open(**({"max_new_tokens": 20} | values)), controller, message_tokens)


def draft(session: EdgeSession, token: int, seconds: float = 1.0) -> bool:
    """Draft `token` now, asked for or not."""
    return session.on_drafted(session.begin_draft(), token, seconds)


def drafted(session: EdgeSession, *tokens: int, seconds: float = 1.0) -> list[Draft]:
    """Draft `tokens` as far as the session lets us, and send what it wants sent."""
    left, sent = list(tokens), []
    while True:
        step = session.next_step(NOW_S)
        if step is Step.DRAFT and left:
            assert draft(session, left.pop(0), seconds)
        elif step is Step.SEND:
            sent.append(session.take_message(NOW_S))
        else:
            return sent


def content(message: Draft) -> Draft:
    """What a message says about tokens, without the time to the next one and the survival."""
    return dataclasses.replace(message, next_us=-1, survival=None)


def mixed(start: int, *pairs: tuple[int, Origin], status: Status = Status.RUNNING) -> Commit:
    """A commit of tokens with their origins."""
    origin = np.array([o for _, o in pairs], np.uint8)
    return Commit(make_open().session, start, ids(*(t for t, _ in pairs)), origin, status)


ROLLBACKS: dict[str, tuple[list[int], list[Commit], list[int], list[int], Draft | None]] = {
    # drafted and sent from position 3; commits; committed behind the prompt; chain; next message after drafting 99
    "agrees": ([5, 6, 7], [make_commit(3, 5)], [5], [6, 7], make_draft(6, 99, seen=4)),
    "agrees to the end of the chain": ([5, 6], [make_commit(3, 5, 6)], [5, 6], [], make_draft(5, 99)),
    "differs at once": ([5, 6, 7], [make_commit(3, 9)], [9], [], make_draft(4, 99)),
    "differs in the middle": ([5, 6, 7], [make_commit(3, 5, 9)], [5, 9], [], make_draft(5, 99)),
    "overtakes": ([5, 6], [make_commit(3, 5, 6, 7, 8)], [5, 6, 7, 8], [], make_draft(7, 99)),
    "overtakes and differs": ([5, 6], [make_commit(3, 5, 9, 7, 8)], [5, 9, 7, 8], [], make_draft(7, 99)),
    "differs where the chain has ended": ([5], [make_commit(3, 5, 9)], [5, 9], [], make_draft(5, 99)),
    "in two commits": ([5, 6, 7], [make_commit(3, 5), make_commit(4, 6, 8)], [5, 6, 8], [], make_draft(6, 99)),
    "no draft at all": ([], [make_commit(3, 5)], [5], [], make_draft(4, 99)),
    "a status alone": ([5, 6], [make_commit(3)], [], [5, 6], make_draft(5, 99, seen=3)),
}


@pytest.mark.parametrize("name", ROLLBACKS)
def test_commits_and_the_chain(name: str) -> None:
    tokens, commits, committed, chain, message = ROLLBACKS[name]
    session = make_edge()
    drafted(session, *tokens)
    for commit in commits:
        assert session.on_commit(commit, NOW_S) is commit.tokens
    assert session.generated.tolist() == committed
    assert session.committed.tolist() == [1, 2, 3, *committed]
    assert session.chain.tolist() == chain
    assert session.context().tolist() == [1, 2, 3, *committed, *chain]
    (sent,) = drafted(session, 99)
    assert same(content(sent), message)


def test_a_commit_that_overtakes_what_was_not_sent_yet() -> None:
    session = make_edge(message_tokens=4)
    for token in (5, 6, 7):
        assert draft(session, token, 1.0)
    session.on_commit(make_commit(3, 5, 6), NOW_S)
    assert draft(session, 8, 1.0)
    assert draft(session, 9, 1.0)
    assert draft(session, 10, 1.0)
    assert session.next_step(NOW_S) is Step.SEND
    # START = SEEN: a new chain for the server
    assert same(content(session.take_message(NOW_S)), make_draft(5, 7, 8, 9, 10))


def test_at_most_so_many_ahead_and_on_with_every_commit() -> None:
    session = make_edge(max_ahead=2)
    assert [m.tokens.tolist() for m in drafted(session, 5, 6, 7, 8)] == [[5], [6]]
    assert session.next_step(NOW_S) is Step.WAIT
    session.on_commit(make_commit(3, 5), NOW_S)
    assert session.next_step(NOW_S) is Step.DRAFT


@pytest.mark.parametrize(("message_tokens", "starts"), [(1, [3, 4, 5, 6, 7]), (2, [3, 5, 7]), (3, [3, 6]), (9, [3])])
def test_grouping(message_tokens: int, starts: list[int]) -> None:
    messages = drafted(make_edge(5, message_tokens), 5, 6, 7, 8, 9)
    assert [message.start for message in messages] == starts
    assert {message.seen for message in messages} == {3}
    assert np.concatenate([message.tokens for message in messages]).tolist() == [5, 6, 7, 8, 9]


def test_no_draft_for_the_last_position() -> None:
    session = make_edge(max_new_tokens=3)
    drafted(session, 5, 6, 7)
    assert session.chain.tolist() == [5, 6]
    session.on_commit(make_commit(3, 5, 9), NOW_S)
    assert [content(message).tokens.tolist() for message in drafted(session, 7)] == [[]]  # the server need not wait
    assert session.next_step(NOW_S) is Step.WAIT
    session.on_commit(make_commit(5, 4, status=Status.LENGTH), NOW_S)
    assert session.next_step(NOW_S) is Step.DONE


def test_no_draft_beyond_the_context_of_the_draft_model() -> None:
    session = EdgeSession(make_open(max_new_tokens=20), SpeculationController(Fixed(9)), max_context_tokens=5)
    assert np.concatenate([m.tokens for m in drafted(session, 5, 6, 7)]).tolist() == [5, 6]


def test_no_draft_behind_an_end_token_until_it_is_rejected() -> None:
    session = make_edge(eos_token_ids=(2,))
    drafted(session, 5, 2, 7)
    assert session.chain.tolist() == [5, 2]
    session.on_commit(make_commit(3, 5), NOW_S)
    assert session.next_step(NOW_S) is Step.WAIT
    session.on_commit(make_commit(4, 8), NOW_S)
    assert session.next_step(NOW_S) is Step.DRAFT


@pytest.mark.parametrize("status", [status for status in Status if status is not Status.RUNNING])
def test_every_final_status_ends(status: Status) -> None:
    session = make_edge()
    drafted(session, 5)
    session.on_commit(make_commit(3, status=status), NOW_S)
    assert (session.next_step(NOW_S), session.status) == (Step.DONE, status)


@pytest.mark.parametrize("commit", [make_commit(4, 5), make_commit(2, 5), make_commit(3, *range(21))])
def test_a_commit_that_does_not_fit(commit: Commit) -> None:
    session = make_edge()
    with pytest.raises(TransportError, match=f"positions {commit.start} to {commit.end}; 3 was due and 23 is the end"):
        session.on_commit(commit, NOW_S)
    assert (len(session.generated), session.status) == (0, Status.RUNNING)


def test_the_same_commit_twice_does_not_fit() -> None:
    session = make_edge()
    session.on_commit(make_commit(3, 5), NOW_S)
    with pytest.raises(TransportError):
        session.on_commit(make_commit(3, 5), NOW_S)


def test_a_thin_client_acknowledges_now_and_then() -> None:
    session = make_edge(max_ahead=0, max_new_tokens=300)
    for position in range(3, 2 + ACK_TOKENS):
        session.on_commit(make_commit(position, 1), NOW_S)
        assert session.next_step(NOW_S) is Step.WAIT
    session.on_commit(make_commit(2 + ACK_TOKENS, 1), NOW_S)
    assert session.next_step(NOW_S) is Step.SEND
    assert same(session.take_message(NOW_S), make_draft(3 + ACK_TOKENS))
    assert session.next_step(NOW_S) is Step.WAIT


def test_a_long_prefill_of_the_device_keeps_no_acknowledgement_back() -> None:
    session = make_edge(max_new_tokens=300)
    for position in range(3, 2 + ACK_TOKENS):
        session.on_commit(make_commit(position, 1), NOW_S)
        assert session.next_step(NOW_S) is Step.DRAFT
        session.begin_draft()  # never done: the prompt is being read, part by part
    session.on_commit(make_commit(2 + ACK_TOKENS, 1), NOW_S)
    assert session.next_step(NOW_S) is Step.SEND
    assert same(session.take_message(NOW_S), make_draft(3 + ACK_TOKENS))
    assert session.next_step(NOW_S) is Step.DRAFT
    for position in range(3 + ACK_TOKENS, 4 + 2 * ACK_TOKENS):
        session.on_commit(make_commit(position, 1), NOW_S)
    draft(session, 5)
    assert session.next_step(NOW_S) is Step.SEND
    assert session.take_message(NOW_S).tokens.tolist() == [5]  # that tells as much


# -- sync rounds ------------------------------------------------------------------------------------------------


def test_sync_rounds() -> None:
    session = make_edge(max_ahead=3, mode=Mode.SYNC)
    assert session.next_step(NOW_S) is Step.WAIT  # the prefill commits the first token
    session.on_commit(make_commit(3, 5), NOW_S)
    assert [(m.start, m.seen, m.tokens.tolist()) for m in drafted(session, 6, 7, 8, 9)] == [(4, 4, [6, 7, 8])]
    assert session.next_step(NOW_S) is Step.WAIT
    session.on_commit(mixed(4, (6, A), (9, C)), NOW_S)
    assert session.chain.tolist() == []
    assert [(m.start, m.seen) for m in drafted(session, 1, 1, 1)] == [(6, 6)]
    session.on_commit(make_commit(6), NOW_S)  # a status without tokens opens no round
    assert session.next_step(NOW_S) is Step.WAIT
    session.on_commit(mixed(6, (1, A), (1, B)), NOW_S)  # a pass short of tokens: the rest of the chain goes, too
    assert session.chain.tolist() == []


def test_a_sync_round_without_a_draft_is_an_empty_message() -> None:
    session = make_edge(max_ahead=0, mode=Mode.SYNC)
    session.on_commit(make_commit(3, 5), NOW_S)
    assert same(session.take_message(NOW_S), make_draft(4))
    session = make_edge(max_new_tokens=2, mode=Mode.SYNC)
    session.on_commit(make_commit(3, 5), NOW_S)
    assert session.next_step(NOW_S) is Step.SEND  # nothing to draft for the last position


# -- connections ------------------------------------------------------------------------------------------------


def test_reopening_sends_everything_received_and_the_chain_again() -> None:
    session = make_edge()
    drafted(session, 5, 6, 7)
    session.on_commit(make_commit(3, 5), NOW_S)
    message = session.reopen()
    assert same(message, make_open(tokens=ids(1, 2, 3, 5), max_new_tokens=20))
    session.on_commit(make_commit(4, 6), NOW_S)  # what the server had committed meanwhile
    (sent,) = drafted(session)
    assert same(content(sent), make_draft(5, 7))


@pytest.mark.parametrize(("received", "step"), [((), Step.WAIT), ((5,), Step.DRAFT)])
def test_reopening_in_sync(received: tuple[int, ...], step: Step) -> None:
    session = make_edge(mode=Mode.SYNC)
    if received:
        session.on_commit(make_commit(3, *received), NOW_S)
        drafted(session, 6, 7, 8, 9)
        assert session.next_step(NOW_S) is Step.WAIT
    session.reopen()
    if received:
        assert same(content(session.take_message(NOW_S)), make_draft(4, 6, 7, 8, 9))
    else:
        assert session.next_step(NOW_S) is step


# -- statistics -------------------------------------------------------------------------------------------------


def test_statistics() -> None:
    session = make_edge(max_ahead=8)
    assert (session.stats.wdt_share, session.stats.tokens_per_pass) == (0.0, 0.0)
    drafted(session, 5, 6, 7, 8, seconds=0.5)
    session.on_commit(mixed(3, (5, A), (6, A), (9, C)), NOW_S)  # 7 was rejected, 8 stood behind
    drafted(session, 1, seconds=1.0)
    session.on_commit(mixed(6, (1, A), (4, B)), NOW_S)
    session.on_commit(make_commit(8, 3), NOW_S)
    stats = session.stats
    assert (stats.num_committed, stats.num_commits, stats.tokens_per_pass) == (6, 3, 2.0)
    assert (stats.num_drafted, stats.num_sent, stats.num_accepted, stats.num_corrections) == (5, 5, 3, 1)
    assert (stats.drafting_s, stats.useful_drafting_s) == (3.0, 2.0)
    assert stats.wdt_share == pytest.approx(1 / 3)


def test_the_wdt_share_is_never_below_zero() -> None:
    shares = []
    for seconds in np.random.default_rng(1).random((50, 12)):
        session = make_edge(max_ahead=16)
        for second in seconds:
            assert draft(session, 1, float(second))
        session.on_commit(make_commit(3, *[1] * 12, origin=A), NOW_S)
        shares.append(session.stats.wdt_share)
    assert min(shares) >= 0.0
