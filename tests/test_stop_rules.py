"""Stop rules as table cases, and what must never happen when a link grows longer or a price higher."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wisp_plugin.controller import MAX_AHEAD, Chain, StopRule
from wisp_plugin.draft_stats import DraftStats
from wisp_plugin.errors import ConfigError
from wisp_plugin.pace import Pace
from wisp_plugin.stop_rules import AdaEdl, Fixed, Paper, Price, Ratio, Svip, late_tokens

PACE = Pace(draft_s=0.005, rtt_s=0.02, verify_s=0.04, overhead_s=0.06, heard_s=1.0, wait_s=0.0)


def chain(*accepts: float, entropy: float = 0.5, following: float | None = None) -> Chain:
    """A chain whose tokens are accepted with these probabilities, each given those before."""
    survival, alive = [], 1.0
    for p in accepts:
        alive *= p
        survival.append(alive)
    last = DraftStats(0.8, entropy, 0.6, 3.0, 0.8) if accepts else None
    return Chain(survival, following if following is not None else 0.75, 0.75, last, accepts[-1] if accepts else 1.0)


@pytest.mark.parametrize(
    ("rule", "drafted", "goes_on"),
    [
        (Fixed(2), chain(0.9), True),
        (Fixed(2), chain(0.9, 0.9), False),
        (Fixed(0), chain(), False),
        (Svip(1.0), chain(), True),
        (Svip(1.0), chain(0.1, entropy=0.9), True),
        (Svip(1.0), chain(0.9, entropy=1.1), False),
        (Svip(9.0, max_tokens=2), chain(0.9, 0.9), False),
        (AdaEdl(gamma=0.2), chain(), True),
        (AdaEdl(gamma=0.2), chain(0.9, entropy=0.1), True),
        (AdaEdl(gamma=0.2), chain(0.9, entropy=4.0), False),
        (Paper(0.5), chain(), True),
        (Paper(0.5), chain(0.2, 0.6), True),  # the newest token counts, not the chain
        (Paper(0.5), chain(0.9, 0.4), False),
        (Ratio(), chain(), True),
        (Ratio(), chain(*[0.9] * 3), True),
        (Ratio(), chain(0.9, 0.05), False),
        (Price(0.05), chain(0.9, 0.9), True),
        (Price(0.05), chain(0.9, 0.05), False),
    ],
)
def test_table(rule: StopRule, drafted: Chain, goes_on: bool) -> None:
    assert rule.draft_on(drafted, PACE, 1.0) is goes_on


def test_ratio_stops_behind_a_token_that_is_doubtful_for_this_draft() -> None:
    good = dataclasses.replace(chain(0.99, 0.65, following=0.97), acceptance=0.97)
    assert not Ratio().draft_on(good, PACE, 1.0)
    middling = dataclasses.replace(good, acceptance=0.75)  # for which 0.65 is not far below what is usual
    assert Ratio().draft_on(middling, PACE, 1.0)


def test_adaedl_follows_the_acceptance_rate() -> None:
    rule = AdaEdl(gamma=0.2, target_acceptance=0.9)
    uncertain = chain(0.9, entropy=1.7)
    assert rule.draft_on(uncertain, PACE, 1.0)
    for _ in range(200):
        rule.on_commit(0, 4)  # nothing is accepted: be careful
    assert not rule.draft_on(uncertain, PACE, 1.0)
    for _ in range(400):
        rule.on_commit(4, 4)
    assert rule.draft_on(uncertain, PACE, 1.0)


def length(rule: StopRule, pace: Pace, accepts: float) -> int:
    """How far a rule drafts at equal beliefs about every token."""
    tokens: list[float] = []
    while len(tokens) < MAX_AHEAD and rule.draft_on(chain(*tokens, following=accepts), pace, 1.0):
        tokens.append(accepts)
    return len(tokens)


SECONDS = st.floats(0.001, 0.5)
BELIEF = st.floats(0.05, 0.99)


@given(SECONDS, SECONDS, SECONDS, BELIEF, st.floats(0, 0.5), st.sampled_from([0.0, 1.5, 3.0]))
def test_a_longer_round_trip_never_shortens_a_ratio_draft(
    draft_s: float, verify_s: float, rtt_s: float, accepts: float, more_s: float, tokens_per_round: float
) -> None:
    def drafted(rtt: float) -> int:
        pace = Pace(
            draft_s=draft_s, overhead_s=rtt + verify_s, tokens_per_round=tokens_per_round, drafted_per_round=4.0
        )
        return length(Ratio(), pace, accepts)

    assert drafted(rtt_s + more_s) >= drafted(rtt_s)


@given(SECONDS, BELIEF, st.floats(0, 0.5))
def test_a_slower_device_never_drafts_more(draft_s: float, accepts: float, more_s: float) -> None:
    def drafted(seconds: float) -> int:
        return length(Ratio(), Pace(draft_s=seconds, overhead_s=0.1), accepts)

    assert drafted(draft_s + more_s) <= drafted(draft_s)


@given(
    st.floats(0.001, 0.1), SECONDS, SECONDS, BELIEF, st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.booleans()
)
def test_a_higher_price_never_lengthens_a_price_draft(
    draft_s: float, verify_s: float, rtt_s: float, accepts: float, energy: float, price: float, more: float, own: bool
) -> None:
    def drafted(energy_price: float, server_price: float) -> int:
        pace = Pace(draft_s=draft_s, rtt_s=rtt_s, verify_s=verify_s, heard_s=1.0, price=server_price)
        return length(Price(min(1.0, energy_price)), pace, accepts)

    dearer = drafted(energy + more, price) if own else drafted(energy, price + more)
    assert dearer <= drafted(energy, price)


def test_no_draft_where_the_server_is_always_first() -> None:
    """A pass takes 10 ms, a draft step 20: no chain ever gets ahead."""
    pace = Pace(draft_s=0.02, rtt_s=0.05, verify_s=0.01, heard_s=1.0, wait_s=0.0)
    assert all(late_tokens(0, pace, 1.0))
    assert not Price(0.0).draft_on(chain(following=0.99), pace, 1.0)


def test_which_tokens_are_late() -> None:
    """Heard at 1.0 s what was committed at 0.94 s: passes begin there and every 10 ms; drafts arrive from 1.065 s."""
    pace = Pace(draft_s=0.005, rtt_s=0.12, verify_s=0.01, heard_s=1.0, wait_s=0.0, num_in_pass=5)
    # Four passes are spared. From 0.98 s on each commits one token of its own; that of 1.14 s has caught up: draft
    # token 15 has come, and so two more with every pass behind it.
    late = [k for k, is_late in enumerate(late_tokens(0, pace, 1.0)) if is_late]
    assert late[:16] == list(range(16))
    assert late[16:] == [16, 18, 20, 22]
    few = dataclasses.replace(pace, num_in_pass=4)  # two are spared
    assert [k for k, is_late in enumerate(late_tokens(0, few, 1.0)) if is_late][:20] == list(range(20))
    held = dataclasses.replace(pace, wait_s=0.09)
    assert not next(late_tokens(0, held, 1.0))


@pytest.mark.parametrize("make", [lambda: Fixed(-1), lambda: Fixed(65), lambda: Price(-0.1), lambda: Price(math.nan)])
def test_numbers_out_of_range_are_refused(make: object) -> None:
    with pytest.raises(ConfigError, match="allowed"):
        make()  # type: ignore[operator]
