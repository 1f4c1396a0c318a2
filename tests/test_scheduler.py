"""Plans and what they give: turns, chunks, prices and figures. Properties: see test_scheduler_properties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.factories import make_config, make_open, session_id
from tests.fakes import FakeClock, FakeReply, FakeVerifier, ServingLoop, make_engine
from wisp_plugin.errors import ConfigError
from wisp_plugin.estimator import Costs
from wisp_plugin.kv_admission import IDLE_S
from wisp_plugin.messages import BatchPlan, Mode, Slo, Status
from wisp_plugin.pass_features import pass_features
from wisp_plugin.scheduler import POLICIES, make_scheduler
from wisp_plugin.wisp_policy import WispParameters

COSTS = (
    Costs((0.01, 0, 0, 0, 0, 0), (0.002, 0, 0.001, 0, 0, 0)),
    Costs((0.036, 0, 0, 0, 0, 1.3e-7), (0.004, 0, 0.0003, 0, 0, 0)),
)


@pytest.mark.parametrize("policy", ["continuous", "fcfs", "wisp"])
@pytest.mark.parametrize(
    ("limit", "num_drafts"),
    [({"max_pass_tokens": 8}, 0), ({"max_pass_sessions": 8}, 0), ({"max_pass_tokens": 32}, 3)],
)
@pytest.mark.parametrize("num_prompt", [3, 40])
def test_a_newcomer_is_not_shut_out(policy: str, limit: dict[str, int], num_drafts: int, num_prompt: int) -> None:
    loop = ServingLoop(num_blocks=4096, policy=policy, static_batch_sessions=8, **limit)
    tight = Slo(ttft_ms=50.0, tpot_ms=1.0)  # all are behind schedule, always
    running = [loop.add(1, max_new_tokens=6000, slo=tight) for _ in range(8)]
    for _ in range(20):
        loop.step(0.1)
    newcomer = loop.add(num_prompt, slo=Slo(ttft_ms=500.0, tpot_ms=50.0))
    num_turns = 1 + num_prompt // 8  # 8 tokens is the smallest chunk
    for _ in range(num_turns * (3 + round(WispParameters().max_hold_s / 0.1))):
        for session in running:
            loop.draft_well(session, num_drafts)
        loop.step(0.1)
        if newcomer.num_committed > num_prompt:
            return
    pytest.fail("it starves")


# -- price, load and figures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["continuous", "edf", "wisp"])
@settings(max_examples=25, deadline=None)
@given(num_drafts=st.integers(0, 6), costs=st.sampled_from(COSTS))
def test_the_price_falls_as_load_falls(policy: str, num_drafts: int, costs: Costs) -> None:
    """When one of several sessions that are alike leaves, the price does not rise, as long as the pass takes part of
    the same kind from each. Where it does not, `wisp` may verify more drafts of those that stay, or fewer."""
    loop = ServingLoop(policy=policy, costs=costs)
    for number in range(12):
        loop.add(prompt=[number, 1, 2], max_new_tokens=30)
    loop.step()
    loop.now_s += 5.0  # all are behind schedule
    for session in loop.all:
        loop.draft_well(session, num_drafts)
    prices: dict[int, list[float]] = {}
    for session in loop.all:
        plan = loop.plan()
        if len({item.num_draft_tokens for item in plan.items}) == 1:
            prices.setdefault(plan.items[0].num_draft_tokens, []).append(plan.price)
        loop.scheduler.remove(session.id)
        session.status = Status.CLOSED
    assert sum(map(len, prices.values())) >= 6
    for falling in prices.values():
        assert falling == sorted(falling, reverse=True)


def test_complete_feeds_the_estimator_with_the_pass_that_ran() -> None:
    loop = ServingLoop()
    for _ in range(4):
        loop.add(5, max_new_tokens=200)
    before = loop.plan().predicted_s
    for _ in range(60):
        loop.step(pass_s=0.05)
    plan = loop.plan()
    assert (loop.estimator.num_observed, loop.estimator.num_rejected) == (60, 0)
    assert before < 0.03
    assert plan.predicted_s == pytest.approx(0.05, rel=0.05)
    features = pass_features(plan.items, loop.verifier.run(plan.items))
    assert plan.predicted_s == pytest.approx(float(loop.estimator.predict(features)))


def test_a_commit_tells_price_and_time_to_the_next_pass() -> None:
    loop = ServingLoop()
    session = loop.add(max_new_tokens=100)
    for _ in range(40):
        plan = loop.step(pass_s=0.01)
        loop.now_s += 0.03
    assert loop.commits[0].load_next_pass_s == 0.0  # nothing is known yet
    assert loop.commits[-1].load_next_pass_s == pytest.approx(0.03, abs=1e-6)
    assert loop.commits[-1].load_price == plan.price > 0
    timing = loop.commits[-1].timing
    assert (timing.waited_us, timing.measured_us, timing.num_sessions) == (30_000, 10_000, 1)
    assert timing.predicted_us == round(1e6 * plan.predicted_s)
    loop.now_s += 0.5
    loop.draft(session, 1)
    loop.now_s += 0.2
    loop.step()
    assert loop.commits[-1].timing.waited_us == 200_000  # from the newest draft


def test_an_unknown_policy_is_refused() -> None:
    loop = ServingLoop()
    with pytest.raises(ConfigError, match="policy is 'lifo'; allowed: continuous, edf, fcfs, wisp"):
        make_scheduler(make_config(policy="lifo"), loop.verifier.pool, loop.estimator)


# -- turns and chunks -------------------------------------------------------------------------------------------


def test_everyone_every_pass_and_nobody_when_nobody_is_due() -> None:
    loop = ServingLoop()
    assert loop.plan() == BatchPlan()
    for _ in range(5):
        loop.add()
    loop.add(mode=Mode.SYNC)
    assert [len(loop.step().items) for _ in range(9)] == [6, *[5] * 7, 0]


def test_drafts_count_and_what_exceeds_the_budget_waits() -> None:
    loop = ServingLoop(max_pass_tokens=4)
    session = loop.add(3)
    loop.step()
    loop.draft_well(session, 6)
    plan = loop.step()
    assert (plan.items[0].num_draft_tokens, plan.num_trimmed_tokens) == (3, 3)
    assert session.num_committed == 8
    assert loop.step().items[0].num_draft_tokens == 2  # of six: three accepted, one equal to the bonus, two left


def test_a_session_without_acknowledgements_pauses_and_goes_on() -> None:
    loop = ServingLoop(num_blocks=64, max_unacked_tokens=128)
    session = loop.add(max_new_tokens=200)
    for _ in range(150):
        loop.step()
    assert session.num_committed == 3 + 128
    loop.draft(session)
    for _ in range(72):
        loop.step()
    assert session.finished


@pytest.mark.parametrize("policy", POLICIES)
def test_a_long_prompt_does_not_silence_those_who_decode(policy: str) -> None:
    clock, verifier = FakeClock(), FakeVerifier(num_blocks=1000)
    engine = make_engine(verifier, clock, make_config(policy=policy, max_pass_tokens=64, static_batch_wait_ms=0))
    replies = [FakeReply() for _ in range(3)]
    for number, reply in enumerate(replies):
        engine.submit(make_open(session=session_id(number), max_new_tokens=200, slo=Slo(1000.0, 20.0)), reply)
    engine.step()
    engine.submit(make_open(np.arange(1500) % 7, session=session_id(9), max_new_tokens=5), FakeReply())
    for _ in range(30):
        before = [len(reply.tokens) for reply in replies]
        clock.now_s += 0.05
        engine.step()
        gained = [len(reply.tokens) - count for reply, count in zip(replies, before, strict=True)]
        assert gained == [1, 1, 1]


def test_a_paused_session_does_not_keep_its_memory_from_others() -> None:
    loop = ServingLoop(num_blocks=40, max_unacked_tokens=128)
    loop.add(max_new_tokens=150)
    for _ in range(130):
        loop.step()
    other = loop.add(40)
    loop.now_s += IDLE_S
    loop.step()
    assert other.num_committed == 41
