"""Seeded coupling (DESIGN.md section 3): the choice of a token as a pure function of logits, parameters and seed.

Order: repetition penalty, banned tokens, temperature, top-k, top-p, then `argmax_v(z[v] + gumbel(seed, position, v))`
in float64, ties to the lowest id. Adding Gumbel noise before an argmax samples from softmax(z); edge and server use
the same noise and so agree without communication (Daliri et al. 2024).

`final_scores` is the definition. `choose_token` always returns its argmax, but scores few tokens: first those near
the best logit; a token farther away then needs so much noise that its integer hash must exceed a threshold.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from wisp_plugin.errors import InvalidRequest, ModelError
from wisp_plugin.messages import Sampling, Tokens

Floats = npt.NDArray[np.floating[Any]]
Float64s = npt.NDArray[np.float64]
Hashes = npt.NDArray[np.uint32]
Ids = npt.NDArray[np.intp]  # token ids, ascending, used as indices

MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-4, 1e4  # besides 0
_MASK64 = (1 << 64) - 1
_MURMUR_1, _MURMUR_2 = np.uint32(0x85EBCA6B), np.uint32(0xC2B2AE35)  # murmur3's fmix32
_HEAD_GAP = 6.0  # in z: e^-6 of the tokens behind the head have noise enough to be looked at
_MAX_SAMPLE = 1024  # tokens scored before the first threshold is known


def key_halves(seed: int, position: int) -> tuple[int, int]:
    """(low32, high32) of `splitmix64(splitmix64(seed) ^ position)`."""
    key = _splitmix64(_splitmix64(seed) ^ position)
    return key & 0xFFFFFFFF, key >> 32


def noise_hash(seed: int, position: int, token_ids: npt.NDArray[Any]) -> Hashes:
    """`fmix32(fmix32(v ^ low32(key)) ^ high32(key))` for each token id v; uint32, same shape."""
    return _finish(_mix(_finish(np.asarray(token_ids).astype(np.uint32)), seed, position))


def gumbel(seed: int, position: int, token_ids: npt.NDArray[Any]) -> Float64s:
    """Standard Gumbel noise of each token at `position`, between -3.14 and 22.88; float64, same shape."""
    return _noise(noise_hash(seed, position, token_ids))


def filter_logits(logits: Floats, sampling: Sampling, context: Tokens) -> Float64s:
    """z of the tokens that survive, -inf elsewhere; float64 [V]. At temperature 0 only penalty and bans apply.

    `context`: all tokens before the position (prompt and draft tokens included), for the repetition penalty.

    Raises:
        ModelError: a logit is NaN or +inf, or no token is left.
        InvalidRequest: a banned or context token outside the vocabulary, a temperature out of range.
    """
    row = _adjusted(logits, sampling, context)
    if sampling.greedy:
        return row.astype(np.float64)
    z = row.astype(np.float64) / sampling.temperature
    ids = _surviving_ids(row, sampling)
    if ids is None:
        return z
    filtered = np.full_like(z, -np.inf)
    filtered[ids] = z[ids]
    return filtered


def final_scores(logits: Floats, sampling: Sampling, position: int, context: Tokens) -> Float64s:
    """The scores whose argmax is chosen: `filter_logits` plus, unless greedy, noise; raises what that raises."""
    z = filter_logits(logits, sampling, context)
    return z if sampling.greedy else z + gumbel(sampling.seed, position, np.arange(len(z)))


def choose_token(logits: Floats, sampling: Sampling, position: int, context: Tokens) -> int:
    """The token at `position`: argmax of `final_scores`, ties to the lowest id; raises what `filter_logits` raises."""
    row = _adjusted(logits, sampling, context)
    if sampling.greedy:
        return int(row.argmax())
    ids = _surviving_ids(row, sampling)
    if ids is None:
        return _best_of_all(row, _mix(_spread_ids(len(row)), sampling.seed, position), sampling.temperature)
    mixed = _mix(_finish(ids.astype(np.uint32)), sampling.seed, position)
    return int(ids[_best_of_all(row[ids], mixed, sampling.temperature)])


def count_accepted(draft: Tokens, chosen: Tokens) -> int:
    """Leading tokens of `draft` that equal the target's own (`chosen` may be longer by the bonus token)."""
    num_accepted = 0
    for drafted, own in zip(draft.tolist(), chosen.tolist(), strict=False):  # drafts are short: quicker than by NumPy
        if drafted != own:
            break
        num_accepted += 1
    return num_accepted


def chosen_logprob(logits: Floats, token: int) -> float:
    """Log-probability of `token` before filters at temperature 1."""
    row = _checked(logits)
    best = row.max()
    return float(row[token]) - float(best) - math.log(float(np.exp(row - best).sum(dtype=np.float64)))


def _splitmix64(state: int) -> int:
    z = (state + 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)


def _mix(spread: Hashes, seed: int, position: int) -> Hashes:
    """`noise_hash` less its last step; `spread` is `_finish(token ids)`.

    `_finish` is linear and its own inverse: the first fmix32's last step and the second's first step
    cancel out, and the very first step is done once per vocabulary. The upper 16 bits are already the hash's.
    """
    low, high = key_halves(seed, position)
    x = spread ^ np.uint32(low ^ (low >> 16))
    shifted = np.empty_like(x)
    for merge in (np.uint32(high ^ (high >> 16)), None):
        x *= _MURMUR_1
        np.right_shift(x, np.uint32(13), out=shifted)
        x ^= shifted
        x *= _MURMUR_2
        if merge is not None:
            x ^= merge
    return x


def _finish(x: Hashes) -> Hashes:
    """First and last step of fmix32: x ^ (x >> 16)."""
    return x ^ (x >> np.uint32(16))


@lru_cache(maxsize=4)
def _spread_ids(vocab_size: int) -> Hashes:
    spread = _finish(np.arange(vocab_size, dtype=np.uint32))
    spread.setflags(write=False)
    return spread


def _noise(hashes: Hashes) -> Float64s:
    uniform: Float64s = (hashes.astype(np.float64) + 0.5) / 2.0**32
    noise: Float64s = -np.log(-np.log(uniform))
    return noise


def _least_hash(noise: float) -> np.uint32:
    """A threshold on `_mix`: tokens below it have less than `noise`. Rounded down, so it never excludes too much."""
    least_uniform = math.exp(-math.exp(-max(noise - 1e-9, -4.0)))
    return np.uint32(max(0, math.floor(2.0**32 * least_uniform) - 2) & 0xFFFF0000)


def _best_of_all(values: Floats, mixed: Hashes, temperature: float) -> int:
    """Index of the best score among `values` (logits, at least one finite), ties to the lowest index."""

    def scores(at: Ids) -> Float64s:
        noisy: Float64s = values[at].astype(np.float64) / temperature + _noise(_finish(mixed[at]))
        return noisy

    best_value = float(values.max())
    # The cut is rounded to the dtype of `values` before use: the bound on the tail's z below holds for it exactly.
    cut = values.dtype.type(best_value - _HEAD_GAP * temperature)
    head = np.flatnonzero(values >= cut)
    sample = head[:_MAX_SAMPLE]
    sample_scores = scores(sample)
    bound = float(sample_scores.max())
    rest = head[_MAX_SAMPLE:]
    rest = rest[mixed[rest] >= _least_hash(bound - best_value / temperature)]
    tail = np.flatnonzero(mixed >= _least_hash(bound - float(cut) / temperature))
    others = np.concatenate((rest, tail))  # `tail` may repeat tokens of the head: harmless
    all_scores = np.concatenate((sample_scores, scores(others)))
    winners = np.flatnonzero(all_scores == all_scores.max())
    return int(np.concatenate((sample, others))[winners].min())


def _checked(logits: Floats) -> Floats:
    """`logits` as float32 or float64 [V], free of NaN and +inf."""
    row = logits if logits.dtype in (np.float32, np.float64) else logits.astype(np.float32)
    if row.ndim != 1 or not len(row):
        raise ModelError(f"logits of one position must have shape [V] with V > 0, not {list(row.shape)}")
    if not row.max() < np.inf:  # NaN propagates through max
        raise ModelError("the model's logits hold NaN or +inf; allowed: finite values and -inf")
    return row


def _adjusted(logits: Floats, sampling: Sampling, context: Tokens) -> Floats:
    """Logits after repetition penalty (float64 if there is one) and bans; `logits` itself stays untouched."""
    row = _checked(logits)
    check_temperature(sampling.temperature)
    if sampling.repetition_penalty != 1.0:
        seen = vocabulary_ids(context, len(row), "context")
        penalised = row.astype(np.float64)
        before = penalised[seen]  # a token that occurs twice is penalised once
        penalty = sampling.repetition_penalty
        penalised[seen] = np.where(before < 0, before * penalty, before / penalty)
        row = penalised
    if sampling.banned_token_ids:
        row = row.copy()
        row[vocabulary_ids(sampling.banned_token_ids, len(row), "banned")] = -np.inf
    if row.max() == -np.inf:
        raise ModelError("no token can be chosen: every one is banned or has the logit -inf")
    return row


def check_temperature(temperature: float) -> None:
    """Raises InvalidRequest unless `temperature` is 0 or in the supported range (NaN is not)."""
    if not (temperature == 0.0 or MIN_TEMPERATURE <= temperature <= MAX_TEMPERATURE):
        raise InvalidRequest(f"temperature is {temperature}; allowed: 0 or {MIN_TEMPERATURE} to {MAX_TEMPERATURE}")


def vocabulary_ids(tokens: npt.ArrayLike, vocab_size: int, kind: str) -> Ids:
    """`tokens` as indices; raises InvalidRequest if one is not in the vocabulary."""
    ids = np.asarray(tokens, dtype=np.intp)
    if len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise InvalidRequest(f"a {kind} token id is outside the vocabulary; allowed: 0 to {vocab_size - 1}")
    return ids


def _surviving_ids(row: Floats, sampling: Sampling) -> Ids | None:
    """Ids that top-k and top-p keep; None if both are off."""
    ids: Ids | None = None
    if 0 < sampling.top_k < len(row):
        kth_best = np.partition(row, len(row) - sampling.top_k)[len(row) - sampling.top_k]
        ids = np.flatnonzero(row >= kth_best)  # ties at the threshold stay, as in transformers' TopKLogitsWarper
    if sampling.top_p < 1.0:
        z = (row if ids is None else row[ids]).astype(np.float64) / sampling.temperature
        kept = _nucleus(z, sampling.top_p)
        ids = kept if ids is None else ids[kept]
    return ids


def _nucleus(z: Float64s, top_p: float) -> Ids:
    """Indices of the smallest set with cumulative probability >= `top_p`, best first, equals by lowest index.

    The definition of transformers' TopPLogitsWarper. Only a head that holds enough probability is sorted.
    """
    best = z.max()
    weights = np.exp(z - best)
    needed = top_p * float(weights.sum())
    for gap in (2.0, 4.0, 8.0, 16.0, 32.0, 1024.0):  # weights behind a gap of 1024 are 0
        head = np.flatnonzero(z >= best - gap)
        if weights[head].sum() >= needed:
            break
    descending = np.sort(z[head])[::-1]
    cumulative = np.cumsum(np.exp(descending - best))
    num_kept = min(int(np.searchsorted(cumulative, needed)) + 1, len(head))
    last = descending[num_kept - 1]
    better, equal = np.flatnonzero(z > last), np.flatnonzero(z == last)
    return np.sort(np.concatenate((better, equal[: num_kept - len(better)])))
