"""The simulator against queueing theory, and what must hold in every run: conservation, order, agreement of figures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest

from bench.baseline_rules import ControllerOf, RuleSpec
from bench.cells import MIX, Cell, Timing
from bench.gpu_cost import line, unloaded_pass_s
from bench.gpu_profile import draft_step_costs
from bench.scenario import Scenario
from bench.settings import Setting
from bench.sim_colocated import DraftingCost
from bench.simulator import _World, simulate
from bench.systems import FEW, SYSTEMS, WISP
from bench.workload import Device, SessionSpec, SloClass, Workload
from wisp_plugin.estimator import Costs
from wisp_plugin.messages import Slo

STEADY = Costs(memory=line(passes=0.040), arithmetic=line(passes=1e-6), norm=32.0)
TINY = Timing(5.0, 1.0, 0.5)
INT4 = replace(MIX, draft="int4")


@dataclass(frozen=True, slots=True)
class Poisson(Workload):
    """Sessions of one output token, each on a device of its own, opened by a Poisson process of `rate_per_s`."""

    rate_per_s: float = 10.0

    def devices(self) -> list[Device]:
        """One device per session."""
        gaps_s = np.random.default_rng(self.seed).exponential(1.0 / self.rate_per_s, self.num_devices)
        return [Device(i, 1.0, 0.0, 0.0, at_s) for i, at_s in enumerate(np.cumsum(gaps_s).tolist())]

    def sessions(self, device: Device) -> Iterator[SessionSpec]:
        """One."""
        yield SessionSpec(device.index, device.index, 0, Slo(1e6, 1e6, "any"), 4, 1, device.first_start_s, device.index)


def times_s(utilization: float, batch: int, num_sessions: int) -> np.ndarray:
    """Times in the system of Poisson sessions; a pass of exactly 40 ms serves up to `batch`."""
    rate_per_s = utilization * batch / 0.040
    workload = Poisson(num_devices=num_sessions, classes=(SloClass("any", 1.0),), rate_per_s=rate_per_s, seed=4)
    engine = {"max_pass_sessions": batch, "max_sessions": num_sessions, "max_pass_tokens": 4 * batch}
    engine |= {"prefix_sharing": False}
    scenario = Scenario(workload, ahead=0, costs=STEADY, warm_up_s=0.0, duration_s=1e6, drain=True, engine=engine,
                        kv_tokens=1 << 20)  # fmt: skip
    return np.array([s.ttft_s for s in simulate(scenario).sessions])


class TestClosedForms:
    @pytest.mark.parametrize("utilization", [0.3, 0.7])
    def test_one_session_per_pass_is_m_d_1(self, utilization: float) -> None:
        """Pollaczek-Khinchine with deterministic service: wait = rho / (2 (1 - rho)) x service."""
        expected_s = 0.040 * (1.0 + utilization / (2.0 * (1.0 - utilization)))
        assert times_s(utilization, 1, 2000).mean() == pytest.approx(expected_s, rel=0.1)

    def test_batches_of_any_size_wait_half_a_pass_and_take_one(self) -> None:
        """An open arrives during a pass with the chance that one runs; it then waits for half of it on average."""
        waited = times_s(0.9, 250, 3000).mean()  # 225 sessions per pass: some pass always runs
        assert waited == pytest.approx(1.5 * 0.040, rel=0.03)

    def test_a_closed_loop_of_one_device_has_the_throughput_of_its_cycle(self) -> None:
        """Output, prompt in one pass, round trip: a cycle of known length (Little's law with one customer)."""
        lengths = {"prompt_range": (8, 8), "output_range": (50, 50)}
        workload = Workload(num_devices=1, rtt_s=(0.02, 0.02), stagger_s=0.0, **lengths)
        result = simulate(Scenario(workload, ahead=0, costs=STEADY, warm_up_s=0.0, duration_s=60.0))
        cycle_s = 50 * unloaded_pass_s(STEADY) + 0.02
        assert result.throughput == pytest.approx(50 / cycle_s, rel=0.03)


class TestEverySystem:
    @pytest.mark.parametrize("setting", [*(kind.settings[0] for kind in FEW), *WISP.settings[:2]], ids=str)
    def test_every_token_is_committed_once_and_arrives_once(self, setting: Setting) -> None:
        base = replace(INT4.scenario(TINY, 2), duration_s=4.0, warm_up_s=0.0, drain=True).with_devices(6)
        short = replace(base.workload, output_range=(10, 40), prompt_range=(8, 60))
        world = _World(setting.serve(replace(base, workload=short), "int4"))
        result = world.run()
        assert len(result.sessions) >= 6
        for client in world._clients.values():
            assert client.edge.committed.tolist() == client.tokens.target.tolist()
            assert client.record.num_tokens == client.record.spec.num_output_tokens
        assert result.server.committed == sum(s.num_tokens for s in result.sessions)
        assert result.server.accepted <= result.server.verified

    @pytest.mark.parametrize("name", ["wisp", "wisp-no-devices", "colocated", "sled"])
    def test_runs_repeat_exactly(self, name: str) -> None:
        scenario = SYSTEMS[name].settings[-1].serve(INT4.scenario(TINY, 1), "int4").with_devices(6)
        assert simulate(scenario).figures() == simulate(scenario).figures()

    def test_all_systems_get_the_same_sessions(self) -> None:
        seen = []
        for kind in (*FEW, WISP):
            scenario = kind.settings[0].serve(INT4.scenario(TINY, 1), "int4").with_devices(4)
            firsts = {s.spec.device: s.spec for s in reversed(simulate(scenario).sessions)}
            seen.append(firsts)
        assert all(firsts == seen[0] for firsts in seen)

    def test_figures_agree_with_each_other(self) -> None:
        figures = simulate(WISP.settings[0].serve(INT4.scenario(TINY, 1), "int4").with_devices(8)).figures()
        assert figures["committed_per_busy_s"] * figures["busy_share"] == pytest.approx(figures["throughput"], rel=0.1)


class TestColocated:
    def run(self, length: int, costs: Costs | None) -> dict[str, float]:
        """A run of 6 devices with drafts of `length` made on the server."""
        setting = Setting("colocated", "continuous", RuleSpec("fixed", length), on_server=True)
        scenario = replace(setting.serve(INT4.scenario(TINY, 1), "int4"), colocated=costs)
        return simulate(scenario.with_devices(6)).figures()

    def test_the_server_pays_for_every_step(self) -> None:
        none, two, four = (self.run(length, draft_step_costs()) for length in (0, 2, 4))
        step_ms = 1e3 * DraftingCost(draft_step_costs()).step_s
        # Of one session alone; a step of several, and verifying what it gives, takes a little longer.
        assert 2 * step_ms < two["mean_pass_ms"] - none["mean_pass_ms"] < 3 * step_ms
        assert 2 * step_ms < four["mean_pass_ms"] - two["mean_pass_ms"] < 3 * step_ms
        assert four["throughput"] > none["throughput"]

    def test_drafts_are_never_late(self) -> None:
        figures = self.run(3, draft_step_costs())
        assert figures["late"] == figures["stale"] == 0
        assert figures["verified"] > 0

    def test_rules_decide_on_the_server_too(self) -> None:
        base = INT4.scenario(TINY, 1)
        fixed, careful = (replace(base, controller=ControllerOf(rule, "int4"), colocated=draft_step_costs())
                          for rule in (RuleSpec("fixed", 8), RuleSpec("paper", 8, 0.8)))  # fmt: skip
        rates = [simulate(s.with_devices(4)).figures()["acceptance_rate"] for s in (fixed, careful)]
        assert rates[1] > rates[0] + 0.1


def test_a_cell_knows_its_name_and_its_slo() -> None:
    cell = Cell(1.5, "fast", (20.0, 20.0), "int8")
    scenario = cell.scenario(TINY, 0)
    assert cell.name == "tpot 1.5, fast devices, RTT 20 ms, int8, a100-qwen3-32b"
    assert scenario.workload.slo(0, 100).tpot_ms == pytest.approx(1.5e3 * unloaded_pass_s(scenario.costs))
