"""KV blocks for a pass: all that its sessions need, or nothing."""

from __future__ import annotations

from collections.abc import Sequence

from wisp_plugin.errors import CapacityError
from wisp_plugin.kv_blocks import BlockCopy, BlockPool
from wisp_plugin.messages import PassItem


def reserve(pool: BlockPool, items: Sequence[PassItem]) -> list[BlockCopy]:
    """Cut every session to its cached tokens and grow it to the pass. Returns copies as `BlockPool.extend`.

    Raises:
        CapacityError: the pool cannot hold the pass, or holds less than an item counts on; none is grown then.
        ValueError: no items, or a session twice.
    """
    if not items or len({item.session for item in items}) != len(items):
        raise ValueError("a pass needs items, and a session takes part once")
    for item in items:
        held = pool.length(item.session)
        if held < item.num_cached:
            raise CapacityError(f"the plan counts on {item.num_cached} tokens of {item.session}, {held} are held")
    for item in items:
        pool.truncate(item.session, item.num_cached)
    num_missing = sum(pool.num_missing(item.session, len(item.tokens)) for item in items)
    if num_missing > pool.num_free:
        raise CapacityError(f"the pass needs {num_missing} KV blocks, {pool.num_free} are free")
    return [copy for item in items for copy in pool.extend(item.session, len(item.tokens))]
