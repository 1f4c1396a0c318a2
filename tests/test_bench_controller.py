"""The controller's benchmark on made-up traces: its arithmetic, its oracle, its figures."""

from __future__ import annotations

import pytest

from bench.controller_free import ENERGY_PRICES, FreeResult, FreeRun, free_figures, run_free
from bench.controller_model import predict_online, time_decision_us
from bench.controller_rounds import Oracle, RoundTotals, Setting, run_rounds
from bench.controller_sync import SETTINGS, SyncResult, sync_figures
from bench.traces import PARTS
from edge_runtime.train_controller import train
from tests.traces import make_trace
from wisp_plugin.controller import SpeculationController
from wisp_plugin.messages import Mode
from wisp_plugin.speculation import make_controller
from wisp_plugin.stop_rules import DEFAULT_ENERGY_PRICE, Fixed

TRACE = make_trace(16, num_generated=40)
SETTING = Setting(rtt_s=0.02, verify_s=0.04)


def rounds(num_tokens: int) -> RoundTotals:
    return run_rounds(TRACE, SETTING, 0.005, lambda text: SpeculationController(Fixed(num_tokens)))


def test_nothing_drafted_is_one_token_per_round() -> None:
    totals = rounds(0)
    assert totals.committed == totals.rounds == sum(len(text.generated) - 1 for text in TRACE.texts)
    assert totals.acceptance_rate is None
    assert totals.tokens_per_s(SETTING) == pytest.approx(1 / 0.06)


def test_time_is_drafting_and_rounds() -> None:
    totals = rounds(4)
    assert totals.tokens_per_s(SETTING) == pytest.approx(
        totals.committed / (0.005 * totals.drafted + 0.06 * totals.rounds)
    )
    assert totals.committed == totals.rounds + totals.accepted
    assert totals.wdt_share == pytest.approx(1 - totals.accepted / totals.drafted)


def test_no_rule_beats_the_oracle() -> None:
    oracle = run_rounds(TRACE, SETTING, 0.005, lambda text: SpeculationController(Oracle(text)))
    assert oracle.acceptance_rate == 1.0
    assert all(oracle.tokens_per_s(SETTING) > rounds(k).tokens_per_s(SETTING) for k in (0, 1, 2, 4, 8))


def result(ratio: RoundTotals, **rules: RoundTotals) -> SyncResult:
    """A result in which every swept rule is one of `rules` by its family's name."""
    from bench.controller_sync import SWEEPS

    named = {name: rules[family] for family, sweep in SWEEPS.items() for name, _ in sweep}
    return SyncResult(named, rules["oracle"], [ratio] * len(SETTINGS))


def test_figures_compare_what_they_say() -> None:
    slow, fast = RoundTotals(0.005, 100, 100, 800, 100), RoundTotals(0.005, 200, 100, 200, 150)
    figures = sync_figures(result(fast, fixed=slow, svip=slow, adaedl=slow, paper=slow, oracle=fast))
    assert figures["oracle_share"] == pytest.approx(1.0)
    assert figures["speed_vs_fixed8"] == pytest.approx(figures["speed_vs_best_fixed_gm"])
    assert figures["speed_vs_best_fixed_min"] > 2.0
    assert figures["acceptance_gain_vs_fixed8"] == pytest.approx(0.75 / 0.125)
    assert figures["wdt_cut_vs_fixed8"] == pytest.approx(1 - 0.25 / 0.875)


def test_costs_are_taken_at_parity_and_at_the_default_price() -> None:
    totals = RoundTotals(0.005, 200, 100, 100, 100)  # the oracle drafts half a token per committed one
    sync = result(totals, fixed=totals, svip=totals, adaedl=totals, paper=totals, oracle=totals)
    speeds = [totals.tokens_per_s(s) for s in SETTINGS]
    runs = [[FreeRun(speed * (2 - price), 1.0 - price, 0.0) for price in ENERGY_PRICES] for speed in speeds]
    figures = free_figures(FreeResult(runs), sync)
    assert figures["free_vs_sync_min"] == pytest.approx(2 - DEFAULT_ENERGY_PRICE)
    assert figures["drafting_cost_parity"] == pytest.approx((1 - max(ENERGY_PRICES)) / 0.5)
    assert figures["drafting_cost_idle"] == pytest.approx((1 - max(ENERGY_PRICES)) / 0.5)
    assert figures["drafting_cost_idle_default"] == pytest.approx((1 - DEFAULT_ENERGY_PRICE) / 0.5)


def test_free_runs_the_real_engine() -> None:
    model, _ = train([TRACE], 1.0, 2, 0, lambda line: None)
    short = type(TRACE)(TRACE.texts[:3], TRACE.about)
    drafting = run_free(short, model, SETTING, 0.005, 0.0)
    resting = run_free(short, model, SETTING, 0.005, 1.0)
    assert drafting.tokens_per_s > 1.2 / SETTING.verify_s
    assert resting.tokens_per_s == pytest.approx(1 / SETTING.verify_s, rel=0.02)
    assert resting.drafted_per_committed < 0.2 < drafting.drafted_per_committed


@pytest.mark.parametrize("throttled_s", [0.02, 0.06])
def test_a_device_that_is_throttled_drafts_less(throttled_s: float) -> None:
    model, _ = train([TRACE], 1.0, 2, 0, lambda line: None)
    short = type(TRACE)(TRACE.texts[:3], TRACE.about)

    def sync(draft_s: float) -> float:
        totals = run_rounds(short, SETTING, draft_s, lambda text: make_controller("ratio", Mode.SYNC, model))
        return totals.drafted / totals.committed

    def free(draft_s: float) -> float:
        return run_free(short, model, SETTING, draft_s, DEFAULT_ENERGY_PRICE).drafted_per_committed

    assert sync(throttled_s) < 0.8 * sync(0.002)
    assert free(throttled_s) < 0.8 * free(0.002)


def test_predictions_are_made_for_every_token_behind_a_right_prefix() -> None:
    model, _ = train([TRACE], 1.0, 2, 0, lambda line: None)
    probability, outcome = predict_online(TRACE, model)
    assert len(outcome) == sum(len(text.drafted) for text in TRACE.texts)
    assert int(outcome.sum()) == sum(int(text.agrees.sum()) for text in TRACE.texts)
    assert ((probability > 0) & (probability < 1)).all()
    assert 0 < time_decision_us(TRACE, model) < 5000


def test_prompts_of_training_and_evaluation_are_disjoint(monkeypatch: pytest.MonkeyPatch) -> None:
    class Words:
        def encode_chat(self, messages: list[dict[str, str]]) -> str:
            return messages[0]["content"]

    monkeypatch.setattr("bench.traces.mt_bench_questions", lambda: [f"q{i}" for i in range(80)])
    monkeypatch.setattr("bench.traces.human_eval_tasks", lambda: [f"t{i}" for i in range(164)])
    prompts = {part.name: set(part.prompts(Words())) for part in PARTS}  # type: ignore[arg-type]
    assert len(prompts["eval"]) == 27 + 24
    assert not prompts["eval"] & (prompts["train"] | prompts["train-sampled"])
    assert prompts["eval"] | prompts["train"] == {f"q{i}" for i in range(80)} | {f"t{i}" for i in range(164)}
