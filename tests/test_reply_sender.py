"""Answers from a thread of their own: in order, and a client that is gone harms nobody."""

from __future__ import annotations

import gc
import threading
import types
import weakref
from typing import Any

import pytest

from tests.factories import make_commit
from triton_models.reply_sender import ReplySender, SendingEngine
from wisp_plugin.messages import Close


class RecordingEngine:
    """Keeps the replies that it is handed."""

    def __init__(self) -> None:
        self.replies: list[Any] = []

    def submit(self, message: Any, reply: Any) -> None:
        self.replies.append(reply)


class SlowReply:
    """Answers only when it may, in whatever thread."""

    def __init__(self, is_lost: bool = False) -> None:
        self.may_go = threading.Event()
        self.said: list[str] = []
        self.threads: set[str] = set()
        self.spoke = threading.Condition()
        self._is_lost = is_lost

    def _say(self, word: str) -> None:
        assert self.may_go.wait(10.0)
        self.threads.add(threading.current_thread().name)
        if self._is_lost:
            raise RuntimeError("the client is gone")
        with self.spoke:
            self.said.append(word)
            self.spoke.notify_all()

    def send(self, commit: Any) -> None:
        self._say(f"commit {commit.start}")

    def finish(self) -> None:
        self._say("finish")

    def fail(self, message: str) -> None:
        self._say(message)

    def is_cancelled(self) -> bool:
        return False


def make_sender(reply: Any) -> tuple[ReplySender, Any]:
    """A sender, and the reply that the engine sees for `reply`."""
    engine, sender = RecordingEngine(), ReplySender()
    SendingEngine(engine, sender).submit(Close("x"), reply)  # type: ignore[arg-type]
    return sender, engine.replies.pop()


def test_the_engine_does_not_wait_and_the_order_stays() -> None:
    reply = SlowReply()
    sender, later = make_sender(reply)
    for start in range(20):
        later.send(make_commit(start, 1))
    later.finish()
    assert not reply.said
    reply.may_go.set()
    sender.close()
    assert reply.said == [*[f"commit {start}" for start in range(20)], "finish"]
    assert reply.threads == {"wisp-replies"}


def test_answers_to_one_session_stay_in_order_over_its_requests() -> None:
    """An open that is refused, and the draft behind it: the error must not come before its reason."""
    engine, sender = RecordingEngine(), ReplySender()
    front, reply = SendingEngine(engine, sender), SlowReply()  # type: ignore[arg-type]
    for _ in range(20):
        front.submit(Close("x"), reply)
    for i, later in enumerate(engine.replies):
        later.fail(str(i))
    reply.may_go.set()
    sender.close()
    assert reply.said == [str(i) for i in range(20)]


def test_a_client_that_is_not_reached_has_left() -> None:
    lost, other = SlowReply(is_lost=True), SlowReply()
    lost.may_go.set()
    other.may_go.set()
    sender = ReplySender()
    to_lost, to_other = sender.wrap(lost, "x"), sender.wrap(other, "x")
    to_lost.send(make_commit(0, 1))
    to_other.fail("one line")
    sender.close()
    assert to_lost.is_cancelled()
    assert not to_other.is_cancelled()
    assert other.said == ["one line"]


def test_a_closed_sender_answers_at_once() -> None:
    reply = SlowReply()
    reply.may_go.set()
    sender, later = make_sender(reply)
    later.send(make_commit(1, 1))
    sender.close()
    assert reply.said == ["commit 1"]
    later.fail("too late")
    assert reply.said == ["commit 1", "too late"]


def test_nothing_is_kept_behind_an_answer() -> None:
    """Triton does not unload a model while a response sender is alive."""
    reply = SlowReply()
    reply.may_go.set()
    sender, later = make_sender(reply)
    later.finish()
    gone = weakref.ref(reply)
    del reply, later
    sender.close()
    gc.collect()
    assert gone() is None


def test_answers_wait_for_the_next_pass_but_not_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triton_models.reply_sender.PASS_S", 30.0)
    reply = SlowReply()
    reply.may_go.set()
    sender, later = make_sender(reply)
    later.finish()
    assert not reply.said
    verifier = sender.watch(types.SimpleNamespace(run=lambda items: wait_for(reply), release=lambda session: None))
    assert verifier.run([]) == ["finish"]  # type: ignore[comparison-overlap]
    monkeypatch.setattr("triton_models.reply_sender.PASS_S", 0.01)
    later.finish()
    assert wait_for(reply, 2) == ["finish", "finish"]
    sender.close()


def test_without_a_next_pass_nothing_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triton_models.reply_sender.PASS_S", 30.0)
    reply = SlowReply()
    reply.may_go.set()
    sender, later = make_sender(reply)
    sender.let_go()
    later.finish()
    assert wait_for(reply) == ["finish"]
    sender.close()


def wait_for(reply: SlowReply, num_answers: int = 1) -> list[str]:
    """What was said, once it is so much, or after 10 s."""
    with reply.spoke:
        reply.spoke.wait_for(lambda: len(reply.said) >= num_answers, 10.0)
    return reply.said
