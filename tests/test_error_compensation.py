"""4-bit weights whose errors cancel: the format, and that outputs are nearer than with rounding to nearest."""

from __future__ import annotations

import numpy as np
import pytest

from edge_runtime.error_compensation import BLOCK_SIZE, Blocks, gram_matrix, quantize


def _inputs(rng: np.random.Generator, num_tokens: int, num_inputs: int) -> np.ndarray:
    """Rows whose elements go together, as hidden states do."""
    mix = rng.normal(size=(8, num_inputs))
    rows = rng.normal(size=(num_tokens, 8)) @ mix + 0.3 * rng.normal(size=(num_tokens, num_inputs))
    return rows.astype(np.float32)


def _to_nearest(weight: np.ndarray) -> np.ndarray:
    blocks = weight.reshape(-1, BLOCK_SIZE, weight.shape[1])
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1)[:, None], axis=1)
    scales = largest / -8
    return (np.clip(np.rint(blocks / scales), -8, 7) * scales).reshape(weight.shape)


def test_outputs_on_other_inputs_are_nearer_than_with_rounding_to_nearest() -> None:
    rng = np.random.default_rng(3)
    weight = rng.normal(size=(128, 48)).astype(np.float32)
    inputs = _inputs(rng, 1200, 128)
    measured, held_out = inputs[:1000], inputs[1000:]
    found = quantize(weight, gram_matrix(measured)).weight()
    error = np.square(held_out @ (found - weight)).mean()
    assert error < 0.5 * np.square(held_out @ (_to_nearest(weight) - weight)).mean()


def test_format_and_that_the_weight_is_not_changed() -> None:
    rng = np.random.default_rng(4)
    weight = rng.normal(size=(96, 5)).astype(np.float32)
    before = weight.copy()
    blocks = quantize(weight, np.eye(96, dtype=np.float32))
    assert (blocks.integers.shape, blocks.integers.dtype) == ((5, 3, BLOCK_SIZE), np.uint8)
    assert (blocks.scales.shape, blocks.scales.dtype) == ((5, 3), np.float32)
    assert blocks.integers.max() <= 15
    np.testing.assert_array_equal(weight, before)
    assert np.abs(blocks.weight() - weight).max() < np.abs(weight).max() / 7


@pytest.mark.parametrize("gram", [np.zeros((32, 32), np.float32), np.ones((32, 32), np.float32)])
def test_zero_weights_and_inputs_that_say_nothing(gram: np.ndarray) -> None:
    blocks = quantize(np.zeros((32, 3), np.float32), gram)
    assert np.isfinite(blocks.scales).all()
    np.testing.assert_array_equal(blocks.weight(), 0)


def test_weight_of_known_blocks() -> None:
    integers = np.full((2, 1, BLOCK_SIZE), 8, np.uint8)
    integers[1, 0, 3] = 10
    weight = Blocks(integers, np.array([[0.5], [0.25]], np.float32)).weight()
    assert weight.shape == (BLOCK_SIZE, 2)
    assert weight[3].tolist() == [0.0, 0.5]
    assert np.count_nonzero(weight) == 1


def test_one_very_long_row_does_not_outweigh_the_others() -> None:
    rows = np.ones((50, 4), np.float32)
    rows[0] = [1e4, 0, 0, 0]
    gram = gram_matrix(rows)
    assert gram[0, 0] == pytest.approx(49 + 20**2, rel=1e-3)  # 10 medians, and the median is 2
    assert gram[1, 1] == pytest.approx(49)
