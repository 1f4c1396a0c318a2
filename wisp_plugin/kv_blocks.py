"""Accounting of the KV memory: which blocks hold the tokens of which session. No tensors here.

The memory is cut into blocks of `block_tokens` tokens, and a session has a table of block ids, as in
PagedAttention (Kwon et al. 2023, section 4.2). Unlike there, the allocator prefers runs of neighbouring
blocks: attention on a CPU then reads a session's KV in place, where a scattered table has to be gathered.

Equal prefixes are stored once. `remember` registers a session's complete blocks under their tokens (kv_prefixes),
`adopt` shares them with a session that begins with the same tokens, and blocks are counted by their owners. A
block with several owners is never written: `extend` gives the session a block of its own and says what to copy.
Blocks that lost their last owner stay matchable until they are handed out again, least recently used first.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from wisp_plugin.errors import CapacityError
from wisp_plugin.kv_owners import BlockOwners
from wisp_plugin.kv_prefixes import PrefixNode
from wisp_plugin.messages import Tokens

BlockCopy = tuple[int, int]  # source, destination
Slots = npt.NDArray[np.int64]


@dataclass(slots=True)
class _Table:
    """Blocks of one session, in the order of its tokens, and how many tokens they hold.

    `nodes[i]` is what `blocks[i]` stands for; there is one for every complete block that was remembered.
    """

    blocks: list[int] = field(default_factory=list)
    num_tokens: int = 0
    nodes: list[PrefixNode] = field(default_factory=list)


class BlockPool:
    """Block tables of all sessions. The same calls in the same order always give the same tables.

    A table changes its blocks only through `BlockOwners`.
    """

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        if num_blocks < 1 or block_tokens < 1:
            raise ValueError(f"{num_blocks} blocks of {block_tokens} tokens are an empty pool; both must be at least 1")
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self._owners = BlockOwners(num_blocks, block_tokens)
        self._tables: dict[str, _Table] = {}

    @property
    def num_free(self) -> int:
        """Blocks that nobody owns, matchable ones included."""
        return self._owners.num_free

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
        """Blocks that `extend(session, num_tokens)` would have to allocate, the one for a copy included."""
        table = self._tables.get(session)
        if table is None:
            return self.num_blocks_for(num_tokens)
        num_new = max(0, self.num_blocks_for(num_tokens) - len(table.blocks))
        return num_new + self._must_copy(table, num_tokens)

    def num_exclusive(self, session: str) -> int:
        """Blocks that `release(session)` would make free."""
        table = self._tables.get(session)
        return sum(self._owners.count(block) == 1 for block in table.blocks) if table else 0

    def extend(self, session: str, num_tokens: int) -> list[BlockCopy]:
        """Grow `session` (created if unknown) to `num_tokens` tokens, so that those behind its length may be written.

        Returns the copies that the owner of the tensors must make before it writes: the session's last block was
        shared, and it goes on in a block of its own. Usually there are none.

        Raises:
            CapacityError: not enough free blocks; nothing has changed then.
            ValueError: `num_tokens` is below the session's length or 0.
        """
        if num_tokens < max(1, self.length(session)):
            raise ValueError(f"session {session} holds {self.length(session)} tokens, it cannot grow to {num_tokens}")
        num_missing = self.num_missing(session, num_tokens)
        if num_missing > self.num_free:
            raise CapacityError(
                f"session {session} needs {num_missing} more KV blocks for {num_tokens} tokens, "
                f"{self.num_free} of {self.num_blocks} are free"
            )
        table = self._tables.setdefault(session, _Table())
        source = None
        if self._must_copy(table, num_tokens):
            source = table.blocks[-1]
            self._give_back(table, len(table.blocks) - 1)
        elif num_tokens > table.num_tokens and table.num_tokens % self.block_tokens:
            self._owners.unregister(table.blocks[-1])
        at = len(table.blocks)
        table.blocks += self._owners.take(table.blocks[-1] if at else None, num_missing)
        table.num_tokens = num_tokens
        return [] if source is None else [(source, table.blocks[at])]

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
        del table.nodes[num_tokens // self.block_tokens :]
        table.num_tokens = num_tokens
        if not num_tokens:
            del self._tables[session]

    def release(self, session: str) -> None:
        """Give all blocks of `session` back. An unknown session is not an error: it may just hold nothing."""
        self.truncate(session, 0)

    # -- shared prefixes ----------------------------------------------------------------------------------------

    def remember(self, session: str, tokens: Tokens) -> None:
        """Register the complete blocks of `session`: its KV stands for `tokens`, int32, exactly the held length.

        Only written KV may be remembered, so it is called behind a pass. ValueError if the length is another.
        """
        table = self._tables.get(session)
        if table is None or len(tokens) != table.num_tokens:
            raise ValueError(f"session {session} holds {self.length(session)} tokens, it cannot remember {len(tokens)}")
        first, size = len(table.nodes), self.block_tokens
        if len(tokens) // size == first:
            return
        parent = table.nodes[-1] if first else self._owners.prefixes.root
        for i in range(first, len(tokens) // size):
            key = _as_bytes(tokens[i * size : (i + 1) * size])
            parent = self._owners.register(parent, key, table.blocks[i])
            table.nodes.append(parent)

    def adopt(self, session: str, tokens: Tokens) -> int:
        """Share the registered blocks of the longest known prefix of `tokens` with `session`, which holds nothing.

        At most `len(tokens) - 1` tokens, as a pass computes one; the last block may be shared for a part of its
        tokens. Takes nothing from other sessions; the blocks that nobody owned count as free no more.
        Returns how many tokens the session now holds (0: none). ValueError if it held some before.
        """
        if session in self._tables:
            raise ValueError(f"session {session} holds {self.length(session)} tokens, it cannot adopt a prefix")
        return self.adopt_more(session, tokens)

    def adopt_more(self, session: str, tokens: Tokens) -> int:
        """As `adopt`, for a session that may hold the KV of the first of `tokens` already, and has remembered it.

        A last block that is not complete is given up if a registered one holds more of `tokens`.
        """
        table = self._tables.get(session) or _Table()
        first = len(table.nodes)
        start = first * self.block_tokens
        if table.num_tokens - start >= self.block_tokens:
            raise ValueError(f"session {session} holds complete blocks that were not remembered")
        node = table.nodes[-1] if first else self._owners.prefixes.root
        found, num_matched = self._owners.prefixes.match(node, _as_bytes(tokens[start:-1]))
        if start + num_matched <= table.num_tokens:
            return table.num_tokens
        blocks = table.blocks[:first]
        for node in found:
            blocks.append(self._owners.share(node, blocks[-1] if blocks else None))
        self._give_back(table, first)
        table.blocks, table.num_tokens = blocks, start + num_matched
        table.nodes += found[: num_matched // self.block_tokens]
        self._tables[session] = table
        return table.num_tokens

    def prefill_key(self, tokens: Tokens, num_cached: int) -> Hashable | None:
        """Identity of the block that a prefill of `tokens` which goes on at `num_cached` computes next.

        Sessions with equal keys would compute the same KV: one may wait and adopt it. None if the tokens end
        before that block is complete, as it would not be registered.
        """
        end = (num_cached // self.block_tokens + 1) * self.block_tokens
        return _as_bytes(tokens[:end]) if end <= len(tokens) else None

    # -- integrity ----------------------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Raise AssertionError unless counts, tables and registrations agree."""
        counts = [0] * self.num_blocks
        for session, table in self._tables.items():
            self._check_table(session, table)
            for block in table.blocks:
                counts[block] += 1
        self._owners.check_integrity(counts)

    def _check_table(self, session: str, table: _Table) -> None:
        assert table.num_tokens > 0, f"session {session} holds no token but has a table"
        assert len(table.blocks) == self.num_blocks_for(table.num_tokens), f"table of {session} does not fit"
        assert len(table.blocks) == len(set(table.blocks)), f"session {session} has a block twice"
        assert len(table.nodes) <= table.num_tokens // self.block_tokens, f"{session} remembers too much"
        parent = self._owners.prefixes.root
        for node, block in zip(table.nodes, table.blocks, strict=False):
            assert node.parent is parent, f"what {session} remembers is not one chain"
            assert self._owners.prefixes.node(block) is node, f"a block of {session} stands for something else"
            parent = node

    def _give_back(self, table: _Table, num_kept: int) -> None:
        """Give up the blocks of `table` behind the first `num_kept`."""
        self._owners.give_back(table.blocks[num_kept:])
        del table.blocks[num_kept:]

    def _must_copy(self, table: _Table, num_tokens: int) -> bool:
        """True if growing to `num_tokens` writes into a block that others own too."""
        at, offset = divmod(table.num_tokens, self.block_tokens)
        return num_tokens > table.num_tokens and offset > 0 and self._owners.count(table.blocks[at]) > 1


def token_slots(blocks: Sequence[int], block_tokens: int, num_tokens: int) -> Slots:
    """Slot of every one of a session's first `num_tokens` tokens, int64 `[num_tokens]`."""
    first = np.asarray(blocks, dtype=np.int64) * block_tokens
    return (first[:, None] + np.arange(block_tokens)).reshape(-1)[:num_tokens]


def _as_bytes(tokens: Tokens) -> bytes:
    """The tokens as int32, as a key of `PrefixTree`."""
    return np.asarray(tokens, np.int32).tobytes()
