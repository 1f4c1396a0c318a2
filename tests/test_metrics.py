"""Counters, gauges and histograms: what Prometheus would see of them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wisp_plugin.metrics import Counter, Gauge, Histogram, Kind, Metric


def series(metric: Metric) -> dict[str, float]:
    """Value by name and labels."""
    keys = [
        f"{family.name}{''.join(f' {name}={value}' for name, value in labels.items())}"
        for family in metric.families()
        for labels in family.labels
    ]
    assert len(set(keys)) == len(keys)
    return dict(zip(keys, metric.values(), strict=True))


def test_every_declared_series_is_there_from_the_start_and_no_other_ever() -> None:
    counter = Counter("c_total", "text", slo=("a", "b"), met=("true", "false"))
    counter.add(2, "a", "false")
    assert series(counter) == {
        "c_total slo=a met=true": 0, "c_total slo=a met=false": 2,
        "c_total slo=b met=true": 0, "c_total slo=b met=false": 0,
    }  # fmt: skip
    gauge = Gauge("g", "text")
    gauge.set(3.5)
    assert series(gauge) == {"g": 3.5}
    for wrong in (lambda: counter.add(1, "c", "true"), lambda: counter.add(1), lambda: gauge.set(1.0, "x")):
        with pytest.raises(KeyError):
            wrong()


def test_a_histogram_is_three_families_with_cumulative_buckets() -> None:
    histogram = Histogram("h_seconds", "text", (0.1, 1.0))
    histogram.observe(0.1)  # a bound belongs to its own bucket
    histogram.observe_all([0.5, 7.0])
    assert series(histogram) == {
        "h_seconds_bucket le=0.1": 1, "h_seconds_bucket le=1": 2, "h_seconds_bucket le=+Inf": 3,
        "h_seconds_sum": 7.6, "h_seconds_count": 3,
    }  # fmt: skip
    assert {family.kind for family in histogram.families()} == {Kind.COUNTER}


def test_the_sum_of_what_may_be_negative_is_no_counter() -> None:
    histogram = Histogram("slack", "text", (-1.0, 0.0))
    histogram.observe(-3.0)
    kinds = {family.name: family.kind for family in histogram.families()}
    assert kinds == {"slack_bucket": Kind.COUNTER, "slack_sum": Kind.GAUGE, "slack_count": Kind.COUNTER}
    assert series(histogram)["slack_sum"] == -3.0


@pytest.mark.parametrize("bounds", [(1.0, 1.0), (2.0, 1.0), (0.0, math.inf)])
def test_bounds_that_make_no_buckets(bounds: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="bounds of h"):
        Histogram("h", "text", bounds)


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.one_of(st.floats(-1e3, 1e3), st.integers(-999, 999))), max_size=30),
    st.lists(st.integers(-999, 999), min_size=1, max_size=6, unique=True),
)
def test_buckets_count_what_they_say(values: list[tuple[str, float]], bounds: list[int]) -> None:
    histogram = Histogram("h", "text", sorted(bounds), kind="ab")
    for label, value in values:
        histogram.observe(value, label)
    buckets, _, counts = histogram.families()
    told = histogram.values()
    for labels, value in zip(buckets.labels, told, strict=False):
        assert value == sum(v <= float(labels["le"]) for label, v in values if label == labels["kind"])
    assert sum(told[-len(counts.labels) :]) == len(values)
