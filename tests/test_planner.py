"""The capacity planner: which plans there are, what is made of their runs, and when there is no verdict."""

from __future__ import annotations

import pytest

from bench import cli, planner, plans
from bench.cells import MIX, Timing
from bench.gpu_profile import DEFAULT, find_profile
from tests.comparison_fakes import document_of


class TestCommand:
    def test_plan(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("bench.search.MOST_DEVICES", 4)
        monkeypatch.setattr(plans, "DRAFTS", ("int4", "int8"))
        monkeypatch.setattr(planner, "LEAST_SESSIONS", 4)
        options = ["--devices", "2", "--tpot-ms", "120", "--output-tokens", "16", "--think-s", "0", "--jobs", "1"]
        assert cli.main(["plan", *options, "--seconds", "12"]) == 0
        output = capsys.readouterr().out
        assert "derived from published figures" in output
        assert "sessions were judged" in output
        document = document_of(output)
        assert document["fits"] is True
        assert document["sessions_judged"] >= 4
        assert document["capacity"] >= 2
        assert {"change", "capacity", "attainment"} == set(document["changes"][0])

    @pytest.mark.parametrize(
        ("capacities", "first"),
        [((76, 48, 40), "prompts"), ((76, 41, 40), plans.SECOND_SERVER), ((40, 41, 38), None)],
    )
    def test_a_second_server_is_the_last_thing_to_change(self, capacities: tuple[int, ...], first: str | None) -> None:
        answers = [planner.Answer(1.0, 100.0, capacity, {}) for capacity in capacities]
        changes = list(zip((plans.SECOND_SERVER, "prompts", "speed"), answers, strict=True))
        assert planner._first_change(planner.Answer(1.0, 100.0, 40, {}), changes) == first

    def test_a_plan_says_nothing_without_sessions(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["plan", "--devices", "8", "--tpot-ms", "45", "--seconds", "0.01", "--jobs", "1"]) == 2
        assert "judge 0 sessions of 8 devices, and at least 20 are needed" in capsys.readouterr().err

    def test_runs_of_a_plan_are_longer_for_few_devices(self) -> None:
        scenario, timing = MIX.scenario(Timing(), 0), plans.PlanTiming(10.0)
        seconds = [timing.timed(scenario, n).duration_s for n in (1, 20, 60, 1000)]
        assert seconds == [600.0, 75.0, 36.0, 36.0]
        few = plans.PlanTiming(10.0, 5.0).timed(scenario, 3)
        assert (few.duration_s, few.warm_up_s, few.workload.num_devices) == (5.0, pytest.approx(5.0 / 3), 3)

    def test_a_plan_tells_the_floor_of_an_slo(self) -> None:
        costs = find_profile(DEFAULT).costs
        assert "35.7 ms" in planner._floor(30.0, costs)
        assert not planner._floor(36.0, costs)

    def test_plan_refuses_nonsense(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit, match="2"):
            cli.main(["plan", "--devices", "0", "--tpot-ms", "50"])
        assert "from 1 to 1,024" in capsys.readouterr().err
