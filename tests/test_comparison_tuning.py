"""Swept on the first seed, then the finalists on all: statistics of every comparison, on made-up answers."""

from __future__ import annotations

import pytest

from bench import comparison, finalists
from bench.baseline_rules import RuleSpec
from bench.best import Best
from bench.cells import MEDIUM, MIX, QUICK
from bench.comparison import compare
from bench.finalists import MOST, finalists_of
from bench.lab import Lab
from bench.search import Question
from bench.settings import Kind, Setting, neighbours
from bench.systems import WISP

LUCKY, STEADY, LEADER, POOR = (Setting("x", "edf", RuleSpec("fixed", n)) for n in (1, 2, 6, 12))
X = Kind("x", [POOR, LUCKY, STEADY, LEADER])
FOUND = neighbours(LEADER)[0]  # by a search, and in no list


def capacity_of(setting: Setting, seed: int) -> int:
    """LUCKY holds most with the first seed, STEADY over all."""
    return {LUCKY: 40 if seed == 7 else 30, STEADY: 38, LEADER: 10, FOUND: 11}.get(setting, 5) + seed - 7


def peak_of(setting: Setting, seed: int) -> float:
    """Of FOUND with the first seed, of LEADER over all."""
    peaks = {LUCKY: 400.0, STEADY: 300.0, LEADER: 880.0, FOUND: 900.0 if seed == 7 else 700.0}
    return peaks.get(setting, 100.0) + 10 * (seed - 7)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Question]:
    """Questions in their order."""
    questions = []

    def answer(question: Question) -> Best:
        questions.append(question)
        kind, seed = question.kind, question.seed
        if kind.name == "wisp":
            own = str(kind.settings[0])
            return Best("wisp", 50 + seed - 7, own, {}, 800.0, 60, own, {}, [(own, 50, 0.95, 800.0)],
                        question.wants_peak)  # fmt: skip
        settings = [*kind.settings, *([FOUND] if kind.is_open and LEADER in kind.settings else [])]
        holder = max(settings, key=lambda s: capacity_of(s, seed))
        leader = max(settings, key=lambda s: peak_of(s, seed))
        runs = [(str(s), n, 0.95, peak_of(s, seed) if n == 60 else 1.0)
                for s in settings for n in (capacity_of(s, seed), 60)]  # fmt: skip
        runs = [(name, n, 0.95 if n != 60 else 0.2, goodput) for name, n, _, goodput in runs]
        return Best(kind.name, capacity_of(holder, seed), str(holder), {}, peak_of(leader, seed), 60, str(leader), {},
                    runs, question.wants_peak)  # fmt: skip

    monkeypatch.setattr(comparison, "find_best", answer)
    monkeypatch.setattr(finalists, "find_best", answer)
    return questions


@pytest.mark.parametrize("together", [0, 1, 2])
def test_what_is_best_over_all_seeds_counts(asked: list[Question], together: int) -> None:
    """One setting has luck with the seed of the sweep, and another one is better."""
    with Lab(1) as lab:
        found = compare(lab, MIX, [X, WISP], MEDIUM, [7, 8, 9], together=together)
    assert found.capacities("x") == [38.0, 39.0, 40.0]
    assert found.goodputs("x") == [880.0, 890.0, 900.0]
    assert {best.capacity_setting for best in found.bests["x"]} == {str(STEADY)}
    assert {best.peak_setting for best in found.bests["x"]} == {str(LEADER)}
    assert found.capacities("wisp") == [50.0, 51.0, 52.0]
    swept = [q for q in asked if q.kind.is_open and q.kind.name == "x"]
    assert sorted(str(s) for q in swept for s in q.kind.settings) == sorted(map(str, X.settings))
    assert all(len(q.kind.settings) <= (together or 4) and q.timing == MEDIUM and q.seed == 7 for q in swept)


def test_finals_are_searched_in_smaller_steps_on_every_seed(asked: list[Question]) -> None:
    with Lab(1) as lab:
        compare(lab, MIX, [X, WISP], MEDIUM, [7, 8, 9])
        finals = [q for q in asked if not q.kind.is_open and q.kind.name == "x"]
        assert {(q.kind.settings[0], q.first) for q in finals} == {(LUCKY, 40), (STEADY, 40), (FOUND, 60), (LEADER, 60)}
        assert sorted(q.seed for q in finals) == [7] * 4 + [8] * 4 + [9] * 4
        assert all(q.timing.resolution < MEDIUM.resolution for q in finals)
        assert {q.kind.settings[0] for q in finals if q.wants_peak} == {FOUND, LEADER}
        assert {q.kind.settings[0] for q in finals if q.wants_capacity} == {LUCKY, STEADY}
        asked.clear()
        compare(lab, MIX, [X, WISP], QUICK, [7], wants_peak=False)
    assert all(q.timing == QUICK and not q.wants_peak for q in asked)
    assert {q.kind.settings[0] for q in asked if q.kind.name == "x" and not q.kind.is_open} == {LUCKY, STEADY}


def test_what_was_tried_is_kept_of_all_parts(asked: list[Question]) -> None:
    with Lab(1) as lab:
        found = compare(lab, MIX, [X, WISP], MEDIUM, [7], together=1)
    assert {name for name, *_ in found.bests["x"][0].runs} == {str(s) for s in (*X.settings, FOUND)}


def test_finalists_are_few_and_close() -> None:
    names = [str(setting) for setting in X.settings]
    runs = [(name, 40, 0.95, 100.0 - i) for i, name in enumerate(names)] + [(names[0], 60, 0.5, 50.0)]
    swept = Best("x", 40, names[3], {}, 100.0, 40, names[0], {}, runs)
    found = finalists_of(X, swept)
    assert sum(finalist.for_capacity for finalist in found) == sum(finalist.for_peak for finalist in found) == MOST
    assert found[0].setting == X.settings[3]  # what has won is always among them
    runs = [
        (name, n, 0.95 if n == 40 - 10 * i else 0.0, 100.0 - 10 * i)
        for i, name in enumerate(names)
        for n in (10, 20, 30, 40)
    ]
    swept = Best("x", 40, names[0], {}, 100.0, 40, names[0], {}, runs)
    assert [finalist.setting for finalist in finalists_of(X, swept)] == [X.settings[0]]


def test_a_search_for_the_peak_begins_where_it_was() -> None:
    """Also where the same setting holds most devices: from there another hill might be climbed."""
    name, other = str(LEADER), str(POOR)
    runs = [(name, 20, 0.96, 300.0), (name, 50, 0.7, 600.0), (other, 50, 0.7, 100.0), (other, 20, 0.5, 100.0)]
    (only,) = finalists_of(X, Best("x", 20, name, {}, 600.0, 50, name, {}, runs))
    assert (only.setting, only.first, only.for_capacity, only.for_peak) == (LEADER, 50, True, True)


def test_seeds_belong_together(asked: list[Question]) -> None:
    """A ratio is of runs with the same sessions, seed by seed."""
    with Lab(1) as lab:
        found = compare(lab, MIX, [Kind("x", [STEADY], is_open=False), WISP], MEDIUM, [7, 17])
    ratio = found.ratio("capacity", "x")
    assert ratio is not None
    assert ratio.mean == pytest.approx(((50 / 38) * (60 / 48)) ** 0.5)
