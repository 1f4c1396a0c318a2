"""Who gets KV memory when there is not enough: by need, by age, without evicting in vain."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fakes import ServingLoop
from wisp_plugin.kv_admission import IDLE_S
from wisp_plugin.messages import Mode, Slo
from wisp_plugin.server_session import ServerSession

LOOSE, TIGHT = Slo(ttft_ms=60_000.0, tpot_ms=5_000.0), Slo(ttft_ms=50.0, tpot_ms=20.0)
POLICY_NAMES = ("continuous", "edf", "wisp")


def needed_s(session: ServerSession) -> float:
    return session.timeline.needed_s


def test_drafts_take_only_blocks_that_nobody_else_needs() -> None:
    loop = ServingLoop(num_blocks=4)
    first, _ = loop.add(3, max_new_tokens=12), loop.add(6, max_new_tokens=12)
    loop.step()
    loop.draft_well(first, 8)
    plan = loop.step()
    assert len(plan.items) == 2
    assert plan.evict == ()
    assert plan.items[0].num_draft_tokens == 4  # the first fills its second block; the other two are the second's


@pytest.mark.parametrize("policy", ["continuous", "edf"])
def test_a_session_that_grows_takes_the_place_of_one_that_is_needed_later(policy: str) -> None:
    loop = ServingLoop(num_blocks=4, policy=policy)
    tight = loop.add(6, max_new_tokens=8, slo=TIGHT)
    loose = loop.add(6, max_new_tokens=4, slo=LOOSE)
    evicted: list[str] = []
    while not tight.finished:
        evicted += loop.step().evict
    assert evicted == [loose.id]
    while not loose.finished:
        loop.step()
    assert loose.num_committed == 10


def test_newcomers_enter_in_the_order_of_their_opening() -> None:
    """A small one does not slip past a large one, however tight its SLO."""
    loop = ServingLoop(num_blocks=10, policy="edf")
    running = loop.add(20, max_new_tokens=8, slo=LOOSE)
    loop.step()
    large, small = loop.add(30, max_new_tokens=2, slo=LOOSE), loop.add(3, max_new_tokens=2, slo=TIGHT)
    while not running.finished:
        assert loop.members(loop.step()) == [0]
    loop.step()
    assert large.num_committed == 31
    assert small.num_committed >= 3


def test_a_prefill_in_chunks_keeps_its_promised_place() -> None:
    """Free blocks that the rest of a running prefill needs are not given to a newcomer."""
    loop = ServingLoop(num_blocks=10, max_pass_tokens=8, prefix_sharing=False)
    long = loop.add(36, max_new_tokens=2)
    loop.step()
    small = loop.add(7, max_new_tokens=2)
    evicted: list[str] = []
    while not long.finished:
        assert small.num_cached == 0
        evicted += loop.step().evict
    assert evicted == []


def test_who_waits_for_its_client_gives_way_after_a_while() -> None:
    loop = ServingLoop(num_blocks=4)
    idle, other = loop.add(6, mode=Mode.SYNC), loop.add(3, max_new_tokens=3)
    loop.step()
    loop.add(7, max_new_tokens=2)
    assert loop.step().evict == ()
    loop.now_s += IDLE_S
    plan = loop.step()
    assert plan.evict == (idle.id,)
    assert set(loop.members(plan)) == {1, 2}
    assert other.num_committed > 3


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_a_common_prefix_is_computed_and_held_once(policy: str) -> None:
    prompt = list(range(48))
    loop = ServingLoop(num_blocks=64, policy=policy, max_pass_tokens=512)
    for number in range(8):
        loop.add(prompt=[*prompt, 100 + number], max_new_tokens=2)
    num_tokens = 0
    while loop.live:
        num_tokens += loop.step().num_new_tokens
    assert num_tokens < 1.8 * (len(prompt) + 8 * 2)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.tuples(st.integers(1, 30), st.integers(1, 12), st.sampled_from([LOOSE, TIGHT]), st.booleans()),
        min_size=2,
        max_size=5,
    ),
    st.integers(11, 22),
    st.sampled_from(POLICY_NAMES),
    st.booleans(),
)
def test_eviction_is_for_the_needier_and_never_in_vain(
    sizes: list[tuple[int, int, Slo, bool]], num_blocks: int, policy: str, sharing: bool
) -> None:
    """An evicted session is needed after some member of the pass that came for its place, or one took over that is
    older; and whoever is evicted finishes all the same, with few passes lost."""
    loop = ServingLoop(num_blocks, policy=policy, prefix_sharing=sharing)
    for num_prompt, max_new_tokens, slo, shared in sizes:
        prompt = np.arange(num_prompt) + (0 if shared else 50 * len(loop.all))
        loop.add(prompt=prompt, max_new_tokens=max_new_tokens, slo=slo)
    num_passes = num_evicted = 0
    while loop.live:
        before = {s.id: (needed_s(s), s.opened_s, s.id) for s in loop.all}
        plan = loop.step()
        num_passes, num_evicted = num_passes + 1, num_evicted + len(plan.evict)
        for victim in plan.evict:
            members = [before[item.session] for item in plan.items]
            assert any(m[0] < before[victim][0] or m[1:] < before[victim][1:] for m in members)
        assert num_passes < 1000
    assert num_evicted <= sum(max_new_tokens for _, max_new_tokens, _, _ in sizes)
