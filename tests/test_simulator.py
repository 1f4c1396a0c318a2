"""The simulator: the real engine and sessions in virtual time."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.gpu_cost import A100_32G, line, unloaded_pass_s
from bench.scenario import Scenario
from bench.sim_client import SessionTokens, SimulatedClient
from bench.sim_result import ServerRecord, SessionRecord, SimResult, SimulationError
from bench.simulator import _World, capacity, simulate
from bench.virtual_time import EventQueue, Link
from bench.workload import CLASSES, SloClass, Workload
from tests.factories import make_session
from wisp_plugin.estimator import Costs
from wisp_plugin.messages import Mode, Slo
from wisp_plugin.pass_features import member_features
from wisp_plugin.policies import NOBODY, Choice
from wisp_plugin.roster import Candidates

STEADY = Costs(memory=line(passes=0.040), arithmetic=line(passes=0.010))  # every pass takes the same time
SMALL = Workload(num_devices=4, prompt_range=(8, 60), output_range=(10, 60), stagger_s=0.5)
SHORT = Scenario(SMALL, duration_s=4.0, warm_up_s=1.0)


def run(scenario: Scenario) -> tuple[SimResult, list[SimulatedClient]]:
    """The result and the clients behind it."""
    world = _World(scenario)
    return world.run(), list(world._clients.values())


def starts(result: SimResult) -> dict[int, tuple[float, int, int]]:
    """When each session was opened, its prompt and its output length."""
    return {s.spec.number: (s.opened_s, s.spec.prompt_len, s.spec.num_output_tokens) for s in result.sessions}


class TestRuns:
    def test_the_same_seed_gives_the_same_run(self) -> None:
        noisy = replace(SHORT, noise_sigma=0.1, workload=replace(SMALL, jitter_s=0.01))
        first, second = simulate(noisy), simulate(noisy)
        assert first.figures() == second.figures()
        assert first.sessions == second.sessions
        assert simulate(replace(noisy, seed=1)).figures() != first.figures()

    def test_a_thin_session_alone_gets_one_token_per_unloaded_pass(self) -> None:
        scenario = Scenario(replace(SMALL, num_devices=1), ahead=0, costs=STEADY, duration_s=4.0, drain=True)
        result, _ = run(scenario)
        pass_s = unloaded_pass_s(STEADY)
        for session in result.sessions:
            assert session.ttft_s >= 0.020 + pass_s - 1e-9
            assert session.mean_tpot_s(result.end_s) == pytest.approx(pass_s, abs=1e-9)

    def test_interference_of_a_session_alone_is_zero(self) -> None:
        result = simulate(Scenario(replace(SMALL, num_devices=1), duration_s=4.0, warm_up_s=0.0))
        assert result.server.num_passes > 0
        assert not result.server.interference_s.any()

    @pytest.mark.parametrize("mode", list(Mode))
    @pytest.mark.parametrize("ahead", [0, 4])
    @pytest.mark.parametrize("timed", [False, True])
    def test_every_session_of_a_drained_run_has_exactly_its_tokens(self, mode: Mode, ahead: int, timed: bool) -> None:
        workload = replace(SMALL, timed=timed, jitter_s=0.005)
        result, clients = run(replace(SHORT, workload=workload, mode=mode, ahead=ahead, drain=True, duration_s=6.0))
        assert len(clients) > 4
        for client in clients:
            spec = client.record.spec
            assert client.record.num_tokens == spec.num_output_tokens
            assert client.record.ended_s <= result.end_s
            assert client.edge.committed.tolist() == client.tokens.target.tolist()

    def test_a_perfect_drafter_is_faster_and_never_wrong(self) -> None:
        thin, usual, perfect = (
            simulate(replace(SHORT, ahead=ahead, acceptance=acceptance))
            for ahead, acceptance in ((0, 0.75), (6, 0.75), (6, 1.0))
        )
        rates = [r.server.committed / r.server.pass_sessions for r in (thin, usual, perfect)]
        assert rates[0] < rates[1] < rates[2]
        assert perfect.server.accepted == perfect.server.verified > 0

    def test_a_drafter_that_is_always_wrong_gains_nothing(self) -> None:
        result = simulate(replace(SHORT, acceptance=0.0))
        assert result.server.verified > 0 == result.server.accepted
        assert result.figures()["wdt_share"] == 1.0

    def test_timed_arrivals_do_not_depend_on_the_system(self) -> None:
        scenario = replace(SHORT, workload=replace(SMALL, timed=True), drain=True)
        runs = [simulate(replace(scenario, policy=policy, ahead=ahead)) for policy, ahead in
                (("continuous", 0), ("fcfs", 6))]  # fmt: skip
        assert starts(runs[0]) == starts(runs[1])
        assert [s.last_s for s in runs[0].sessions] != [s.last_s for s in runs[1].sessions]

    def test_closed_devices_start_again_when_a_session_has_ended(self) -> None:
        result = simulate(SHORT)
        by_device = [s for s in result.sessions if s.spec.device == 0]
        assert len(by_device) > 1
        for one, following in pairwise(by_device):
            assert one.ended_s <= following.opened_s < one.ended_s + 1 / 60.0  # it finishes the draft step it is in

    def test_events_during_a_pass_reach_the_engine_at_their_time(self) -> None:
        clients = run(replace(SHORT, costs=STEADY))[1]
        waits = [client.record.arrived_s - client.record.opened_s for client in clients]
        assert waits == pytest.approx([0.010] * len(waits))

    def test_refused_sessions_try_again(self) -> None:
        scenario = replace(SHORT, engine={"max_sessions": 2}, drain=True)
        result, clients = run(scenario)
        assert result.figures()["refused"] > 0
        assert all(c.record.num_tokens == c.record.spec.num_output_tokens for c in clients)

    def test_true_and_believed_costs_are_separate(self) -> None:
        slow = Costs(memory=line(passes=0.080), arithmetic=line(passes=0.010))
        result = simulate(replace(SHORT, costs=slow, believed_costs=STEADY))
        assert result.figures()["mean_pass_ms"] == pytest.approx(1e3 * unloaded_pass_s(slow))

    def test_little_kv_memory_slows_down_but_loses_nothing(self) -> None:
        _, clients = run(replace(SHORT, kv_tokens=256, drain=True))
        assert all(c.record.num_tokens == c.record.spec.num_output_tokens for c in clients)

    @pytest.mark.parametrize(("wake_s", "complaint"), [(math.inf, "none is served"), (0.0, "plan again at once")])
    def test_a_policy_that_serves_nobody_is_found_out(self, wake_s: float, complaint: str) -> None:
        class Nobody:
            def choose(self, candidates: Candidates, now_s: float) -> Choice:
                return replace(NOBODY, wake_s=wake_s)

            def note(self, candidates: Candidates, choice: Choice, now_s: float) -> None:
                assert not len(choice.members)

        with pytest.raises(SimulationError, match=complaint):
            simulate(replace(SHORT, policy=lambda config, estimator: Nobody(), drain=True))

    def test_server_time_adds_up(self) -> None:
        result = simulate(replace(SHORT, warm_up_s=0.0, costs=STEADY))
        figures = result.figures()
        assert result.server.pass_s == pytest.approx(result.server.num_passes * unloaded_pass_s(STEADY))
        assert 0.8 < figures["busy_share"] <= 1.0
        assert figures["goodput"] <= figures["throughput"]


class TestCapacity:
    def test_finds_the_edge(self) -> None:
        tight = replace(SMALL, classes=(SloClass("only", 1.0),), unloaded_pass_s=0.042, ttft_tpots=100.0)
        scenario = Scenario(tight, ahead=0, duration_s=9.0, warm_up_s=2.0)
        most = capacity(scenario, max_devices=64)
        assert 1 <= most < 64
        assert simulate(scenario.with_devices(most)).attainment() >= 0.95
        assert simulate(scenario.with_devices(2 * most)).attainment() < 0.95

    def test_is_zero_if_nobody_can_be_served(self) -> None:
        hopeless = replace(SMALL, classes=(SloClass("only", 0.5),))
        assert capacity(replace(SHORT, workload=hopeless, ahead=0)) == 0


class TestJudging:
    def record(self, times_s: list[float], ended: bool, num_output_tokens: int = 100) -> SessionRecord:
        """A session opened at 0 with ttft 1 s and tpot 0.1 s, whose tokens came at `times_s`."""
        spec = next(SMALL.sessions(SMALL.devices()[0]))
        spec = replace(spec, slo=Slo(1000.0, 100.0), num_output_tokens=num_output_tokens)
        record = SessionRecord(spec, 0.0, 0.0)
        if times_s:
            record.first_s, record.last_s = times_s[0], times_s[-1]
        record.num_tokens = len(times_s)
        record.num_overdue = sum(t > record.due_s(i) for i, t in enumerate(times_s))
        record.ended_s = times_s[-1] if ended else math.inf
        return record

    def result(self, sessions: list[SessionRecord], end_s: float, warm_up_s: float = 0.0) -> SimResult:
        return SimResult(("only",), end_s, warm_up_s, end_s, sessions, ServerRecord.of(1))

    def test_a_complete_session(self) -> None:
        assert self.record([0.9, 1.0, 1.1], ended=True).is_met(5.0)
        assert not self.record([1.1, 1.2], ended=True).is_met(5.0)
        assert not self.record([0.1, 0.35], ended=True).is_met(5.0)

    def test_mean_pace_and_due_times_differ(self) -> None:
        early_start = self.record([0.1, 0.5], ended=True)
        late_middle = self.record([0.9, 1.15, 1.2, 1.2], ended=True)
        assert (early_start.is_met(5.0), early_start.is_strictly_met(5.0)) == (False, True)
        assert (late_middle.is_met(5.0), late_middle.is_strictly_met(5.0)) == (True, False)

    def test_a_cut_session_is_judged_with_what_it_waits_for(self) -> None:
        cut = self.record([0.5 + 0.1 * i for i in range(30)], ended=False)
        assert cut.is_met(3.45)
        assert not cut.is_met(4.0)
        assert cut.is_strictly_met(3.9)
        assert not cut.is_strictly_met(4.1)

    @pytest.mark.parametrize("times_s", [[], [0.5 + 0.1 * i for i in range(12)], [0.1] * 40])
    @pytest.mark.parametrize("ended", [False, True])
    def test_when_it_was_opened_decides_who_is_judged_and_not_how_it_went(
        self, times_s: list[float], ended: bool
    ) -> None:
        judged, other = self.record(times_s, ended=ended and bool(times_s)), self.record([], ended=False)
        assert judged not in self.result([judged, other], end_s=2.9).judged
        assert judged in self.result([judged, other], end_s=3.1).judged

    def test_all_are_judged_if_all_have_ended(self) -> None:
        ended = self.record([0.9, 1.0], ended=True)
        assert self.result([ended], end_s=1.5).judged == [ended]

    def test_sessions_of_the_warm_up_do_not_count(self) -> None:
        ended, running = self.record([0.9, 1.0], ended=True), self.record([0.9, 1.0], ended=False)
        assert self.result([ended, running], end_s=5.0, warm_up_s=1.5).judged == [running]
        assert self.result([ended, running], end_s=5.0, warm_up_s=0.5).judged == [ended, running]


class TestParts:
    @settings(max_examples=30)
    @given(acceptance=st.floats(0.0, 1.0), seed=st.integers(0, 1000))
    def test_drafts_are_the_targets_tokens_exactly_where_they_are_right(self, acceptance: float, seed: int) -> None:
        spec = replace(next(SMALL.sessions(SMALL.devices()[0])), prompt_len=10, num_output_tokens=40)
        tokens = SessionTokens(seed, spec, acceptance)
        right = [tokens.draft(p, p)[0] == tokens.target[p] for p in range(50)]
        for num_committed in range(50):
            for position in range(num_committed, 50):
                chain_is_right = all(right[num_committed : position + 1])
                assert (tokens.draft(num_committed, position)[0] == tokens.target[position]) == chain_is_right

    def test_acceptance_is_that_of_the_scenario(self) -> None:
        spec = replace(next(SMALL.sessions(SMALL.devices()[0])), num_output_tokens=20_000)
        tokens = SessionTokens(3, spec, 0.75)
        drafted = [tokens.draft(p, p)[0] for p in range(len(tokens.target))]
        assert np.mean(np.array(drafted) == tokens.target) == pytest.approx(0.75, abs=0.02)

    def test_a_larger_workload_contains_the_smaller(self) -> None:
        few, many = Workload(num_devices=3), Workload(num_devices=5)
        assert many.devices()[:3] == few.devices()
        for device in few.devices():
            assert next(few.sessions(device)) == next(many.sessions(device))

    def test_classes_come_in_their_shares_and_lengths_around_their_medians(self) -> None:
        sessions = [next(Workload(num_devices=600).sessions(d)) for d in Workload(num_devices=600).devices()]
        counts = np.bincount([s.class_index for s in sessions])
        assert counts.min() > 150
        assert np.median([s.prompt_len for s in sessions]) == pytest.approx(250, rel=0.1)
        assert np.median([s.num_output_tokens for s in sessions]) == pytest.approx(200, rel=0.1)
        tight = next(s for s in sessions if s.slo.name == "tight")
        assert tight.slo.tpot_ms == pytest.approx(CLASSES[0].tpot_passes * 36.0, rel=0.01)

    @given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.integers(0, 99))
    def test_a_link_keeps_the_order(self, gaps_s: list[float], seed: int) -> None:
        link, now_s, arrivals = Link(0.01, 0.5, seed), 0.0, []
        for gap_s in gaps_s:
            now_s += gap_s
            arrivals.append(link.arrival_s(now_s))
            assert arrivals[-1] >= now_s + 0.01
        assert arrivals == sorted(arrivals)

    def test_events_happen_in_order_and_at_their_time(self) -> None:
        events, seen = EventQueue(), []
        for at_s, name in ((2.0, "b"), (1.0, "a"), (2.0, "c"), (3.5, "late")):
            events.schedule(at_s, lambda n: seen.append((events.now_s, n)), name)
        events.advance(3.0)
        assert seen == [(1.0, "a"), (2.0, "b"), (2.0, "c")]
        assert (events.now_s, events.next_s) == (3.0, 3.5)

    def test_features_of_members(self) -> None:
        item = make_session(prompt=range(1, 6)).pass_item(5, 0)
        assert member_features([item, item]).tolist() == [[0, 1, 5, 1, 15, 5]] * 2

    def test_the_unloaded_pass_of_section_4(self) -> None:
        assert unloaded_pass_s(A100_32G) == pytest.approx(0.036, rel=0.001)

    def test_a_line_refuses_unknown_features(self) -> None:
        with pytest.raises(ValueError, match="no such feature"):
            line(weights=1.0)
