"""4-bit weights whose rounding errors cancel: GPTQ (Frantar et al., 2023) in numpy, in the format of plain 4-bit.

Rounding to nearest makes each weight as exact as it can be; what counts is the output `inputs @ weight`. So the
weights of a column are rounded one after the other, and the error of each is made up for by those that follow,
as far as their inputs go together (`gram`). The result costs a device nothing: same blocks, same kernel.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
BLOCK_SIZE = 32  # weights with one scale
_HALF = 8  # integers 0 to 15 stand for -8 to 7
# Share of the mean of the diagonal that is added to it. GPTQ's usual 0.01 believes a few thousand tokens too much:
# KL from the target over held-out text 0.25 with 0.01, 0.20 with 0.3 (plain 4-bit: 0.39).
_DAMPING = 0.3
# Multiples of the plain scale that are tried for every block; a negative one puts the 16th step on the other side.
_SCALES = (1.0, 0.95, 0.9, 0.85, 0.8, 1.05, 1.12, -1.0, -0.93, -1.07)
_MOST_NORM = 10.0  # of an input row, in medians: see `gram_matrix`


class Blocks(NamedTuple):
    """A weight `[K, N]` in blocks of 32 along K: it is `(integers - 8) * scales`."""

    integers: npt.NDArray[np.uint8]  # [N, K / 32, 32], 0 to 15
    scales: Floats  # [N, K / 32]

    def weight(self) -> Floats:
        """float32 `[K, N]`, as the kernel sees it."""
        values = (self.integers.astype(np.float32) - _HALF) * self.scales[:, :, None]
        return np.ascontiguousarray(values.reshape(len(values), -1).T)


def gram_matrix(inputs: Floats) -> Floats:
    """`[K, K]` of input rows `[tokens, K]`: what goes together with what.

    The first token of a text gives inputs hundreds of times as long as others (the attention sink). They would outweigh
    all else, and without them the weights that they need would be lost, so their length is bounded.
    """
    norms = np.linalg.norm(inputs, axis=1, keepdims=True)
    bounded = inputs * np.minimum(1.0, _MOST_NORM * np.median(norms) / np.maximum(norms, 1e-30))
    return np.asarray(bounded.T @ bounded, np.float32)


def quantize(weight: Floats, gram: Floats) -> Blocks:
    """`weight` `[K, N]` (K a multiple of 32) in 4 bits, for inputs with the Gram matrix `gram` `[K, K]`."""
    num_inputs, num_outputs = weight.shape
    weight = weight.copy()
    follow = _compensation(gram)
    integers = np.empty((num_inputs, num_outputs), np.uint8)
    scales = np.empty((num_inputs // BLOCK_SIZE, num_outputs), np.float32)
    for start in range(0, num_inputs, BLOCK_SIZE):
        end = start + BLOCK_SIZE
        block, inner = weight[start:end], follow[start:end, start:end]
        scale = _best_scales(block, 1 / np.diag(inner) ** 2)
        errors = np.empty_like(block)
        for i in range(BLOCK_SIZE):
            rounded = np.clip(np.rint(block[i] / scale), -_HALF, _HALF - 1)
            errors[i] = (block[i] - rounded * scale) / inner[i, i]
            block[i + 1 :] -= inner[i, i + 1 :, None] * errors[i]
            integers[start + i] = rounded + _HALF
        weight[end:] -= follow[start:end, end:].T @ errors
        scales[start // BLOCK_SIZE] = scale
    blocked = np.ascontiguousarray(integers.T).reshape(num_outputs, -1, BLOCK_SIZE)
    return Blocks(blocked, np.ascontiguousarray(scales.T))


def _compensation(gram: Floats) -> Floats:
    """`[K, K]`, upper triangular: row i tells how the weights behind i make up for the error of weight i."""
    damped = gram.astype(np.float64)
    damped[np.diag_indices_from(damped)] += max(_DAMPING * float(np.diag(gram).mean()), 1e-12)
    return np.ascontiguousarray(np.linalg.cholesky(np.linalg.inv(damped)).T, np.float32)


def _best_scales(block: Floats, importance: Floats) -> Floats:
    """`[N]`: for each column of `block` `[32, N]` the scale with the least rounding error, rows weighted."""
    largest = block[np.abs(block).argmax(axis=0), np.arange(block.shape[1])]
    plain = np.where(largest == 0, 1e-8, largest / -_HALF).astype(np.float32)
    best, least = plain, np.full(block.shape[1], np.inf, np.float32)
    for multiple in _SCALES:
        scale = plain * np.float32(multiple)
        rounded = np.clip(np.rint(block / scale), -_HALF, _HALF - 1)
        error = importance @ (block - rounded * scale) ** 2
        best, least = np.where(error < least, scale, best), np.minimum(error, least)
    return best
