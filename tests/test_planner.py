"""The capacity planner: what it makes of its runs, when there is no verdict, and what it tells."""

from __future__ import annotations

import pytest

from bench import cli, planner, plans
from bench.arguments import LEAST_KV_TOKENS
from bench.baseline_rules import ControllerOf
from bench.gpu_profile import DEFAULT, find_profile
from bench.scenario import Scenario
from bench.settings import NO_DRAFTS
from bench.workload import DeviceKind
from tests.comparison_fakes import document_of
from tests.planner_fakes import ASKED, FakeSimulator, plans_by_name
from wisp_plugin.errors import ConfigError


def one_per_minute(scenario: Scenario) -> float:
    """Judged sessions: one per device and minute behind the warm-up."""
    return scenario.workload.num_devices * (scenario.duration_s - scenario.warm_up_s) // 60


class TestAnswers:
    @pytest.mark.parametrize(("asked", "most"), [(40, 60), (41, 60), (41, 20), (3, 5), (1, 5)])
    def test_a_second_server_holds_twice_as_many(self, asked: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """... and what is said of the devices asked about is said of all of them."""
        monkeypatch.setattr(planner, "simulate", FakeSimulator(lambda _: most))
        one = planner.solve(plans_by_name("--devices", str(asked))[plans.AS_ASKED])
        two = planner.solve(plans_by_name("--devices", str(asked))[plans.SECOND_SERVER])
        assert one.goodput == two.goodput == 10.0 * asked
        assert 0.97 * most <= one.capacity <= most
        assert 2 * 0.97 * most <= two.capacity <= 2 * most
        assert one.attainment == (1.0 if asked <= most else 0.5)

    def test_attainment_of_two_servers_is_that_of_all_devices(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(planner, "simulate", FakeSimulator(lambda _: 20))
        answer = planner.solve(plans_by_name("--devices", "41")[plans.SECOND_SERVER])
        assert answer.attainment == pytest.approx((20 * 1.0 + 21 * 0.5) / 41)

    @pytest.mark.parametrize(("most", "is_least"), [(5000, True), (1024, True), (900, False), (0, False)])
    def test_a_capacity_at_the_end_of_the_search_is_a_least_one(
        self, most: int, is_least: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(planner, "simulate", FakeSimulator(lambda _: most))
        answer = planner.solve(plans_by_name()[plans.AS_ASKED])
        assert answer.is_least is is_least
        assert answer.held == (f"at least {answer.capacity}" if is_least else answer.capacity)
        assert 0.97 * min(most, 1024) <= answer.capacity <= min(most, 1024)


class TestVerdicts:
    @pytest.mark.parametrize("name", [plans.AS_ASKED, plans.SECOND_SERVER])
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
        figures = planner.measure(plans_by_name("--seconds", "10")[plans.AS_ASKED], 40)
        assert len(fake.scenarios) == 1
        assert figures["simulated_s"] == 10.0

    def test_too_few_sessions_in_the_longest_run_are_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(planner, "simulate", FakeSimulator(lambda _: 1, lambda _: 19.0))
        with pytest.raises(ConfigError, match=r"with 1 device: 14,400 s judge 19 .* at least 20 .* \(--seconds\)"):
            planner.measure(plans_by_name()[plans.AS_ASKED], 1)

    def test_the_refusal_is_one_line(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        monkeypatch.setattr(planner, "simulate", FakeSimulator(lambda _: 1, lambda _: 0.0))
        assert cli.main(["plan", *ASKED, "--jobs", "1"]) == 2
        error = capsys.readouterr().err
        assert "as asked, with 40 devices: 600 s judge 0 sessions" in error.splitlines()[-1]
        assert "Traceback" not in error


def most_by_change(scenario: Scenario) -> int:
    """Devices that are held where so many tell the changes apart."""
    workload, base = scenario.workload, plans_by_name()[plans.AS_ASKED].scenario.workload
    if scenario.controller == ControllerOf(NO_DRAFTS, "int4"):
        return 20
    if workload.kinds == (DeviceKind(120.0),):
        return 60
    return 50 if workload.rtt_s[0] < base.rtt_s[0] else 42


class TestCommand:
    def test_a_plan_on_the_simulator(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("bench.search.MOST_DEVICES", 4)
        monkeypatch.setattr(planner, "LEAST_SESSIONS", 4)
        server_drafts = "up to 3 drafts of the server as well, KV for 70%"
        few = (plans.AS_ASKED, plans.WITHOUT_DRAFTS, server_drafts, plans.SECOND_SERVER)
        monkeypatch.setattr(planner, "make_plans", lambda args: [p for p in plans.make_plans(args) if p.name in few])
        options = ["--devices", "2", "--tpot-ms", "120", "--output-tokens", "16", "--think-s", "0", "--jobs", "1"]
        assert cli.main(["plan", *options, "--seconds", "12"]) == 0
        output = capsys.readouterr().out
        assert "derived from published figures" in output
        assert "sessions were judged, in 12 s" in output
        document = document_of(output)
        assert document["fits"] is True
        assert document["sessions_judged"] >= 4
        assert document["capacity"] >= 2
        assert [set(change) for change in document["changes"]] == [{"change", "capacity", "attainment"}] * 2

    def test_changes_are_sorted_by_what_they_win(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(planner, "simulate", FakeSimulator(most_by_change))
        assert cli.main(["plan", *ASKED, "--jobs", "1"]) == 0
        output = capsys.readouterr().out
        document = document_of(output)
        names = [change["change"] for change in document["changes"]]
        assert names[:3] == [plans.SECOND_SERVER, "devices that draft twice as fast", "half the round trip"]
        assert len(names) == len(plans_by_name()) - 2
        assert document["change_first"] == "devices that draft twice as fast"
        assert (document["fits"], document["hold_at_least"], document["left_out"]) == (True, [], [])
        assert 41 <= document["capacity"] <= 42
        assert 19 <= document["capacity_without_drafts"] <= 20
        assert document["attainment_without_drafts"] == 0.5
        assert f"The server holds {document['capacity']} such devices" in output
        table = [line for line in output.splitlines() if line.startswith(tuple(plans_by_name()))]
        assert [line[: len(name)] for line, name in zip(table[2:], names, strict=True)] == names

    @pytest.mark.parametrize("most", [30, 5000])
    def test_a_verdict_is_told_with_what_is_known(
        self, most: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Too few devices are held: exit code 1. More than are tried: their number is told as a least one."""
        monkeypatch.setattr(planner, "simulate", FakeSimulator(lambda _: most))
        assert cli.main(["plan", *ASKED, "--jobs", "1"]) == int(most < 40)
        output = capsys.readouterr().out
        document = document_of(output)
        if most < 40:
            assert "40 devices at 60 ms per token cannot be served" in output
            assert document["change_first"] == plans.SECOND_SERVER
            return
        assert document["hold_at_least"] == [*list(plans_by_name())[:2], *(c["change"] for c in document["changes"])]
        assert f"The server holds at least {document['capacity']} such devices, at least" in output
        assert 2 * 0.97 * 1024 <= document["changes"][0]["capacity"] <= 2 * 1024
        assert f"at least {document['changes'][0]['capacity']}" in output

    def test_plans_without_room_are_told_and_not_run(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        fake = FakeSimulator(lambda _: 60)
        monkeypatch.setattr(planner, "simulate", fake)
        assert cli.main(["plan", *ASKED, "--jobs", "1", "--kv-tokens", "4000"]) == 0
        output = capsys.readouterr().out
        document = document_of(output)
        some = ("up to 3 drafts", "up to 2 drafts", "one draft")
        names = [f"{drafts} of the server as well, KV for 70%" for drafts in some]
        assert document["left_out"] == names
        assert not {change["change"] for change in document["changes"]} & set(names)
        assert f"Left out: {names[0]}. The target would have KV of 2,7" in output
        assert min(scenario.kv_tokens for scenario in fake.scenarios) >= LEAST_KV_TOKENS

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
