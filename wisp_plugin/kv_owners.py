"""Who owns which KV blocks, what they stand for, and which of the free ones are handed out next.

A block is plain (nobody owns it, it stands for nothing), matchable (nobody owns it, it is registered) or owned, by
one session or several. Free are the first two kinds. A matchable block is the only one for its tokens: beside
another it would be worth nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from wisp_plugin.kv_prefixes import PrefixNode, PrefixTree


class BlockOwners:
    """Counts of owners and registrations of all blocks; the only place where blocks change hands."""

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        self.num_free = num_blocks
        self.prefixes = PrefixTree(block_tokens)
        self._counts = [0] * num_blocks
        self._owned = bytearray(num_blocks)  # 1: has owners
        self._kept = bytearray(num_blocks)  # 1: owned or matchable
        self._released_at = np.zeros(num_blocks, np.int64)  # of matchable blocks: counts releases, higher is later
        self._num_releases = 0

    def count(self, block: int) -> int:
        """Owners of `block`."""
        return self._counts[block]

    def take(self, last: int | None, wanted: int) -> list[int]:
        """Hand out `wanted` free blocks, in as few runs as can be, to a session whose last block is `last`.

        There must be as many. What they stood for is forgotten.
        """
        taken: list[int] = []
        while len(taken) < wanted:
            start, size = self._find_run(last, wanted - len(taken))
            for block in range(start, start + size):
                if self._kept[block]:
                    self._forget(block)
                self._counts[block] = 1
            self._owned[start : start + size] = self._kept[start : start + size] = b"\x01" * size
            last = start + size - 1
            taken.extend(range(start, start + size))
        self.num_free -= wanted
        return taken

    def share(self, node: PrefixNode, previous: int | None) -> int:
        """One owner more for a block of `node`: one in use anyhow, if possible the neighbour of `previous`."""
        block = node.blocks[0]
        if len(node.blocks) > 1:
            block = max(node.blocks, key=lambda b: (self._owned[b], previous is not None and b == previous + 1))
        self._counts[block] += 1
        self.num_free -= not self._owned[block]
        self._owned[block] = 1
        return block

    def give_back(self, blocks: Sequence[int]) -> None:
        """One owner less for a session's last `blocks`, the last of them first.

        So they count as released in the order in which they are of least use: a block serves only behind those
        before it.
        """
        for block in reversed(blocks):
            self._counts[block] -= 1
            if self._counts[block]:
                continue
            self._owned[block] = 0
            self.num_free += 1
            self._num_releases += 1
            self._released_at[block] = self._num_releases
            node = self.prefixes.node(block)
            if node is None:
                self._kept[block] = 0
            elif len(node.blocks) > 1:
                self._forget(block)

    def register(self, parent: PrefixNode, key: bytes, block: int) -> PrefixNode:
        """Note that the owned `block` stands for the tokens `key` behind `parent`."""
        node = self.prefixes.add(parent, key, block)
        for other in node.blocks[:-1]:
            if not self._owned[other]:
                self._forget(other)
        return node

    def unregister(self, block: int) -> None:
        """The only owner of `block` is about to write into it: it stands for nothing any more."""
        if block in self.prefixes:
            self.prefixes.remove(block)

    def check_integrity(self, counts: Sequence[int]) -> None:
        """Raise AssertionError unless everything agrees with `counts`, the owners of each block by the tables."""
        assert self._counts == counts, "the count of owners is wrong"
        assert self._owned == bytearray(count > 0 for count in counts), "owned blocks and counts differ"
        kept = bytearray(count > 0 or block in self.prefixes for block, count in enumerate(counts))
        assert self._kept == kept, "kept blocks and registrations differ"
        assert self.num_free == counts.count(0), "the count of free blocks is wrong"
        self.prefixes.check_integrity()
        for block, count in enumerate(counts):
            node = self.prefixes.node(block)
            assert count or node is None or node.blocks == [block], "a block is matchable beside another"

    def _forget(self, block: int) -> None:
        """Make a matchable block plain."""
        self.prefixes.remove(block)
        self._kept[block] = 0

    def _find_run(self, last: int | None, wanted: int) -> tuple[int, int]:
        """Start and size (at most `wanted`) of the free run to take next, behind block `last` of the session.

        The run that goes on directly behind the session's last block comes first, matchable or not. Then the
        longest run of plain blocks, from its middle if its left neighbour is kept: both then have room to grow.
        Matchable blocks go when plain ones would not be neighbours, least recently used first.
        """
        if last is not None and last + 1 < len(self._owned) and not self._owned[last + 1]:
            end = self._owned.find(1, last + 1)
            return last + 1, min(wanted, (end if end >= 0 else len(self._owned)) - last - 1)
        start, size = _longest_run(self._kept)
        if size >= wanted:
            return (start + (size - wanted) // 2 if start else 0), wanted
        oldest = self._oldest_run(wanted)
        return _longest_run(self._owned) if oldest is None else (oldest, wanted)

    def _oldest_run(self, size: int) -> int | None:
        """Start of the `size` neighbouring free blocks that were released longest ago, on average; None without.

        Plain blocks count as oldest.
        """
        owned, kept = np.frombuffer(self._owned, np.uint8), np.frombuffer(self._kept, np.uint8)
        num_owned = _window_sums(owned.astype(np.int64), size)
        age = _window_sums(np.where(kept, self._released_at, 0), size)
        starts = np.flatnonzero(num_owned == 0)
        return int(starts[age[starts].argmin()]) if len(starts) else None


def _window_sums(values: npt.NDArray[np.int64], size: int) -> npt.NDArray[np.int64]:
    """Sums of every `size` neighbouring values; empty if there are fewer."""
    sums = np.concatenate([[0], np.cumsum(values)])
    windows: npt.NDArray[np.int64] = sums[size:] - sums[:-size]
    return windows


def _longest_run(taken: bytearray) -> tuple[int, int]:
    """Start and size of the longest run of zeros, the leftmost of equal ones; (0, 0) if there is none."""
    return max(_runs(taken), key=lambda run: (run[1], -run[0]), default=(0, 0))


def _runs(taken: bytearray) -> Iterator[tuple[int, int]]:
    """Start and size of every maximal run of zeros, from the left."""
    start = taken.find(0)
    while start >= 0:
        end = taken.find(1, start)
        end = end if end >= 0 else len(taken)
        yield start, end - start
        start = taken.find(0, end)
