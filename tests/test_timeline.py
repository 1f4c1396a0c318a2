"""Due times, the way to the client, and whether an SLO is met or lost."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.factories import make_session
from wisp_plugin.messages import Slo
from wisp_plugin.timeline import RECOVERY, Timeline

SLO = Slo(ttft_ms=1000.0, tpot_ms=100.0)


def served(*times_s: float, slo: Slo = SLO, opened_s: float = 10.0, num_each: int = 1) -> Timeline:
    """A timeline opened at 10 s, with commits `times_s` after that."""
    timeline = Timeline(slo, opened_s)
    for number, time_s in enumerate(times_s):
        timeline.on_commit(num_each, 3 + num_each * (number + 1), opened_s + time_s)
    return timeline


def test_due_times_follow_the_slo() -> None:
    timeline = served()
    assert [timeline.due_s(i) for i in (0, 1, 10)] == pytest.approx([11.0, 11.1, 12.0])
    assert timeline.needed_s == pytest.approx(11.0)
    assert timeline.is_met is None
    assert not timeline.is_lost(num_left=0)


def test_the_first_token_sets_the_pace_when_it_is_early() -> None:
    timeline = served(0.2)
    assert timeline.needed_s == pytest.approx(10.3)  # due only at 11.1
    timeline.on_commit(3, 7, 10.25)
    assert timeline.needed_s == pytest.approx(10.6)


def test_the_due_time_counts_when_the_first_token_is_late() -> None:
    timeline = served(1.5)
    assert timeline.needed_s == pytest.approx(11.1)
    assert timeline.is_met is False


def test_the_way_comes_off_due_times_and_not_off_the_pace() -> None:
    timeline = served(0.2)
    pace_s = timeline.needed_s
    timeline.on_acknowledged(4, 10.4)
    assert timeline.way_s == pytest.approx(0.1)
    assert timeline.due_s(1) == pytest.approx(11.0)
    assert timeline.needed_s == pace_s


def test_the_way_is_half_of_the_shortest_recent_round_trip() -> None:
    timeline = Timeline(SLO, 0.0)
    for number, round_trip_s in enumerate([0.4, 0.1, 0.3, *[0.2] * 16]):
        timeline.on_commit(1, number + 4, number * 1.0)
        timeline.on_acknowledged(number + 4, number + round_trip_s)
        shortest = 0.4 if number == 0 else 0.1 if number < 17 else 0.2  # 16 are remembered
        assert timeline.way_s == pytest.approx(shortest / 2)


def test_an_acknowledgement_of_several_commits_is_that_of_the_last() -> None:
    timeline = served(0.0, 0.1, 0.2)
    timeline.on_acknowledged(5, 10.3)  # not yet the third
    assert timeline.way_s == pytest.approx(0.1)
    timeline.on_acknowledged(5, 20.0)  # says nothing new
    assert timeline.way_s == pytest.approx(0.1)
    timeline.on_acknowledged(3, 20.0)
    assert timeline.way_s == pytest.approx(0.1)


def test_a_slow_client_does_not_eat_up_its_own_slo() -> None:
    timeline = served(0.0)
    timeline.on_acknowledged(4, 60.0)
    assert timeline.way_s == pytest.approx(0.25)


def test_what_is_never_acknowledged_is_forgotten() -> None:
    timeline = served(*[0.01 * i for i in range(100)])
    timeline.on_acknowledged(10, 20.0)  # so old that its time of commit is not kept
    assert timeline.way_s == 0.0
    timeline.on_acknowledged(103, 11.09)
    assert timeline.way_s == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("times_s", "is_met"),
    [
        ((0.9,), True),
        ((1.1,), False),
        ((0.9, 0.99, 1.08), True),
        ((0.9, 0.95, 1.2), False),
        ((0.9, 1.1, 1.15, 1.19), True),  # the mean counts, not the longest wait
        ((1.1, 1.11, 1.12), False),  # nothing makes a late first token good
    ],
)
def test_met_is_the_mean_time_behind_the_first_token(times_s: tuple[float, ...], is_met: bool) -> None:
    assert served(*times_s).is_met is is_met


def test_a_late_first_token_at_the_client_counts() -> None:
    timeline = served(0.95)
    assert timeline.is_met
    timeline.on_acknowledged(4, 11.15)  # 0.1 s away
    assert timeline.is_met is False
    assert timeline.is_lost(num_left=1000)


def test_lost_is_what_cannot_be_made_good() -> None:
    timeline = served(0.5, 1.0)  # 0.4 s behind
    num_needed = math.ceil(0.4 / (RECOVERY * 0.1))
    assert not timeline.is_lost(num_needed + 1)
    assert timeline.is_lost(num_needed - 2)
    assert served(0.5, 0.55).is_lost(0) is False


@given(
    st.sampled_from([0.001, 50.0, 1e7]),
    st.sampled_from([0.001, 50.0, 1e7]),
    st.lists(st.tuples(st.floats(0, 10), st.integers(1, 5)), max_size=20),
)
def test_any_slo_gives_finite_times_that_only_move_on(
    ttft_ms: float, tpot_ms: float, steps: list[tuple[float, int]]
) -> None:
    timeline, now_s, end, needed_s = Timeline(Slo(ttft_ms, tpot_ms), 5.0), 5.0, 3, -math.inf
    for wait_s, num_tokens in steps:
        now_s, end = now_s + wait_s, end + num_tokens
        timeline.on_commit(num_tokens, end, now_s)
        assert math.isfinite(timeline.needed_s)
        assert timeline.needed_s > needed_s
        needed_s = timeline.needed_s
        assert timeline.needed_s <= timeline.due_s(timeline.num_tokens)
        assert isinstance(timeline.is_met, bool)
        assert not (timeline.is_met and timeline.is_lost(0)), "met and lost"


def test_a_session_carries_its_timeline_over_a_resumption() -> None:
    session = make_session(now_s=10.0)
    session.timeline.on_commit(1, 4, 10.5)
    session.resume(session.opened, 60.0)
    assert session.timeline.due_s(0) == pytest.approx(11.0)  # due times keep the first open's
