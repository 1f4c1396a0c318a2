"""The capacity planner's plans by name, and what stands for their simulation."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from types import SimpleNamespace

from bench import planner, plans
from bench.scenario import Scenario

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
