"""The client with its drafting thread, in real time: lost connections, and the real engine at the other end."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from edge_runtime.commit_inbox import CommitInbox
from edge_runtime.drafting_thread import EdgeWork
from tests.edge_fakes import (
    LOST,
    Consumer,
    QueueTransport,
    SleepingDrafter,
    drafting_threads,
    make_client,
    wait_until,
)
from tests.factories import ids, make_commit, make_open
from tests.fakes import FakeVerifier, draft_token, make_engine, target_alone
from wisp_plugin.controller import SpeculationController
from wisp_plugin.edge_session import EdgeSession
from wisp_plugin.engine import Engine
from wisp_plugin.errors import RequestRefused
from wisp_plugin.messages import Close, Commit, Draft, Mode, Open, Sampling, Status
from wisp_plugin.stop_rules import Fixed


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = drafting_threads()  # of a test that has failed
    yield
    wait_until(lambda: not set(drafting_threads()) - set(before), 1.0)


# -- connections ------------------------------------------------------------------------------------------------


def test_a_connection_that_is_lost_during_a_step_is_opened_again_before_anything_is_sent() -> None:
    client = make_client(drafter := SleepingDrafter(choose=len))
    consumer = Consumer(client)
    wait_until(lambda: len(client.transport.drafts) >= 2)
    drafter.wait_for_step()
    client.transport.inbox.put(LOST)
    wait_until(lambda: sum(isinstance(m, Open) for m in client.transport.log) == 2)
    wait_until(lambda: isinstance(client.transport.log[-1], Draft))
    client.transport.inbox.put(make_commit(3, 9, status=Status.EOS))
    consumer.finish()
    again = max(i for i, message in enumerate(client.transport.log) if isinstance(message, Open))
    first = client.transport.log[again + 1]
    assert isinstance(first, Draft)
    assert (first.start, first.seen) == (3, 3)  # the whole chain again, with what was in the making
    assert first.tokens.tolist() == [3, 4, 5, 6, 7, 8, 9, 10][: len(first.tokens)]
    assert len(first.tokens) >= 2
    assert client.session.stats.num_reopened == 1


def test_a_connection_that_is_lost_while_sending_is_opened_again() -> None:
    client = make_client(SleepingDrafter(0.001))
    client.transport.fail_sends = 1
    consumer = Consumer(client)
    wait_until(lambda: len(client.transport.drafts) >= 3)
    client.transport.inbox.put(make_commit(3, 9, status=Status.EOS))
    consumer.finish()
    assert consumer.error is None
    assert [type(message) for message in client.transport.log[:3]] == [Open, Open, Draft]
    assert client.transport.drafts[0].start == 3


def test_a_message_of_a_connection_that_is_gone_is_not_sent_on_the_next() -> None:
    """The connection is opened anew between the session's giving a message and its sending: it may come before `open`
    has been answered, and does not continue anything there."""

    class Interrupted:
        def __getattr__(self, name: str) -> Any:
            return getattr(session, name)

        def take_message(self, now_s: float) -> Draft:
            message = session.take_message(now_s)
            if not reconnecting.is_alive() and reconnecting.ident is None:
                reconnecting.start()
                wait_until(work._sending.locked)  # it waits for the session now, which we hold
            return message

    opened = make_open(max_new_tokens=20)
    session = EdgeSession(opened, SpeculationController(Fixed(8)), message_tokens=1)
    work = EdgeWork(Interrupted(), transport := QueueTransport(), SleepingDrafter(0.0, choose=len), Sampling())
    reconnecting = threading.Thread(target=work.connect)
    work.connect()
    for _ in range(4):
        work.step()
    reconnecting.join(5.0)
    for _ in range(4):
        work.step()
    assert [type(message) for message in transport.log[:3]] == [Open, Open, Draft]
    assert [message.start for message in transport.drafts] == [3, 4, 5]  # the chain, once
    work.check()


def test_a_refusal_ends_the_session_and_its_thread() -> None:
    client = make_client(SleepingDrafter(0.001))
    client.transport.inbox.put(RequestRefused("no"))
    with pytest.raises(RequestRefused):
        list(client.run())
    client.close()


def test_a_thin_client_has_no_thread() -> None:
    client = make_client(None)
    client.session.controller.rule = Fixed(0)
    client.transport.inbox.put(make_commit(3, 9))
    stream = client.run()
    next(stream)
    assert not drafting_threads()
    client.close()


# -- against the real engine ------------------------------------------------------------------------------------


class QueueReply:
    """Answers of the engine, into a queue; an error to raise is in it like a commit."""

    def __init__(self, inbox: CommitInbox) -> None:
        self._inbox = inbox
        self.is_gone = False

    def send(self, commit: Commit) -> None:
        self._inbox.put(commit)

    def finish(self) -> None:
        """Nothing more comes."""

    def fail(self, message: str) -> None:
        self._inbox.put(RequestRefused(message))

    def is_cancelled(self) -> bool:
        return self.is_gone


class EngineTransport(QueueTransport):
    """To an engine in this process; every `lose_every`th message breaks the connection and is lost."""

    def __init__(self, engine: Engine, lose_every: int) -> None:
        super().__init__()
        self._engine = engine
        self._lose_every = lose_every
        self._num_sent = 0
        self._reply = QueueReply(self.inbox)

    def open(self, message: Open) -> None:
        super().open(message)
        self._reply.is_gone = True
        self.inbox = CommitInbox()
        self._reply = QueueReply(self.inbox)
        self._engine.submit(message, self._reply)

    def send(self, message: Draft | Close) -> None:
        self._num_sent += 1
        if self._num_sent % self._lose_every == 0:
            self.inbox.put(LOST)
            raise LOST
        super().send(message)
        self._engine.submit(message, QueueReply(self.inbox))


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("lose_every", [13, 10_000])
def test_threads_that_meet_anyhow_give_the_targets_text(mode: Mode, lose_every: int) -> None:
    random = np.random.default_rng(lose_every)
    verifier = FakeVerifier(num_blocks=256, on_run=lambda: time.sleep(0.002 * random.random()))
    engine = make_engine(verifier, time.monotonic)  # type: ignore[arg-type]
    engine.start()
    try:
        drafter = SleepingDrafter(0.001, draft_token)
        client = make_client(drafter, 200, EngineTransport(engine, lose_every), mode=mode)
        tokens = [int(token) for part in client.run() for token in part]
        client.close()
    finally:
        engine.stop()
    assert tokens == target_alone(ids(1, 2, 3), 203)[3:]
    assert client.session.stats.num_accepted > 0  # how many, the machine decides
    assert (client.session.stats.num_reopened > 0) == (lose_every == 13)
