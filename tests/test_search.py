"""The search of a system at its best, on made-up hills: capacity, peak, and settings beyond those it begins with."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.baseline_rules import RuleSpec
from bench.best import Best
from bench.bisection import most_that_hold
from bench.cells import Timing
from bench.search import Search
from bench.settings import CHUNKS, LENGTHS, Kind, Setting, reachable
from bench.systems import FEW, SYSTEMS, WISP

A, B = Setting("x", "edf", RuleSpec("fixed", 1)), Setting("x", "edf", RuleSpec("fixed", 2))
KIND = Kind("x", [A, B], is_open=False)


class TestSearch:
    def search(self, capacities: dict[Setting, int], peak_at: int = 40, first: int = 24) -> Search:
        """Attainment falls at the capacities; goodput is a hill with its top at `peak_at`, higher for B."""

        def measure(setting: Setting, n: int) -> dict[str, float]:
            height = 2.0 if setting == B else 1.0
            return {"attainment": 1.0 if n <= capacities[setting] else 0.5,
                    "goodput": height * 100.0 * math.exp(-abs(math.log(n / peak_at)))}  # fmt: skip

        return Search(measure, first, most=500)

    @settings(max_examples=60)
    @given(a=st.integers(0, 400), b=st.integers(0, 400), first=st.integers(1, 300))
    def test_finds_the_capacity_of_the_better_setting(self, a: int, b: int, first: int) -> None:
        search = self.search({A: a, B: b}, first=first)
        found, setting = search.capacity(KIND)
        best = max(a, b)
        assert best - max(1, 0.04 * best) <= found <= best
        assert found == 0 or search.runs[setting, found]["attainment"] == 1.0

    def test_no_run_is_made_twice_and_a_poor_setting_costs_one(self) -> None:
        calls = []

        def measure(setting: Setting, n: int) -> dict[str, float]:
            calls.append((setting, n))
            return {"attainment": float(n <= {A: 100, B: 50}[setting]), "goodput": 1.0 * n}

        search = Search(measure, 24, most=500)
        search.capacity(KIND)
        assert sum(setting == B for setting, _ in calls) == 1
        search.peak(KIND)
        assert len(calls) == len(set(calls))

    @settings(max_examples=40)
    @given(a=st.integers(0, 400), b=st.integers(0, 400), peak_at=st.integers(2, 400), leader=st.sampled_from([A, B]))
    def test_the_last_setting_alone_goes_on_from_what_the_others_came_to(
        self, a: int, b: int, peak_at: int, leader: Setting
    ) -> None:
        first, last = (B, A) if leader == A else (A, B)  # who is last may be the higher hill or not
        whole = self.search({A: a, B: b}, peak_at)
        before = Kind("x", [first], is_open=False)
        held, at = self.search({A: a, B: b}, peak_at), Kind("x", [first, last], is_open=False)
        capacity, _ = held.capacity(before)
        num_devices, setting = held.peak(before)
        goodput = held.runs[setting, num_devices]["goodput"]
        known = Best("x", capacity, str(first), {}, goodput, num_devices, str(first), {"goodput": goodput}, [])
        search = self.search({A: a, B: b}, peak_at)
        found, _ = search.capacity_behind(known, at)
        num_devices, setting = search.peak(at.only(last))
        assert found == pytest.approx(whole.capacity(at)[0], rel=0.04, abs=1.0)
        assert setting == B
        assert search.figures(setting, num_devices)["goodput"] > 0.85 * 200.0
        assert {own for own, *_ in search.tried()} <= {str(last)}

    @settings(max_examples=40)
    @given(peak_at=st.integers(2, 400), first=st.integers(1, 300))
    def test_climbs_to_the_peak_from_anywhere(self, peak_at: int, first: int) -> None:
        search = self.search({A: 60, B: 40}, peak_at, first)
        search.capacity(KIND)
        num_devices, setting = search.peak(KIND)
        assert setting == B
        assert search.runs[setting, num_devices]["goodput"] > 0.85 * 200.0

    def test_a_dip_beside_the_leader_does_not_hide_the_peak(self) -> None:
        def measure(setting: Setting, n: int) -> dict[str, float]:
            return {"attainment": float(n <= 46), "goodput": 570.0 - abs(n - 46) + (60.0 if 53 <= n <= 57 else 0.0)}

        search = Search(measure, 46, most=500, timing=Timing(climbs=(1.25,)), looks_far=False)
        search.capacity(KIND)
        num_devices, setting = search.peak(KIND)
        assert search.runs[setting, num_devices]["goodput"] > 610.0

    @pytest.mark.parametrize("looks_far", [True, False])
    def test_a_second_hill_is_found_where_it_is_looked_for(self, looks_far: bool) -> None:
        """That of what has given up a class, at twice the number of devices."""

        def measure(setting: Setting, n: int) -> dict[str, float]:
            hill = 100.0 - 10.0 * abs(n - 24)
            return {"attainment": float(n <= 24), "goodput": 150.0 if setting == B and n >= 46 else max(hill, 1.0)}

        search = Search(measure, 24, most=500, looks_far=looks_far)
        search.capacity(KIND)
        assert (search.peak(KIND)[1] == B) == looks_far

    def test_what_takes_kv_memory_is_tried_with_fewer_devices(self) -> None:
        """Its hill is steep on the side where the memory ends, and far from the leader's."""
        drafting = replace(A, server_drafts=3, draft_kv_share=0.7)

        def measure(setting: Setting, n: int) -> dict[str, float]:
            top = 70 if setting == drafting else 100
            return {"attainment": float(n <= top), "goodput": (1200.0 if setting == drafting else 1100.0) * (n <= top)}

        search = Search(measure, 96, most=500, timing=Timing(climbs=(1.25,)), looks_far=False)
        search.capacity(kind := Kind("x", [A, drafting], is_open=False))
        assert search.peak(kind)[1] == drafting

    def test_what_does_best_with_fewer_devices_is_found(self) -> None:
        """B, which does more for each, has fallen below A where A has its peak."""

        def measure(setting: Setting, n: int) -> dict[str, float]:
            goodput = 13.0 * (n if n <= 90 else 70) if setting == A else 1260.0 - abs(n - 64) ** 1.8
            return {"attainment": float(n <= 90), "goodput": goodput}

        search = Search(measure, 64, most=500, timing=Timing(climbs=(1.25,)), looks_far=False)
        search.capacity(KIND)
        assert search.peak(KIND)[1] == B

    def test_where_single_sessions_decide_every_setting_is_bisected(self) -> None:
        """B holds 40 devices, though not the 3 that would be one more than A holds."""

        def measure(setting: Setting, n: int) -> dict[str, float]:
            return {"attainment": float(n <= 2 if setting == A else 10 < n <= 40), "goodput": float(n)}

        found, setting = Search(measure, 24, most=500).capacity(KIND)
        assert setting == B
        assert 38 <= found <= 40

    def test_no_climb_where_nothing_counts(self) -> None:
        search = Search(lambda setting, n: {"attainment": 0.0, "goodput": 0.0}, 24, most=500, looks_far=False)
        search.capacity(KIND)
        search.peak(KIND)
        assert max(n for _, n in search.runs) <= 1.5 * 24

    @pytest.mark.parametrize(("chunk", "length"), [(32, 1), (768, 4), (96, 16)])
    def test_goes_on_to_better_settings_than_those_it_begins_with(self, chunk: int, length: int) -> None:
        """The nearer to one setting the more devices, and the higher the peak: both end there, from wherever."""

        def measure(setting: Setting, n: int) -> dict[str, float]:
            far = abs(CHUNKS.index(setting.chunk) - CHUNKS.index(chunk))
            far += abs(LENGTHS.index(setting.rule.length) - LENGTHS.index(length))
            height = 1000.0 * 0.8**far
            return {"attainment": float(n <= 0.1 * height), "goodput": height - abs(n - 0.1 * height)}

        alone = Search(measure, 24, most=500).capacity(Kind("x", [A]))[1]  # a list of one is no end either
        assert (alone.chunk, alone.rule.length) == (chunk, length)
        search = Search(measure, 24, most=500)
        num_devices, setting = search.capacity(replace(KIND, is_open=True))
        assert (setting.chunk, setting.rule.length) == (chunk, length)
        assert 95 <= num_devices <= 100
        setting = search.peak(replace(KIND, is_open=True))[1]
        assert (setting.chunk, setting.rule.length) == (chunk, length)
        assert reachable(KIND.settings)[str(setting)] == setting

    def test_one_setting_stays_alone(self) -> None:
        """On other seeds a system has the setting that it was tuned to."""
        search = self.search({A: 60, B: 40})
        assert search.capacity(replace(KIND, is_open=True).only(A))[1] == A
        assert {setting for setting, _ in search.runs} == {A}

    def test_what_is_ours_has_no_such_settings(self) -> None:
        """One set of constants everywhere."""
        assert not any(WISP.neighbours(setting) for setting in WISP.settings)
        assert not SYSTEMS["slo-central"].neighbours(SYSTEMS["slo-central"].settings[0])
        assert all(any(kind.neighbours(s) for s in kind.settings) for kind in FEW if kind.name != "slo-central")


@given(
    most=st.integers(1, 1024), limit=st.integers(0, 1100), probe=st.integers(1, 1024), known=st.integers(0, 1024),
    resolution=st.sampled_from([0.0, 0.03, 0.1]),
)  # fmt: skip
def test_bisection_finds_the_limit(most: int, limit: int, probe: int, known: int, resolution: float) -> None:
    asked: list[int] = []

    def holds(num_devices: int) -> bool:
        asked.append(num_devices)
        return num_devices <= limit

    limit = min(limit, most)
    good = min(known, limit)
    found = most_that_hold(holds, good, min(max(probe, good + 1), most), most, resolution)
    assert 0 <= limit - found < max(1, resolution * found)
    assert all(1 <= n <= most for n in asked)
    assert len(asked) <= 24
