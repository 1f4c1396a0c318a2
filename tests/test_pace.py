"""What a device measures of its link, its server and itself."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.factories import ids, make_open
from wisp_plugin.messages import Commit, Origin, Timing
from wisp_plugin.pace import Pace, PaceMeter

A, C, B, D = Origin.ACCEPTED, Origin.CORRECTION, Origin.BONUS, Origin.DECODED


def commit(start: int, *origins: Origin, waited_s: float = 0.0, measured_s: float = 0.04) -> Commit:
    """A commit of so many tokens, with the times of its pass."""
    timing = Timing(round(1e6 * waited_s), 0, round(1e6 * measured_s), 1)
    tokens = ids(*range(len(origins)))
    return Commit(make_open().session, start, tokens, np.array(origins, np.uint8), timing=timing)


def test_drafting_time_ignores_outliers() -> None:
    meter = PaceMeter()
    meter.on_drafted(0.9)  # the first run of a graph
    meter.on_drafted(0.005)
    assert meter.pace.draft_s == 0.005
    for seconds in (0.005, 0.006, 0.3, 0.005):
        meter.on_drafted(seconds)
    assert meter.pace.draft_s == 0.005


def test_a_device_that_slows_down_is_noticed_within_a_few_tokens() -> None:
    meter = PaceMeter()
    for _ in range(20):
        meter.on_drafted(0.005)
    for _ in range(5):
        meter.on_drafted(0.025)
    assert meter.pace.draft_s == 0.025


def test_the_round_trip_is_what_neither_the_pass_nor_the_wait_explains() -> None:
    meter = PaceMeter()
    meter.on_sent(12, 1.00)  # two tokens from position 10
    meter.on_commit(commit(10, A, A, B, waited_s=0.015), breaks=False, now_s=1.085)
    assert meter.pace.rtt_s == pytest.approx(0.03)
    assert meter.pace.verify_s == pytest.approx(0.04)


def test_a_correction_was_in_the_pass_and_what_stood_behind_it_tells_nothing() -> None:
    meter = PaceMeter()
    meter.on_sent(11, 1.00)
    meter.on_sent(12, 1.01)
    meter.on_sent(13, 1.02)
    meter.on_commit(commit(10, A, C), breaks=True, now_s=1.10)  # position 11, sent at 1.01 s, was rejected
    assert meter.pace.rtt_s == pytest.approx(0.05)
    meter.on_commit(commit(12, D), breaks=True, now_s=1.14)
    assert meter.pace.rtt_s == pytest.approx(0.05)


def test_a_decoded_token_has_seen_no_message() -> None:
    meter = PaceMeter()
    meter.on_sent(11, 1.00)
    meter.on_commit(commit(10, D), breaks=False, now_s=1.001)
    assert meter.pace.rtt_s == 0.05  # still the first guess


def test_rounds_of_sync() -> None:
    meter = PaceMeter()
    for start, sent_s in ((10, 1.0), (13, 2.0)):
        meter.on_sent(start + 2, sent_s)
        round_ = commit(start, A, A, B)
        meter.on_round(round_, 2, sent_s + 0.06)
        meter.on_commit(round_, breaks=True, now_s=sent_s + 0.06)
    pace = dataclasses.replace(meter.pace, draft_s=0.01)
    assert pace.overhead_s == pytest.approx(0.06)
    assert pace.tokens_per_s == pytest.approx(3 / 0.08)
    assert pace.rtt_s == pytest.approx(0.02)


def test_waits_behind_broken_and_living_chains_are_told_apart() -> None:
    meter = PaceMeter()
    meter.on_commit(commit(10, D), breaks=True, now_s=1.0)
    meter.on_sent(12, 1.01)
    meter.on_commit(commit(11, A, B), breaks=False, now_s=1.07)  # the pass of 40 ms began 30 ms behind the first
    assert meter.pace.wait_broken_s == pytest.approx(0.03)
    meter.on_commit(commit(13, A), breaks=True, now_s=1.11)
    assert meter.pace.wait_alive_s == pytest.approx(0.0, abs=1e-9)
    assert meter.pace.wait_s == pytest.approx(0.03)
    meter.on_commit(commit(14, D), breaks=True, now_s=1.5)  # nothing was drafted: no news about holding
    assert meter.pace.wait_broken_s == pytest.approx(0.03)


def test_the_pass_that_computes_the_prompt_is_no_measure_of_the_next_ones() -> None:
    meter = PaceMeter()
    meter.on_commit(commit(10, D, measured_s=2.0), breaks=True, now_s=3.0)
    assert meter.pace.verify_s == pytest.approx(2.0)  # nothing better is known
    meter.on_commit(commit(11, D, measured_s=0.04), breaks=True, now_s=3.05)
    assert meter.pace.verify_s == pytest.approx(0.04)
    meter.on_commit(commit(12, D, measured_s=0.08), breaks=True, now_s=3.15)
    assert meter.pace.verify_s == pytest.approx(0.046)


def test_the_time_without_a_connection_is_no_wait_for_a_pass() -> None:
    meter = PaceMeter()
    for number in range(9):
        meter.on_commit(commit(10 + number, A), breaks=False, now_s=1.0 + 0.04 * number)
    rate = meter.pace.committed_per_s
    assert rate == pytest.approx(25.0)
    meter.on_lost()
    assert meter.pace.wait_s == math.inf  # nothing is late before the server is heard again
    meter.on_commit(commit(19, D, measured_s=0.24), breaks=False, now_s=31.0)  # the prefix is computed anew
    assert meter.pace.wait_alive_s == pytest.approx(0.0, abs=1e-9)
    assert meter.pace.committed_per_s == rate
    assert meter.pace.verify_s == pytest.approx(0.04)
    meter.on_commit(commit(20, A), breaks=False, now_s=31.04)
    assert meter.pace.wait_alive_s == pytest.approx(0.0, abs=1e-9)
    assert meter.pace.committed_per_s == pytest.approx(25.0)


@given(st.lists(st.tuples(st.sampled_from("dscl"), st.floats(0, 0.2)), max_size=60))
def test_figures_stay_sane_whatever_happens(events: list[tuple[str, float]]) -> None:
    meter, now_s, position = PaceMeter(), 1.0, 10
    for kind, seconds in events:
        now_s += seconds
        if kind == "d":
            meter.on_drafted(seconds)
        elif kind == "s":
            meter.on_sent(position + 3, now_s)
        elif kind == "c":
            meter.on_commit(commit(position, A, C), breaks=True, now_s=now_s)
            position += 2
        else:
            meter.on_lost()
        figures = dataclasses.asdict(meter.pace)
        assert all(value >= 0.0 for name, value in figures.items() if name != "arrivals_s")


def test_a_round_that_took_no_time_by_the_clock_has_a_rate() -> None:
    pace = Pace(draft_s=0.0, overhead_s=0.0, tokens_per_round=1.0)
    assert math.isfinite(pace.tokens_per_s)
