"""When a pass is worth waiting for drafts: against the rate that both choices really give, by simulation."""

from __future__ import annotations

import numpy as np
import pytest

from tests.factories import make_candidates
from wisp_plugin.roster import Candidates
from wisp_plugin.wisp_hold import waits_for_drafts


def candidates(
    acceptance: float, gap_s: float, rtt_s: float, next_s: float, survival: tuple[float, ...] = ()
) -> Candidates:
    """One session at 0 s with these drafts; the next ones arrive at `next_s`."""
    return make_candidates(
        1, [survival], next_draft_s=next_s, draft_gap_s=gap_s, acceptance=acceptance, way_s=rtt_s / 2, is_new_chain=1.0
    )


def waits(pass_s: float, *args: object, token_s: float = 0.0, **values: object) -> bool:
    """The answer for one session."""
    return bool(waits_for_drafts(candidates(*args, **values), 0.0, pass_s, token_s)[0])  # type: ignore[arg-type]


def test_what_is_not_on_its_way_is_not_waited_for() -> None:
    assert not waits(0.08, 0.9, 0.005, 0.005, float("inf"))


def test_a_long_pass_behind_a_rejection_waits_for_a_near_device() -> None:
    assert waits(0.08, 0.75, 0.005, 0.005, 0.010)


def test_a_short_pass_does_not_wait_for_a_far_one() -> None:
    assert not waits(0.01, 0.75, 0.005, 0.1, 0.105)


def test_a_slow_device_is_not_waited_for() -> None:
    assert not waits(0.01, 0.9, 0.05, 0.01, 0.06)


def test_the_wait_ends_when_there_is_enough() -> None:
    buffered: tuple[float, ...] = ()
    while waits(0.08, 0.75, 0.005, 0.005, 0.005, survival=buffered):
        buffered = (*buffered, 0.75 ** (len(buffered) + 1))
        assert len(buffered) < 16
    assert len(buffered) >= 3


def simulated_rate(acceptance: float, gap_s: float, rtt_s: float, pass_s: float, token_s: float, hold: bool) -> float:
    """Tokens per second of one session over many passes; a free device, a server that holds as `waits` says or never.

    Behind a rejection the first draft token comes a round trip and a draft step later, the others one by one.
    """
    rng = np.random.default_rng(0)
    now_s, tokens, first_s, committed = 0.0, 0, rtt_s + gap_s, 0  # position `committed` is due; its draft comes at...
    is_right = rng.random(20_000) < acceptance
    while tokens < 1_500:
        num_arrived = max(0, int((now_s - first_s) / gap_s + 1 + 1e-9)) if now_s >= first_s - 1e-12 else 0
        chain_next_s = first_s + num_arrived * gap_s
        survival = tuple(acceptance ** (k + 1) for k in range(min(num_arrived, 40)))
        next_s = chain_next_s - now_s
        if hold and waits(pass_s, acceptance, gap_s, rtt_s, next_s, survival=survival, token_s=token_s):
            now_s = chain_next_s
            continue
        num_right = 0
        while num_right < num_arrived and is_right[committed + num_right]:
            num_right += 1
        own_is_right = num_right == num_arrived and is_right[committed + num_right]
        committed += num_right + 1
        tokens += num_right + 1
        now_s += pass_s + token_s * num_arrived
        # Alive: the next draft token is the one behind the pass's own. Else the device starts anew.
        first_s = first_s + (num_right + 1) * gap_s if own_is_right else now_s + rtt_s + gap_s
    return tokens / now_s


@pytest.mark.parametrize(("pass_s", "token_s"), [(0.01, 0.0), (0.04, 0.0), (0.08, 0.0), (0.04, 0.002), (0.08, 0.006)])
@pytest.mark.parametrize("rtt_s", [0.005, 0.05])
@pytest.mark.parametrize("acceptance", [0.6, 0.9])
def test_holding_by_this_rule_never_costs_speed(acceptance: float, rtt_s: float, pass_s: float, token_s: float) -> None:
    held = simulated_rate(acceptance, 0.005, rtt_s, pass_s, token_s, hold=True)
    never = simulated_rate(acceptance, 0.005, rtt_s, pass_s, token_s, hold=False)
    assert held > 0.965 * never


def test_and_gains_where_passes_are_long_and_the_device_is_near() -> None:
    held = simulated_rate(0.75, 0.005, 0.005, 0.08, 0.0, hold=True)
    assert held > 1.1 * simulated_rate(0.75, 0.005, 0.005, 0.08, 0.0, hold=False)
