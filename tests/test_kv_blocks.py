"""The accounting of KV blocks: every session always reads its own tokens, and blocks are neighbours where they can."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.factories import ids
from wisp_plugin.errors import CapacityError
from wisp_plugin.kv_blocks import BlockPool, token_slots

NUM_BLOCKS, BLOCK_TOKENS = 12, 4
SESSIONS = st.sampled_from(["a", "b", "c", "d"])
PROMPTS = [(0,) * 20, (0,) * 5 + (1,) * 15, (1, 0) * 10, (0,) * 12 + (1, 2) * 4]
TOKENS = st.builds(
    lambda prompt, length, tail: [*prompt[:length], *tail],
    st.sampled_from(PROMPTS),
    st.integers(0, 20),
    st.lists(st.integers(0, 2), max_size=5),
).filter(len)


def num_common(left: list[int], right: list[int]) -> int:
    return sum(itertools.takewhile(bool, (a == b for a, b in zip(left, right, strict=False))))


class PoolMachine(RuleBasedStateMachine):
    """Drives a pool and what its owner would do with the tensors: `contents` is the token that lies in each slot.

    `tokens` are those of each session, `num_known` how many of them lie in complete blocks that were remembered.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS, BLOCK_TOKENS)
        self.contents = np.full(self.pool.num_tokens, -1)
        self.tokens: dict[str, list[int]] = {}
        self.num_known: dict[str, int] = {}

    def owners(self, block: int) -> list[str]:
        return [session for session in self.tokens if block in self.pool.blocks(session)]

    def slots(self, session: str) -> np.ndarray:
        return token_slots(self.pool.blocks(session), BLOCK_TOKENS, self.pool.length(session))

    def num_missing(self, session: str, num_tokens: int) -> int:
        blocks, held = self.pool.blocks(session), len(self.tokens.get(session, ()))
        is_copied = held % BLOCK_TOKENS and num_tokens > held and len(self.owners(blocks[-1])) > 1
        return -(-num_tokens // BLOCK_TOKENS) - len(blocks) + bool(is_copied)

    @rule(news=st.dictionaries(SESSIONS, st.lists(st.integers(0, 2), min_size=1, max_size=14), min_size=1))
    def run_pass(self, news: dict[str, list[int]]) -> None:
        """All sessions grow, then the copies are made, then the new tokens are written: as in a verifier."""
        copies = []
        grown: dict[str, int] = {}
        for session, new in news.items():
            held = len(self.tokens.get(session, ()))
            before, missing = self.pool.blocks(session), self.num_missing(session, held + len(new))
            assert self.pool.num_missing(session, held + len(new)) == missing
            if missing > self.pool.num_free:
                with pytest.raises(CapacityError, match="free"):
                    self.pool.extend(session, held + len(new))
                assert self.pool.blocks(session) == before
                continue
            num_free = self.pool.num_free
            copies += self.pool.extend(session, held + len(new))
            assert self.pool.num_free == num_free - missing
            grown[session] = held
            self.tokens[session] = [*self.tokens.get(session, ()), *new]
        blocks = self.contents.reshape(NUM_BLOCKS, BLOCK_TOKENS)
        for source, destination in copies:
            blocks[destination] = blocks[source]
        for session, held in grown.items():
            for block in self.pool.blocks(session)[held // BLOCK_TOKENS :]:
                assert self.owners(block) == [session], "a shared block is written"
            self.contents[self.slots(session)[held:]] = self.tokens[session][held:]

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        session = data.draw(st.sampled_from(sorted(self.tokens)))
        kept = data.draw(st.integers(1, len(self.tokens[session])))
        before = self.pool.blocks(session)
        self.pool.truncate(session, kept)
        assert self.pool.blocks(session) == before[: -(-kept // BLOCK_TOKENS)]
        del self.tokens[session][kept:]
        self.num_known[session] = min(self.num_known.get(session, 0), kept // BLOCK_TOKENS * BLOCK_TOKENS)

    @rule(session=SESSIONS)
    def release(self, session: str) -> None:
        num_free, num_exclusive = self.pool.num_free, self.pool.num_exclusive(session)
        self.pool.release(session)
        assert self.pool.num_free == num_free + num_exclusive
        self.tokens.pop(session, None)
        self.num_known.pop(session, None)

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def remember(self, data: st.DataObject) -> None:
        session = data.draw(st.sampled_from(sorted(self.tokens)))
        tables = {other: self.pool.blocks(other) for other in self.tokens}
        self.pool.remember(session, ids(*self.tokens[session]))
        self.num_known[session] = len(self.tokens[session]) // BLOCK_TOKENS * BLOCK_TOKENS
        assert tables == {other: self.pool.blocks(other) for other in self.tokens}

    @rule(session=SESSIONS, tokens=TOKENS, goes_on=st.booleans())
    def adopt(self, session: str, tokens: list[int], goes_on: bool) -> None:
        held = self.tokens.get(session, [])
        if held and not goes_on:
            with pytest.raises(ValueError, match="cannot adopt"):
                self.pool.adopt(session, ids(*tokens))
            return
        if held:  # in the middle of the prefill of more tokens
            self.remember_all(session)
            tokens = [*held, *tokens]
        others = {other: self.pool.blocks(other) for other in self.tokens if other != session}
        num_free, num_exclusive = self.pool.num_free, self.pool.num_exclusive(session)
        method = self.pool.adopt_more if held else self.pool.adopt
        num_held = method(session, ids(*tokens))
        assert len(held) <= num_held <= max(len(held), len(tokens) - 1)
        best = max((num_common(tokens[:-1], self.tokens[s][: self.num_known.get(s, 0)]) for s in others), default=0)
        assert num_held >= best, "what a session holds can be adopted"
        assert others == {other: self.pool.blocks(other) for other in others}
        assert self.pool.num_free <= num_free + num_exclusive
        if num_held:
            self.tokens[session] = tokens[:num_held]
            self.num_known[session] = num_held // BLOCK_TOKENS * BLOCK_TOKENS

    def remember_all(self, session: str) -> None:
        self.pool.remember(session, ids(*self.tokens[session]))
        self.num_known[session] = len(self.tokens[session]) // BLOCK_TOKENS * BLOCK_TOKENS

    @invariant()
    def every_session_reads_its_own_tokens(self) -> None:
        self.pool.check_integrity()
        assert set(self.pool.sessions()) == set(self.tokens)
        for session, tokens in self.tokens.items():
            assert self.contents[self.slots(session)].tolist() == tokens
        owned = {block for session in self.tokens for block in self.pool.blocks(session)}
        assert self.pool.num_free == NUM_BLOCKS - len(owned)


PoolMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)
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
    prompt = np.arange(200, dtype=np.int32) // 3

    def tables() -> dict[str, tuple[int, ...]]:
        pool = BlockPool(32, 4)
        for step in range(90):
            session = f"s{step % 5}"
            if step % 7 == 3:
                pool.truncate(session, pool.length(session) // 2)
            elif step % 11 == 6:
                pool.release(session)
                pool.adopt(session, prompt[: step % 40 + 5])
            elif pool.num_missing(session, pool.length(session) + 5) <= pool.num_free:
                pool.extend(session, pool.length(session) + 5)
                pool.remember(session, prompt[: pool.length(session)])
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
    with pytest.raises(AssertionError, match="owners"):
        pool.check_integrity()


def fill(pool: BlockPool, session: str, *tokens: int) -> None:
    """`session` computes `tokens` in one pass."""
    assert pool.extend(session, len(tokens)) == []
    pool.remember(session, ids(*tokens))


def test_an_equal_prefix_is_held_once() -> None:
    pool = BlockPool(16, 4)
    fill(pool, "a", *range(10))
    assert pool.adopt("b", ids(*range(8), 99, 98)) == 8
    assert pool.blocks("b") == pool.blocks("a")[:2]
    assert (pool.num_free, pool.num_exclusive("a"), pool.num_exclusive("b")) == (13, 1, 0)
    assert pool.extend("b", 10) == []  # goes on in a block of its own
    assert pool.num_free == 12
    pool.release("a")
    assert (pool.num_free, pool.length("b")) == (13, 10)


def test_a_pass_always_computes_a_token() -> None:
    pool = BlockPool(16, 4)
    fill(pool, "a", *range(8))
    assert [pool.adopt(f"b{n}", ids(*range(n))) for n in (1, 2, 8, 9)] == [0, 1, 7, 8]
    assert "b1" not in pool.sessions()


def test_a_block_that_is_equal_in_part_is_shared_until_it_is_written() -> None:
    pool = BlockPool(16, 4)
    fill(pool, "a", *range(8))
    fill(pool, "c", 0, 1, 2, 3, 4, 7, 7, 7)
    assert pool.adopt("b", ids(0, 1, 2, 3, 4, 5, 9, 9)) == 6  # nearest to a's second block, not to c's
    assert pool.blocks("b") == pool.blocks("a")
    assert (pool.num_missing("b", 6), pool.num_missing("b", 8), pool.num_missing("b", 9)) == (0, 1, 2)
    num_free = pool.num_free
    ((source, destination),) = pool.extend("b", 8)
    assert (source, destination) == (pool.blocks("a")[1], pool.blocks("b")[1])
    assert source != destination
    assert pool.num_free == num_free - 1
    pool.check_integrity()


def test_who_is_cut_back_into_a_shared_block_goes_on_in_a_copy() -> None:
    pool = BlockPool(16, 4)
    fill(pool, "a", *range(8))
    pool.adopt("b", ids(*range(9)))
    before = pool.blocks("b")
    pool.truncate("a", 6)
    assert pool.extend("a", 7) == [(before[1], pool.blocks("a")[1])]
    assert pool.blocks("b") == before


def test_a_block_that_its_only_owner_writes_again_is_found_no_more() -> None:
    pool = BlockPool(16, 4)
    fill(pool, "a", *range(8))
    pool.truncate("a", 6)
    assert pool.extend("a", 8) == []
    pool.remember("a", ids(0, 1, 2, 3, 4, 5, 9, 9))
    assert pool.adopt("b", ids(*range(9))) == 6
    assert pool.adopt("c", ids(0, 1, 2, 3, 4, 5, 9, 9, 9)) == 8
    pool.check_integrity()


def test_blocks_of_the_gone_are_found_until_they_are_handed_out() -> None:
    pool = BlockPool(8, 4)
    fill(pool, "a", *range(16))
    pool.release("a")
    assert pool.num_free == 8
    pool.extend("x", 16)  # plain blocks are enough
    pool.release("x")
    assert pool.adopt("b", ids(*range(20))) == 16
    assert pool.num_free == 4
    pool.release("b")
    pool.extend("y", 32)
    assert pool.adopt("c", ids(*range(20))) == 0
    pool.check_integrity()


def test_the_oldest_prefix_goes_first_and_its_end_before_its_beginning() -> None:
    pool = BlockPool(8, 4)
    for session, start in (("a", 0), ("b", 100)):
        fill(pool, session, *range(start, start + 16))
    pool.release("a")
    pool.release("b")
    pool.adopt("a", ids(*range(20)))
    pool.release("a")  # now b's blocks are the oldest
    pool.extend("x", 8)
    assert pool.adopt("b", ids(*range(100, 120))) == 8
    assert pool.adopt("a", ids(*range(20))) == 16


def test_a_lost_block_computed_again_leads_to_those_behind_it() -> None:
    pool = BlockPool(4, 4)
    fill(pool, "a", *range(12))
    pool.adopt("b", ids(*range(13)))
    pool.release("a")
    pool.truncate("b", 6)
    pool.extend("b", 8)  # the second block is written again, the third waits without an owner
    assert pool.adopt("c", ids(*range(13))) == 4
    pool.release("c")
    pool.remember("b", ids(*range(8)))
    assert pool.adopt("c", ids(*range(13))) == 12
    pool.check_integrity()


def test_of_two_that_computed_the_same_one_block_is_kept() -> None:
    pool = BlockPool(8, 4)
    fill(pool, "a", *range(8))
    fill(pool, "b", *range(8))
    kept = pool.blocks("b")
    pool.release("a")
    assert pool.adopt("c", ids(*range(9))) == 8
    assert pool.blocks("c") == kept
    pool.check_integrity()


def test_a_prefill_takes_what_another_has_finished_meanwhile() -> None:
    pool = BlockPool(16, 4)
    prompt = ids(*range(20))
    fill(pool, "a", *range(6))
    fill(pool, "b", *range(15))
    assert pool.adopt_more("a", prompt) == 15 - 15 % 4
    assert pool.blocks("a")[1:] == pool.blocks("b")[1:3]
    assert pool.adopt_more("a", prompt) == 12
    pool.extend("a", 20)
    with pytest.raises(ValueError, match="not remembered"):
        pool.adopt_more("a", prompt)


def test_a_prefill_key_is_the_next_block_with_all_before_it() -> None:
    pool = BlockPool(16, 4)
    prompt, other = ids(*range(10)), ids(*range(6), 9, 9, 9)
    assert pool.prefill_key(prompt, 0) == pool.prefill_key(other, 3)
    assert pool.prefill_key(prompt, 4) != pool.prefill_key(other, 4)
    assert pool.prefill_key(prompt, 4) == pool.prefill_key(prompt.copy(), 7)
    assert pool.prefill_key(prompt, 8) is None


def test_tokens_of_another_dtype_are_the_same_tokens() -> None:
    pool = BlockPool(4, 4)
    fill(pool, "a", *range(8))
    assert pool.adopt("b", np.arange(9)) == 8


def test_remembering_needs_exactly_the_held_length() -> None:
    pool = BlockPool(4, 4)
    pool.extend("a", 6)
    with pytest.raises(ValueError, match="holds 6 tokens, it cannot remember 5"):
        pool.remember("a", ids(*range(5)))
    with pytest.raises(ValueError, match="holds 0"):
        pool.remember("b", ids(1))
