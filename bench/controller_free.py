"""Part `free` of `wisp-bench controller`: the real engine, policy `wisp` with its holding, rule `price`, simulated.

One device on the 12 settings of link and verification: a pass takes the setting's time, whatever is in it. The session
asks for a pace that it can hardly reach, so that speed is all that counts. Speeds count from the first token, which
the prefill gives, to the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.controller_rounds import Setting
from bench.controller_sync import SETTINGS, SyncResult, geometric_mean
from bench.gpu_cost import line
from bench.report import Progress, print_table
from bench.scenario import Scenario
from bench.simulator import simulate
from bench.trace_workload import TraceWorkload
from wisp_plugin.acceptance_model import AcceptanceModel
from wisp_plugin.controller import Abstention, SpeculationController
from wisp_plugin.draft_trace import DraftTrace
from wisp_plugin.estimator import Costs
from wisp_plugin.stop_rules import DEFAULT_ENERGY_PRICE, Price

ENERGY_PRICES = (0.03, DEFAULT_ENERGY_PRICE, 0.1, 0.2, 0.3)


@dataclass(frozen=True, slots=True)
class FreeRun:
    """One run: committed tokens per second, draft tokens per committed one, share of wasted drafting time."""

    tokens_per_s: float
    drafted_per_committed: float
    wdt_share: float


def run_free(
    trace: DraftTrace, model: AcceptanceModel, setting: Setting, draft_s: float, energy_price: float,
    policy: str = "wisp",
) -> FreeRun:  # fmt: skip
    """All texts of `trace` in one setting."""
    workload = TraceWorkload(
        trace=trace, draft_s=draft_s, link_rtt_s=setting.rtt_s, tpot_s=setting.verify_s / 20, stagger_s=0.0
    )
    scenario = Scenario(
        workload=workload,
        policy=policy,
        controller=lambda: SpeculationController(Price(energy_price), model, Abstention()),
        tokens=workload.tokens,
        duration_s=1e9,
        warm_up_s=0.0,
        drain=True,
        costs=Costs(memory=line(passes=setting.verify_s), arithmetic=line(passes=1e-6), norm=4.0),
    )
    result = simulate(scenario)
    num_tokens = sum(s.num_tokens - 1 for s in result.sessions)
    elapsed_s = sum(s.last_s - s.first_s for s in result.sessions)
    wdt_share = 1.0 - result.useful_drafting_s / result.drafting_s if result.drafting_s else 0.0
    return FreeRun(num_tokens / elapsed_s, result.drafting_s / draft_s / num_tokens, wdt_share)


@dataclass(frozen=True, slots=True)
class FreeResult:
    """Runs `[setting][energy price]`."""

    runs: Sequence[Sequence[FreeRun]]

    def at(self, energy_price: float) -> list[FreeRun]:
        """The runs with one energy price, per setting."""
        return [row[ENERGY_PRICES.index(energy_price)] for row in self.runs]


def run_all(
    trace: DraftTrace, model: AcceptanceModel, draft_s: float, num_processes: int, label: str
) -> FreeResult:
    """Every setting at every energy price, in `num_processes`."""
    num_runs = len(SETTINGS) * len(ENERGY_PRICES)
    with ProcessPoolExecutor(num_processes) as pool, Progress(num_runs, label) as progress:
        futures = [
            [pool.submit(run_free, trace, model, setting, draft_s, price) for price in ENERGY_PRICES]
            for setting in SETTINGS
        ]
        runs: list[list[FreeRun]] = []
        for row in futures:
            runs.append([])
            for future in row:
                runs[-1].append(future.result())
                progress.step()
    return FreeResult(runs)


def report_free(draft: str, free: FreeResult, sync: SyncResult, suffix: str) -> dict[str, Any]:
    """Print the tables of one draft and return its figures; keys end with `suffix`."""
    figures, rows = free_figures(free, sync), []
    for i, setting in enumerate(SETTINGS):
        run = free.at(DEFAULT_ENERGY_PRICE)[i]
        sync_s, decode_s = sync.ratio[i].tokens_per_s(setting), 1.0 / setting.verify_s
        parity = _parity(free.runs[i], sync_s)
        rows.append([
            round(1e3 * setting.rtt_s), round(1e3 * setting.verify_s), decode_s, sync_s, run.tokens_per_s,
            run.tokens_per_s / sync_s, run.tokens_per_s / decode_s, run.drafted_per_committed, run.wdt_share,
            ENERGY_PRICES[parity] if parity is not None else None,
            free.runs[i][parity].drafted_per_committed if parity is not None else None,
        ])  # fmt: skip
    print_table(
        f"free, {draft} draft, price {DEFAULT_ENERGY_PRICE}: committed tokens/s, draft tokens per committed one",
        ["RTT, ms", "verify, ms", "target only", "sync, ratio", "free", "vs sync", "vs target", "drafted", "WDT share",
         "parity at price", "drafted there"], rows,
    )  # fmt: skip
    return {f"{name}{suffix}": value for name, value in figures.items()}


def free_figures(free: FreeResult, sync: SyncResult) -> dict[str, Any]:
    """Speed against `sync` and plain decoding at the default energy price; drafting against the oracle's.

    Drafting cost is taken on the frontier, at the highest energy price that is still as fast as `sync`: the worst
    setting in which `sync` beats plain decoding (`drafting_cost_parity`), and the worst in which it does not
    (`drafting_cost_idle`). With the suffix `_default`: at the default price.
    """
    runs = free.at(DEFAULT_ENERGY_PRICE)
    speeds = np.array([run.tokens_per_s for run in runs])
    syncs = np.array([ratio.tokens_per_s(s) for s, ratio in zip(SETTINGS, sync.ratio, strict=True)])
    decodes = np.array([1.0 / s.verify_s for s in SETTINGS])
    oracle = sync.oracle.drafted / sync.oracle.committed
    parities = [_parity(row, s) for row, s in zip(free.runs, syncs, strict=True)]
    costs = np.array([
        row[at].drafted_per_committed if at is not None else np.inf for row, at in zip(free.runs, parities, strict=True)
    ]) / oracle  # fmt: skip
    at_default = np.array([run.drafted_per_committed for run in runs]) / oracle
    idle = decodes >= syncs
    return {
        "free_vs_sync_gm": geometric_mean(speeds / syncs),
        "free_vs_sync_min": float((speeds / syncs).min()),
        "free_vs_decode_min": float((speeds / decodes).min()),
        "free_vs_decode_gm": geometric_mean(speeds / decodes),
        "drafting_cost_parity": _worst(costs[~idle]),
        "drafting_cost_idle": _worst(costs[idle]),
        "drafting_cost_parity_default": _worst(at_default[~idle]),
        "drafting_cost_idle_default": _worst(at_default[idle]),
    }


def _worst(costs: np.ndarray) -> float | None:
    """The highest cost; 0 without any setting, None if parity is not reached in one."""
    worst = float(costs.max(initial=0.0))
    return worst if np.isfinite(worst) else None


def _parity(runs: Sequence[FreeRun], sync_tokens_per_s: float) -> int | None:
    """The highest energy price at which a setting is as fast as `sync`; None: at none."""
    return max((i for i, run in enumerate(runs) if run.tokens_per_s >= sync_tokens_per_s), default=None)
