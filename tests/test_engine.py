"""The serving loop: sessions come and go, every request gets exactly one end (the fake reply insists)."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.factories import ids, make_config, make_draft, make_open, session_id
from tests.fakes import FakeClock, FakeReply, FakeVerifier, make_engine, target_alone
from wisp_plugin.engine import RETRY_AFTER_MS
from wisp_plugin.messages import Close, Draft, Mode, Open, Sampling, Status


class Server:
    """An engine without a thread; `send` is one request."""

    def __init__(self, verifier: FakeVerifier | None = None, **config: Any) -> None:
        self.clock = FakeClock()
        self.verifier = verifier or FakeVerifier()
        self.failures: list[str | None] = []
        self.engine = make_engine(
            self.verifier, self.clock, make_config(**config), lambda: self.failures.append(self.engine.failure)
        )

    def send(self, message: Open | Draft | Close) -> FakeReply:
        reply = FakeReply()
        self.engine.submit(message, reply)
        return reply

    def open(self, number: int = 0, **values: Any) -> FakeReply:
        return self.send(make_open(session=session_id(number), **values))

    def steps(self, num_steps: int, step_s: float = 0.01) -> None:
        for _ in range(num_steps):
            self.engine.step()
            self.clock.now_s += step_s

    def scheduled(self) -> list[str]:
        return [session.id for session in self.engine.scheduler.sessions]


def draft(start: int, *tokens: int, number: int = 0, seen: int | None = None) -> Draft:
    return make_draft(start, *tokens, seen=seen, session=session_id(number))


def wait_until(condition: Callable[[], bool]) -> None:
    """For threads: a moment at most."""
    deadline_s = time.monotonic() + 5.0
    while not condition():
        assert time.monotonic() < deadline_s, "did not happen"
        time.sleep(0.002)


def test_a_session_from_open_to_its_end() -> None:
    server = Server()
    reply = server.open(max_new_tokens=5)
    server.steps(6)
    assert [1, 2, 3, *reply.tokens] == target_alone(ids(1, 2, 3), 8)
    assert (reply.status, reply.finished, server.scheduled()) == (Status.LENGTH, True, [])
    assert server.verifier.pool.num_free == server.verifier.pool.num_blocks


def test_drafts_are_answered_by_their_end_alone_also_behind_the_sessions_end() -> None:
    server = Server()
    server.open(max_new_tokens=3)
    server.steps(1)
    replies = [server.send(draft(4, 5, 6)), server.send(draft(6, 1, seen=4))]
    server.steps(4)
    late = server.send(draft(5, 1, seen=4))
    server.steps(1)
    for reply in (*replies, late):
        assert (reply.finished, reply.error, reply.commits) == (True, None, [])


@pytest.mark.parametrize("message", [draft(4, number=9), Close(session_id(9))])
def test_an_unknown_session(message: Draft | Close) -> None:
    server = Server()
    other = server.open()
    reply = server.send(message)
    server.steps(1)
    assert reply.error == "session 00000000... is not known here; open it first"
    assert len(other.tokens) == 1


def test_seen_beyond_the_session_is_an_error_of_that_request_alone() -> None:
    server = Server()
    stream = server.open()
    server.steps(1)
    reply = server.send(draft(9, 1))
    server.steps(1)
    assert reply.error == "SEEN is 9; allowed for this session: 3 to 4"
    assert not stream.ended


def test_timing_of_a_commit() -> None:
    server = Server()
    server.verifier._on_run = lambda: setattr(server.clock, "now_s", server.clock.now_s + 0.05)
    server.open()
    stream = server.open(1)
    server.clock.now_s += 0.2
    server.steps(1)
    timing = stream.commits[0].timing
    assert (timing.waited_us, timing.measured_us, timing.num_sessions) == (200_000, 50_000, 2)


def test_close() -> None:
    server = Server()
    stream = server.open(max_new_tokens=50)
    server.steps(3)
    closing = server.send(Close(session_id(0)))
    server.steps(1)
    assert (stream.status, stream.finished, closing.finished, closing.commits) == (Status.CLOSED, True, True, [])
    assert (server.scheduled(), server.verifier.pool.sessions()) == ([], ())
    again, reopened = server.send(Close(session_id(0))), server.open(max_new_tokens=50)
    server.steps(1)
    assert (again.finished, reopened.finished, reopened.status) == (True, True, Status.CLOSED)


def test_a_session_with_its_end_in_the_open_is_ended_at_once() -> None:
    server = Server()
    stream = server.open(tokens=ids(1, 2, 3, 4, 5), max_new_tokens=2)
    server.steps(1)
    assert (stream.status, stream.tokens, stream.finished) == (Status.LENGTH, [], True)
    assert server.verifier.passes == []


# -- resumption -------------------------------------------------------------------------------------------------


def test_a_second_open_supersedes_the_first_and_goes_on() -> None:
    server = Server()
    first = server.open()
    server.steps(3)
    second = server.open(tokens=ids(1, 2, 3, *first.tokens[:1]))
    server.steps(10)
    assert (first.status, first.finished) == (Status.SUPERSEDED, True)
    assert first.tokens[:1] + second.tokens == target_alone(ids(1, 2, 3), 11)[3:]
    assert server.verifier.passes[3][0].num_new_tokens == 1  # its KV was kept


def test_a_conflict_leaves_the_first_stream_alone() -> None:
    server = Server()
    first = server.open()
    server.steps(2)
    for values in ({"max_new_tokens": 9}, {"sampling": Sampling(seed=1)}, {"prompt": (1, 2, 4)}):
        second = server.open(**values)
        server.steps(1)
        assert (second.status, second.finished, second.tokens) == (Status.CONFLICT, True, [])
    server.steps(10)
    assert first.tokens == target_alone(ids(1, 2, 3), 11)[3:]


@pytest.mark.parametrize(("away_s", "is_held"), [(59.0, True), (61.0, False)])
def test_lingering(away_s: float, is_held: bool) -> None:
    server = Server(linger_s=60.0)
    stream = server.open(mode=Mode.SYNC)
    server.steps(2)
    stream.cancelled = True
    server.steps(2, 0.3)
    server.clock.now_s += away_s
    server.steps(1)
    reply = server.send(draft(4))
    server.steps(1)
    assert (reply.error is None) == is_held
    conflicting = server.open(max_new_tokens=9)  # of a session that is not held, it is simply a new one
    server.steps(1)
    assert (conflicting.status is Status.CONFLICT) == is_held


def test_overloaded() -> None:
    server = Server(max_sessions=1)
    first, second = server.open(0), server.open(1)
    server.steps(1)
    assert (second.status, second.finished) == (Status.OVERLOADED, True)
    assert second.commits[0].retry_after_ms == RETRY_AFTER_MS
    server.steps(10)
    third = server.open(2)
    server.steps(10)
    assert (first.status, third.status) == (Status.LENGTH, Status.LENGTH)


def test_resumed_sessions_count_too() -> None:
    server = Server(max_sessions=1)
    for number in (0, 1):
        stream = server.open(number, mode=Mode.SYNC)
        server.steps(2)
        stream.cancelled = True
        server.steps(2, 0.3)
    first, second = server.open(0, mode=Mode.SYNC), server.open(1, mode=Mode.SYNC)
    server.steps(1)
    assert (first.status, second.status) == (Status.RUNNING, Status.OVERLOADED)


# -- clients that leave or do not read ---------------------------------------------------------------------------


def test_a_client_that_vanishes_is_unscheduled_within_a_second() -> None:
    server = Server()
    gone, stays = server.open(0, max_new_tokens=500), server.open(1, max_new_tokens=500)
    server.steps(5, 0.1)
    gone.cancelled = True
    server.steps(9, 0.1)
    assert gone.finished
    assert server.scheduled() == [session_id(1)]
    assert server.verifier.pool.sessions() == (session_id(1),)
    assert not stays.ended


def test_a_client_that_does_not_acknowledge_is_paused_then_closed_and_may_resume() -> None:
    server = Server(max_unacked_tokens=128, linger_s=10.0)
    stream = server.open(max_new_tokens=200)
    server.steps(140)
    assert len(stream.tokens) == 128
    server.steps(9, 1.0)
    assert not stream.ended
    server.steps(4, 1.0)
    assert (stream.status, stream.finished, server.scheduled()) == (Status.CLOSED, True, [])
    resumed = server.open(max_new_tokens=200, tokens=ids(1, 2, 3, *stream.tokens))
    server.steps(80)
    assert (len(resumed.tokens), resumed.status) == (72, Status.LENGTH)


def test_an_acknowledgement_wakes_a_paused_session() -> None:
    server = Server(max_unacked_tokens=128)
    stream = server.open(max_new_tokens=250)
    server.steps(140)
    server.send(draft(50))
    server.steps(80)
    assert len(stream.tokens) == 47 + 128


def test_the_queue_has_a_bound() -> None:
    server = Server(max_queued_messages=2)
    replies = [server.open(number) for number in range(3)]
    assert replies[2].error == "unavailable: the queue is full (2 messages)"
    server.steps(1)
    assert [len(reply.tokens) for reply in replies] == [1, 1, 0]


def test_eviction_goes_unnoticed() -> None:
    server = Server(FakeVerifier(num_blocks=6))
    replies = [server.open(number, max_new_tokens=20) for number in range(4)]
    server.steps(300, 0.02)
    assert all(reply.tokens == target_alone(ids(1, 2, 3), 23)[3:] for reply in replies)
    assert server.engine.telemetry.totals.evictions > 0
    assert server.engine.telemetry.totals.committed_tokens == 80
