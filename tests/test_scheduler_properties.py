"""Properties of every policy on random sessions, turns, budgets and KV memory (hypothesis)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.factories import same
from tests.fakes import VOCAB_SIZE, ServingLoop, target_alone
from wisp_plugin.estimator import Costs
from wisp_plugin.messages import BatchPlan, Mode, Slo
from wisp_plugin.policies import PREFILL_WAIT_S
from wisp_plugin.scheduler import POLICIES
from wisp_plugin.wisp_policy import WispParameters

COSTS = (
    Costs((0.01, 0, 0, 0, 0, 0), (0.002, 0, 0.001, 0, 0, 0)),
    Costs((0.036, 0, 0, 0, 0, 1.3e-7), (0.004, 0, 0.0003, 0, 0, 0)),
    Costs((0, 0, 0, 0, 0, 0), (0.01, 0, 0.005, 0.001, 1e-6, 0), norm=1.0),
    Costs((0.01, 0, 0, 0, 0, 0), (0, 0, 0, 0, 0, 0)),  # a further token costs nothing
)
P = WispParameters()
MAX_TOKENS = 60  # of a session, prompt included
# Six sessions one token at a time, which a static batch makes wait for six turns each, and what eviction repeats.
MAX_TURNS = 10_000


@dataclass(frozen=True)
class Turn:
    """What happens before a pass: `who` drafts `num_tokens`, good or not, and time goes by."""

    who: int
    num_tokens: int
    is_good: bool
    survival: int | None  # x 255, of the first token; each further one has three quarters of it
    next_us: int
    pass_s: float


@dataclass(frozen=True)
class History:
    """Sessions, of which one is added in every other turn, and the turns, which repeat."""

    config: dict[str, Any]
    opens: tuple[dict[str, Any], ...]
    turns: tuple[Turn, ...]

    def play(self, num_turns: int) -> tuple[ServingLoop, list[BatchPlan]]:
        """The loop after so many turns (or when all have finished), and its plans."""
        loop, plans = ServingLoop(**self.config), []
        for number in range(num_turns):
            if number % 2 == 0 and number // 2 < len(self.opens):
                loop.add(**self.opens[number // 2])
            elif number // 2 >= len(self.opens) and not loop.live:
                break
            self.before_pass(loop, number)
            plans.append(loop.step(self.turns[number % len(self.turns)].pass_s))
            if not plans[-1].items:
                loop.now_s = min(plans[-1].wake_s, loop.now_s + 0.02)
        return loop, plans

    def before_pass(self, loop: ServingLoop, number: int) -> None:
        """Everybody acknowledges now and then, which opens the rounds of `sync`; one drafts."""
        turn = self.turns[number % len(self.turns)]
        if number % 3 == 0:
            for session in loop.live:
                if not session.num_buffered:
                    loop.draft(session)
        if turn.who < len(loop.all) and not loop.all[turn.who].finished:
            session, end = loop.all[turn.who], loop.all[turn.who].num_committed
            right = target_alone(session.committed, end + turn.num_tokens)[end:]
            survival = None if turn.survival is None else [turn.survival * 3**i // 4**i for i in range(len(right))]
            tokens = right if turn.is_good else [(t + 1) % VOCAB_SIZE for t in right]
            loop.draft(session, *tokens, survival=survival, next_us=turn.next_us)


turns = st.builds(
    Turn,
    who=st.integers(0, 5),
    num_tokens=st.integers(0, 6),
    is_good=st.booleans(),
    survival=st.none() | st.integers(0, 255),
    next_us=st.sampled_from([-1, 0, 20_000, 2_000_000_000]),
    pass_s=st.sampled_from([0.001, 0.01, 0.05]),
)


@st.composite
def histories(draw: st.DrawFn, roomy: bool = False) -> History:
    """Random sessions and turns; `roomy` gives KV memory for all, otherwise there may be room for hardly one."""
    opens = []
    for number in range(draw(st.integers(1, 6))):
        shared, length = draw(st.booleans()), draw(st.sampled_from([1, 3, 10, 20, 40]))
        opens.append({
            "prompt": [k % VOCAB_SIZE if shared else (7 * k + number) % 5 for k in range(length)],
            "max_new_tokens": draw(st.integers(1, MAX_TOKENS - length)),
            "mode": draw(st.sampled_from(Mode)),
            "slo": Slo(draw(st.sampled_from([0.001, 100, 1e7])), draw(st.sampled_from([0.001, 5, 30, 1e7]))),
        })  # fmt: skip
    config = {
        "policy": draw(st.sampled_from(list(POLICIES))),
        "costs": draw(st.sampled_from(COSTS)),
        "num_blocks": 1000 if roomy else draw(st.integers(MAX_TOKENS // 4, MAX_TOKENS // 2)),
        "max_pass_tokens": draw(st.sampled_from([1, 3, 8, 20, 64, 512])),
        "max_pass_sessions": draw(st.integers(1, 4)),
        "static_batch_sessions": draw(st.integers(1, 5)),
        "static_batch_wait_ms": draw(st.sampled_from([0, 20, 100])),
        "prefix_sharing": draw(st.booleans()),
    }
    return History(config, tuple(opens), tuple(draw(st.lists(turns, min_size=1, max_size=12))))


slow = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@slow
@given(histories())
def test_limits_hold_and_everybody_gets_through_exactly(history: History) -> None:
    """`ServingLoop.plan` and the fake verifier check every pass; here: nobody is lost, nothing hangs."""
    loop, _ = history.play(MAX_TURNS)
    assert len(loop.all) == len(history.opens)
    for session in loop.all:
        assert session.committed.tolist() == target_alone(session.opened.tokens, session.opened.end)
    assert loop.verifier.pool.num_free == loop.verifier.pool.num_blocks


@settings(slow, max_examples=12)
@given(histories())
def test_equal_histories_give_equal_plans(history: History) -> None:
    (first, plans), (second, again) = history.play(60), history.play(60)
    assert len(plans) == len(again)
    assert all(same(left, right) for left, right in zip(first.commits, second.commits, strict=True))
    for left, right in zip(plans, again, strict=True):
        assert (left.evict, left.price, left.wake_s) == (right.evict, right.price, right.wake_s)
        assert all(same(*pair) for pair in zip(left.items, right.items, strict=True))


@slow
@given(histories(roomy=True))
def test_waiting_is_bounded(history: History) -> None:
    """With KV memory for all, a session that could run takes part in one of the next passes, at the latest ...

    continuous, fcfs: when those that were ready before it have had a turn each, and the batch has fired.
    wisp: as `fcfs`, counted from when it has waited for `max_hold_s`; prefills one after the other.
    edf bounds nothing by itself; see `test_policies`.
    """
    if history.config["policy"] == "edf":
        return
    loop, num_overtaken = ServingLoop(**history.config), dict[str, int]()
    static_wait_s = history.config["static_batch_wait_ms"] / 1e3
    held_s = {"continuous": PREFILL_WAIT_S, "fcfs": static_wait_s, "wisp": P.max_hold_s}[history.config["policy"]]
    for number in range(100):
        if number < len(history.opens):
            loop.add(**history.opens[number])
        history.before_pass(loop, number)
        waiting = [s for s in loop.candidates if loop.now_s - s.ready_since_s >= held_s]
        plan = loop.step(0.05)
        if not plan.items:
            loop.now_s = min(plan.wake_s, loop.now_s + 0.05)
            continue
        members = {item.session for item in plan.items}
        for session in waiting:
            missed = 0 if session.id in members else num_overtaken.get(session.id, 0) + 1
            assert missed <= 2 * len(history.opens), "a session starves"
            num_overtaken[session.id] = missed
