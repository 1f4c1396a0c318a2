"""Plans: budgets, order, chunks, memory. The fake verifier refuses a plan that does not fit into KV memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.factories import make_config, make_draft, make_open, make_session, same, session_id
from tests.fakes import FakeClock, FakeReply, FakeVerifier, make_engine, target_alone
from wisp_plugin.messages import BatchPlan, Mode
from wisp_plugin.scheduler import KV_IDLE_S, Continuous, Scheduler
from wisp_plugin.server_session import ServerSession


class Bench:
    """A scheduler and a fake verifier without an engine; a pass takes 10 ms."""

    def __init__(self, num_blocks: int = 256, **config: Any) -> None:
        self.verifier = FakeVerifier(num_blocks, block_tokens=4)
        self.scheduler = Scheduler(Continuous(), make_config(**config), self.verifier.pool)
        self.now_s = 0.0
        self.all: list[ServerSession] = []

    def add(self, num_prompt: int = 3, opened_s: float | None = None, **values: Any) -> ServerSession:
        number = len(self.all)
        prompt = np.arange(num_prompt) + 5 * number
        opened_s = self.now_s if opened_s is None else opened_s
        session = make_session(opened_s, prompt=prompt, session=session_id(number), **values)
        self.all.append(session)
        self.scheduler.add(session)
        return session

    def draft(self, session: ServerSession, *tokens: int) -> None:
        session.on_draft(make_draft(session.num_committed, *tokens, session=session.id), self.now_s)

    def draft_well(self, session: ServerSession, num_tokens: int) -> None:
        end = session.num_committed
        self.draft(session, *target_alone(session.committed, end + num_tokens)[end:])

    def step(self) -> BatchPlan:
        plan = self.scheduler.plan(self.now_s)
        for session in plan.evict:
            self.verifier.release(session)
        self.scheduler.evict(plan.evict)
        outcomes = self.verifier.run(plan.items)
        for commit in self.scheduler.complete(plan, outcomes, self.now_s, 0.01):
            if commit.status:
                self.scheduler.remove(commit.session)
                self.verifier.release(commit.session)
        self.now_s += 0.01
        return plan


def members(plan: BatchPlan, sessions: Sequence[ServerSession]) -> list[int]:
    """Places in `sessions` of the members of a pass, in order of service."""
    return [[s.id for s in sessions].index(item.session) for item in plan.items]


def test_everyone_every_pass_and_nobody_when_nobody_is_due() -> None:
    bench = Bench()
    assert bench.scheduler.plan(0.0) == BatchPlan()
    for _ in range(5):
        bench.add()
    bench.add(mode=Mode.SYNC)
    assert [len(bench.step().items) for _ in range(9)] == [6, *[5] * 7, 0]


def test_prefill_in_chunks_within_the_token_budget() -> None:
    bench = Bench(max_pass_tokens=8)
    running = bench.add(2, max_new_tokens=50)
    bench.step()
    long = bench.add(30)
    for _ in range(4):
        plan = bench.step()
        assert members(plan, bench.all) == [0, 1]  # decoding before prefill
        assert [item.num_new_tokens for item in plan.items] == [1, 7]
        assert plan.items[1].is_prefill_chunk
    assert not bench.step().items[1].is_prefill_chunk
    assert (running.num_committed, long.num_committed) == (8, 31)


def test_drafts_count_and_what_exceeds_the_budget_waits() -> None:
    bench = Bench(max_pass_tokens=4)
    session = bench.add(3)
    bench.step()
    bench.draft_well(session, 6)
    assert bench.step().items[0].num_draft_tokens == 3
    assert session.num_committed == 8
    assert bench.step().items[0].num_draft_tokens == 2  # of six: three accepted, one equal to the bonus, two left


def test_at_most_max_pass_sessions_and_everybody_in_turn() -> None:
    bench = Bench(max_pass_sessions=2)
    for _ in range(5):
        bench.add(1, max_new_tokens=50)
    served = [members(bench.step(), bench.all) for _ in range(15)]
    assert all(len(each) == 2 for each in served)
    for i in range(13):  # whoever is due waits for at most two passes
        assert set().union(*served[i : i + 3]) == set(range(5))


def test_sync_is_first_in_first_out() -> None:
    bench = Bench(max_pass_sessions=2)
    for _ in range(5):
        bench.add(mode=Mode.SYNC)
    while bench.step().items:
        pass
    for number in (3, 0, 4, 1, 2):
        bench.now_s += 0.001
        bench.draft(bench.all[number], 1)
    assert [members(bench.step(), bench.all) for _ in range(3)] == [[3, 0], [4, 1], [2]]


def test_equal_calls_give_equal_plans() -> None:
    def plans() -> list[BatchPlan]:
        bench = Bench(num_blocks=10, max_pass_tokens=20, max_pass_sessions=3)
        for number in range(5):
            bench.add(2 + number, max_new_tokens=25)  # equal times
        made = []
        for turn in range(60):
            for session in bench.scheduler.sessions:
                bench.draft_well(session, turn % 3 // 2)
            made.append(bench.step())
        return made

    first, second = plans(), plans()
    assert sum(len(plan.evict) for plan in first) > 0
    for left, right in zip(first, second, strict=True):
        assert left.evict == right.evict
        assert all(same(*pair) for pair in zip(left.items, right.items, strict=True))


def test_the_oldest_runs_in_every_pass_whatever_others_need() -> None:
    bench = Bench(num_blocks=8)  # 32 tokens; two sessions do not fit at their full length
    oldest = bench.add(4, max_new_tokens=20)
    for _ in range(3):
        bench.add(10, max_new_tokens=15)
    for _ in range(20):
        assert 0 in members(bench.step(), bench.all)
    assert oldest.finished
    for _ in range(400):
        bench.step()
    assert all(session.finished for session in bench.all)


def test_an_older_session_takes_its_blocks_back_from_a_younger_one() -> None:
    bench = Bench(num_blocks=4)
    old, young = bench.add(4, mode=Mode.SYNC), bench.add(6, max_new_tokens=5)
    bench.step()
    bench.now_s += KV_IDLE_S  # the old one's client is slow: its memory is free for others now
    bench.add(7, max_new_tokens=2)
    plan = bench.step()
    assert plan.evict == (old.id,)
    assert members(plan, bench.all) == [1, 2]
    bench.draft(old)
    plan = bench.step()
    assert 0 in members(plan, bench.all)
    assert young.id not in plan.evict  # the youngest goes first


def test_drafts_take_only_blocks_that_nobody_else_needs() -> None:
    bench = Bench(num_blocks=4)
    first, _ = bench.add(3, max_new_tokens=12), bench.add(6, max_new_tokens=12)
    bench.step()
    bench.draft_well(first, 8)
    plan = bench.step()
    assert len(plan.items) == 2
    assert plan.evict == ()
    assert plan.items[0].num_draft_tokens == 4  # the first fills its second block; the other two are the second's


def test_a_session_without_acknowledgements_pauses_and_goes_on() -> None:
    bench = Bench(num_blocks=64, max_unacked_tokens=128)
    session = bench.add(max_new_tokens=200)
    for _ in range(150):
        bench.step()
    assert session.num_committed == 3 + 128
    bench.draft(session)
    for _ in range(72):
        bench.step()
    assert session.finished


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(1, 12), st.sampled_from(Mode)), min_size=1, max_size=6),
    st.integers(1, 20),
    st.integers(1, 4),
    st.integers(8, 24),
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 6)), max_size=60),
)
def test_limits_hold_and_all_get_through(
    sizes: list[tuple[int, int, Mode]],
    max_pass_tokens: int,
    max_pass_sessions: int,
    num_blocks: int,
    drafts: list[tuple[int, int]],
) -> None:
    bench = Bench(num_blocks, max_pass_tokens=max_pass_tokens, max_pass_sessions=max_pass_sessions)
    for num_prompt, max_new_tokens, mode in sizes:
        bench.add(num_prompt, max_new_tokens=max_new_tokens, mode=mode)
    for turn in range(2000):
        number, num_drafts = drafts[turn % len(drafts)] if drafts else (0, 0)
        if number < len(bench.all) and not bench.all[number].finished:
            bench.draft_well(bench.all[number], num_drafts)
        if all(session.finished for session in bench.all):
            break
        if not bench.step().items:
            for session in bench.scheduler.sessions:
                bench.draft(session)
            bench.now_s += 0.5
    for session in bench.all:
        assert session.committed.tolist() == target_alone(session.opened.tokens, session.opened.end)
    for items in bench.verifier.passes:
        assert len(items) <= max_pass_sessions
        assert sum(item.num_new_tokens for item in items) <= max_pass_tokens


@pytest.mark.parametrize(
    ("limit", "num_drafts"),
    [({"max_pass_tokens": 8}, 0), ({"max_pass_sessions": 8}, 0), ({"max_pass_tokens": 256}, 63)],
)
def test_a_newcomer_is_not_shut_out_by_running_sessions(limit: dict[str, int], num_drafts: int) -> None:
    bench = Bench(num_blocks=4096, **limit)
    running = [bench.add(1, max_new_tokens=2000) for _ in range(8)]
    bench.step()
    newcomer = bench.add(3)
    for _ in range(20):
        for session in running:
            bench.draft_well(session, num_drafts)
        bench.step()
    assert newcomer.num_committed > 3


def test_a_paused_session_does_not_keep_its_memory_from_others() -> None:
    bench = Bench(num_blocks=40, max_unacked_tokens=128)
    bench.add(max_new_tokens=150)
    for _ in range(130):
        bench.step()
    other = bench.add(40)
    bench.now_s += KV_IDLE_S
    bench.step()
    assert other.num_committed == 41


def test_a_long_prompt_does_not_silence_those_who_decode() -> None:
    """A chunk of prefill is a turn: the next chunk queues behind the sessions that wait."""
    clock, verifier = FakeClock(), FakeVerifier(num_blocks=1000)
    engine = make_engine(verifier, clock, make_config(max_pass_tokens=64))
    replies = [FakeReply() for _ in range(3)]
    for number, reply in enumerate(replies):
        engine.submit(make_open(session=session_id(number), max_new_tokens=200), reply)
    engine.step()
    engine.submit(make_open(np.arange(1500) % 7, session=session_id(9), max_new_tokens=5), FakeReply())
    for _ in range(30):
        before = [len(reply.tokens) for reply in replies]
        clock.now_s += 0.05
        engine.step()
        assert all(len(reply.tokens) > count for reply, count in zip(replies, before, strict=True))
