"""The capacity planner: which plans there are, what is made of their runs, and when there is no verdict."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from bench import cli, planner, plans
from bench.arguments import LEAST_KV_TOKENS
from bench.gpu_profile import DEFAULT, find_profile
from bench.scenario import Scenario
from tests.comparison_fakes import document_of
from wisp_plugin.errors import ConfigError

Count = Callable[[Scenario], float]
ASKED = ("--devices", "40", "--tpot-ms", "60")


def plans_by_name(*words: str) -> dict[str, plans.Plan]:
    """The plans of a command line behind `ASKED`."""
    parser = argparse.ArgumentParser()
    planner.add_arguments(parser)
    return {plan.name: plan for plan in plans.make_plans(parser.parse_args([*ASKED, *words]))}


class FakeSimulator:
    """Stands for `simulate`: up to `most(scenario)` devices all sessions meet their SLO, beyond that half of them do.

    `sessions(scenario)` are judged; each device brings 10 tokens/s. `scenarios`: all that was asked.
    """

    def __init__(self, most: Count, sessions: Count = lambda _: 100.0) -> None:
        self._most, self._sessions = most, sessions
        self.scenarios: list[Scenario] = []

    def __call__(self, scenario: Scenario) -> SimpleNamespace:
        self.scenarios.append(scenario)
        num_devices, sessions = scenario.workload.num_devices, self._sessions(scenario)
        is_met = num_devices <= self._most(scenario) or not sessions  # attainment is 1 without sessions
        figures = {"sessions": sessions, "attainment": 1.0 if is_met else 0.5, "goodput": 10.0 * num_devices,
                   "busy_share": 0.5, "wdt_share": 0.1}  # fmt: skip
        return SimpleNamespace(figures=lambda: figures)


def one_per_minute(scenario: Scenario) -> float:
    """Judged sessions: one per device and minute behind the warm-up."""
    return scenario.workload.num_devices * (scenario.duration_s - scenario.warm_up_s) // 60


class TestLengths:
    def test_runs_are_longer_for_few_devices(self) -> None:
        timing = plans.PlanTiming(10.0)
        assert [next(timing.lengths_s(n)) for n in (1, 20, 60, 1000)] == [600.0, 75.0, 36.0, 36.0]

    @pytest.mark.parametrize(
        ("seconds", "num_devices", "lengths"),
        [
            (None, 1, [600.0, 1200.0, 2400.0, 4800.0, 9600.0, 14_400.0]),
            (None, 60, [36.0, 72.0, 144.0, 288.0, 576.0, 600.0]),
            (250.0, 12, [250.0, 500.0, 1000.0, 1200.0]),
            (900.0, 100, [900.0]),
        ],
    )
    def test_each_is_twice_the_one_before_up_to_a_bound(
        self, seconds: float | None, num_devices: int, lengths: list[float]
    ) -> None:
        assert list(plans.PlanTiming(10.0, seconds).lengths_s(num_devices)) == lengths

    def test_a_third_of_a_run_is_warm_up(self) -> None:
        run = next(plans_by_name("--seconds", "6")["as asked"].runs(3))
        assert (run.duration_s, run.warm_up_s, run.workload.stagger_s, run.workload.num_devices) == (6.0, 2.0, 2.0, 3)


class TestVerdicts:
    @pytest.mark.parametrize("name", ["as asked", plans.SECOND_SERVER])
    def test_what_judges_nobody_holds_nothing(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """... where 10 s judge too few sessions of any number of devices, and longer runs show that all fail."""
        fake = FakeSimulator(lambda _: 0, one_per_minute)
        monkeypatch.setattr(planner, "simulate", fake)
        answer = planner.solve(plans_by_name("--seconds", "10")[name])
        assert (answer.capacity, answer.attainment) == (0, 0.5)
        assert answer.figures["sessions"] >= planner.LEAST_SESSIONS
        last_s = {scenario.workload.num_devices: scenario.duration_s for scenario in fake.scenarios}
        assert last_s[1] > last_s[5] > 10.0

    def test_a_run_that_judges_enough_is_the_only_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fake = FakeSimulator(lambda _: 1, lambda _: float(planner.LEAST_SESSIONS))
        monkeypatch.setattr(planner, "simulate", fake)
        figures = planner.measure(plans_by_name("--seconds", "10")["as asked"], 40)
        assert len(fake.scenarios) == 1
        assert figures["simulated_s"] == 10.0

    def test_too_few_sessions_in_the_longest_run_are_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(planner, "simulate", FakeSimulator(lambda _: 1, lambda _: 19.0))
        with pytest.raises(ConfigError, match=r"with 1 device: 14,400 s judge 19 .* at least 20 .* \(--seconds\)"):
            planner.measure(plans_by_name()["as asked"], 1)

    def test_the_refusal_is_one_line(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        monkeypatch.setattr(planner, "simulate", FakeSimulator(lambda _: 1, lambda _: 0.0))
        assert cli.main(["plan", *ASKED, "--jobs", "1"]) == 2
        error = capsys.readouterr().err
        assert "as asked, with 40 devices: 600 s judge 0 sessions" in error.splitlines()[-1]
        assert "Traceback" not in error


class TestRoom:
    @pytest.mark.parametrize(("kv_tokens", "shares"), [("3072", ["70%", "70%", "35%"]), ("4000", ["70%", "70%"]),
                                                       ("4500", [])])  # fmt: skip
    def test_drafts_of_the_server_leave_room_for_the_longest_session(self, kv_tokens: str, shares: list[str]) -> None:
        without_room = [plan for plan in plans_by_name("--kv-tokens", kv_tokens).values() if not plan.has_room]
        assert [plan.name.rpartition(" ")[2] for plan in without_room] == shares
        assert all(plan.scenario.server_draft is not None for plan in without_room)

    def test_plans_without_room_are_told_and_not_run(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        fake = FakeSimulator(lambda _: 60)
        monkeypatch.setattr(planner, "simulate", fake)
        assert cli.main(["plan", *ASKED, "--jobs", "1", "--kv-tokens", "4000"]) == 0
        output = capsys.readouterr().out
        document = document_of(output)
        names = [f"up to {n} drafts of the server as well, KV for 70%" for n in (3, 2)]
        assert document["left_out"] == names
        assert not {change["change"] for change in document["changes"]} & set(names)
        assert f"Left out: {names[0]}. The target would have KV of 2,7" in output
        assert min(scenario.kv_tokens for scenario in fake.scenarios) >= LEAST_KV_TOKENS


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

    def test_a_plan_tells_the_floor_of_an_slo(self) -> None:
        costs = find_profile(DEFAULT).costs
        assert "35.7 ms" in planner._floor(30.0, costs)
        assert not planner._floor(36.0, costs)

    def test_plan_refuses_nonsense(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit, match="2"):
            cli.main(["plan", "--devices", "0", "--tpot-ms", "50"])
        assert "from 1 to 1,024" in capsys.readouterr().err
