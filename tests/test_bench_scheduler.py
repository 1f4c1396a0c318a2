"""The scheduler benchmark: what its figures mean. The runs themselves are those of tests/test_simulator.py."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench import cli, scheduler, scheduler_compare, scheduler_optimum, scheduler_plan
from bench.lab import Figures, Lab, figures_of, mean_figures
from bench.scenario import Scenario
from bench.scheduler_compare import Served
from bench.scheduler_systems import BASELINES, CHUNKS, WISP, System, tune, with_drafts
from bench.workload import Workload
from wisp_plugin.config import EngineConfig
from wisp_plugin.estimator import Estimator
from wisp_plugin.messages import Mode
from wisp_plugin.wisp_policy import WispParameters
from wisp_plugin.wisp_spare import Spare

SMALL = Scenario(
    Workload(num_devices=3, prompt_range=(8, 60), output_range=(10, 60), stagger_s=0.5), duration_s=3.0, warm_up_s=0.5
)

TIMED = replace(SMALL, workload=replace(SMALL.workload, timed=True), drain=True, warm_up_s=0.0)


def is_running(process: int) -> bool:
    """True for a process that is there, and no zombie."""
    try:
        return bool(Path(f"/proc/{process}/cmdline").read_bytes())
    except OSError:
        return False


class TestSystems:
    def test_a_system_decides_about_the_server_and_nothing_else(self) -> None:
        sled = System("fcfs", "fcfs", 4, 192, Mode.SYNC, 16, 10.0)
        served = sled.serve(SMALL)
        assert (served.policy, served.mode, served.ahead) == ("fcfs", Mode.SYNC, 4)
        limits = {"max_pass_tokens": 192, "static_batch_sessions": 16, "static_batch_wait_ms": 10.0}
        assert served.engine == limits
        assert replace(served, policy=SMALL.policy, mode=SMALL.mode, ahead=SMALL.ahead, engine={}) == SMALL

    def test_parameters_make_another_policy(self) -> None:
        held, eager = WISP, replace(WISP, parameters=WispParameters(holds=False))
        assert figures_of(held.serve(SMALL)) != figures_of(eager.serve(SMALL))
        same = replace(WISP, parameters=WispParameters())
        assert figures_of(same.serve(SMALL)) == figures_of(held.serve(SMALL))

    def test_figures_do_not_depend_on_the_number_of_processes(self) -> None:
        scenarios = [system.serve(SMALL) for system in (WISP, *with_drafts("edf"))]
        with Lab(1) as alone, Lab(2) as shared:
            expected = alone.means("test", scenarios, 2)
            assert shared.means("test", scenarios, 2) == expected
        by_hand = mean_figures([figures_of(scenarios[0].with_seed(seed)) for seed in (0, 1)])
        assert expected[0] == by_hand

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_what_is_stopped_leaves_no_process_behind(self, number: signal.Signals) -> None:
        script = (
            "import os, threading\nfrom bench.lab import Lab\n"
            # One write: an unbuffered print makes two, and those of two workers can meet in one line.
            "def ask(_):\n    os.write(1, f'{os.getpid()}\\n'.encode())\n    threading.Event().wait(60)\n"
            "with Lab(2) as lab:\n    lab.map('test', ask, range(6))\n"
        )
        command = [sys.executable, "-c", script]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            try:
                assert process.stdout is not None
                workers = [int(process.stdout.readline()) for _ in range(2)]
                process.send_signal(number)
                process.wait(20)
            finally:
                process.kill()
        deadline_s = time.monotonic() + 20
        while any(is_running(worker) for worker in workers):
            assert time.monotonic() < deadline_s, "a worker goes on"
            time.sleep(0.1)

    def test_capacity_is_that_of_the_mean_over_seeds(self) -> None:
        scenario = System("edf", "edf", 0, 16).serve(SMALL)
        with Lab(1) as lab:
            most = lab.capacity("test", scenario, 2)

        def reached(num_devices: int) -> float:
            seeded = [scenario.with_seed(seed).with_devices(num_devices) for seed in (0, 1)]
            return mean_figures([figures_of(one) for one in seeded])["attainment"]

        assert most > 0
        assert reached(most) >= 0.95 > reached(most + 1)

    def test_the_best_setting_is_found_for_each_kind(self, capsys: pytest.CaptureFixture[str]) -> None:
        kinds = [with_drafts("edf"), [System("continuous", "continuous", 0)]]
        with Lab(1) as lab:
            bests = tune(lab, TIMED, kinds, chunks=(8, 256))
        goodputs = {
            (ahead, chunk): figures_of(System("edf", "edf", ahead, chunk).serve(TIMED))["arrivals_goodput"]
            for ahead in (3, 6) for chunk in (8, 256)
        }  # fmt: skip
        assert [best.name for best in bests] == ["edf", "continuous"]
        assert goodputs[bests[0].ahead, bests[0].max_pass_tokens] == max(goodputs.values())
        assert capsys.readouterr().out.count(" best") == 2

    def test_systems_that_keep_every_slo_have_the_same_goodput_of_arrivals(self) -> None:
        runs = [figures_of(system.serve(TIMED)) for system in (WISP, System("edf", "edf", 6, 2048))]
        assert [run["attainment"] for run in runs] == [1.0, 1.0]
        assert runs[0]["arrivals_goodput"] == runs[1]["arrivals_goodput"] > 0

    def test_every_baseline_has_a_sweep(self) -> None:
        assert {system.policy for kind in BASELINES for system in kind} == {"fcfs", "edf", "continuous"}
        assert 96 in CHUNKS


class TestOptimum:
    def test_the_search_finds_the_best_of_all_passes(self) -> None:
        random = np.random.default_rng(5)
        num_trimmed = 0
        for _ in range(40):
            estimator = Estimator(scheduler_optimum.random_costs(random))
            candidates = scheduler_optimum.random_candidates(random)
            candidates = candidates.only(np.arange(min(4, len(candidates))))
            offers = scheduler_optimum.offers_of(candidates, EngineConfig(), estimator)
            needed = offers.is_due.astype(int).tolist()
            ranges = [range(least, most + 1) for least, most in zip(needed, offers.num_levels.tolist(), strict=True)]
            densities = []
            for taken in itertools.product(*ranges):
                value, work = scheduler_optimum.worth_of(offers, np.array(taken), estimator)
                densities.append(value / float(estimator.seconds(work)))
            assert scheduler_optimum.best_density(offers, estimator) == pytest.approx(max(densities), rel=1e-9)
            num_trimmed += max(densities) > densities[-1] * (1 + 1e-9)
        assert num_trimmed > 5, "the best pass is not simply everything"

    def test_the_worth_of_a_pass_is_what_fill_says(self) -> None:
        random = np.random.default_rng(6)
        for _ in range(20):
            estimator = Estimator(scheduler_optimum.random_costs(random))
            config = EngineConfig(max_pass_tokens=2048)
            offers = scheduler_optimum.offers_of(scheduler_optimum.random_candidates(random), config, estimator)
            taken, work = Spare(config, estimator, WispParameters()).fill(offers)
            assert scheduler_optimum.worth_of(offers, taken, estimator)[1] == pytest.approx(work)

    def test_nothing_beats_the_best(self) -> None:
        random = np.random.default_rng(7)
        instances = [scheduler_optimum.solve(random) for _ in range(30)]
        assert all(0 < i.ratio <= 1 + 1e-9 for i in instances)
        assert {i.num_needed > 0 for i in instances} == {False, True}


def test_sessions_of_the_timed_decisions() -> None:
    random = np.random.default_rng(0)
    built, sessions = scheduler_plan.build(64, random)
    scheduler_plan.redraft(built, sessions, random)
    plan = built.plan(scheduler_plan._NOW_S)
    buffered = {session.num_buffered for session in sessions}
    ahead = [(s.timeline.needed_s - scheduler_plan._NOW_S) / s.timeline.tpot_s for s in sessions]
    assert buffered == set(range(9))
    assert all(session.num_uncached == 1 for session in sessions)
    assert -4 < min(ahead) < 0 < 4 < max(ahead) < 8
    assert len(plan.items) > 32
    assert not plan.evict


def served(name: str, load: float, **figures: float) -> Served:
    """A system that has met `figures`."""
    return Served(load, 10, System(name, "wisp", 6), figures)


def test_figures_are_those_of_the_first_load() -> None:
    def of(goodput: float, interference_ms: float) -> Figures:
        return {"attainment": 0.97, "arrivals_goodput": goodput, "interference_ms_tight": interference_ms}

    first = [("wisp", of(500, 2)), ("fcfs", of(250, 8)), ("edf", of(400, 1)), ("continuous", of(500, 1))]
    first.append(("fcfs, chunked", of(400, 2)))
    rows = [served(name, 1.0, **figures) for name, figures in first]
    rows += [served(name, 1.5, **of(0, 0)) for name, _ in first]
    assert scheduler_compare.figures_at_first(rows) == {
        "attainment_wisp": 0.97,
        "goodput_vs_fcfs": 2.0,
        "goodput_vs_fcfs_chunked": 1.25,
        "goodput_vs_edf": 1.25,
        "goodput_vs_continuous": 1.0,
        "interference_ratio": 0.25,
        "interference_ratio_chunked": 1.0,
    }


@pytest.mark.parametrize(
    ("figures", "code"),
    [
        ({"density_vs_optimum": 0.96, "plan_us_64": 900.0, "plan_us_1024": 900.0}, 0),
        ({"density_vs_optimum": 0.94, "plan_us_64": 90.0, "plan_us_1024": 900.0}, 1),
    ],
)
def test_only_virtual_time_decides_about_the_exit_code(
    figures: Figures, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scheduler, "run", lambda *_: figures)
    assert cli.main(["scheduler", "--parts", "plan", "optimum"]) == code
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(document["missed"]) == 1
    assert document["density_vs_optimum"] == figures["density_vs_optimum"]
