"""Accounting of the KV memory: which blocks hold the tokens of which session. No tensors here.

The memory is cut into blocks of `block_tokens` tokens, and a session has a table of block ids, as in
PagedAttention (Kwon et al. 2023, section 4.2). Unlike there, the allocator prefers runs of neighbouring
blocks: attention on a CPU then reads a session's KV in place, where a scattered table has to be gathered.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from wisp_plugin.errors import CapacityError

_FREE, _USED = b"\x00", b"\x01"


@dataclass(slots=True)
class _Table:
    """Blocks of one session, in the order of its tokens, and how many tokens they hold."""

    blocks: list[int] = field(default_factory=list)
    num_tokens: int = 0


class BlockPool:
    """Block tables of all sessions. The same calls in the same order always give the same tables.

    Every block is owned by exactly one session. `_take` and `_give_back` are the only places that change
    ownership, so that shared blocks need a count there and nothing elsewhere.
    """

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        if num_blocks < 1 or block_tokens < 1:
            raise ValueError(f"{num_blocks} blocks of {block_tokens} tokens are an empty pool; both must be at least 1")
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self._used = bytearray(num_blocks)
        self._num_free = num_blocks
        self._tables: dict[str, _Table] = {}

    @property
    def num_free(self) -> int:
        """Blocks that nobody owns."""
        return self._num_free

    @property
    def num_tokens(self) -> int:
        """Tokens that the whole pool can hold."""
        return self.num_blocks * self.block_tokens

    def sessions(self) -> tuple[str, ...]:
        """Sessions that own blocks, in the order in which they came."""
        return tuple(self._tables)

    def length(self, session: str) -> int:
        """Tokens of `session` whose KV is held; 0 for an unknown session."""
        table = self._tables.get(session)
        return table.num_tokens if table else 0

    def blocks(self, session: str) -> tuple[int, ...]:
        """Block ids of `session`: token i lies in block `blocks[i // block_tokens]`. Empty for an unknown session."""
        table = self._tables.get(session)
        return tuple(table.blocks) if table else ()

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens of one session fill."""
        return -(-num_tokens // self.block_tokens)

    def num_missing(self, session: str, num_tokens: int) -> int:
        """Blocks that `extend(session, num_tokens)` would have to allocate."""
        table = self._tables.get(session)
        return max(0, self.num_blocks_for(num_tokens) - (len(table.blocks) if table else 0))

    def extend(self, session: str, num_tokens: int) -> None:
        """Grow `session` (created if unknown) to `num_tokens` tokens.

        Raises:
            CapacityError: not enough free blocks; nothing has changed then.
            ValueError: `num_tokens` is below the session's length or 0.
        """
        if num_tokens < max(1, self.length(session)):
            raise ValueError(f"session {session} holds {self.length(session)} tokens, it cannot grow to {num_tokens}")
        num_missing = self.num_missing(session, num_tokens)
        if num_missing > self._num_free:
            raise CapacityError(
                f"session {session} needs {num_missing} more KV blocks for {num_tokens} tokens, "
                f"{self._num_free} of {self.num_blocks} are free"
            )
        table = self._tables.setdefault(session, _Table())
        while num_missing:
            start, size = self._find_run(table.blocks[-1] if table.blocks else None, num_missing)
            self._take(table, start, size)
            num_missing -= size
        table.num_tokens = num_tokens

    def truncate(self, session: str, num_tokens: int) -> None:
        """Forget the tokens of `session` behind the first `num_tokens`; 0 is the same as `release`.

        Raises ValueError if the session holds fewer.
        """
        if not 0 <= num_tokens <= self.length(session):
            raise ValueError(f"session {session} holds {self.length(session)} tokens, it cannot shrink to {num_tokens}")
        table = self._tables.get(session)
        if table is None:
            return
        self._give_back(table, self.num_blocks_for(num_tokens))
        table.num_tokens = num_tokens
        if not num_tokens:
            del self._tables[session]

    def release(self, session: str) -> None:
        """Give all blocks of `session` back. An unknown session is not an error: it may just hold nothing."""
        self.truncate(session, 0)

    def check_integrity(self) -> None:
        """Raise AssertionError unless every block is either free or owned by exactly one session."""
        owned = [block for table in self._tables.values() for block in table.blocks]
        assert len(owned) == len(set(owned)), "a block is owned twice"
        assert sorted(owned) == [b for b in range(self.num_blocks) if self._used[b]], "owned and used blocks differ"
        assert self._num_free == self.num_blocks - len(owned), "the count of free blocks is wrong"
        for session, table in self._tables.items():
            assert table.num_tokens > 0, f"session {session} holds no token but has a table"
            assert len(table.blocks) == self.num_blocks_for(table.num_tokens), f"table of {session} does not fit"

    def _find_run(self, last: int | None, wanted: int) -> tuple[int, int]:
        """Start and size (at most `wanted`) of the free run to take next, behind block `last` of the session.

        The run that goes on directly behind the session's last block comes first. Otherwise the longest run
        is taken, and from its middle if its left neighbour is a session: both then have room to grow.
        """
        if last is not None and last + 1 < self.num_blocks and not self._used[last + 1]:
            end = self._used.find(_USED, last + 1)
            return last + 1, min(wanted, (end if end >= 0 else self.num_blocks) - last - 1)
        start, size = max(self._free_runs(), key=lambda run: (run[1], -run[0]))
        if size <= wanted:
            return start, size
        return (start + (size - wanted) // 2 if start else 0), wanted

    def _free_runs(self) -> Iterator[tuple[int, int]]:
        """Start and size of every maximal run of free blocks, from the left."""
        start = self._used.find(_FREE)
        while start >= 0:
            end = self._used.find(_USED, start)
            end = end if end >= 0 else self.num_blocks
            yield start, end - start
            start = self._used.find(_FREE, end)

    def _take(self, table: _Table, start: int, size: int) -> None:
        """Append the free blocks `start` to `start + size` to `table`."""
        self._used[start : start + size] = _USED * size
        self._num_free -= size
        table.blocks.extend(range(start, start + size))

    def _give_back(self, table: _Table, num_kept: int) -> None:
        """Free the blocks of `table` behind the first `num_kept`."""
        for block in table.blocks[num_kept:]:
            self._used[block] = 0
        self._num_free += len(table.blocks) - num_kept
        del table.blocks[num_kept:]
