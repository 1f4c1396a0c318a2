"""The accounting of KV blocks: against a plain model, and the promise of neighbouring blocks."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from wisp_plugin.errors import CapacityError
from wisp_plugin.kv_blocks import BlockPool

NUM_BLOCKS, BLOCK_TOKENS = 12, 4
SESSIONS = st.sampled_from(["a", "b", "c", "d"])


class PoolMachine(RuleBasedStateMachine):
    """Drives a pool and, beside it, a dict of lengths; every token must keep its place while it is held."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS, BLOCK_TOKENS)
        self.lengths: dict[str, int] = {}

    def num_used(self) -> int:
        return sum(-(-length // BLOCK_TOKENS) for length in self.lengths.values())

    @rule(session=SESSIONS, more=st.integers(1, 20))
    def extend(self, session: str, more: int) -> None:
        before, wanted = self.pool.blocks(session), self.lengths.get(session, 0) + more
        missing = -(-wanted // BLOCK_TOKENS) - len(before)
        assert self.pool.num_missing(session, wanted) == missing
        if missing > NUM_BLOCKS - self.num_used():
            with pytest.raises(CapacityError, match="free"):
                self.pool.extend(session, wanted)
            assert self.pool.blocks(session) == before
        else:
            self.pool.extend(session, wanted)
            self.lengths[session] = wanted
            assert self.pool.blocks(session)[: len(before)] == before

    @precondition(lambda self: self.lengths)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        session = data.draw(st.sampled_from(sorted(self.lengths)))
        kept = data.draw(st.integers(0, self.lengths[session]))
        before = self.pool.blocks(session)
        self.pool.truncate(session, kept)
        assert self.pool.blocks(session) == before[: -(-kept // BLOCK_TOKENS)]
        self.lengths[session] = kept
        if not kept:
            del self.lengths[session]

    @rule(session=SESSIONS)
    def release(self, session: str) -> None:
        self.pool.release(session)
        self.lengths.pop(session, None)

    @invariant()
    def agrees_with_the_model(self) -> None:
        self.pool.check_integrity()
        assert set(self.pool.sessions()) == set(self.lengths)
        assert {s: self.pool.length(s) for s in self.lengths} == self.lengths
        assert self.pool.num_free == NUM_BLOCKS - self.num_used()


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPoolMachine = PoolMachine.TestCase


def is_contiguous(blocks: tuple[int, ...]) -> bool:
    return all(right == left + 1 for left, right in itertools.pairwise(blocks))


def test_growing_sessions_stay_contiguous_while_there_is_room() -> None:
    pool = BlockPool(64, 4)
    for length in range(1, 25):  # four sessions grow in turn, token by token, to 6 blocks each
        for session in "abcd":
            pool.extend(session, length)
    assert all(is_contiguous(pool.blocks(session)) for session in "abcd")


def test_a_full_pool_is_used_to_the_last_block() -> None:
    pool = BlockPool(6, 2)
    for session in "abc":
        pool.extend(session, 4)
    pool.release("b")
    pool.truncate("a", 1)
    pool.extend("d", 6)
    assert pool.num_free == 0
    assert not is_contiguous(pool.blocks("d"))
    pool.check_integrity()


def test_the_same_calls_give_the_same_tables() -> None:
    def tables() -> dict[str, tuple[int, ...]]:
        pool = BlockPool(32, 4)
        for step in range(60):
            session = f"s{step % 5}"
            if step % 7 == 3:
                pool.truncate(session, pool.length(session) // 2)
            elif pool.num_missing(session, pool.length(session) + 5) <= pool.num_free:
                pool.extend(session, pool.length(session) + 5)
        return {session: pool.blocks(session) for session in pool.sessions()}

    assert tables() == tables()


def test_unknown_sessions_hold_nothing() -> None:
    pool = BlockPool(4, 4)
    assert (pool.length("x"), pool.blocks("x"), pool.num_missing("x", 9)) == (0, (), 3)
    pool.release("x")
    assert pool.sessions() == ()


def test_misuse_is_refused() -> None:
    pool = BlockPool(4, 4)
    pool.extend("a", 6)
    with pytest.raises(ValueError, match="cannot grow to 5"):
        pool.extend("a", 5)
    with pytest.raises(ValueError, match="cannot shrink to 7"):
        pool.truncate("a", 7)
    with pytest.raises(ValueError, match="cannot grow to 0"):
        pool.extend("b", 0)
    with pytest.raises(ValueError, match="empty"):
        BlockPool(0, 4)


def test_integrity_check_sees_a_block_owned_twice() -> None:
    pool = BlockPool(8, 4)
    pool.extend("a", 4)
    pool.extend("b", 4)
    pool._tables["b"].blocks[0] = pool.blocks("a")[0]
    with pytest.raises(AssertionError, match="twice"):
        pool.check_integrity()
