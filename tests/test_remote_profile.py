"""The grid of sizes for somebody else's model, and a profile of known costs through it."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from triton_models.profile_fit import fit_repeats
from triton_models.remote_model import RemoteModel, RequestSize
from triton_models.remote_profile import measure, request_sizes, table
from wisp_plugin.errors import ConfigError
from wisp_plugin.profile import Fingerprint


class FakeModel:
    """A model whose batches cost 2 ms and 0.1 ms per new token; Triton splits a burst of more than 4."""

    def __init__(self, max_tokens: int | None = None, second: bool = False, context: bool = False) -> None:
        self.max_tokens, self.has_second_input, self.has_context = max_tokens, second, context
        self.config = SimpleNamespace(max_batch_size=8)
        self.bursts: list[tuple[RequestSize, int]] = []

    def burst(self, size: RequestSize, num_requests: int) -> dict[int, tuple[int, float]]:
        """See `RemoteModel.burst`."""
        self.bursts.append((size, num_requests))
        batches = [4] * (num_requests // 4) + ([num_requests % 4] if num_requests % 4 else [])
        each = size.num_tokens + size.num_drafts
        return {number: (batches.count(number), 2e-3 + 1e-4 * number * each) for number in batches}


def sizes_of(model: FakeModel, max_tokens: int | None = None, max_context: int = 1024) -> list[RequestSize]:
    return request_sizes(cast(RemoteModel, model), max_tokens, max_context)


def test_sizes_are_powers_of_four_up_to_the_most() -> None:
    assert [size.num_tokens for size in sizes_of(FakeModel())] == [1, 4, 16, 64, 256]
    assert [size.num_tokens for size in sizes_of(FakeModel(max_tokens=8))] == [1, 4, 8]
    assert [size.num_tokens for size in sizes_of(FakeModel(), max_tokens=100)] == [1, 4, 16, 64, 100]


def test_drafts_and_contexts_are_varied_where_there_are_inputs_for_them() -> None:
    sizes = sizes_of(FakeModel(second=True, context=True), max_tokens=16)
    assert {size.num_context for size in sizes} == {0, 256, 1024}
    assert {(size.num_tokens, size.num_drafts) for size in sizes} == {(1, 0), (4, 0), (16, 0), (1, 3), (1, 15)}


@pytest.mark.parametrize("values", [{"max_tokens": 0}, {"max_context": 0}])
def test_sizes_out_of_range_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="allowed: 1 or more"):
        sizes_of(FakeModel(), **values)


def test_more_than_the_model_takes_is_refused() -> None:
    with pytest.raises(ConfigError, match="--max-tokens is 9; the model takes up to 8"):
        sizes_of(FakeModel(max_tokens=8), max_tokens=9)


def test_every_burst_is_made_once_and_the_fit_finds_the_costs() -> None:
    model = FakeModel()
    clock = itertools.count()
    repeats = measure(cast(RemoteModel, model), sizes_of(model), 1.0, lambda line: None, lambda: float(next(clock)))
    assert {number for _, number in repeats} == {1, 2, 4}  # what Triton made of the bursts, not the bursts
    assert len(set(model.bursts)) == 5 * 4
    features = np.array([size.features(number) for size, number in repeats])
    profile = fit_repeats(features, list(repeats.values()), 1.0, Fingerprint("m", "", "any", "cpu", 0, {}))
    predicted_s = profile.estimator().predict(features)
    measured_s = np.array([times[0] for times in repeats.values()])
    assert np.abs(predicted_s / measured_s - 1).max() < 0.03
    assert len(table(repeats, profile).splitlines()) == 1 + len(repeats)
