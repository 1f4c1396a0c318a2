"""Systems, profiles, intervals, commands, reports: the machinery of the comparison on made-up and tiny runs."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from bench import capacity, cli, distance_check, goodput
from bench.baseline_rules import Confidence, ControllerOf, RuleSpec
from bench.cells import MIX, Cell, Timing
from bench.comparison import Comparison, ratio_figures
from bench.comparison_command import goodput_ceiling
from bench.gpu_cost import unloaded_pass_s
from bench.gpu_profile import DEFAULT, NORMS, QWEN3_06B, QWEN3_32B, derive, find_profile, is_derived, kv_tokens
from bench.intervals import mean_interval, ratio_interval
from bench.lab import Lab
from bench.simulator import simulate
from bench.systems import ABLATIONS, FEW, FULL, SYSTEMS, WISP
from tests.comparison_fakes import best_of, document_of
from wisp_plugin.controller import Chain
from wisp_plugin.draft_stats import DraftStats
from wisp_plugin.errors import ConfigError
from wisp_plugin.pace import Pace


class TestProfiles:
    @pytest.mark.parametrize("suffix", list(NORMS))
    def test_the_files_are_what_is_derived(self, suffix: str) -> None:
        assert find_profile(DEFAULT + suffix) == derive(suffix)
        assert is_derived(derive(suffix))
        assert "derived" in derive(suffix).fingerprint.device

    def test_figures_of_the_derivation(self) -> None:
        assert QWEN3_32B.kv_bytes_per_token == 256 * 1024
        assert 0.034 < unloaded_pass_s(derive().costs) < 0.038  # 65.6 GB at 90 % of 2.04 TB/s
        assert 40_000 < kv_tokens() < 60_000
        assert kv_tokens(draft=QWEN3_06B) < 0.75 * kv_tokens()

    def test_forms_are_ordered(self) -> None:
        smooth, maximum, additive = (unloaded_pass_s(derive(s).costs) for s in ("", "-maximum", "-additive"))
        assert maximum <= smooth < additive

    def test_an_unknown_profile_is_refused_with_those_there_are(self) -> None:
        with pytest.raises(ConfigError, match=DEFAULT):
            find_profile("no-such-gpu")


class TestSystems:
    def test_every_system_serves_and_can_be_sent_to_a_process(self) -> None:
        import pickle

        base = replace(MIX, draft="int4").scenario(Timing(2.0, 0.5), 0)
        for kind in SYSTEMS.values():
            names = [str(setting) for setting in kind.settings]
            assert len(set(names)) == len(names)
            for setting in kind.settings:
                assert pickle.loads(pickle.dumps(setting.serve(base, "int4"))) is not None

    def test_the_reduced_sweep_is_part_of_the_full_one(self) -> None:
        for few in FEW:
            full = next(kind for kind in FULL if kind.name == few.name)
            assert set(few.settings) <= set(full.settings)
        assert [k.name for k in (*FULL, WISP, *ABLATIONS)] == list(SYSTEMS)

    def test_confidence_stops_at_an_unsure_token(self) -> None:
        rule = Confidence(0.6, 4)
        sure, unsure = DraftStats(0.9, 0.1, 0.8, 1.0, 0.9), DraftStats(0.3, 2.0, 0.1, 1.0, 0.3)
        assert rule.draft_on(Chain(), Pace(), 0.0)
        assert rule.draft_on(Chain([0.9], stats=sure), Pace(), 0.0)
        assert not rule.draft_on(Chain([0.9], stats=unsure), Pace(), 0.0)
        assert not rule.draft_on(Chain([0.9] * 4, stats=sure), Pace(), 0.0)

    def test_an_unknown_rule_is_refused(self) -> None:
        with pytest.raises(ValueError, match="no rule"):
            ControllerOf(RuleSpec("guess"), "int4")()


class TestIntervals:
    def test_of_a_mean(self) -> None:
        interval = mean_interval([10.0, 12.0, 14.0])
        assert interval.mean == 12.0
        assert interval.low == pytest.approx(12.0 - 4.303 * 2.0 / math.sqrt(3), abs=0.01)
        assert mean_interval([3.0]).low is None
        assert mean_interval([0.0, 60.0]).low == 0.0  # no figure is below that

    def test_of_a_ratio(self) -> None:
        interval = ratio_interval([2.0, 4.4], [1.0, 2.0])
        assert interval is not None
        assert interval.mean == pytest.approx(math.sqrt(2.0 * 2.2))
        assert ratio_interval([1.0], [0.0]) is None


class TestFigures:
    def test_ratios_and_published_ones_side_by_side(self) -> None:
        bests = {"wisp": [best_of("wisp", 40, 800.0)], "centralized": [best_of("centralized", 20, 500.0)],
                 "sled": [best_of("sled", 0, 100.0)]}  # fmt: skip
        figures = ratio_figures(Comparison(MIX, bests), "capacity")
        assert figures["capacity_vs_centralized"] == pytest.approx(2.0)
        assert figures["capacity_vs_centralized_published"] == 2.1
        assert figures["capacity_vs_centralized_reaches_published"] is False
        assert figures["capacity_vs_sled"] is None
        assert figures["capacity_vs_best_other"] == 2.0
        assert figures["capacity_best_other"] == "centralized"


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands with runs of five seconds, few systems, and few settings of each."""
    few = [replace(kind, settings=kind.settings[:2], is_open=False) for kind in FEW]
    kinds = [few[0], few[4], replace(WISP, settings=WISP.settings[:2])]
    for module in (capacity, goodput):
        monkeypatch.setattr(module, "asked", lambda args: (
            replace(MIX, draft="int4"), kinds, Timing(5.0, 0.5, 0.2, suits=False), [0, 1]))  # fmt: skip
    monkeypatch.setattr(goodput, "lists", lambda args: few)
    monkeypatch.setattr(goodput, "GRID", (2, 3))
    monkeypatch.setattr("bench.search.MOST_DEVICES", 4)


class TestCommands:
    def test_capacity_and_goodput(self, tiny: None, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        assert cli.main(["capacity", "--jobs", "1", "--no-check", "--report", str(tmp_path)]) == 0
        document = document_of(capsys.readouterr().out)
        assert {"capacity_wisp", "capacity_vs_centralized", "capacity_vs_colocated_ci", "systems"} <= set(document)
        page = (tmp_path / "capacity.html").read_text()
        assert page.count("data:image/png;base64,") == 2
        assert "http" not in page
        assert (tmp_path / "capacity.png").read_bytes().startswith(b"\x89PNG")

    def test_goodput(
        self, tiny: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(goodput, "variants", lambda cell: [replace(cell, profile=f"{DEFAULT}-additive")])
        assert cli.main(["goodput", "--jobs", "1", "--quick", "--sensitivity"]) == 0
        document = document_of(capsys.readouterr().out)
        assert {"goodput_wisp", "goodput_vs_centralized", "capacity_vs_centralized", "curves"} <= set(document)
        assert len(document["curves"]["wisp"]) == 1
        assert {"goodput_vs_sled", "capacity_vs_centralized"} <= set(document["sensitivity"][0])

    def test_simulator_speed(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["simulator", "--devices", "1", "3", "--seconds", "1.5"]) == 0
        document = document_of(capsys.readouterr().out)
        assert document["core_s_3"] > 0
        assert document["us_per_token_1"] > 0
        with pytest.raises(SystemExit, match="2"):
            cli.main(["simulator", "--devices", "0"])


class TestCeilings:
    def test_co_located_speculation_is_checked_against_the_analytic_gain(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("bench.search.MOST_DEVICES", 4)
        monkeypatch.setattr(distance_check, "LENGTHS", (2,))
        with Lab(1) as lab:
            (row,) = distance_check.check(lab, replace(MIX, draft="int8"), Timing(2.5, 0.5, 0.2), 0, 4)
        assert len(row) == len(distance_check.CHECK_COLUMNS)
        assert row["analytic_gain"] == pytest.approx(1.0 + 2 * row["draft_step_ms"] / row["verify_ms"])
        assert row["throughput_gain"] == pytest.approx(row["analytic_gain"], rel=0.05)

    def test_no_system_exceeds_the_goodput_ceiling(self) -> None:
        """... not even with SLOs that nobody can miss, perfect drafts and more devices than it takes."""
        cell, timing = Cell(1000.0, "fast", (5.0, 5.0), "int8"), Timing(12.0, 4.0, 0.0)
        ceiling = goodput_ceiling(cell, timing)
        assert ceiling is not None
        base = cell.scenario(timing, 0)
        workload = replace(base.workload, stagger_s=4.0)
        base = replace(base, workload=workload, tokens=None, acceptance=1.0, duration_s=12.0, warm_up_s=4.0)
        for setting in (WISP.settings[0], SYSTEMS["fixed-edf"].settings[0], SYSTEMS["centralized"].settings[-1]):
            figures = simulate(setting.serve(base, "int8").with_devices(90)).figures()
            assert figures["throughput"] < ceiling, setting
        best = simulate(WISP.settings[0].serve(base, "int8").with_devices(90)).figures()["throughput"]
        assert best > 0.5 * ceiling  # near enough to tell something
