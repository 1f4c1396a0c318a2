"""Who is refused, and when a refused client should come again."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.factories import make_candidates, make_estimator, make_open, session_id
from tests.fakes import ServingLoop
from wisp_plugin.admission import LEAST_RETRY_S, MOST_RETRY_S, predicted_load, prefill_wait_s, retry_after_s
from wisp_plugin.messages import Mode, Open, Slo
from wisp_plugin.server_session import ServerSession


def newcomer(ttft_ms: float = 1000.0, tpot_ms: float = 100.0, **values: Any) -> Open:
    return make_open(session=session_id(99), slo=Slo(ttft_ms, tpot_ms), **values)


def serving(num_sessions: int, tpot_ms: float = 100.0, **config: Any) -> ServingLoop:
    loop = ServingLoop(num_blocks=4096, **config)
    for number in range(num_sessions):
        loop.add(prompt=[number, 1, 2], max_new_tokens=400, slo=Slo(1000.0, tpot_ms))
    for _ in range(3):
        loop.step(pass_s=loop.plan().predicted_s)
    return loop


@pytest.mark.parametrize("tpot_ms", [0.001, 100.0, 1e7])
@pytest.mark.parametrize("ttft_ms", [0.001, 1e7])
def test_nobody_is_refused_at_an_idle_server(ttft_ms: float, tpot_ms: float) -> None:
    assert ServingLoop().scheduler.refuses(newcomer(ttft_ms, tpot_ms)) is None


def test_the_load_that_can_be_served_is_served_and_no_more() -> None:
    """A pass of n sessions takes about 2 + n ms: with tpot 100 ms some 98 can be served."""
    assert serving(80).scheduler.refuses(newcomer()) is None
    loop = serving(110)
    retry_s = loop.scheduler.refuses(newcomer())
    assert retry_s is not None
    assert LEAST_RETRY_S <= retry_s <= MOST_RETRY_S
    assert loop.scheduler.load() > 1.0
    assert loop.scheduler.refuses(newcomer(tpot_ms=1e7)) is not None  # the others would suffer


def test_without_a_limit_nobody_is_refused() -> None:
    assert serving(110, max_load=0.0).scheduler.refuses(newcomer()) is None


def test_who_would_wait_too_long_for_the_prefills_of_others_is_refused() -> None:
    loop = serving(5)
    loop.add(prompt=[1] * 3000, max_new_tokens=10)  # some 3 s of prefill
    assert loop.scheduler.load(newcomer()) < 1.0
    assert loop.scheduler.refuses(newcomer(ttft_ms=1000.0)) is not None
    assert loop.scheduler.refuses(newcomer(ttft_ms=10_000.0)) is None


def test_load_of_nobody_is_zero() -> None:
    estimator = make_estimator()
    nobody = make_candidates(0)
    assert predicted_load(nobody, None, estimator) == 0.0
    assert prefill_wait_s(nobody, 0.0, estimator) == 0.0
    assert 0.0 < predicted_load(nobody, newcomer(), estimator) < 1.0


def test_more_tokens_per_turn_relax_the_rhythm() -> None:
    """With fewer turns the fixed cost of a pass weighs less; verifying the drafts costs more."""
    estimator = make_estimator()
    plain, rich = (make_candidates(8, tpot_s=0.012, tokens_per_turn=n) for n in (1.0, 3.0))
    assert predicted_load(rich, None, estimator) < predicted_load(plain, None, estimator)


@given(
    st.lists(
        st.tuples(st.sampled_from([0.02, 0.05, 0.1, 1e4]), st.sampled_from([1.0, 2.0, 4.0]), st.integers(1, 1000)),
        min_size=1,
        max_size=30,
    )
)
def test_load_rises_with_every_session(sessions: list[tuple[float, float, int]]) -> None:
    estimator, loads = make_estimator(), [0.0]
    for number in range(1, len(sessions) + 1):
        tpot_s, per_turn, cached = zip(*sessions[:number], strict=True)
        c = make_candidates(number, tpot_s=tpot_s, tokens_per_turn=per_turn, num_cached=cached)
        loads.append(predicted_load(c, None, estimator))
    assert all(later >= earlier - 1e-12 for earlier, later in pairwise(loads))


@given(st.floats(0, 1e6), st.floats(0.01, 100), st.integers(0, 1000), st.floats(0, 1e5))
def test_retry_is_bounded(load: float, max_load: float, num_sessions: int, mean_s: float) -> None:
    assert LEAST_RETRY_S <= retry_after_s(load, max_load, num_sessions, mean_s) <= MOST_RETRY_S


def test_retry_when_as_many_have_ended_as_are_too_many() -> None:
    """100 sessions of 5 s each end at 20 a second: 10 too many are gone after half a second."""
    assert retry_after_s(load=1.0 / 0.9, max_load=1.0, num_sessions=100, mean_session_s=5.0) == pytest.approx(0.5)


def test_prefill_waits_for_what_decoding_leaves() -> None:
    estimator = make_estimator()
    c = make_candidates(2, num_uncached=[1, 101])
    alone_s = prefill_wait_s(c, 0.0, estimator)
    assert alone_s == pytest.approx(0.103, rel=0.01)
    assert prefill_wait_s(c, 0.5, estimator) == pytest.approx(2 * alone_s)
    assert prefill_wait_s(c, 7.0, estimator) == pytest.approx(20 * alone_s)
    assert prefill_wait_s(replace(c, num_uncached=c.num_uncached * 0 + 1), 0.5, estimator) == 0.0


def test_one_hopeless_session_does_not_shut_out_everybody() -> None:
    """tpot 1 us cannot be kept, not even alone: refusing others does not help it (top of admission.py)."""
    loop = serving(1, tpot_ms=0.001)
    assert loop.scheduler.refuses(newcomer()) is None


def test_a_session_that_waits_for_its_client_keeps_nobody_out() -> None:
    """It has much to compute, but not before its draft: that may be never."""
    loop = ServingLoop(policy="wisp", num_blocks=4000)
    resumed = make_open(np.arange(10), 3500, tokens=np.arange(3000, dtype=np.int32), mode=Mode.SYNC)
    loop.scheduler.add(ServerSession(resumed, loop.now_s))
    assert loop.scheduler.refuses(make_open(session=session_id(1))) is None
