"""Counters, gauges and histograms in plain Python, as Prometheus understands them (its data model and naming rules).

Triton's own endpoint prints them, and that has no histograms: a histogram is three families, NAME_bucket{le=...}
(cumulative), NAME_sum and NAME_count, which is what `histogram_quantile` reads.

All label values are given when a metric is made: the number of series is bounded, and every series is there from
the start with 0. One thread writes and another reads without a lock: what it reads may be in the middle of a pass,
one observation ahead in one series; the next reading has it all. `NAME_count` is always the `+Inf` bucket.
"""

from __future__ import annotations

import enum
import itertools
import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

INF_LABEL = "+Inf"


class Kind(enum.Enum):
    """The kinds of families that Triton's endpoint has."""

    COUNTER = "counter"
    GAUGE = "gauge"


@dataclass(frozen=True, slots=True)
class Family:
    """One metric name on the endpoint: a series for each entry of `labels`."""

    name: str
    help: str
    kind: Kind
    labels: tuple[Mapping[str, str], ...] = ({},)


class Metric(Protocol):
    """Something that has series."""

    def families(self) -> list[Family]:
        """The families, always the same."""

    def values(self) -> list[float]:
        """The value of every series, in the order of `families` and their `labels`."""


class Labelled:
    """Values of one metric by label values. `labels` names, for each label, all values that it may have."""

    kind: Kind

    def __init__(self, name: str, text: str, **labels: Sequence[str]) -> None:
        self._name, self._text = name, text
        self._label_names = tuple(labels)
        self._values = dict.fromkeys(itertools.product(*labels.values()), 0.0)

    def families(self) -> list[Family]:
        """See `Metric.families`."""
        labels = tuple(dict(zip(self._label_names, values, strict=True)) for values in self._values)
        return [Family(self._name, self._text, self.kind, labels)]

    def values(self) -> list[float]:
        """See `Metric.values`."""
        return list(self._values.values())


class Counter(Labelled):
    """What only grows. Its name ends with `_total`."""

    kind = Kind.COUNTER

    def add(self, amount: float, *labels: str) -> None:
        """Count; KeyError for label values that were not declared."""
        self._values[labels] += amount


class Gauge(Labelled):
    """What is now."""

    kind = Kind.GAUGE

    def set(self, value: float, *labels: str) -> None:
        """Tell the value; KeyError for label values that were not declared."""
        if labels not in self._values:
            raise KeyError(labels)
        self._values[labels] = value


class _Series:
    """Observations of one histogram under one set of label values. `counts[i]`: above bound i - 1, up to bound i."""

    __slots__ = ("counts", "sum")

    def __init__(self, num_bounds: int) -> None:
        self.counts = [0] * (num_bounds + 1)
        self.sum = 0.0


class Histogram:
    """Observations in buckets. If the lowest bound is negative, the sum may fall and is told as a gauge."""

    def __init__(self, name: str, text: str, bounds: Sequence[float], **labels: Sequence[str]) -> None:
        """`bounds` are the upper bounds of the buckets, ascending and finite; ValueError if they are not."""
        if not all(low < high for low, high in itertools.pairwise(bounds)) or not all(map(math.isfinite, bounds)):
            raise ValueError(f"bounds of {name} are not ascending and finite: {bounds}")
        self._name, self._text = name, text
        self._bounds = tuple(bounds)
        self._label_names = tuple(labels)
        self._series = {values: _Series(len(self._bounds)) for values in itertools.product(*labels.values())}

    def observe(self, value: float, *labels: str) -> None:
        """Count one value; KeyError for label values that were not declared."""
        series = self._series[labels]
        series.counts[bisect_left(self._bounds, value)] += 1
        series.sum += value

    def observe_all(self, values: Iterable[float], *labels: str) -> None:
        """Count several values."""
        series, bounds = self._series[labels], self._bounds
        counts = series.counts
        total = 0.0
        for value in values:
            counts[bisect_left(bounds, value)] += 1
            total += value
        series.sum += total

    def families(self) -> list[Family]:
        """See `Metric.families`."""
        base = [dict(zip(self._label_names, values, strict=True)) for values in self._series]
        le = [*(f"{bound:g}" for bound in self._bounds), INF_LABEL]
        buckets = tuple(labels | {"le": bound} for labels in base for bound in le)
        of_sum = Kind.GAUGE if self._bounds[0] < 0 else Kind.COUNTER
        return [
            Family(f"{self._name}_bucket", f"{self._text}: values up to le", Kind.COUNTER, buckets),
            Family(f"{self._name}_sum", f"{self._text}: sum", of_sum, tuple(base)),
            Family(f"{self._name}_count", f"{self._text}: number", Kind.COUNTER, tuple(base)),
        ]

    def values(self) -> list[float]:
        """See `Metric.values`."""
        cumulated = [list(itertools.accumulate(series.counts)) for series in self._series.values()]
        buckets = [float(count) for counts in cumulated for count in counts]
        sums = [series.sum for series in self._series.values()]
        return [*buckets, *sums, *(float(counts[-1]) for counts in cumulated)]
