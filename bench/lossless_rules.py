"""Every stop rule in every mode it is for, on a real tritonserver: no rule may change what is generated.

A rule decides how far to draft, so each drives the session through other chains, messages and rollbacks. A few
prompts are enough for each: what they have in common is tested by the cells of all prompts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from bench.live import ServerShare, server_totals
from bench.lossless_live import Cell, References, RunSession, case_key, judge, load_drafters, run_all
from bench.report import Progress
from triton_models.server_process import ServerProcess
from wisp_plugin.acceptance_model import AcceptanceModel, shipped_model
from wisp_plugin.controller import SpeculationController
from wisp_plugin.messages import Mode
from wisp_plugin.speculation import make_controller
from wisp_plugin.stop_rules import DEFAULT_ENERGY_PRICE

DRAFT = "int4"  # it is rejected often enough, and its weights are shipped
BOTH_CHOICES = "greedy and sampled"


@dataclass(frozen=True, slots=True)
class RuleCase:
    """A stop rule as `wisp-edge` is told of it."""

    rule: str
    energy_price: float = DEFAULT_ENERGY_PRICE

    @property
    def name(self) -> str:
        """For tables."""
        return self.rule if self.energy_price == DEFAULT_ENERGY_PRICE else f"{self.rule}, energy {self.energy_price:g}"

    def controller(self, mode: Mode, model: AcceptanceModel) -> SpeculationController:
        """The controller of one session."""
        return make_controller(self.rule, mode, model, self.energy_price)


_OF_EITHER_MODE = (RuleCase("fixed:8"), RuleCase("svip"), RuleCase("adaedl"), RuleCase("paper"))
# `auto` is one of these, `fixed` is fixed:8. At an energy price of 0 most is drafted, at 0.3 it rests now and then.
RULE_CASES: Mapping[Mode, Sequence[RuleCase]] = {
    Mode.FREE: (*_OF_EITHER_MODE, RuleCase("price"), RuleCase("price", 0.0), RuleCase("price", 0.3)),
    Mode.SYNC: (*_OF_EITHER_MODE, RuleCase("ratio")),
}


def few(refs: References, num_prompts: int, num_tokens: int) -> References:
    """The same for `num_prompts` of the prompts, one seed, and the first `num_tokens` generated tokens."""
    cases = {}
    for sampling, every in refs.cases.items():
        of_seed = [case for case in every if case.sampling.seed == every[0].sampling.seed]
        cases[sampling] = [of_seed[i * len(of_seed) // num_prompts] for i in range(num_prompts)]
    expected = {
        case_key(case): refs.expected[case_key(case)][:num_tokens] for group in cases.values() for case in group
    }
    return dataclasses.replace(refs, cases=cases, expected=expected)


def run_rules(
    server: ServerProcess,
    run_with: Callable[[Callable[[Mode], SpeculationController]], RunSession],
    modes: Sequence[Mode],
    refs: References,
    num_at_once: int,
) -> list[Cell]:
    """A cell for every rule in every mode it is for. `run_with` makes sessions from a maker of their controllers."""
    drafters, model = load_drafters(DRAFT, num_at_once), shipped_model(DRAFT)
    cases = [case for group in refs.cases.values() for case in group]
    before, cells = server_totals(server), []
    for mode in modes:
        for rule in RULE_CASES[mode]:
            run = run_with(partial(rule.controller, model=model))
            with Progress(len(cases), f"{DRAFT}, {mode.value}, rule {rule.name}") as progress:
                found = run_all(run, cases, mode, drafters, progress)
            after = server_totals(server)
            share = ServerShare.between(before, after)
            cells.append(judge(DRAFT, mode, BOTH_CHOICES, found, refs, share, rule.name))
            before = after
    return cells
