"""KV tensors: what was written is read back, in place where a session's blocks are neighbours."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from triton_models.kv_cache import KvCache
from wisp_plugin.kv_blocks import BlockPool, token_slots

NUM_LAYERS, NUM_KV_HEADS, HEAD_DIM = 2, 3, 4


def make_cache(num_blocks: int = 8, block_tokens: int = 4, dtype: torch.dtype = torch.float32) -> KvCache:
    pool = BlockPool(num_blocks, block_tokens)
    return KvCache(pool, NUM_LAYERS, NUM_KV_HEADS, HEAD_DIM, dtype, torch.device("cpu"))


def write_tokens(cache: KvCache, session: str, start: int, end: int) -> torch.Tensor:
    """Grow `session` to `end` and fill its new tokens with recognisable keys (values are their negatives)."""
    cache.pool.extend(session, end)
    slots = torch.from_numpy(cache.slots(session)[start:])
    base = 1000.0 * (ord(session) - ord("a")) + torch.arange(start, end, dtype=torch.float32)
    keys = base[:, None, None].expand(-1, NUM_KV_HEADS, HEAD_DIM).to(cache.keys[0].dtype)
    for layer in range(NUM_LAYERS):
        cache.write(layer, slots, keys + 100 * layer, -keys - 100 * layer)
    return keys


def scattered() -> KvCache:
    """`d` grows into the holes that others left, so that its table has gaps."""
    cache = make_cache(num_blocks=6, block_tokens=2)
    for session in "abc":
        write_tokens(cache, session, 0, 4)
    cache.pool.release("b")
    cache.pool.truncate("a", 1)
    return cache


def test_slots_follow_the_block_table() -> None:
    assert token_slots((5, 2), 4, 6).tolist() == [20, 21, 22, 23, 8, 9]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_contiguous_session_is_read_in_place(dtype: torch.dtype) -> None:
    cache = make_cache(dtype=dtype)
    first = write_tokens(cache, "a", 0, 6)
    second = write_tokens(cache, "a", 6, 11)
    keys, values = cache.read(1, cache.view("a"))
    torch.testing.assert_close(keys, torch.cat([first, second]) + 100, rtol=0, atol=0)
    torch.testing.assert_close(values, -keys, rtol=0, atol=0)
    assert keys.untyped_storage().data_ptr() == cache.keys[1].untyped_storage().data_ptr()


def test_a_scattered_session_is_gathered() -> None:
    cache = scattered()
    written = write_tokens(cache, "d", 0, 6)
    view = cache.view("d")
    assert view.start is None
    keys, values = cache.read(0, view)
    torch.testing.assert_close(keys, written)
    torch.testing.assert_close(values, -written)
    cache.check_integrity()


def test_gather_reads_many_sessions_at_once() -> None:
    cache = scattered()
    written = {session: write_tokens(cache, session, start, 4) for session, start in (("d", 0), ("a", 1))}
    table = torch.stack([torch.from_numpy(cache.slots(session)) for session in ("d", "a")])
    keys, values = cache.gather(0, table)
    assert keys.shape == (2, 4, NUM_KV_HEADS, HEAD_DIM)
    torch.testing.assert_close(keys[0], written["d"])
    torch.testing.assert_close(keys[1, 1:], written["a"])
    torch.testing.assert_close(values, -keys)


def test_truncated_tokens_can_be_written_again() -> None:
    cache = make_cache()
    kept = write_tokens(cache, "a", 0, 9)[:5]
    cache.pool.truncate("a", 5)
    write_tokens(cache, "b", 0, 12)
    again = write_tokens(cache, "a", 5, 7)
    torch.testing.assert_close(cache.read(0, cache.view("a"))[0], torch.cat([kept, again]))


def test_integrity_check_sees_a_broken_tensor() -> None:
    cache = make_cache()
    write_tokens(cache, "a", 0, 5)
    cache.check_integrity()
    cache.values[1][int(cache.slots("a")[3])] = float("nan")
    with pytest.raises(AssertionError, match="layer 1, session a"):
        cache.check_integrity()


def test_a_copied_block_is_the_reader_s_own() -> None:
    cache = make_cache()
    tokens = np.arange(8, dtype=np.int32)
    written = write_tokens(cache, "a", 0, 8)
    cache.pool.remember("a", tokens)
    assert cache.pool.adopt("b", tokens[:7]) == 6
    cache.copy_blocks(cache.pool.extend("b", 8))
    slots = torch.from_numpy(cache.slots("b")[6:])
    for layer in range(NUM_LAYERS):
        cache.write(layer, slots, torch.full((2, NUM_KV_HEADS, HEAD_DIM), 7.0), torch.full_like(written[:2], 7.0))
    for layer in range(NUM_LAYERS):
        keys, values = cache.read(layer, cache.view("a"))
        torch.testing.assert_close(keys, written + 100 * layer)
        torch.testing.assert_close(values, -keys)
        keys, values = cache.read(layer, cache.view("b"))
        torch.testing.assert_close(keys[:6], written[:6] + 100 * layer)
        torch.testing.assert_close(values[:6], -keys[:6])
        assert (keys[6:] == 7.0).all()
    cache.check_integrity()
