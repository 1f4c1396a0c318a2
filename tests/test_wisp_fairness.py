"""No session spoils it for the others, whatever it asks for, and nobody waits for ever."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.factories import make_candidates, make_config, make_estimator
from tests.fakes import ServingLoop
from tests.test_policies import parts
from tests.test_wisp_budget import LOOSE_S, TIGHT_S
from tests.test_wisp_turns import LINEAR, NOW_S, take
from wisp_plugin.estimator import Estimator
from wisp_plugin.messages import Slo
from wisp_plugin.policies import Choice
from wisp_plugin.roster import Candidates
from wisp_plugin.wisp_budget import PassBudget
from wisp_plugin.wisp_parameters import WispParameters
from wisp_plugin.wisp_policy import Wisp

P = WispParameters()


@pytest.mark.parametrize("tpot_s", [5e-3, 1e-3, 1e-6])
@pytest.mark.parametrize("num_uncached", [1.0, 500.0])
def test_an_impossible_slo_of_one_makes_nobody_else_hopeless(tpot_s: float, num_uncached: float) -> None:
    c = make_candidates(
        20, tpot_s=[tpot_s, *[TIGHT_S] * 19], num_uncached=[num_uncached, *[1.0] * 19],
        needed_s=[NOW_S + 2.0, *[NOW_S] * 19],
    )  # fmt: skip
    budget = PassBudget(Estimator(LINEAR), P).of(c, c.num_uncached > P.prefill_tokens, NOW_S)
    assert budget.seconds <= 1.1 * TIGHT_S


def test_an_impossible_slo_sets_no_rhythm() -> None:
    """The server has next to nothing to do, and holds nobody back."""
    c = make_candidates(
        8, tpot_s=[1e-6, *[LOOSE_S] * 7], needed_s=NOW_S + 9.0, ready_s=NOW_S, next_draft_s=NOW_S + 0.5, acceptance=0.1
    )
    assert len(Wisp(make_config(), Estimator(LINEAR)).choose(c, NOW_S).members) == 8


def test_a_prompt_beside_held_sessions_gets_more_than_crumbs() -> None:
    c = make_candidates(
        21, num_uncached=[*[1.0] * 20, 100.0], tpot_s=0.02, ready_s=NOW_S, opened_s=NOW_S,
        needed_s=[*[NOW_S + 0.8] * 20, NOW_S + 1.9], next_draft_s=[*[NOW_S + 0.5] * 20, np.inf],
    )  # fmt: skip
    choice = Wisp(make_config(), make_estimator()).choose(c, NOW_S)
    assert choice.members.tolist() == [20]
    assert choice.num_committed[0] >= P.prefill_tokens


def test_who_has_waited_too_long_gets_no_less_for_it() -> None:
    """It has a chunk for sure, and what there is room for."""

    def choose(age_s: float) -> Choice:
        c = make_candidates(
            22, num_uncached=[400.0, 400.0, *[1.0] * 20], tpot_s=[*[0.1] * 2, *[LOOSE_S] * 20],
            needed_s=[NOW_S + 0.5, NOW_S + 0.6, *[NOW_S + 0.1] * 20], ready_s=[NOW_S - age_s, *[NOW_S] * 21],
        )  # fmt: skip
        return Wisp(make_config(max_pass_tokens=512), Estimator(LINEAR)).choose(c, NOW_S)

    young, old = choose(0.9 * P.max_hold_s), choose(1.1 * P.max_hold_s)
    assert parts(old) == parts(young) == [(0, 400, 0), (1, 92, 0), *[(i, 1, 0) for i in range(2, 22)]]


def test_of_prompts_that_have_waited_too_long_one_in_each_pass_is_sure_of_a_chunk() -> None:
    c = make_candidates(
        15, num_uncached=[400.0, 400.0, 400.0, *[1.0] * 12], tpot_s=TIGHT_S, needed_s=[*[NOW_S + 9.0] * 3, *[0.0] * 12],
        ready_s=[-1.5, -2.0, -1.0, *[NOW_S] * 12],
    )  # fmt: skip
    choice = Wisp(make_config(), Estimator(LINEAR)).choose(c, NOW_S)
    assert parts(choice)[0] == (1, P.prefill_tokens, 0)
    assert choice.members.tolist() == [1, *range(3, 15)]


def test_a_prompt_without_room_keeps_nobody_out() -> None:
    """15 tokens are left: no chunk of the prompt that is needed next, but the own tokens of those behind it."""
    c = make_candidates(
        13, num_uncached=[1.0, 200.0, *[1.0] * 11],
        needed_s=[NOW_S + 0.01, NOW_S + 0.5, *[NOW_S + 0.6] * 11], ready_s=NOW_S,
    )  # fmt: skip
    assert take(c, 0.0115).members.tolist() == [0, *range(2, 13)]


def test_waiting_prompts_do_not_make_drafts_dearer() -> None:
    """They get no token from this pass, whatever its drafts take."""

    def num_drafts(num_prompts: int) -> int:
        survival = np.zeros((20 + num_prompts, 4))
        survival[:20] = 0.9, 0.7, 0.5, 0.3
        c = make_candidates(
            20 + num_prompts, survival, num_uncached=[*[1.0] * 20, *[100.0] * num_prompts], needed_s=NOW_S + 9.0
        )
        return int(take(c, math.inf, max_pass_tokens=100_000, max_pass_sessions=1000).num_drafts.sum())

    assert num_drafts(150) == num_drafts(0) == 80


@pytest.mark.parametrize("num_running", [0, 1])
def test_a_late_prompt_does_not_starve_among_others_that_are_in_time(num_running: int) -> None:
    """Clients whose next prompt comes as soon as the last one is answered; a pass takes half a second."""
    loop = ServingLoop(policy="wisp", num_blocks=4096, max_pass_tokens=512)
    for number in range(num_running):
        loop.add(prompt=[number], max_new_tokens=1000, slo=Slo(2e3, 1e3))
    late = loop.add(512, max_new_tokens=1, slo=Slo(1.0, 1.0))
    loop.now_s += 0.5
    others = [loop.add(512, max_new_tokens=1, slo=Slo(5e3, 1e3)) for _ in range(3)]
    for _ in range(60):
        others = [loop.add(512, max_new_tokens=1, slo=Slo(5e3, 1e3)) if o.finished else o for o in others]
        loop.step(0.5)
        if late.finished:
            return
    pytest.fail("it starves")


def test_the_budget_hears_of_passes_as_they_are_planned() -> None:
    """Not of prompts that another one of the pass computes for them."""
    loop = ServingLoop(policy="wisp", num_blocks=4096)
    noted: list[tuple[int, int]] = []

    def note(candidates: Candidates, choice: Choice, now_s: float) -> None:
        noted.append((len(choice.members), int(choice.num_committed.sum() + choice.all_drafts.sum())))

    loop.scheduler._policy.note = note  # type: ignore[method-assign]
    for number in range(6):
        loop.add(prompt=[number], max_new_tokens=50, slo=Slo(50.0, 5.0))
    for _ in range(3):
        loop.add(prompt=list(range(100, 164)), max_new_tokens=5, slo=Slo(60.0, 5.0))
    planned = [loop.step().items for _ in range(6)]
    assert noted == [(len(items), sum(len(item.tokens) - item.num_cached for item in items)) for items in planned]
