"""The estimator: its form, the fit to measured passes, and what it learns while serving."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wisp_plugin.cost_fit import MIN_PASSES, NORMS, fit_costs, non_negative_least_squares
from wisp_plugin.estimator import EMPTY_PASS, FEATURES, NUM_FEATURES, Costs, Estimator, Floats, item_features

GPU = Costs((0.036, 0.0002, 0.0, 0.0, 0.0, 1.3e-6), (0.004, 0.0, 3e-4, 1e-4, 5e-8, 0.0), 4.0)
CPU = Costs((0.030, 0.004, 0.0, 0.0, 0.0, 2e-5), (0.015, 0.0, 0.003, 0.001, 1e-6, 0.0), 2.0)
prices = st.tuples(*[st.floats(1e-7, 0.1)] * NUM_FEATURES)
costs = st.builds(Costs, prices, prices, st.sampled_from([*NORMS, 3.3]))
passes = st.lists(st.tuples(st.integers(0, 4000), st.integers(1, 600)), min_size=1, max_size=20)


def features_of(*members: tuple[int, int]) -> Floats:
    """A pass of members (cached, new); every new token is chosen behind."""
    cached, new = np.array(members, np.float64).T
    return EMPTY_PASS + item_features(cached, new, new).sum(axis=0)


def random_passes(num_passes: int, seed: int = 0, max_sessions: int = 16) -> Floats:
    """Ragged passes, some with a chunk of prefill, `[N, F]`."""
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(num_passes):
        size = int(random.integers(1, max_sessions + 1))
        cached, new = random.integers(16, 1001, size).astype(float), random.integers(1, 10, size).astype(float)
        choices = new.copy()
        if random.random() < 0.3:
            new[0], choices[0] = np.round(2 ** random.uniform(4, 9)), 0
        rows.append(EMPTY_PASS + item_features(cached, new, choices).sum(axis=0))
    return np.array(rows)


def noisy_times(true: Costs, features: Floats, noise: float, seed: int = 1) -> Floats:
    return Estimator(true).predict(features) * np.exp(np.random.default_rng(seed).normal(0, noise, len(features)))


def error(estimator: Estimator, true: Costs, features: Floats, factor: float = 1.0) -> float:
    """Mean relative error against the true cost times `factor`."""
    return float(np.abs(estimator.predict(features) / (factor * Estimator(true).predict(features)) - 1).mean())


# -- form -------------------------------------------------------------------------------------------------------------


def test_features_of_a_session() -> None:
    row = item_features(np.array(10.0), np.array(3.0), np.array(2.0))
    # Tokens 11, 12 and 13 attend to 11, 12 and 13 tokens.
    assert dict(zip(FEATURES, row, strict=True)) == {
        "passes": 0, "sessions": 1, "new_tokens": 3, "choices": 2, "new_x_context": 36, "context": 13,
    }  # fmt: skip


def test_smooth_maximum_lies_between_maximum_and_sum() -> None:
    features = random_passes(200)
    memory, arithmetic = features @ np.array(GPU.memory), features @ np.array(GPU.arithmetic)
    for norm in (*NORMS, 3.3):
        predicted = Estimator(Costs(GPU.memory, GPU.arithmetic, norm)).predict(features)
        np.testing.assert_allclose(predicted, (memory**norm + arithmetic**norm) ** (1 / norm), rtol=1e-12)
        assert (predicted >= np.maximum(memory, arithmetic) * (1 - 1e-12)).all()
        assert (predicted <= (memory + arithmetic) * (1 + 1e-12)).all()


@given(costs, passes)
def test_gradient_is_the_derivative(costs: Costs, members: list[tuple[int, int]]) -> None:
    estimator, features = Estimator(costs), features_of(*members)
    gradient = estimator.gradient(features)
    for i in range(NUM_FEATURES):
        step = np.zeros(NUM_FEATURES)
        step[i] = 1e-4 * max(1.0, features[i])
        slope = (estimator.predict(features + step) - estimator.predict(features - step)) / (2 * step[i])
        rounding = 1e-11 * float(estimator.predict(features)) / step[i]
        assert gradient[i] == pytest.approx(float(slope), rel=1e-3, abs=rounding)


@given(costs, passes, st.tuples(st.integers(0, 4000), st.integers(1, 600)))
def test_one_more_session_never_makes_a_pass_shorter(
    costs: Costs, members: list[tuple[int, int]], more: tuple[int, int]
) -> None:
    estimator = Estimator(costs)
    assert estimator.predict(features_of(*members, more)) >= estimator.predict(features_of(*members)) * (1 - 1e-12)


def test_predicts_any_leading_shape() -> None:
    features = random_passes(12)
    flat = Estimator(GPU).predict(features)
    assert np.array_equal(Estimator(GPU).predict(features.reshape(3, 4, -1)), flat.reshape(3, 4))
    assert float(Estimator(GPU).predict(features[5])) == pytest.approx(flat[5], rel=1e-12)
    assert np.allclose(Estimator(GPU, margin=1.2).predict_quantile(features), 1.2 * flat)


@pytest.mark.parametrize(
    "bad", [{"memory": (1.0,)}, {"memory": (-1.0,) * 6}, {"arithmetic": (math.nan,) * 6}, {"norm": 0.5}, {"norm": 99}]
)
def test_costs_refuse_what_cannot_be(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        Costs(**{"memory": GPU.memory, "arithmetic": GPU.arithmetic, "norm": 4.0, **bad})  # type: ignore[arg-type]


def test_costs_refuse_a_free_pass() -> None:
    with pytest.raises(ValueError, match="cost something"):
        Costs((0.0,) * 6, (0.0,) * 6)


# -- fit --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("true", [GPU, CPU], ids=["gpu", "cpu"])
def test_fit_recovers_the_form_and_its_times(true: Costs) -> None:
    features = random_passes(400, max_sessions=64)
    fit = fit_costs(features, noisy_times(true, features, 0.03))
    assert fit.costs.norm == true.norm
    assert error(Estimator(fit.costs), true, random_passes(200, seed=9, max_sessions=64)) < 0.02


@pytest.mark.parametrize("norm", NORMS)
def test_fit_without_noise_is_exact(norm: float) -> None:
    true = Costs(CPU.memory, CPU.arithmetic, norm)
    features = random_passes(200, max_sessions=64)
    assert error(Estimator(fit_costs(features, noisy_times(true, features, 0.0)).costs), true, features) < 0.002


def test_disturbed_passes_do_not_bend_the_fit() -> None:
    features = random_passes(300, max_sessions=64)
    times = noisy_times(GPU, features, 0.02)
    times[::15] *= 5
    assert error(Estimator(fit_costs(features, times).costs), GPU, features) < 0.02


def test_fit_refuses_too_little_and_nonsense() -> None:
    features = random_passes(MIN_PASSES)
    with pytest.raises(ValueError, match="at least"):
        fit_costs(features[1:], np.ones(MIN_PASSES - 1))
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="above zero"):
            fit_costs(features, np.array([bad] + [1.0] * (MIN_PASSES - 1)))


def test_equal_passes_can_be_fitted() -> None:
    features = np.repeat(random_passes(1), MIN_PASSES, axis=0)
    assert Estimator(fit_costs(features, np.full(MIN_PASSES, 0.25)).costs).predict(features[0]) == pytest.approx(0.25)


@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(1, 12))
def test_non_negative_least_squares_is_optimal(seed: int, num_unknowns: int, num_rows: int) -> None:
    random = np.random.default_rng(seed)
    matrix, target = random.normal(size=(num_rows, num_unknowns)), random.normal(size=num_rows)
    solution = non_negative_least_squares(matrix, target)
    assert (solution >= 0).all()
    # Karush-Kuhn-Tucker: no slope where the solution is free, none downwards where it is zero.
    slope = matrix.T @ (matrix @ solution - target)
    assert (slope >= -1e-7).all()
    assert np.abs(slope[solution > 0]).max(initial=0.0) < 1e-7


# -- learning while serving -------------------------------------------------------------------------------------------


def serve(estimator: Estimator, true: Costs, features: Floats, noise: float, factor: float = 1.0, seed: int = 2) -> int:
    """Run passes through `observe`; how many were later than the quantile prediction said."""
    num_late = 0
    for row, time_s in zip(features, factor * noisy_times(true, features, noise, seed), strict=True):
        num_late += time_s > estimator.predict_quantile(row)
        estimator.observe(row, float(time_s))
    return num_late


@pytest.mark.parametrize("factor", [2.0, 0.5, 8.0])
def test_follows_a_machine_that_changed_its_speed(factor: float) -> None:
    estimator = Estimator(GPU, noise=0.05)
    serve(estimator, GPU, random_passes(300), 0.05)
    serve(estimator, GPU, random_passes(50, seed=3), 0.05, factor)
    assert error(estimator, GPU, random_passes(100, seed=4), factor) < 0.15


def test_learns_that_one_price_was_wrong() -> None:
    true = Costs(CPU.memory, tuple(3 * price if i == 2 else price for i, price in enumerate(CPU.arithmetic)), CPU.norm)
    fresh, estimator = Estimator(CPU, noise=0.05), Estimator(CPU, noise=0.05)
    serve(estimator, true, random_passes(800), 0.05)
    later = random_passes(100, seed=4)
    assert error(estimator, true, later) < 0.05 < 0.3 < error(fresh, true, later)
    assert estimator.learned_costs().arithmetic[2] > 1.8 * CPU.arithmetic[2]


@pytest.mark.parametrize("members", [[(100, 1)], [(900, 9)] * 16, [(0, 512)]], ids=["small", "large", "prefill"])
def test_a_narrow_range_does_not_spoil_other_sizes(members: list[tuple[int, int]]) -> None:
    estimator, others = Estimator(CPU, noise=0.05), random_passes(100, seed=4)
    same = np.repeat(features_of(*members)[None], 4000, axis=0)
    serve(estimator, CPU, same, 0.05)
    assert error(estimator, CPU, others) < 0.05
    serve(estimator, CPU, same[:1000], 0.05, factor=2.0)
    assert error(estimator, CPU, others, 2.0) < 0.15


@pytest.mark.parametrize("noise", [0.02, 0.1, 0.25])
def test_one_pass_in_twenty_is_later_than_the_quantile(noise: float) -> None:
    estimator = Estimator(GPU)  # a margin of 1: half of the passes are late at first
    serve(estimator, GPU, random_passes(100), noise)
    assert 0.03 <= serve(estimator, GPU, random_passes(600, seed=5), noise) / 600 <= 0.07


def test_margin_comes_back_after_a_change() -> None:
    estimator = Estimator(GPU)
    serve(estimator, GPU, random_passes(300), 0.05)
    before = estimator.margin
    serve(estimator, GPU, random_passes(200, seed=6), 0.05, factor=2.0)
    assert estimator.margin < before * 1.15


def test_single_outliers_are_clipped() -> None:
    estimator, features = Estimator(GPU, noise=0.05), random_passes(100)
    serve(estimator, GPU, features, 0.02)
    clipped = estimator.num_clipped
    estimator.observe(features[0], 1e6)
    assert estimator.num_clipped == clipped + 1
    assert error(estimator, GPU, features) < 0.2
    serve(estimator, GPU, features, 0.02)
    assert error(estimator, GPU, features) < 0.05


def test_what_is_no_time_is_counted_and_ignored() -> None:
    estimator, features = Estimator(GPU), features_of((10, 2))
    before = (float(estimator.predict(features)), estimator.margin)
    for bad in (math.nan, math.inf, -math.inf, 0.0, -1.0):
        estimator.observe(features, bad)
    assert (float(estimator.predict(features)), estimator.margin) == before
    assert (estimator.num_rejected, estimator.num_observed) == (5, 0)


@settings(max_examples=30)
@given(costs, st.lists(st.tuples(passes, st.floats(1e-9, 1e9)), min_size=1, max_size=40))
def test_stays_sound_whatever_it_is_told(costs: Costs, told: list[tuple[list[tuple[int, int]], float]]) -> None:
    estimator = Estimator(costs)
    for members, measured_s in told:
        estimator.observe(features_of(*members), measured_s)
    learned = estimator.learned_costs()  # checks that prices are finite and not negative
    assert 1.0 / 4001 < learned.memory[0] / costs.memory[0] < 4001
    assert 0.0 < estimator.margin < math.inf
    assert np.isfinite(estimator.gradient(features_of((5, 1)))).all()


def test_learned_costs_predict_alike() -> None:
    estimator = Estimator(CPU)
    serve(estimator, GPU, random_passes(100), 0.05)
    features = random_passes(20, seed=7)
    np.testing.assert_allclose(Estimator(estimator.learned_costs()).predict(features), estimator.predict(features))


def test_is_cheap() -> None:
    """Bounds with room for a busy machine; `wisp-bench estimator` measures."""
    estimator, features = Estimator(GPU), random_passes(1000)

    def least_s(run: object, times: int = 30) -> float:
        taken = []
        for _ in range(times):
            start_s = time.perf_counter()
            run()  # type: ignore[operator]
            taken.append(time.perf_counter() - start_s)
        return min(taken)

    assert least_s(lambda: estimator.predict(features)) < 1e-3
    assert least_s(lambda: estimator.gradient(features[0])) < 1e-4
    assert least_s(lambda: estimator.observe(features[0], 0.05)) < 5e-4
