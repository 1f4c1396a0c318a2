"""KV tensors of all layers in slots; `BlockPool` says which session owns which of them.

Slot `block * block_tokens + offset` holds the key and the value of one token, `[num_kv_heads, head_dim]` each,
in every layer. A `SlotView` is where a session's tokens lie, computed once per pass and used by all layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from wisp_plugin.kv_blocks import BlockCopy, BlockPool, Slots, token_slots


@dataclass(frozen=True, slots=True)
class SlotView:
    """Where the first `num_tokens` tokens of a session lie.

    `start` is the first slot if they lie side by side (then reading is a view), else None and
    `index` int64 `[num_tokens]` names every slot.
    """

    num_tokens: int
    start: int | None
    index: torch.Tensor | None = None


class KvCache:
    """Keys and values, per layer `[num_slots, num_kv_heads, head_dim]` each, and the pool that accounts for them."""

    def __init__(
        self,
        pool: BlockPool,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.pool = pool
        self.device = device
        shape = (pool.num_tokens, num_kv_heads, head_dim)
        # Zeros and not empty: a padded gather reads slots that were never written, and a NaN there would
        # survive its mask (0 * NaN).
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]

    def slots(self, session: str) -> Slots:
        """Slot of every token that `session` holds."""
        return token_slots(self.pool.blocks(session), self.pool.block_tokens, self.pool.length(session))

    def view(self, session: str) -> SlotView:
        """Where the tokens of `session` lie."""
        slots = self.slots(session)
        if len(slots) and (np.diff(slots) == 1).all():
            return SlotView(len(slots), int(slots[0]))
        return SlotView(len(slots), None, torch.from_numpy(slots).to(self.device))

    def write(self, layer: int, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store `keys` and `values`, `[T, num_kv_heads, head_dim]`, in the slots int64 `[T]`."""
        self.keys[layer].index_copy_(0, slots, keys)
        self.values[layer].index_copy_(0, slots, values)

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        """Copy blocks in all layers, `(source, destination)` each, as `BlockPool.extend` asked for.

        Must run before the pass writes: a source belongs to other sessions, who may go on in it.
        """
        if not copies:
            return
        size = self.pool.block_tokens
        sources, destinations = (
            torch.from_numpy(token_slots(blocks, size, len(copies) * size)).to(self.device)
            for blocks in zip(*copies, strict=True)
        )
        for layer in range(len(self.keys)):
            self.write(layer, destinations, self.keys[layer][sources], self.values[layer][sources])

    def read(self, layer: int, view: SlotView) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a session, `[num_tokens, num_kv_heads, head_dim]`: views if its slots are neighbours."""
        if view.start is not None:
            end = view.start + view.num_tokens
            return self.keys[layer][view.start : end], self.values[layer][view.start : end]
        assert view.index is not None, "slots that are no neighbours have an index"
        return self.keys[layer].index_select(0, view.index), self.values[layer].index_select(0, view.index)

    def gather(self, layer: int, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of many sessions, `[B, S, num_kv_heads, head_dim]`, from the slots int64 `[B, S]`."""
        return self.keys[layer][table], self.values[layer][table]

    def check_integrity(self) -> None:
        """Raise AssertionError unless the pool is sound, the tensors fit it and every held token is finite."""
        self.pool.check_integrity()
        for layer, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            assert keys.shape == values.shape, f"keys and values of layer {layer} differ in shape"
            assert keys.shape[0] == self.pool.num_tokens, f"layer {layer} has not one slot per token of the pool"
            for session in self.pool.sessions():
                held = self.read(layer, self.view(session))
                is_finite = all(bool(torch.isfinite(part).all()) for part in held)
                assert is_finite, f"layer {layer}, session {session}: not finite"
