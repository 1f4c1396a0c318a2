"""Seeded coupling for a batch of rows of torch logits (definition and numpy form: wisp_plugin.coupling).

On CPU every row goes through `coupling.choose_token` without a copy (bfloat16 and float16 are widened, which is
exact). Elsewhere the device computes hash, filters and approximate scores, and only tokens within a small
tolerance of the best cross to the host, where numpy scores them: the choice is the same bit for bit, and
the device is waited for once per chunk of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from triton_models.compiled import compiled_on_device
from wisp_plugin import coupling
from wisp_plugin.errors import ModelError
from wisp_plugin.messages import Sampling, Tokens

_CHUNK_ELEMENTS = 1 << 24  # rows x vocabulary scored at once on a device: 128 MiB per float64 temporary
_TOP_P_MARGIN = 1e-9  # a nucleus whose edge is nearer to top_p than this (share of probability) is cut on the host


@dataclass(frozen=True, slots=True)
class ChoiceRow:
    """What besides logits decides one token: `context` holds all tokens before `position`, drafts included."""

    sampling: Sampling
    position: int
    context: Tokens


def choose_tokens(logits: torch.Tensor, rows: Sequence[ChoiceRow]) -> npt.NDArray[np.int32]:
    """The token of each row of `logits` [R, V] (any float dtype, any device); int32 [R].

    Raises:
        ModelError: a logit is NaN or +inf, or a row has no token left.
        InvalidRequest: a banned or context token outside the vocabulary, a temperature out of range.
    """
    _check_shape(logits, len(rows))
    logits = logits.detach()
    if logits.device.type == "cpu":
        chosen = [_choose_on_host(logits[i], row) for i, row in enumerate(rows)]
        return np.array(chosen, dtype=np.int32)
    return choose_on_device(logits, rows)


def chosen_logprobs(logits: torch.Tensor, tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
    """Log-probability of `tokens[i]` in row i of `logits` [R, V], before filters at temperature 1; float32 [R]."""
    _check_shape(logits, len(tokens))
    logits = logits.detach()
    if logits.device.type == "cpu":
        found = [coupling.chosen_logprob(_as_numpy(logits[i]), int(token)) for i, token in enumerate(tokens)]
        return np.array(found, dtype=np.float32)
    wanted = torch.as_tensor(tokens, dtype=torch.int64).to(logits.device)[:, None]
    chosen = logits.gather(1, wanted)[:, 0].float() - torch.logsumexp(logits.float(), dim=1)
    return np.asarray(chosen.cpu().numpy(), dtype=np.float32)


def choose_on_device(logits: torch.Tensor, rows: Sequence[ChoiceRow]) -> npt.NDArray[np.int32]:
    """`choose_tokens` with the work on the tensor's device. Works on CPU too, which is how it is tested there."""
    chosen = np.empty(len(rows), dtype=np.int32)
    if all(row.sampling.greedy and not _is_adjusted(row.sampling) for row in rows):
        best, ids = logits.max(dim=1)  # the first of equals
        _check_best(best.double().cpu().numpy())
        chosen[:] = ids.cpu().numpy()
        return chosen
    num_rows = max(1, _CHUNK_ELEMENTS // logits.shape[1])
    for start in range(0, len(rows), num_rows):
        chunk = slice(start, start + num_rows)
        chosen[chunk] = _choose_chunk(logits[chunk], rows[chunk])
    return chosen


def warm_up_choice(logits: torch.Tensor) -> None:
    """Choose from one row and from two of `logits` [2 or more, V] as sampling does: on a device other than a CPU that
    compiles, which no session is to wait for."""
    row = ChoiceRow(Sampling(seed=1, temperature=1.0), 0, np.empty(0, np.int32))
    for num_rows in (1, 2):
        choose_tokens(logits[:num_rows], [row] * num_rows)


def _choose_chunk(logits: torch.Tensor, rows: Sequence[ChoiceRow]) -> list[int]:
    z = logits.to(torch.float64, copy=True)
    best_logit = z.amax(dim=1)
    _adjust(z, rows)
    # A tensor as divisor: dividing by a Python number may multiply by its reciprocal, which rounds differently.
    z /= z.new_tensor([1.0 if row.sampling.greedy else row.sampling.temperature for row in rows])[:, None]
    keep_top_k(z, rows)
    is_unclear = keep_top_p(z, rows)
    scores = _scores(z, *noise_keys(z, rows))
    best = scores.amax(dim=1, keepdim=True)
    is_near = scores >= best - (1e-6 + 1e-12 * best.abs())
    at = is_near.nonzero()
    near_z = z[at[:, 0], at[:, 1]].cpu().numpy()
    at_rows, at_ids = at.cpu().numpy().T
    flags = torch.stack((best_logit, best[:, 0], is_unclear.double())).cpu().numpy()
    _check_best(flags[0])
    chosen: list[int] = []
    for i, row in enumerate(rows):
        if flags[2, i]:
            chosen.append(_choose_on_host(logits[i], row))
            continue
        if flags[1, i] == -np.inf:
            raise ModelError("no token can be chosen: every one is banned or has the logit -inf")
        mine = slice(*np.searchsorted(at_rows, (i, i + 1)))
        ids, exact = at_ids[mine], near_z[mine]
        if not row.sampling.greedy:
            exact = exact + coupling.gumbel(row.sampling.seed, row.position, ids)
        chosen.append(int(ids[exact.argmax()]))  # ids ascend: the first of equals has the lowest
    return chosen


def _choose_on_host(logits: torch.Tensor, row: ChoiceRow) -> int:
    return coupling.choose_token(_as_numpy(logits), row.sampling, row.position, row.context)


def _as_numpy(row: torch.Tensor) -> coupling.Floats:
    """A row on the host. bfloat16 is widened by numpy: for one row torch's OpenMP start costs more than the work."""
    host = row.cpu()
    if host.dtype != torch.bfloat16:
        return np.asarray(host.numpy())  # `coupling` widens float16
    widened = host.view(torch.int16).numpy().view(np.uint16).astype(np.uint32)
    widened <<= np.uint32(16)
    return widened.view(np.float32)


def _adjust(z: torch.Tensor, rows: Sequence[ChoiceRow]) -> None:
    """Repetition penalty and bans, in place. Ids are checked as on the host."""
    for i, row in enumerate(rows):
        sampling = row.sampling
        coupling.check_temperature(sampling.temperature)
        if sampling.repetition_penalty != 1.0:
            ids = _device_ids(np.unique(row.context), z, "context")
            before, penalty = z[i, ids], z.new_tensor(sampling.repetition_penalty)
            z[i, ids] = torch.where(before < 0, before * penalty, before / penalty)
        if sampling.banned_token_ids:
            z[i, _device_ids(sampling.banned_token_ids, z, "banned")] = -torch.inf


def keep_top_k(z: torch.Tensor, rows: Sequence[ChoiceRow]) -> None:
    """Top-k in place; exact, as it only compares."""
    vocab_size = z.shape[1]
    active = [i for i, row in enumerate(rows) if 0 < row.sampling.top_k < vocab_size and not row.sampling.greedy]
    if not active:
        return
    at = torch.tensor(active, device=z.device)
    k = torch.tensor([rows[i].sampling.top_k for i in active], device=z.device)[:, None]
    part = z[at]
    kth_best = part.topk(int(max(rows[i].sampling.top_k for i in active)), dim=1).values.gather(1, k - 1)
    z[at] = part.masked_fill_(part < kth_best, -torch.inf)


def keep_top_p(z: torch.Tensor, rows: Sequence[ChoiceRow]) -> torch.Tensor:
    """Top-p in place; returns bool [R]: rows whose nucleus rounding could change."""
    is_unclear = torch.zeros(len(rows), dtype=torch.bool, device=z.device)
    active = [i for i, row in enumerate(rows) if row.sampling.top_p < 1.0 and not row.sampling.greedy]
    if not active:
        return is_unclear
    at = torch.tensor(active, device=z.device)
    part = z[at]
    descending, order = part.sort(dim=1, descending=True, stable=True)
    weights = (descending - descending[:, :1]).exp()
    total = weights.sum(dim=1, keepdim=True)
    missing = weights.cumsum(dim=1) - weights - total * z.new_tensor([rows[i].sampling.top_p for i in active])[:, None]
    is_kept = missing < 0
    is_kept[:, 0] = True
    is_unclear[at] = (missing.abs() < _TOP_P_MARGIN * total).any(dim=1)
    is_removed = torch.empty_like(is_kept).scatter_(1, order, ~is_kept)
    z[at] = part.masked_fill_(is_removed, -torch.inf)
    return is_unclear


def noise_keys(like: torch.Tensor, rows: Sequence[ChoiceRow]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each row the two halves of its key, int32 [R, 2], and 1 if it is sampled, else 0, [R, 1]."""
    halves = [coupling.key_halves(row.sampling.seed, row.position) for row in rows]
    keys = torch.from_numpy(np.array(halves, dtype=np.uint32).view(np.int32)).to(like.device)
    return keys, like.new_tensor([0.0 if row.sampling.greedy else 1.0 for row in rows])[:, None]


@compiled_on_device  # otherwise some twenty passes over memory
def _scores(z: torch.Tensor, keys: torch.Tensor, is_sampled: torch.Tensor) -> torch.Tensor:
    """z [R, V] plus Gumbel noise (none in greedy rows) up to rounding; the hash itself is exact."""
    uniform = (device_hash(z.shape[1], keys).to(torch.float64) + 0.5) / 2.0**32
    return z - torch.log(-torch.log(uniform)) * is_sampled


def device_hash(vocab_size: int, keys: torch.Tensor) -> torch.Tensor:
    """`coupling.noise_hash` of every token for each row of `keys` int32 [R, 2]: int64 [R, V]."""
    ids = torch.arange(vocab_size, dtype=torch.int32, device=keys.device)[None, :]
    return _fmix32(_fmix32(ids ^ keys[:, :1]) ^ keys[:, 1:]).to(torch.int64) & 0xFFFFFFFF


def _fmix32(x: torch.Tensor) -> torch.Tensor:
    """murmur3's finalizer on int32: products wrap, right shifts are made logical by a mask."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * (0x85EBCA6B - (1 << 32))
    x = (x ^ ((x >> 13) & 0x7FFFF)) * (0xC2B2AE35 - (1 << 32))
    return x ^ ((x >> 16) & 0xFFFF)


def _device_ids(tokens: npt.ArrayLike, z: torch.Tensor, kind: str) -> torch.Tensor:
    return torch.from_numpy(coupling.vocabulary_ids(tokens, z.shape[1], kind)).to(z.device)


def _is_adjusted(sampling: Sampling) -> bool:
    return sampling.repetition_penalty != 1.0 or bool(sampling.banned_token_ids)


def _check_best(best: npt.NDArray[np.float64]) -> None:
    if not np.all(best < np.inf):
        raise ModelError("the model's logits hold NaN or +inf; allowed: finite values and -inf")


def _check_shape(logits: torch.Tensor, num_rows: int) -> None:
    if logits.ndim != 2 or len(logits) != num_rows or not logits.shape[1]:
        raise ModelError(f"logits have shape {list(logits.shape)}; needed: [{num_rows}, V] with V > 0")
