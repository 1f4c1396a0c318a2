"""The client with its drafting thread, in real time: what a draft step in the making must not hold up or get wrong."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from edge_runtime.client import Patience
from edge_runtime.drafting_thread import DraftingThread, EdgeWork
from tests.edge_fakes import (
    STEP_S,
    Consumer,
    QueueTransport,
    SleepingDrafter,
    drafting_threads,
    make_client,
    wait_until,
)
from tests.factories import make_commit
from wisp_plugin.errors import ModelError, TransportError
from wisp_plugin.messages import Close, Commit, Mode, Sampling, Status, Tokens


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = drafting_threads()  # of a test that has failed
    yield
    wait_until(lambda: not set(drafting_threads()) - set(before), 1.0)


# -- commits while a token is drafted ---------------------------------------------------------------------------


def test_a_commit_is_handled_while_a_draft_step_runs() -> None:
    client = make_client(drafter := SleepingDrafter(0.2))
    consumer, put_s = Consumer(client), []
    for position in range(3, 8):
        drafter.wait_for_step()
        put_s.append(time.monotonic())
        client.transport.inbox.put(make_commit(position, 9))  # never what is drafted: the next step begins anew
        wait_until(lambda: len(consumer.times_s) == len(put_s))
    handled_s = np.subtract(consumer.times_s, put_s)
    client.transport.inbox.put(make_commit(8, 9, status=Status.EOS))
    consumer.finish()
    assert np.median(handled_s) < 0.01
    assert handled_s.max() < 0.1  # half a step, however busy the machine is


def test_a_token_whose_prefix_is_rolled_back_meanwhile_is_never_sent() -> None:
    client = make_client(drafter := SleepingDrafter(choose=len))
    consumer = Consumer(client)
    for _ in range(2):
        drafter.wait_for_step()
    client.transport.inbox.put(make_commit(3, 9, 8))
    wait_until(lambda: len(client.transport.drafts) >= 3)
    client.transport.inbox.put(make_commit(5, 9, status=Status.EOS))
    consumer.finish()
    assert consumer.error is None
    sent = [(message.start, message.seen, message.tokens.tolist()) for message in client.transport.drafts]
    assert sent[:3] == [(3, 3, [3]), (5, 5, [5]), (6, 5, [6])]
    assert client.session.stats.num_interrupted >= 1


def test_drafting_goes_on_when_a_commit_makes_room() -> None:
    client = make_client(drafter := SleepingDrafter(0.0))
    consumer = Consumer(client)
    wait_until(lambda: len(client.transport.drafts) == 8)
    time.sleep(0.02)
    assert drafter.num_steps == 8  # as far ahead as the rule lets it
    put_s = time.monotonic()
    client.transport.inbox.put(make_commit(3, 5, 5))
    wait_until(lambda: len(client.transport.drafts) == 10)
    assert time.monotonic() - put_s < 0.5  # woken, not found by the way
    client.transport.inbox.put(make_commit(5, 5, status=Status.EOS))
    consumer.finish()


class ChunkedDrafter(SleepingDrafter):
    """Has a long prompt to feed: `num_chunks` steps of STEP_S without a token."""

    num_chunks = 6

    def __init__(self) -> None:
        super().__init__(0.0)
        self.contexts: list[int] = []

    def advance(self, tokens: Tokens) -> int:
        self.contexts.append(len(tokens))
        if self.num_chunks == 0:
            return 0
        time.sleep(STEP_S)
        self.num_chunks -= 1
        return self.num_chunks + 1


def test_a_long_prefill_takes_up_what_is_committed_between_its_chunks() -> None:
    client = make_client(drafter := ChunkedDrafter())
    consumer = Consumer(client)
    wait_until(lambda: len(drafter.contexts) >= 2)
    client.transport.inbox.put(make_commit(3, 9))
    wait_until(lambda: len(client.transport.drafts) >= 1)
    client.transport.inbox.put(make_commit(4, 5, status=Status.EOS))
    consumer.finish()
    assert drafter.contexts[:2] == [3, 3]
    assert sorted(set(drafter.contexts))[:2] == [3, 4]
    assert client.transport.drafts[0].start == 4
    assert client.session.stats.num_interrupted == 0


def test_the_time_that_the_device_needs_itself_is_not_the_servers_silence() -> None:
    """In `sync` nothing comes from the server while a round is drafted."""
    client = make_client(SleepingDrafter(), patience=Patience(commit_s=0.2), mode=Mode.SYNC)
    client.transport.inbox.put(make_commit(3, 9))
    consumer = Consumer(client)
    wait_until(lambda: len(client.transport.drafts) == 1)  # behind 8 steps of 0.05 s
    client.transport.inbox.put(make_commit(4, 5, status=Status.EOS))
    consumer.finish()
    assert (consumer.error, client.session.stats.num_reopened) == (None, 0)


def test_a_silent_server_is_noticed_by_a_device_that_has_drafted_all_it_may() -> None:
    patience = Patience(commit_s=0.1, prefill_token_s=0.0, first_retry_s=0.01, reconnect_s=0.2)
    client = make_client(SleepingDrafter(0.0), patience=patience)
    consumer = Consumer(client)
    consumer.finish()
    assert isinstance(consumer.error, TransportError)
    assert "no commit from the server for 0.1 s" in str(consumer.error)


# -- failures ---------------------------------------------------------------------------------------------------


class BrokenDrafter(SleepingDrafter):
    """Fails in its third step."""

    def draft_token_with_stats(self, tokens: Tokens, sampling: Sampling) -> tuple[int, None]:
        if self.num_steps == 2:
            raise ModelError("the graph is damaged")
        return super().draft_token_with_stats(tokens, sampling)


def test_what_the_drafter_raises_reaches_the_caller() -> None:
    client = make_client(BrokenDrafter(0.0))
    began_s = time.monotonic()
    with pytest.raises(ModelError, match="the graph is damaged"):
        list(client.run())
    assert time.monotonic() - began_s < 1.0
    client.close()
    assert client.transport.is_closed


def test_what_the_drafter_raises_reaches_a_caller_who_gets_commits_all_the_time() -> None:
    positions = iter(range(3, 100_000))

    class Busy(QueueTransport):
        is_woken = False

        def wake(self) -> None:
            self.is_woken = True

        def receive(self, timeout_s: float) -> Commit | None:
            return None if self.is_woken else make_commit(next(positions), 5)

    client = make_client(BrokenDrafter(0.0), max_new_tokens=100_000, transport=Busy())
    with pytest.raises(ModelError, match="the graph is damaged"):
        list(client.run())
    client.close()


def test_closing_during_a_step_waits_for_it_and_then_leaves_the_drafter_alone() -> None:
    client = make_client(drafter := SleepingDrafter(0.2))
    client.transport.inbox.put(make_commit(3, 9))
    stream = client.run()
    next(stream)
    drafter.wait_for_step()
    began_s = time.monotonic()
    client.close()
    assert time.monotonic() - began_s < 1.0
    assert not drafting_threads()
    num_steps = drafter.num_steps
    time.sleep(0.05)
    assert drafter.num_steps == num_steps
    assert isinstance(client.transport.log[-1], Close)


def test_a_stream_that_is_dropped_ends_its_thread() -> None:
    client = make_client(drafter := SleepingDrafter(0.0))
    client.transport.inbox.put(make_commit(3, 9))
    stream = client.run()
    next(stream)
    drafter.wait_for_step()
    stream.close()
    wait_until(lambda: not drafting_threads(), 1.0)


def test_a_stop_between_two_looks_is_not_missed() -> None:
    """The thread has just seen that it goes on, and is about to forget what has become due."""
    drafter = SleepingDrafter(0.0)
    work = EdgeWork(make_client(drafter).session, transport := QueueTransport(), drafter, Sampling())

    class Late(threading.Event):
        """Somebody else's `stop` comes first whenever the thread clears."""

        def clear(self) -> None:
            if threading.current_thread().name == "wisp-drafting" and self.is_set():
                stopping.append(True)
                thread.stop()
            super().clear()

    stopping: list[bool] = []
    work.due = Late()
    thread = DraftingThread(work, transport.wake)
    work.due.set()
    begin_s = time.monotonic()
    thread.join()
    assert stopping
    assert time.monotonic() - begin_s < 0.5


def test_a_step_that_hangs_is_reported_in_time() -> None:
    hanging = threading.Event()
    drafter = SleepingDrafter(0.0, choose=lambda tokens: int(hanging.wait(5.0)))
    work = EdgeWork(make_client(drafter).session, transport := QueueTransport(), drafter, Sampling())
    work.connect()
    thread = DraftingThread(work, transport.wake)
    drafter.wait_for_step()
    thread.stop()
    with pytest.raises(ModelError, match=r"the draft model has not finished a step within 0\.05 s"):
        thread.join(0.05)
    hanging.set()
    thread.join()


def test_a_drafter_serves_one_session_after_the_other() -> None:
    drafter = SleepingDrafter(0.005)  # notices two users at once
    for _ in range(10):
        client = make_client(drafter)
        client.transport.inbox.put(make_commit(3, 9))
        stream = client.run()
        next(stream)
        drafter.wait_for_step()
        client.close()
    assert not drafting_threads()
