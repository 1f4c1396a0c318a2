"""Which KV blocks hold the KV of which tokens: a tree over complete blocks, so that equal prefixes are stored once.

A node stands for one block's tokens behind all the tokens of its ancestors. Its key are the tokens themselves, as
bytes, and it hangs below its parent: a match compares every token and trusts no hash. That blocks without an owner
stay matchable is vLLM's automatic prefix caching; matching inside a block is RadixAttention's (Zheng et al. 2024).

A node whose blocks were handed out again stays while a node below it has blocks: what hangs below is right, it
is only out of reach until the missing block is computed again.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, field

import numpy as np

_TOKEN_BYTES = 4  # int32


@dataclass(slots=True, eq=False)
class PrefixNode:
    """The tokens `key` of one block behind the tokens of all `parent`s; `blocks` hold their KV.

    `matchable` are the keys of the children that have blocks, sorted.
    """

    parent: PrefixNode | None
    key: bytes
    blocks: list[int] = field(default_factory=list)
    children: dict[bytes, PrefixNode] = field(default_factory=dict)
    matchable: list[bytes] = field(default_factory=list)


class PrefixTree:
    """Registered blocks by the tokens they stand for. Who owns a block is the pool's business."""

    def __init__(self, block_tokens: int) -> None:
        self.root = PrefixNode(None, b"")
        self._block_bytes = block_tokens * _TOKEN_BYTES
        self._nodes: dict[int, PrefixNode] = {}

    def __contains__(self, block: int) -> bool:
        return block in self._nodes

    def __len__(self) -> int:
        return len(self._nodes)

    def node(self, block: int) -> PrefixNode | None:
        """What `block` stands for; None if it is not registered."""
        return self._nodes.get(block)

    def add(self, parent: PrefixNode, key: bytes, block: int) -> PrefixNode:
        """Register `block` for the tokens `key` behind those of `parent`; several blocks may stand for the same."""
        assert block not in self._nodes, f"block {block} is registered already"
        node = parent.children.get(key)
        if node is None:
            node = parent.children[key] = PrefixNode(parent, key)
        if not node.blocks:
            insort(parent.matchable, key)
        node.blocks.append(block)
        self._nodes[block] = node
        return node

    def remove(self, block: int) -> None:
        """Forget what `block` stands for, and every node that leads nowhere without it. KeyError if not registered."""
        node = self._nodes.pop(block)
        node.blocks.remove(block)
        if node.blocks or node.parent is None:
            return
        del node.parent.matchable[bisect_left(node.parent.matchable, node.key)]
        parent: PrefixNode | None = node.parent
        while parent is not None and not node.blocks and not node.children:
            del parent.children[node.key]
            node, parent = parent, parent.parent

    def match(self, node: PrefixNode, data: bytes) -> tuple[list[PrefixNode], int]:
        """The longest known prefix of the int32 tokens in `data`, which stand behind `node`.

        Returns the nodes to share, in order, and how many tokens they cover: of the last one perhaps only a part.
        """
        found: list[PrefixNode] = []
        for start in range(0, len(data) - self._block_bytes + 1, self._block_bytes):
            child = node.children.get(data[start : start + self._block_bytes])
            if child is None or not child.blocks:
                break
            found.append(child)
            node = child
        num_matched_bytes = len(found) * self._block_bytes
        closest, num_common = _closest(node, data[num_matched_bytes:])
        if closest is not None:
            found.append(closest)
        return found, num_matched_bytes // _TOKEN_BYTES + num_common

    def check_integrity(self) -> None:
        """Raise AssertionError unless nodes, blocks and keys agree and every node leads to a block."""
        seen: dict[int, PrefixNode] = {}
        stack = [self.root]
        while stack:
            node = stack.pop()
            for key, child in node.children.items():
                assert child.key == key, "a node hangs below the wrong key"
                assert len(key) == self._block_bytes, "a key is not one block of tokens"
                assert child.parent is node, "a node does not know its parent"
                assert child.blocks or child.children, "a node leads to no block"
                seen |= dict.fromkeys(child.blocks, child)
            assert node.matchable == sorted(k for k, child in node.children.items() if child.blocks), "wrong keys"
            stack += node.children.values()
        assert seen == self._nodes, "the tree and the list of registered blocks differ"


def _closest(node: PrefixNode, data: bytes) -> tuple[PrefixNode | None, int]:
    """The child with blocks that begins most like `data`, and how many tokens they have in common (None, 0: none).

    In sorted order the longest common prefix is that of a neighbour.
    """
    if not data or not node.matchable:
        return None, 0
    at = bisect_left(node.matchable, data)
    num_common, key = max(
        ((_num_common(key, data), key) for key in node.matchable[max(0, at - 1) : at + 1]), key=lambda pair: pair[0]
    )
    return (node.children[key], num_common) if num_common else (None, 0)


def _num_common(key: bytes, data: bytes) -> int:
    """Leading tokens that two int32 arrays, as bytes, have in common."""
    length = min(len(key), len(data)) // _TOKEN_BYTES
    differs = np.frombuffer(key, np.int32, length) != np.frombuffer(data, np.int32, length)
    return int(differs.argmax()) if differs.any() else length
