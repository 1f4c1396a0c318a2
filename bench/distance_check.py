"""Co-located speculation against the analytic gain of drafting elsewhere ("Speculation at a Distance", 2606.25091).

Taking the draft steps off the server turns a round of `verify_time + draft_length x draft_time` into one of
`verify_time`: at most 1 + draft_length x draft_time / verify_time times the rounds, whatever the acceptance is.
Measured beside it are, at the capacity of co-located speculation with that draft length, how much longer its rounds are
and committed tokens per busy second of the server, means over some seeds; and capacity with the first seed:

    free drafts   the same server, its drafts cost nothing: the analytic case
    edge          the drafts come from devices over their links, so some are late: what is left of the gain. With as
                  little KV memory as beside a draft model, to compare nothing else
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from bench.baseline_rules import RuleSpec
from bench.cells import Cell, Timing
from bench.gpu_cost import line
from bench.lab import Figures, Lab, mean_figures
from bench.scenario import Scenario
from bench.search import Search
from bench.settings import Kind, Setting
from bench.sim_colocated import DraftingCost
from bench.simulator import simulate
from wisp_plugin.estimator import Costs

LENGTHS = (1, 2, 4)
_NUM_SEEDS = 3  # of the gains: one has as much noise as there is to see
_NOTHING = Costs(memory=line(passes=1e-9), arithmetic=line(passes=1e-9), norm=1.0)
CHECK_COLUMNS = (
    "draft length", "draft step, ms", "verification, ms", "1 + k x draft / verification", "round, measured",
    "tokens per busy s, measured",
    "capacity co-located", "capacity, free drafts", "gain of free drafts", "capacity, edge", "gain of edge drafts",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Asked:
    cell: Cell
    timing: Timing
    seed: int
    length: int
    first: int


def check(lab: Lab, cell: Cell, timing: Timing, seed: int, first: int) -> list[dict[str, Any]]:
    """A row per draft length, see CHECK_COLUMNS; keys as figures of the report. `first`: devices to begin with."""
    asked = [_Asked(cell, timing, seed, length, first) for length in LENGTHS]
    return lab.map("co-located", _check_one, asked)


def rows_of(results: Sequence[dict[str, Any]]) -> list[list[Any]]:
    """Rows for a table."""
    return [list(result.values()) for result in results]


def _check_one(asked: _Asked) -> dict[str, Any]:
    rule = RuleSpec("fixed", asked.length)
    on_server = Setting("colocated", "edf", rule, 192, on_server=True)
    edge = replace(on_server, system="edge", on_server=False)
    base = asked.cell.scenario(asked.timing, asked.seed)
    paid = on_server.serve(base, asked.cell.draft)
    free = replace(paid, colocated=_NOTHING)
    from_devices = replace(edge.serve(base, asked.cell.draft), kv_tokens=paid.kv_tokens)
    colocated, free_capacity, edge_capacity = (_capacity(s, asked.first) for s in (paid, free, from_devices))
    with_cost, without = (_means(s.with_devices(max(1, colocated))) for s in (paid, free))
    verify_ms = without["mean_pass_ms"]
    draft_ms = 1e3 * DraftingCost(paid.colocated or _NOTHING).step_of(with_cost["mean_pass_sessions"])
    return {
        "draft_length": asked.length,
        "draft_step_ms": draft_ms,
        "verify_ms": verify_ms,
        "analytic_gain": 1.0 + asked.length * draft_ms / verify_ms,
        "round_gain": with_cost["mean_pass_ms"] / verify_ms,
        "throughput_gain": without["committed_per_busy_s"] / with_cost["committed_per_busy_s"],
        "capacity_colocated": colocated,
        "capacity_free_drafts": free_capacity,
        "capacity_gain_free_drafts": free_capacity / colocated if colocated else None,
        "capacity_edge": edge_capacity,
        "capacity_gain_edge": edge_capacity / colocated if colocated else None,
    }


def _means(scenario: Scenario) -> Figures:
    seeds = range(scenario.seed, scenario.seed + _NUM_SEEDS)
    return mean_figures([simulate(scenario.with_seed(seed)).figures() for seed in seeds])


def _capacity(scenario: Scenario, first: int) -> int:
    any_setting = Setting("check", "edf", RuleSpec("fixed", 0))
    search = Search(lambda _, n: simulate(scenario.with_devices(n)).figures(), first)
    return search.capacity(Kind("check", [any_setting], is_open=False))[0]
