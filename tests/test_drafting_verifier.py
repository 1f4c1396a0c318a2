"""The server drafts before it verifies: what is wanted, with a KV memory of its own, and never a wrong token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.factories import ids, make_draft, make_open, session_id
from tests.fakes import FakeClock, FakeReply, FakeVerifier, draft_token, make_engine, target_alone, target_token
from wisp_plugin.drafting_verifier import DraftingVerifier, DraftLimits
from wisp_plugin.estimator import Costs, Estimator
from wisp_plugin.messages import Mode, PassItem, Sampling

STEP = Costs(memory=(1e-3, 0, 0, 0, 0, 0), arithmetic=(0, 0, 0, 0, 0, 0))


def serve(num_blocks: int, draft_blocks: int, seed: int, num_sessions: int = 4, good: bool = True) -> tuple[Any, Any]:
    """Sessions whose devices draft now and then beside a server that drafts too; replies and the engine."""
    random, clock = np.random.default_rng(seed), FakeClock()

    def tick() -> None:
        clock.now_s += 0.01

    verifier = FakeVerifier(num_blocks, on_run=tick)
    draft = FakeVerifier(draft_blocks, on_run=tick, chooses=target_token if good else draft_token)
    engine = make_engine(verifier, clock, server_draft=draft)
    replies = [FakeReply() for _ in range(num_sessions)]
    for number, reply in enumerate(replies):
        prompt = random.integers(0, 7, 5 + 5 * number).tolist()
        engine.submit(make_open(session=session_id(number), prompt=prompt, max_new_tokens=20), reply)
    for _ in range(300):
        for number, reply in enumerate(replies):
            if reply.commits and not reply.ended and random.random() < 0.3:
                tokens = random.integers(0, 7, 3).tolist()
                engine.submit(make_draft(reply.commits[-1].end, *tokens, session=session_id(number)), FakeReply())
        if not engine.step():
            clock.now_s += 0.01
        draft.pool.check_integrity()
    random = np.random.default_rng(seed)
    for number, reply in enumerate(replies):
        prompt = random.integers(0, 7, 5 + 5 * number)
        assert reply.tokens == target_alone(prompt, len(prompt) + 20)[len(prompt) :]
    assert not draft.pool.sessions()
    assert not verifier.pool.sessions()
    return engine, draft


class TestServing:
    @pytest.mark.parametrize("good", [True, False])
    @pytest.mark.parametrize("seed", range(4))
    def test_the_targets_own_tokens_in_fewer_passes(self, good: bool, seed: int) -> None:
        engine, _ = serve(256, 256, seed, good=good)
        totals = engine.telemetry.totals
        assert totals.server_accepted_tokens > 0
        assert totals.server_accepted_tokens <= totals.server_drafted_tokens
        assert totals.commits < totals.committed_tokens * (0.8 if good else 0.95)

    @pytest.mark.parametrize("seed", range(4))
    def test_little_memory_costs_drafts_and_nothing_else(self, seed: int) -> None:
        engine, _ = serve(256, 8, seed)
        assert engine.telemetry.totals.committed_tokens == 80

    def test_no_memory_for_anybody_is_no_drafts(self) -> None:
        engine, draft = serve(256, 1, 0)
        assert engine.telemetry.totals.server_accepted_tokens == 0
        assert not draft.passes

    @pytest.mark.parametrize("seed", range(3))
    def test_a_target_short_of_memory(self, seed: int) -> None:
        serve(14, 64, seed)


class TestDraftingVerifier:
    def make(self, **options: Any) -> tuple[DraftingVerifier, FakeVerifier]:
        draft = FakeVerifier(64)
        return DraftingVerifier(FakeVerifier(64), draft, draft.pool, Estimator(STEP), FakeClock(), **options), draft

    def item(self, tokens: Any, num_cached: int = 0, to_draft: int = 2, session: str = session_id(1)) -> PassItem:
        return PassItem(session, np.asarray(tokens, np.int32), num_cached, 0, Sampling(), num_to_draft=to_draft)

    def test_it_drafts_what_is_wanted_and_catches_up(self) -> None:
        drafting, draft = self.make()
        (outcome,) = drafting.run([self.item([1, 2, 3])])
        assert outcome.drafted is not None
        assert outcome.drafted.tolist() == outcome.chosen[:2].tolist() == target_alone(ids(1, 2, 3), 5)[3:]
        assert len(outcome.chosen) == 3
        committed = [1, 2, 3, *outcome.chosen.tolist()]
        drafting.run([self.item(committed, 5, to_draft=0)])
        assert len(draft.passes) == 2  # nobody wanted anything
        further = [*committed, target_token(ids(*committed))]
        drafting.run([self.item(further, 6)])
        assert [item.num_cached for (item,) in draft.passes[2:]] == [4, 7]  # its own last token had no KV yet

    def test_a_rejected_chain_is_cut(self) -> None:
        drafting, draft = self.make()
        drafting.run([self.item([1, 2, 3])])
        drafting.run([self.item([1, 2, 3, 6, 6], 3)])
        assert draft.passes[-2][0].num_cached in (3, 4)
        assert draft.passes[-2][0].tokens.tolist() == [1, 2, 3, 6, 6]

    def test_a_session_beyond_its_context_gets_nothing(self) -> None:
        drafting, draft = self.make(limits=DraftLimits(max_context_tokens=4))
        (outcome,) = drafting.run([self.item([1, 2, 3])])
        assert outcome.drafted is None
        assert len(outcome.chosen) == 1
        assert not draft.passes

    def test_a_long_prompt_is_caught_up_with_in_pieces(self) -> None:
        drafting, draft = self.make(limits=DraftLimits(catch_up_tokens=4))
        prompt = [1, 2, 3, 4, 5, 6]
        (outcome,) = drafting.run([self.item(prompt)])
        assert outcome.drafted is None
        (outcome,) = drafting.run([self.item([*prompt, target_token(ids(*prompt))], 6)])
        assert outcome.drafted is not None
        assert [item.num_cached for (item,) in draft.passes] == [0, 4, 7]

    def test_who_lacks_little_is_not_kept_out_by_a_long_prompt(self) -> None:
        drafting, _ = self.make(limits=DraftLimits(catch_up_tokens=6))
        long, short = self.item([1] * 8), self.item([1, 2, 3], session=session_id(2))
        outcomes = drafting.run([long, short])
        assert [o.drafted is None for o in outcomes] == [True, False]

    def test_one_without_room_keeps_nobody_else_out(self) -> None:
        drafting, draft = self.make()
        taken = (draft.pool.num_free - 3) * 4
        draft.pool.extend("taken", taken)
        sessions = [self.item([1] * 30, session=session_id(1)), self.item([1, 2, 3], session=session_id(2))]
        assert [o.drafted is None for o in drafting.run(sessions)] == [True, False]

    def test_who_is_idle_makes_room(self) -> None:
        drafting, draft = self.make()
        drafting.run([self.item([1] * 20, session=session_id(1))])
        draft.pool.extend("taken", draft.pool.num_free * 4)
        (outcome,) = drafting.run([self.item([1] * 10, session=session_id(2))])
        assert outcome.drafted is not None
        assert session_id(1) not in draft.pool.sessions()

    def test_tokens_that_the_draft_model_does_not_know(self) -> None:
        drafting, draft = self.make(limits=DraftLimits(vocab_size=5))
        banned = Sampling(temperature=0.5, banned_token_ids=(2, 6))
        known = replace(self.item([1, 2, 3]), sampling=banned)
        unknown = self.item([1, 6, 3], session=session_id(2))
        outcomes = drafting.run([known, unknown])
        assert [o.drafted is None for o in outcomes] == [False, True]
        assert {item.sampling.banned_token_ids for items in draft.passes for item in items} == {(2,)}

    def test_release_is_of_both(self) -> None:
        drafting, draft = self.make()
        drafting.run([self.item([1, 2, 3])])
        assert draft.pool.sessions()
        drafting.release(session_id(1))
        assert not draft.pool.sessions()
        drafting.release(session_id(1))


def test_sync_sessions_are_served_as_before() -> None:
    clock = FakeClock()
    engine = make_engine(FakeVerifier(64), clock, server_draft=FakeVerifier(64))
    reply = FakeReply()
    engine.submit(make_open(mode=Mode.SYNC), reply)
    for _ in range(5):
        engine.step()
        clock.now_s += 0.01
    assert [len(commit.tokens) for commit in reply.commits] == [1]
