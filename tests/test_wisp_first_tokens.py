"""Which prompts come later so that the fewest first tokens are late."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.factories import make_candidates
from wisp_plugin.estimator import Costs, Estimator
from wisp_plugin.wisp_first_tokens import put_off, will_be_late

NOW_S = 10.0
ESTIMATOR = Estimator(Costs((0.0, 0, 0, 0, 0, 0), (0.01, 0, 0.001, 0, 0, 0)))  # 1 ms per new token


def num_in_time(sizes_s: list[float], due_s: list[float], order: list[int]) -> int:
    ends_s = np.cumsum([sizes_s[job] for job in order])
    return int(sum(end_s <= due_s[job] for end_s, job in zip(ends_s, order, strict=True)))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 40)), max_size=6))
def test_no_other_choice_has_fewer_late_jobs(jobs: list[tuple[int, int]]) -> None:
    jobs = sorted(jobs, key=lambda job: job[1])
    sizes_s, due_s = [float(size) for size, _ in jobs], [float(due) for _, due in jobs]
    late = put_off(sizes_s, due_s)
    kept = [job for job in range(len(jobs)) if job not in late]
    assert num_in_time(sizes_s, due_s, kept) == len(kept)
    orders = itertools.permutations(range(len(jobs)))
    assert len(kept) == max(num_in_time(sizes_s, due_s, list(order)) for order in orders)


def late_rows(needed_s: list[float], num_uncached: list[int], tpot_s: float = 1.0, num_running: int = 0) -> list[int]:
    num = len(needed_s)
    c = make_candidates(
        num + num_running, num_uncached=[*num_uncached, *[1] * num_running], num_cached=0.0,
        needed_s=[*(NOW_S + s for s in needed_s), *[NOW_S] * num_running], tpot_s=tpot_s,
    )  # fmt: skip
    is_prefill = np.arange(len(c)) < num
    return np.flatnonzero(will_be_late(c, is_prefill, ESTIMATOR, NOW_S)).tolist()


def test_the_longest_prompt_is_put_off_and_who_is_late_costs_the_others_nothing() -> None:
    assert late_rows([0.2, 0.3, 0.5], [100, 200, 200]) == []
    assert late_rows([0.2, 0.3, 0.4], [100, 200, 150]) == [1]
    assert late_rows([-0.1, 0.2], [1000, 150]) == [0]
    assert late_rows([0.1], [500]) == [0]
    assert late_rows([], []) == []


def test_those_who_run_take_their_part_of_the_time() -> None:
    assert late_rows([0.3], [200], tpot_s=0.1, num_running=1) == []
    assert late_rows([0.3], [200], tpot_s=0.1, num_running=40) == [0]  # 60 % of the time is left
    assert late_rows([1.1], [200], tpot_s=0.1, num_running=1000) == []  # a fifth is always left


def test_a_lost_session_that_computes_again_takes_no_time_before_others() -> None:
    columns = {"num_uncached": [200, 250], "num_cached": 0.0, "needed_s": [NOW_S + 0.3, NOW_S + 0.4], "tpot_s": 1.0}
    is_prefill = np.ones(2, bool)
    lost = make_candidates(2, is_lost=[1.0, 0.0], **columns)
    assert not will_be_late(lost, is_prefill, ESTIMATOR, NOW_S).any()
    assert will_be_late(make_candidates(2, **columns), is_prefill, ESTIMATOR, NOW_S).any()
    running = make_candidates(41, num_uncached=[200, *[1] * 40], num_cached=0.0, needed_s=NOW_S + 0.3, tpot_s=0.1,
                              is_lost=[0.0, *[1.0] * 40])  # fmt: skip
    assert not will_be_late(running, np.arange(41) < 1, ESTIMATOR, NOW_S).any()
