"""Attention for one packed row `[1, T]`: the new tokens of many sessions side by side, without padding.

Registered with transformers under `PACKED_ATTENTION`; the pass travels as the keyword argument
`packed_pass` of `model(...)`. Per layer it stores the new keys and values, then every session attends to its own
cached and new tokens, causally. Two implementations give the same result:

    looped    one call per session on views of the KV memory; best on a CPU, where a call is cheap and a copy is not
    gathered  one call per group of sessions with similar query length, on a gathered copy; best on a GPU
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from triton_models.kv_cache import KvCache, SlotView

PACKED_ATTENTION = "wisp_packed"
_MIN_GATHERED_QUERY = 16  # shorter queries (drafts) are padded to one group


@dataclass(frozen=True, slots=True)
class Span:
    """New tokens of one session in the packed row; with them its KV is `num_tokens` long."""

    session: str
    num_cached: int
    num_tokens: int

    @property
    def num_new_tokens(self) -> int:
        """Query length."""
        return self.num_tokens - self.num_cached


@dataclass(frozen=True, slots=True)
class _Looped:
    """One session: rows `start` to `end` attend to `view`. `mask` is additive `[1, 1, K, S]`, None if not needed."""

    start: int
    end: int
    view: SlotView
    mask: torch.Tensor | None
    is_causal: bool


@dataclass(frozen=True, slots=True)
class _Gathered:
    """A group of B sessions, padded to K queries and S keys.

    `queries` int64 `[B, K]`: row of each query (0 where padded); `table` int64 `[B, S]`: slot of each key (0 where
    padded); `mask` additive `[B, 1, G * K, S]`; `rows` int64 `[N]` and `sources` int64 `[N]`: output row n comes
    from place `sources[n]` of the flattened `[B * K]`.
    """

    queries: torch.Tensor
    table: torch.Tensor
    mask: torch.Tensor
    rows: torch.Tensor
    sources: torch.Tensor


class Attention(Protocol):
    """What the model's layers call, one after the other: a `PackedPass`, or what stands in for one."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
    ) -> torch.Tensor:
        """`query` `[1, Hq, T, D]`, `key`/`value` `[1, Hkv, T, D]` -> `[1, T, Hq, D]`."""


@dataclass(frozen=True, slots=True)
class PackedPass:
    """Index tensors of one pass, the same for all layers."""

    cache: KvCache
    write_slots: torch.Tensor  # int64 [T]
    parts: tuple[_Looped, ...] | tuple[_Gathered, ...]

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
    ) -> torch.Tensor:
        """Store the layer's keys and values, then every part of the pass: `[1, T, Hq, D]`."""
        output = query.new_empty(output_shape(query))
        self.attend_into(output, layer, query, key, value, scaling)
        return output

    def attend_into(
        self, output: torch.Tensor, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        scaling: float | None,
    ) -> None:  # fmt: skip
        """`attend` that writes to `output`. Rows behind the pass's own T are padding: neither read nor written."""
        own = slice(len(self.write_slots))
        self.cache.write(layer, self.write_slots, key[0, :, own].transpose(0, 1), value[0, :, own].transpose(0, 1))
        for part in self.parts:
            if isinstance(part, _Looped):
                _attend_looped(self.cache, layer, part, query, output, scaling)
            else:
                _attend_gathered(self.cache, layer, part, query, output, scaling)


def output_shape(query: torch.Tensor) -> tuple[int, int, int, int]:
    """Shape of attention's output for `query` `[1, Hq, T, D]`."""
    return (1, query.shape[2], query.shape[1], query.shape[3])


def build_pass(
    cache: KvCache, spans: Sequence[Span], dtype: torch.dtype, num_query_groups: int, gather: bool
) -> PackedPass:
    """Indices for `spans`, in row order. `cache.pool` must hold `num_tokens` of each session already.

    `dtype` is the queries' (masks have it too); `num_query_groups` the query heads per KV head.
    """
    slots = [cache.slots(span.session) for span in spans]
    new_slots = [all_slots[span.num_cached :] for span, all_slots in zip(spans, slots, strict=True)]
    write_slots = torch.from_numpy(np.concatenate(new_slots)).to(cache.device)
    starts = np.cumsum([0, *(span.num_new_tokens for span in spans)])
    parts: list[Any] = []
    if gather:
        groups: dict[int, list[int]] = {}
        for i, span in enumerate(spans):
            groups.setdefault(_gather_key(span.num_new_tokens), []).append(i)
        for members in groups.values():
            part = [(int(starts[i]), spans[i], slots[i]) for i in members]
            parts.append(_build_gathered(part, cache.device, dtype, num_query_groups))
    else:
        for span, start in zip(spans, starts, strict=False):
            mask = None
            if span.num_cached and span.num_new_tokens > 1:
                positions = torch.from_numpy(_query_positions(span, span.num_new_tokens)).to(cache.device)
                mask = _causal_mask(positions, span.num_tokens, dtype)[None, None]
            is_causal = not span.num_cached and span.num_new_tokens > 1
            end = int(start) + span.num_new_tokens
            parts.append(_Looped(int(start), end, cache.view(span.session), mask, is_causal))
    return PackedPass(cache, write_slots, tuple(parts))


def _gather_key(num_new_tokens: int) -> int:
    """Group of a query length: up to 16, then powers of two, so that padding at most doubles a long query.

    Decoding and verifying are one group: on an H100 another one costs 0.15 ms per layer, padding next to nothing.
    """
    return max(_MIN_GATHERED_QUERY, 1 << (num_new_tokens - 1).bit_length())


def _build_gathered(
    members: Sequence[tuple[int, Span, np.ndarray]], device: torch.device, dtype: torch.dtype, num_query_groups: int
) -> _Gathered:
    """Padded indices of one group; a member is its first row, its span and its slots."""
    num_queries = max(span.num_new_tokens for _, span, _ in members)
    num_keys = max(span.num_tokens for _, span, _ in members)
    queries = np.zeros((len(members), num_queries), dtype=np.int64)
    positions = np.zeros((len(members), num_queries), dtype=np.int64)
    table = np.zeros((len(members), num_keys), dtype=np.int64)
    rows, sources = [], []
    for b, (start, span, slots) in enumerate(members):
        own_rows = np.arange(start, start + span.num_new_tokens)
        queries[b, : len(own_rows)] = own_rows
        table[b, : span.num_tokens] = slots
        positions[b] = _query_positions(span, num_queries)
        rows.append(own_rows)
        sources.append(b * num_queries + np.arange(len(own_rows)))
    arrays = (queries, table, np.concatenate(rows), np.concatenate(sources), positions)
    moved = [torch.from_numpy(array).to(device) for array in arrays]
    mask = _causal_mask(moved[4], num_keys, dtype)[:, None].repeat(1, 1, num_query_groups, 1)
    return _Gathered(moved[0], moved[1], mask, moved[2], moved[3])


def _query_positions(span: Span, num_queries: int) -> np.ndarray:
    """int64 `[num_queries]`: query i stands at `num_cached + i`; padded ones see what the last sees."""
    return np.minimum(span.num_cached + np.arange(num_queries), span.num_tokens - 1)


def _causal_mask(positions: torch.Tensor, num_keys: int, dtype: torch.dtype) -> torch.Tensor:
    """`[..., num_keys]` for queries at `positions`: 0 up to it, minus infinity behind.

    Additive, as sdpa would convert a boolean mask again in every layer; made on the device, where it is large.
    """
    is_hidden = torch.arange(num_keys, device=positions.device) > positions[..., None]
    return torch.zeros(is_hidden.shape, dtype=dtype, device=positions.device).masked_fill_(is_hidden, float("-inf"))


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    packed_pass: Attention | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: `query` `[1, Hq, T, D]`, `key`/`value` `[1, Hkv, T, D]` -> `[1, T, Hq, D]`.

    Raises ValueError without a pass, or for a kind of attention that this function does not compute.
    """
    # Compiled layers leave the pass alone: the compiler would make another version for every class of it.
    if attention_mask is not None or (not torch.compiler.is_compiling() and packed_pass is None):
        raise ValueError("packed attention needs `packed_pass` and no attention mask")
    if sliding_window is not None or softcap is not None or s_aux is not None:
        raise ValueError("packed attention has no sliding window, no soft cap and no attention sinks")
    if torch.compiler.is_compiling():
        return torch.ops.wisp.packed_attention(query, key, value, scaling), None
    return packed_pass.attend(int(module.layer_idx), query, key, value, scaling), None  # type: ignore[union-attr]


class _Running(threading.local):
    """The pass that this thread is in and its next layer, for compiled layers: neither can travel through them."""

    packed_pass: Attention | None = None
    layer: int = 0


_RUNNING = _Running()


@contextmanager
def running(packed_pass: Attention) -> Iterator[None]:
    """Within, this thread runs the layers of the model over `packed_pass`, each once and in order."""
    _RUNNING.packed_pass, _RUNNING.layer = packed_pass, 0
    try:
        yield
    finally:
        _RUNNING.packed_pass = None


@torch.library.custom_op("wisp::packed_attention", mutates_args=())
def _attend_opaquely(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """`attend` for the next layer of the running pass. That KV memory changes is not the compiler's business."""
    packed_pass, layer = _RUNNING.packed_pass, _RUNNING.layer
    assert packed_pass is not None, "a compiled layer outside of `running`"
    _RUNNING.layer += 1
    return packed_pass.attend(layer, query, key, value, scaling)


@_attend_opaquely.register_fake
def _shape_of_output(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    return query.new_empty(output_shape(query))


def _attend_looped(
    cache: KvCache, layer: int, part: _Looped, query: torch.Tensor, output: torch.Tensor, scaling: float | None
) -> None:
    """One session; sdpa on a CPU handles grouped queries and strided views without a copy."""
    keys, values = cache.read(layer, part.view)
    output[:, part.start : part.end] = F.scaled_dot_product_attention(
        query[:, :, part.start : part.end],
        keys.transpose(0, 1).unsqueeze(0),
        values.transpose(0, 1).unsqueeze(0),
        attn_mask=part.mask,
        is_causal=part.is_causal,
        scale=scaling,
        enable_gqa=True,
    ).transpose(1, 2)


def _attend_gathered(
    cache: KvCache, layer: int, part: _Gathered, query: torch.Tensor, output: torch.Tensor, scaling: float | None
) -> None:
    """One group. The G query heads of a KV head become G * K queries of it: on CUDA `enable_gqa` together with a
    mask would fall back to the slow kernel, and repeating the keys would copy them G times."""
    keys, values = cache.gather(layer, part.table)
    batch, num_queries = part.queries.shape
    num_heads, num_kv_heads, head_dim = query.shape[1], keys.shape[2], query.shape[3]
    grouped = query[0].transpose(0, 1)[part.queries]  # [B, K, Hq, D]
    grouped = grouped.unflatten(2, (num_kv_heads, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # [B, Hkv, G * K, D]
    attended = F.scaled_dot_product_attention(
        grouped, keys.transpose(1, 2), values.transpose(1, 2), attn_mask=part.mask, scale=scaling
    )
    attended = attended.unflatten(2, (-1, num_queries)).permute(0, 3, 1, 2, 4)  # [B, K, Hkv, G, D]
    output[0].index_copy_(0, part.rows, attended.reshape(batch * num_queries, num_heads, head_dim)[part.sources])


# Nothing is registered for masks: transformers then makes none. For a registered one it would first look whether
# positions are consecutive, and wait for the device to know.
AttentionInterface.register(PACKED_ATTENTION, packed_attention)
