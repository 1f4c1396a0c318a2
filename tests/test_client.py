"""The client's loop over a fake transport and a fake drafter: streaming, reconnecting, refusals, leaving."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from edge_runtime.client import EdgeClient, Patience
from tests.factories import SESSION, ids, make_commit, make_draft, make_open, same
from tests.fakes import FakeClock, draft_token
from wisp_plugin.controller import SpeculationController
from wisp_plugin.edge_session import EdgeSession
from wisp_plugin.errors import RequestRefused, TransportError
from wisp_plugin.messages import Close, Commit, Draft, Open, Sampling, Status, Tokens
from wisp_plugin.stop_rules import Fixed

LOST = TransportError("connection reset")
LAST = make_commit(5, 12, status=Status.LENGTH)


class ScriptedTransport:
    """Plays a script: each `open` starts the next connection, whose events `receive` hands out in order.

    A connection that is an error cannot be made. With no event left, waiting takes its whole time.
    """

    def __init__(self, clock: FakeClock, *connections: list[Any] | TransportError) -> None:
        self.clock = clock
        self.connections = deque(connections)
        self.events: deque[Any] = deque()
        self.opens: list[Open] = []
        self.opened_s: list[float] = []
        self.sent: list[Draft | Close] = []
        self.num_closed = 0
        self.on_send: Callable[[], None] = lambda: None

    def open(self, message: Open) -> None:
        self.opens.append(message)
        self.opened_s.append(round(self.clock.now_s, 6))
        assert len(self.opens) < 500, "opens for ever"
        connection = self.connections.popleft() if len(self.connections) > 1 else self.connections[0]
        if isinstance(connection, TransportError):
            raise connection
        self.events = deque(connection)

    def send(self, message: Draft | Close) -> None:
        self.sent.append(message)
        self.on_send()

    def receive(self, timeout_s: float) -> Commit | None:
        if not self.events:
            self.clock.now_s += timeout_s
            return None
        event = self.events.popleft()
        if isinstance(event, Exception):
            raise event
        return event

    def wake(self) -> None:
        """Nobody waits: without a thread, whoever could wake is the one that would wait."""

    def close(self) -> None:
        self.num_closed += 1


class SlowDrafter:
    """Needs `num_chunks` calls before it may draft; a token takes 0.25 s."""

    def __init__(self, clock: FakeClock, num_chunks: int = 0) -> None:
        self.clock = clock
        self.num_chunks = num_chunks

    def advance(self, tokens: Tokens) -> int:
        self.num_chunks -= 1
        return max(0, self.num_chunks)

    def draft_token_with_stats(self, tokens: Tokens, sampling: Sampling) -> tuple[int, None]:
        self.clock.now_s += 0.25
        return draft_token(tokens), None


def make_client(*connections: list[Any] | TransportError, max_ahead: int = 0, num_chunks: int = 0) -> EdgeClient:
    """A client for three tokens behind the prompt 1, 2, 3, without a thread."""
    clock = FakeClock(0.0)
    opened = make_open(max_new_tokens=3)

    def sleep(seconds: float) -> None:
        clock.now_s += seconds

    return EdgeClient(
        opened,
        EdgeSession(opened, SpeculationController(Fixed(max_ahead)), message_tokens=1),
        ScriptedTransport(clock, *connections),
        SlowDrafter(clock, num_chunks) if max_ahead else None,
        Patience(commit_s=60.0, reconnect_s=10.0, first_retry_s=0.1, max_retry_s=2.0, close_s=1.0),
        clock,
        sleep,
        threaded=False,
    )


def run(client: EdgeClient) -> list[int]:
    return [int(token) for tokens in client.run() for token in tokens]


def test_tokens_stream_as_they_arrive() -> None:
    client = make_client([make_commit(3, 10), make_commit(4, 11), LAST])
    told: list[Commit] = []
    client.on_commit = told.append
    assert [tokens.tolist() for tokens in client.run()] == [[10], [11], [12]]
    assert [commit.start for commit in told] == [3, 4, 5]
    assert [same(message, client.opened) for message in client.transport.opens] == [True]
    client.close()
    assert (client.transport.sent, client.transport.num_closed) == ([], 1)


def test_drafts_are_sent_while_commits_arrive() -> None:
    client = make_client([None, None, make_commit(3, 10), make_commit(4, 11), LAST], max_ahead=2, num_chunks=2)
    assert run(client) == [10, 11, 12]
    first = draft_token(ids(1, 2, 3))
    survival = np.array([round(255 * 0.75)], np.uint8)  # what is believed of a draft model before it is known
    told = dataclasses.replace(make_draft(3, first), survival=survival, next_us=250_000)  # what the token took
    assert same(client.transport.sent[0], told)
    assert client.session.stats.drafting_s == 0.25 * client.session.stats.num_drafted > 0


def test_a_long_prefill_of_the_draft_model_leaves_room_for_commits() -> None:
    client = make_client([make_commit(3, 10), make_commit(4, 11), LAST], max_ahead=2, num_chunks=100)
    assert run(client) == [10, 11, 12]
    assert client.session.stats.num_drafted == 0


@pytest.mark.parametrize("error", [TransportError("no server at there"), RequestRefused("no")])
def test_a_first_connection_that_fails_is_not_tried_again(error: TransportError) -> None:
    client = make_client(error)
    with pytest.raises(TransportError, match=str(error)):
        run(client)
    assert len(client.transport.opens) == 1
    client.close()
    assert client.transport.num_closed == 1


def test_a_lost_connection_is_opened_again_with_all_that_was_received() -> None:
    client = make_client([make_commit(3, 10), LOST], [make_commit(4, 11), LAST])
    assert run(client) == [10, 11, 12]
    assert [message.tokens.tolist() for message in client.transport.opens] == [[1, 2, 3], [1, 2, 3, 10]]
    assert client.session.stats.num_reopened == 1


def test_a_connection_lost_while_sending() -> None:
    client = make_client([None] * 9, [make_commit(3, 10, 11), LAST], max_ahead=1)

    def fail_once() -> None:
        client.transport.on_send = lambda: None
        raise LOST

    client.transport.on_send = fail_once
    assert run(client) == [10, 11, 12]
    assert same(*client.transport.sent[:2])  # the chain that got lost is sent again


def test_pauses_grow_up_to_a_limit_and_trying_ends() -> None:
    client = make_client([make_commit(3, 10), LOST], LOST)
    with pytest.raises(TransportError, match=r"gave up after waiting 9\.1 s: connection reset"):
        run(client)
    pauses = np.diff(client.transport.opened_s).round(6).tolist()
    assert pauses == [0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0, 2.0]
    assert client.session.stats.num_reopened == 0


def test_a_commit_makes_the_patience_new() -> None:
    client = make_client([LOST], LOST, LOST, [make_commit(3, 10), LOST], [make_commit(4, 11), LAST])
    assert run(client) == [10, 11, 12]
    assert np.diff(client.transport.opened_s).round(6).tolist() == [0.1, 0.2, 0.4, 0.1]


def test_connections_that_break_without_a_commit_end_the_trying() -> None:
    client = make_client([LOST])
    with pytest.raises(TransportError, match=r"gave up after waiting 9\.1 s"):
        run(client)
    assert client.transport.opened_s[-1] <= 10.0


def test_pauses_grow_also_if_the_connection_breaks_only_after_the_open() -> None:
    client = make_client([LOST])
    with pytest.raises(TransportError):
        run(client)
    assert np.diff(client.transport.opened_s).round(6).tolist()[:4] == [0.1, 0.2, 0.4, 0.8]


def test_a_server_whose_commits_never_fit_is_given_up() -> None:
    client = make_client([make_commit(9, 10)])
    with pytest.raises(TransportError, match=r"gave up after waiting 9\.1 s"):
        run(client)


def test_silence_counts_as_a_lost_connection() -> None:
    client = make_client([], [make_commit(3, 10, 11), LAST])
    assert run(client) == [10, 11, 12]
    assert client.transport.opened_s == pytest.approx([0.0, 60.25])  # 0.05 s more for each of 3 tokens to prefill


def test_a_server_that_has_answered_has_less_time() -> None:
    client = make_client([make_commit(3, 10)], [make_commit(4, 11), LAST])
    assert run(client) == [10, 11, 12]
    assert client.transport.opened_s == pytest.approx([0.0, 60.1])


@pytest.mark.parametrize("connections", [([RequestRefused("no")],), ([LOST], RequestRefused("no"))])
def test_a_refusal_ends_the_session_at_once(connections: tuple[Any, ...]) -> None:
    client = make_client(*connections, [make_commit(3, 10, 11), LAST])
    with pytest.raises(RequestRefused, match="no"):
        run(client)
    assert len(client.transport.opens) == len(connections)


def test_a_server_that_is_restarted_in_order_is_opened_again() -> None:
    client = make_client([make_commit(3, 10), make_commit(4, status=Status.CLOSED)], [make_commit(4, 11), LAST])
    assert run(client) == [10, 11, 12]


# -- an overloaded server ---------------------------------------------------------------------------------------


def overloaded(retry_after_ms: int | None) -> list[Commit]:
    """A connection whose only commit says that there is no room."""
    return [dataclasses.replace(make_commit(3, status=Status.OVERLOADED), retry_after_ms=retry_after_ms)]


def test_an_overloaded_server_is_asked_again_when_it_said() -> None:
    client = make_client(overloaded(3_000), overloaded(1_500), [make_commit(3, 10, 11), LAST])
    assert run(client) == [10, 11, 12]
    assert client.transport.opened_s == [0.0, 3.0, 5.0]  # never sooner than asked; the second pause is the client's own
    assert [message.tokens.tolist() for message in client.transport.opens] == [[1, 2, 3]] * 3
    assert client.session.stats.num_reopened == 2


def test_an_overload_in_the_middle_of_a_session_loses_nothing() -> None:
    full = [make_commit(3, 10), LOST]
    client = make_client(full, overloaded(2_000), [make_commit(4, 11), LAST])
    assert run(client) == [10, 11, 12]
    assert client.transport.opens[-1].tokens.tolist() == [1, 2, 3, 10]


@pytest.mark.parametrize(
    ("retry_after_ms", "waited_s", "line"),
    [
        (4_000, 8.0, r"gave up after waiting 8\.0 s: the server is overloaded \(it asks to try again after 4 s\)"),
        (60_000, 0.0, r"gave up after waiting 0\.0 s: the server is overloaded \(it asks to try again after 60 s\)"),
        (0, 9.1, r"gave up after waiting 9\.1 s: the server is overloaded \(it asks to try again after 0 s\)"),
        (None, 9.1, r"gave up after waiting 9\.1 s: the server is overloaded$"),
    ],
)
def test_waiting_for_an_overloaded_server_has_a_limit(retry_after_ms: int | None, waited_s: float, line: str) -> None:
    client = make_client(overloaded(retry_after_ms))
    with pytest.raises(TransportError, match=line):
        run(client)
    assert client.clock() == pytest.approx(waited_s)
    client.close()
    assert client.transport.num_closed == 1


# -- leaving ----------------------------------------------------------------------------------------------------


def test_leaving_early_tells_the_server_and_waits_for_its_last_word() -> None:
    client = make_client([make_commit(3, 10), make_commit(4, 11), make_commit(5, status=Status.CLOSED), LOST])
    stream = client.run()
    next(stream)
    client.close()
    assert client.transport.sent == [Close(SESSION)]
    assert (client.transport.events, client.transport.num_closed) == (deque([LOST]), 1)


@pytest.mark.parametrize("event", [LOST, RequestRefused("session is not known")])
def test_leaving_over_a_broken_connection_is_no_error(event: TransportError) -> None:
    client = make_client([make_commit(3, 10), event])
    next(client.run())
    client.close()
    assert client.transport.num_closed == 1


def test_leaving_a_silent_server_takes_a_moment_only() -> None:
    client = make_client([make_commit(3, 10)])
    next(client.run())
    client.close()
    assert (client.clock(), client.transport.num_closed) == (1.0, 1)


def test_a_slow_drafter_does_not_fall_behind_the_server() -> None:
    """All commits that have arrived are taken between two draft steps, not one."""
    client = make_client([make_commit(3, 10), make_commit(4, 11), LAST], max_ahead=2)
    assert run(client) == [10, 11, 12]
    assert client.session.stats.num_drafted == 1
