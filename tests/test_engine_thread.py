"""The engine's thread: stop, failure, and what is left for the clients then."""

from __future__ import annotations

import threading
import time

import pytest

from tests.factories import make_config, make_open, session_id
from tests.fakes import FakeReply, FakeVerifier, make_engine
from tests.test_engine import Server, draft, wait_until
from wisp_plugin.engine import Engine
from wisp_plugin.errors import EngineFailed
from wisp_plugin.messages import Close, Mode, Status


def broken() -> None:
    raise RuntimeError("no memory\nwith a second line")


def test_stop_ends_streams_as_closed_and_is_prompt() -> None:
    server = Server(FakeVerifier(on_run=lambda: time.sleep(0.005)))
    server.engine.start()
    running, waiting = server.open(0, max_new_tokens=200), server.open(1, mode=Mode.SYNC)
    wait_until(lambda: len(running.tokens) > 2 and len(waiting.tokens) == 1)
    started_s = time.monotonic()
    server.engine.stop()
    assert time.monotonic() - started_s < 0.5
    for reply in (running, waiting):
        assert (reply.status, reply.finished) == (Status.CLOSED, True)
    assert server.open(2).error == "unavailable: the server is shutting down"
    assert (server.engine.failure, server.failures) == (None, [])


def test_stop_while_idle_is_prompt() -> None:
    server = Server()
    server.engine.start()
    time.sleep(0.02)
    started_s = time.monotonic()
    server.engine.stop()
    assert time.monotonic() - started_s < 0.2


def test_stop_says_so_if_a_pass_does_not_end() -> None:
    release = threading.Event()
    server = Server(FakeVerifier(on_run=release.wait))
    server.engine.start()
    server.open()
    time.sleep(0.02)
    with pytest.raises(EngineFailed, match=r"did not end within 0\.05 s"):
        server.engine.stop(timeout_s=0.05)
    release.set()
    server.engine.stop()


def test_a_failing_pass_fails_every_request_and_all_later_ones() -> None:
    server = Server(FakeVerifier(on_run=broken))
    waiting = [server.open(0, mode=Mode.SYNC), server.open(1)]
    queued: list[FakeReply] = []
    server.verifier._on_run = lambda: (queued.extend([server.open(2), server.send(draft(4))]), broken())  # type: ignore
    server.engine.start()
    wait_until(lambda: bool(server.failures))
    later = server.send(Close(session_id(0)))
    line = "unavailable: the engine has failed: RuntimeError: no memory"
    assert [reply.error for reply in (*waiting, *queued, later)] == [line] * 5
    assert server.failures == ["RuntimeError: no memory"]
    started_s = time.monotonic()
    server.engine.stop()
    assert time.monotonic() - started_s < 0.2


def test_a_verifier_that_answers_for_too_few_fails_the_engine() -> None:
    server = Server()
    server.verifier.run = lambda items: []  # type: ignore[method-assign]
    stream = server.open()
    server.engine.start()
    wait_until(lambda: bool(server.failures))
    assert stream.error is not None
    assert "ValueError" in stream.error


class BrokenRelease(FakeVerifier):
    """A verifier that fails when a session leaves."""

    def release(self, session: str) -> None:
        broken()


def test_the_request_at_which_the_engine_fails_is_answered_too() -> None:
    server = Server(BrokenRelease())
    stream = server.open(mode=Mode.SYNC)
    closing = server.send(Close(session_id(0)))
    server.engine.start()
    wait_until(lambda: bool(server.failures))
    assert stream.error is not None
    assert closing.error is not None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_failure_at_a_sessions_end_gives_no_second_end() -> None:
    server = Server(BrokenRelease())
    ending, other = server.open(0, max_new_tokens=1), server.open(1, mode=Mode.SYNC)
    server.engine.start()
    wait_until(lambda: bool(server.failures))
    assert ending.ended
    assert other.error is not None


class RefusingReply(FakeReply):
    """A stream whose transport raises, as a response sender may when its client is gone."""

    def send(self, commit: object) -> None:
        raise OSError("gone")

    def fail(self, message: str) -> None:
        raise OSError("gone")


def test_one_broken_reply_is_the_loss_of_its_own_session_only() -> None:
    server = Server()
    server.engine.submit(make_open(session=session_id(0)), RefusingReply())
    other = server.open(1, max_new_tokens=50)
    server.engine.start()
    wait_until(lambda: other.finished)
    assert len(other.tokens) == 50
    assert not server.failures
    server.engine.stop()


def test_one_broken_reply_does_not_keep_the_others_from_their_end() -> None:
    server = Server(FakeVerifier(on_run=broken))
    server.engine.submit(make_open(session=session_id(0)), RefusingReply())
    other = server.open(1)
    server.engine.start()
    wait_until(lambda: bool(server.failures))
    assert other.error == "unavailable: the engine has failed: RuntimeError: no memory"


def test_clients_in_threads_each_get_their_tokens() -> None:
    verifier = FakeVerifier(num_blocks=256)
    engine: Engine = make_engine(verifier, time.monotonic, make_config())  # type: ignore[arg-type]
    engine.start()
    replies = [FakeReply() for _ in range(24)]
    threads = [
        threading.Thread(target=engine.submit, args=(make_open(session=session_id(i), max_new_tokens=20), reply))
        for i, reply in enumerate(replies)
    ]
    for thread in threads:
        thread.start()
    wait_until(lambda: all(reply.finished for reply in replies))
    engine.stop()
    assert all(len(reply.tokens) == 20 for reply in replies)
    assert engine.telemetry.totals.committed_tokens == 480
