"""The delayed link of `wisp-bench link`, and what the benchmark makes of its measurements."""

from __future__ import annotations

import argparse
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from bench import link
from bench.delayed_link import DelayedLink
from bench.live import SessionResult
from tests.edge_fakes import LOST, QueueTransport, wait_until
from tests.factories import ids, make_commit, make_draft, make_open
from wisp_plugin.edge_session import EdgeStats
from wisp_plugin.errors import ConfigError, TransportError
from wisp_plugin.messages import Close, Draft

RTT_S = 0.1


class TimedTransport(QueueTransport):
    """Notes when each message arrives."""

    def __init__(self) -> None:
        super().__init__()
        self.arrived_s: list[float] = []

    def send(self, message: Draft | Close) -> None:
        super().send(message)
        self.arrived_s.append(time.monotonic())


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    names = [thread.name for thread in threading.enumerate()]
    assert not {"delay-line", "delayed-link"} & set(names)


@pytest.fixture
def far() -> Iterator[tuple[DelayedLink, TimedTransport]]:
    inner = TimedTransport()
    delayed = DelayedLink(inner, RTT_S)
    delayed.open(make_open())
    yield delayed, inner
    delayed.close()
    assert inner.is_closed


def test_messages_arrive_half_a_round_trip_later_and_in_order(far: tuple[DelayedLink, TimedTransport]) -> None:
    delayed, inner = far
    sent_s = []
    for position in range(3, 13):
        sent_s.append(time.monotonic())
        delayed.send(make_draft(position, 5))
        time.sleep(0.002)
    assert time.monotonic() - sent_s[0] < RTT_S / 2  # nobody waits for the way
    wait_until(lambda: len(inner.arrived_s) == 10)
    assert [message.start for message in inner.drafts] == list(range(3, 13))
    late_s = np.subtract(inner.arrived_s, sent_s)
    assert late_s.min() >= RTT_S / 2
    assert np.median(late_s) < RTT_S / 2 + 0.1  # however busy the machine is


def test_commits_arrive_half_a_round_trip_later_and_in_order(far: tuple[DelayedLink, TimedTransport]) -> None:
    delayed, inner = far
    began_s = time.monotonic()
    for position in range(3, 8):
        inner.inbox.put(make_commit(position, 5))
    assert delayed.receive(0.0) is None
    starts = [commit.start for _ in range(5) if (commit := delayed.receive(1.0)) is not None]
    elapsed_s = time.monotonic() - began_s
    assert starts == [3, 4, 5, 6, 7]
    assert RTT_S / 2 <= elapsed_s < RTT_S / 2 + 0.3


def test_jitter_keeps_the_order() -> None:
    delayed = DelayedLink(inner := TimedTransport(), 0.01, jitter_s=0.02)
    delayed.open(make_open())
    sent_s = []
    for position in range(3, 53):
        sent_s.append(time.monotonic())
        delayed.send(make_draft(position, 5))
        time.sleep(0.001)
    wait_until(lambda: len(inner.arrived_s) == 50)
    delayed.close()
    assert [message.start for message in inner.drafts] == list(range(3, 53))
    late_s = np.subtract(inner.arrived_s, sent_s)
    assert late_s.min() >= 0.005
    assert np.ptp(late_s) > 0.003


def test_a_lost_connection_is_noticed_and_can_be_opened_again() -> None:
    delayed = DelayedLink(inner := TimedTransport(), 0.6)
    delayed.open(make_open())
    inner.inbox.put(LOST)
    with pytest.raises(TransportError, match="connection reset"):
        delayed.receive(1.0)
    inner.fail_sends = 1
    delayed.send(make_draft(3, 5))
    with pytest.raises(TransportError, match="connection reset"):
        delayed.receive(1.0)
    delayed.send(make_draft(3, 6))  # still on its way when the link is opened again: lost
    delayed.open(make_open(tokens=ids(1, 2, 3, 4)))
    assert delayed.receive(0.4) is None
    delayed.close()
    assert inner.drafts == []


def test_a_waiting_receive_can_be_woken(far: tuple[DelayedLink, TimedTransport]) -> None:
    delayed, _ = far
    threading.Timer(0.05, delayed.wake).start()
    began_s = time.monotonic()
    assert delayed.receive(5.0) is None
    assert time.monotonic() - began_s < 1.0


def test_a_link_that_is_not_open() -> None:
    delayed = DelayedLink(TimedTransport(), RTT_S)
    with pytest.raises(TransportError, match="not open"):
        delayed.send(Close("x"))
    delayed.close()


# -- the benchmark ----------------------------------------------------------------------------------------------


def result(tokens_per_s: float, tokens: Any = (5, 6, 7)) -> SessionResult:
    stats = EdgeStats(num_committed=100, num_commits=25, drafting_s=2.0, useful_drafting_s=1.5)
    return SessionResult(ids(*tokens), stats, 100 / tokens_per_s, 0.1)


def test_the_speedup_is_the_median_of_paired_ratios() -> None:
    """Prompts differ more than systems do: medians of each would say something else."""
    speeds = {"free": [10.0, 60.0, 28.0], "sync": [10.0, 20.0, 20.0], "decode": [5.0, 10.0, 10.0]}
    results = {system: [result(speed) for speed in found] for system, found in speeds.items()}
    args = argparse.Namespace(rtt_ms=40.0)
    figures = link.report(args, results, (0, 1))
    assert figures["free_speedup"] == pytest.approx(1.4)
    assert figures["sync_vs_decode"] == pytest.approx(2.0)
    assert figures["tokens_per_s_free"] == pytest.approx(28.0)
    assert (figures["tokens_per_pass_sync"], figures["wdt_share_free"]) == (4.0, 0.25)


def test_texts_that_differ_stop_the_benchmark() -> None:
    link.check_equal({"free": ids(1, 2, 3), "decode": ids(1, 2, 3)})
    with pytest.raises(AssertionError, match="sync differs from plain decoding at generated token 1"):
        link.check_equal({"free": ids(1, 2, 3), "sync": ids(1, 9, 3), "decode": ids(1, 2, 3)})


def test_pinning_is_undone_and_needs_two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.sched_getaffinity(0)
    core = min(before)
    with link.pinned_to(core):
        assert os.sched_getaffinity(0) == {core}
    assert os.sched_getaffinity(0) == before
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3})
    with pytest.raises(ConfigError, match="a core each"):
        link.two_cores()
