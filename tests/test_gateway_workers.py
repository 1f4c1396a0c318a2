"""Threads of sessions: kept for the next one, not without bound; and how often threads take turns."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from collections.abc import Iterator

import pytest

from edge_runtime.drafting_thread import MAX_SWITCH_S, SWITCH_S, set_switch_interval
from edge_runtime.gateway.workers import Workers
from tests.edge_fakes import wait_until

WAIT_S = 5.0


def until(num_threads: int) -> None:
    """Wait until there are so many threads of workers."""
    wait_until(lambda: sum(thread.name == "wisp-session" for thread in threading.enumerate()) == num_threads)


def test_a_thread_is_used_again_and_forgets_its_work() -> None:
    class Session:
        def __init__(self) -> None:
            self.done = threading.Event()

        def work(self) -> None:
            ran_in.append(threading.get_ident())
            self.done.set()

    workers, ran_in = Workers(), []
    for _ in range(3):
        session = Session()
        workers.run(session.work)
        assert session.done.wait(WAIT_S)
        wait_until(lambda: bool(workers._idle))
    assert len(set(ran_in)) == 1
    kept = weakref.ref(session)
    del session
    gc.collect()
    assert kept() is None
    workers.close()
    until(0)


def test_few_threads_are_kept_and_none_behind_close() -> None:
    workers, go, started = Workers(num_kept=2), threading.Event(), threading.Barrier(6)

    def work() -> None:
        started.wait(WAIT_S)
        assert go.wait(WAIT_S)

    for _ in range(5):
        workers.run(work)
    started.wait(WAIT_S)
    until(5)
    go.set()
    until(2)
    workers.close()
    until(0)
    go.clear()
    workers.run(go.set)
    assert go.wait(WAIT_S)
    until(0)


@pytest.fixture
def interval() -> Iterator[None]:
    before = sys.getswitchinterval()
    yield
    set_switch_interval()
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("interval")
def test_the_more_sessions_the_longer_the_turns() -> None:
    turns = []
    for num_sessions in (0, 1, 4, 16, 64, 10_000):
        set_switch_interval(num_sessions)
        turns.append(sys.getswitchinterval())
    assert turns == pytest.approx([SWITCH_S, SWITCH_S, SWITCH_S, 4 * SWITCH_S, 16 * SWITCH_S, MAX_SWITCH_S])
