"""`wisp-bench validate` without a server: what is compared, and what is said of it."""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench import validate
from bench.commit_log import simulate_logged
from bench.load_options import Load
from tests.comparison_fakes import document_of

MACHINE = {"between_ms": 8.0, "way_ms": 10.0, "mismatches": 0.0}


def options(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    validate.add_arguments(parser)
    return parser.parse_args(["--duration", "12", "--warm-up", "4", "--active", "2", *words])


def on_a_server(monkeypatch: pytest.MonkeyPatch, slower: float = 1.0, mismatches: float = 0.0) -> None:
    """The live side is a simulation as well, of passes that take `slower` times as long."""

    def run(load: Load, *_: object) -> tuple[Any, dict[str, float]]:
        scenario = replace(load.scenario, costs=validate.dilated(load.scenario.costs, slower))
        result, log = simulate_logged(scenario)
        return SimpleNamespace(result=result, log=log), MACHINE | {"mismatches": mismatches}

    monkeypatch.setattr(validate, "run_on_own_server", run)


def test_what_is_as_simulated_differs_by_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    on_a_server(monkeypatch)
    assert validate.main(options("--devices", "3", "--simulations", "1")) == 0
    document = document_of(capsys.readouterr().out)
    assert document["max_error"] == 0.0
    assert document["informed_error"] > 0.0  # it adds what this server does not have
    assert document["missed"] == []
    assert document["spread_goodput_3"] == document["spread_goodput_live_3"] == 0.0


def test_simulated_is_the_mean_over_draws_of_the_noise() -> None:
    load = Load.of(validate.with_pauses(options(), 3), 3)
    means, spreads = validate.simulated_figures("test", load.scenario, 1.0, 3)
    alone = [replace(load.scenario, seed=seed) for seed in (0, 1000, 2000)]
    gaps = [validate.simulated_figures("test", one, 1.0, 1)[0]["commit_gap_p95_ms"] for one in alone]
    assert len(set(gaps)) == 3
    assert means["commit_gap_p95_ms"] == pytest.approx(sum(gaps) / 3)
    assert spreads["spread_commit_gap_p95_ms"] == pytest.approx((max(gaps) - min(gaps)) / (sum(gaps) / 3))


def test_live_is_the_mean_over_runs_and_forgets_no_wrong_token(monkeypatch: pytest.MonkeyPatch) -> None:
    load = Load.of(validate.with_pauses(options(), 3), 3)
    servers, gaps_ms = [], []
    for slower, mismatches in ((1.0, 0.0), (1.3, 1.0)):
        on_a_server(monkeypatch, slower, mismatches)
        servers.append(validate.run_on_own_server)
        alone, _, spreads = validate.live_figures(load, 1, 1)
        gaps_ms.append(alone["commit_gap_ms"])
        assert set(spreads.values()) == {0.0}
    in_turn, targets = iter(servers), []

    def run(one: Load, *further: Any) -> tuple[Any, dict[str, float]]:
        targets.append(one.settings(Path("p.json"))["target"])
        return next(in_turn)(one, *further)

    monkeypatch.setattr(validate, "run_on_own_server", run)
    both, machine, spreads = validate.live_figures(load, 1, 2)
    assert both["commit_gap_ms"] == pytest.approx(sum(gaps_ms) / 2)
    assert spreads["spread_commit_gap_ms"] == pytest.approx((gaps_ms[1] - gaps_ms[0]) / both["commit_gap_ms"])
    assert machine["mismatches"] == 0.5
    assert len(set(targets)) == 2  # each has a draw of the noise of its own


@pytest.mark.parametrize(("slower", "mismatches"), [(1.5, 0.0), (1.0, 1.0)])
def test_a_difference_or_a_wrong_token_is_told_by_the_exit_code(
    slower: float, mismatches: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    on_a_server(monkeypatch, slower, mismatches)
    assert validate.main(options("--devices", "3", "--simulations", "1", "--runs", "1")) == 1
    document = document_of(capsys.readouterr().out)
    assert bool(document["missed"]) == (slower > 1.0)


def test_the_informed_simulation_has_the_times_of_this_machine() -> None:
    load = Load.of(validate.with_pauses(options("--dilation", "2"), 3), 3)
    told = validate.informed_scenario(load, MACHINE, pass_ms=40.0)
    assert told.workload.rtt_s[0] == pytest.approx(load.scenario.workload.rtt_s[0] + 0.010)
    assert told.costs.arithmetic == pytest.approx([1.1 * price for price in load.scenario.costs.arithmetic])
    assert told.believed_costs == load.scenario.costs


def test_pauses_keep_about_so_many_devices_active() -> None:
    assert validate.with_pauses(options(), 2).think == 0.0
    many = validate.with_pauses(options(), 8)
    assert many.stagger == 4 * validate._SESSION_S
    assert many.think == 3 * validate._SESSION_S


def test_differences() -> None:
    assert validate.relative(0.0, 0.0) == 0.0
    assert validate.relative(1.1, 1.0) == pytest.approx(0.1)
    assert math.isinf(validate.relative(1.0, 0.0))
    assert math.isinf(validate.relative(math.nan, 1.0))
