"""Tuned on the first seed, then run with what was best there: statistics of every comparison, on made-up answers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench import comparison
from bench.baseline_rules import RuleSpec
from bench.cells import MIX, Timing
from bench.comparison import compare
from bench.scheduler_systems import Lab
from bench.search import Best, Question
from bench.systems import WISP, Kind, Setting

HOLDER, LEADER, POOR = (Setting("x", "edf", RuleSpec("fixed", n)) for n in (1, 2, 3))
FOUND = replace(LEADER, chunk=256)  # by a search, and in no list
CAPACITY = {HOLDER: 40, LEADER: 30, POOR: 10, FOUND: 35}
PEAK = {HOLDER: 400.0, LEADER: 500.0, POOR: 100.0, FOUND: 900.0}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Question]:
    """Questions in their order; on seed s a capacity is s higher, and a peak 10 s."""
    questions = []

    def answer(question: Question) -> Best:
        questions.append(question)
        settings = question.kind.settings
        ours = question.kind.name == "wisp"
        if FOUND not in settings and question.kind.is_open and LEADER in settings:
            settings = [*settings, FOUND]
        held = 50 if ours else max(CAPACITY[s] for s in settings)
        tokens = 800.0 if ours else max(PEAK[s] for s in settings)
        holder = settings[0] if ours else max(settings, key=CAPACITY.__getitem__)
        leader = settings[0] if ours else max(settings, key=PEAK.__getitem__)
        return Best(question.kind.name, held + question.seed, str(holder), {}, tokens + 10 * question.seed, 60,
                    str(leader), {}, [(str(s), 1, 1.0, 1.0) for s in settings])  # fmt: skip

    monkeypatch.setattr(comparison, "find_best", answer)
    return questions


@pytest.mark.parametrize("together", [0, 1, 2])
def test_a_system_is_tuned_once_and_keeps_its_settings(asked: list[Question], together: int) -> None:
    """One setting holds most devices, another one, which the search has found, has the highest peak."""
    with Lab(1) as lab:
        kinds = [Kind("x", [POOR, HOLDER, LEADER]), WISP]
        found = compare(lab, MIX, kinds, Timing(), [7, 8, 9], together=together)
    assert found.capacities("x") == [47.0, 48.0, 49.0]
    assert found.goodputs("x") == [970.0, 980.0, 990.0]
    assert found.capacities("wisp") == [57.0, 58.0, 59.0]
    swept = [q for q in asked if q.seed == 7 and q.kind.name == "x"]
    assert sorted(str(s) for q in swept for s in q.kind.settings) == sorted(map(str, (POOR, HOLDER, LEADER)))
    assert all(len(q.kind.settings) <= (together or 3) for q in swept)
    later = [q for q in asked if q.seed == 8 and q.kind.name == "x"]
    assert [(q.kind.settings, q.kind.is_open, q.wants_peak, q.first) for q in later] == [
        ((HOLDER,), False, False, 47), ((FOUND,), False, True, 60),
    ]  # fmt: skip


def test_what_was_tried_is_kept_of_all_parts(asked: list[Question]) -> None:
    with Lab(1) as lab:
        found = compare(lab, MIX, [Kind("x", [POOR, HOLDER, LEADER]), WISP], Timing(), [0], together=1)
    assert {name for name, *_ in found.bests["x"][0].runs} == {str(s) for s in (POOR, HOLDER, LEADER, FOUND)}


def test_seeds_belong_together(asked: list[Question]) -> None:
    """A ratio is of runs with the same sessions, seed by seed."""
    with Lab(1) as lab:
        found = compare(lab, MIX, [Kind("x", [HOLDER]), WISP], Timing(), [0, 10])
    ratio = found.ratio("capacity", "x")
    assert ratio is not None
    assert ratio.mean == pytest.approx(((50 / 40) * (60 / 50)) ** 0.5)
