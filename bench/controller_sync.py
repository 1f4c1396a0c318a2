"""Part `sync` of `wisp-bench controller`: every rule, 12 settings of link and verification, over recorded traces."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from bench.controller_rounds import Oracle, RoundTotals, Setting, run_rounds
from bench.report import Progress, print_table
from wisp_plugin.acceptance_model import AcceptanceModel
from wisp_plugin.controller import SpeculationController, StopRule
from wisp_plugin.draft_trace import DraftTrace, TextTrace
from wisp_plugin.stop_rules import AdaEdl, Fixed, Paper, Ratio, Svip

SETTINGS = tuple(Setting(rtt / 1e3, verify / 1e3) for rtt, verify in product((5, 20, 50, 100), (10, 40, 80)))
FIXED_LENGTHS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 24, 28, 32, 40, 48)
MakeRule = Callable[[], StopRule]
# Baselines are swept, and each setting sees every one of them at its best there.
SWEEPS: dict[str, list[tuple[str, MakeRule]]] = {
    "fixed": [(f"fixed {k}", lambda k=k: Fixed(k)) for k in FIXED_LENGTHS],  # type: ignore[misc]
    "svip": [(f"svip {h}", lambda h=h: Svip(h, 48)) for h in (0.3, 0.5, 0.7, 0.9, 1.1, 1.4, 1.8, 2.1, 2.4, 2.8)],  # type: ignore[misc]
    "adaedl": [
        (f"adaedl {gamma} {rate}", lambda gamma=gamma, rate=rate: AdaEdl(gamma, rate, 48))  # type: ignore[misc]
        for gamma in (0.03, 0.07, 0.1, 0.2, 0.4)
        for rate in (0.1, 0.3, 0.5, 0.7, 0.9)
    ],
    "paper": [(f"paper {p}", lambda p=p: Paper(p, 48)) for p in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)],  # type: ignore[misc]
}


@dataclass(frozen=True, slots=True)
class SyncResult:
    """Totals of every rule. Those of `ratio` are per setting, all others hold in every one."""

    rules: Mapping[str, RoundTotals]  # by name of rule and parameter
    oracle: RoundTotals
    ratio: Sequence[RoundTotals]

    def best(self, family: str, setting: Setting) -> tuple[str, RoundTotals]:
        """The best member of a swept family in a setting."""
        names = [name for name, _ in SWEEPS[family]]
        name = max(names, key=lambda n: self.rules[n].tokens_per_s(setting))
        return name, self.rules[name]


def run_sync(trace: DraftTrace, model: AcceptanceModel, draft_s: float, progress: Progress) -> SyncResult:
    """All rules over all texts of `trace`."""

    def run(make: Callable[[TextTrace], StopRule], setting: Setting = SETTINGS[0]) -> RoundTotals:
        totals = run_rounds(trace, setting, draft_s, lambda text: SpeculationController(make(text), model))
        progress.step()
        return totals

    rules = {name: run(lambda _, make=make: make()) for sweep in SWEEPS.values() for name, make in sweep}  # type: ignore[misc]
    return SyncResult(rules, run(Oracle), [run(lambda _: Ratio(), setting) for setting in SETTINGS])


def num_sync_runs() -> int:
    """Steps of progress that `run_sync` makes."""
    return sum(map(len, SWEEPS.values())) + 1 + len(SETTINGS)


def report_sync(draft: str, result: SyncResult, suffix: str) -> dict[str, Any]:
    """Print the tables of one draft and return its figures; keys end with `suffix`."""
    rows, families = [], ("fixed", "svip", "adaedl", "paper")
    for setting, ratio in zip(SETTINGS, result.ratio, strict=True):
        bests = [result.best(family, setting) for family in families]
        rows.append([
            round(1e3 * setting.rtt_s), round(1e3 * setting.verify_s), 1.0 / setting.verify_s,
            *(cell for name, best in bests for cell in (best.tokens_per_s(setting), name.partition(" ")[2])),
            ratio.tokens_per_s(setting), result.oracle.tokens_per_s(setting), ratio.tokens_per_round,
            ratio.acceptance_rate, ratio.wdt_share,
        ])  # fmt: skip
    columns = ["RTT, ms", "verify, ms", "target only", *(cell for family in families for cell in (family, "best at")),
               "ratio", "oracle", "ratio: tokens/round", "acceptance", "WDT share"]  # fmt: skip
    print_table(f"sync, {draft} draft: committed tokens/s of every rule at its best", columns, rows)
    print_table(
        f"sync, {draft} draft: rules that look at no time",
        ["rule", "acceptance", "tokens/round", "drafted/round", "WDT share"],
        [[n, t.acceptance_rate, t.tokens_per_round, t.drafted / t.rounds, t.wdt_share]
         for n, t in {**result.rules, "oracle": result.oracle}.items()],
    )  # fmt: skip
    return {f"{name}{suffix}": value for name, value in sync_figures(result).items()}


def sync_figures(result: SyncResult) -> dict[str, Any]:
    """Comparisons of `ratio`, over all settings: minimum, geometric mean (`_gm`) or mean."""
    fixed8 = result.rules["fixed 8"]

    def speed(other: Callable[[Setting], RoundTotals]) -> np.ndarray:
        pairs = zip(SETTINGS, result.ratio, strict=True)
        return np.array([ratio.tokens_per_s(s) / other(s).tokens_per_s(s) for s, ratio in pairs])

    vs_best = speed(lambda s: result.best("fixed", s)[1])
    wdt_cut = np.array([1.0 - ratio.wdt_share / fixed8.wdt_share for ratio in result.ratio])
    low_delay = np.array([s.rtt_s <= 0.020 and s.verify_s <= 0.010 for s in SETTINGS])
    acceptance = np.array([ratio.acceptance_rate or 1.0 for ratio in result.ratio])
    return {
        "speed_vs_best_fixed_min": float(vs_best.min()),
        "speed_vs_best_fixed_gm": geometric_mean(vs_best),
        "speed_vs_fixed8": geometric_mean(speed(lambda s: fixed8)),
        "speed_vs_best_svip": geometric_mean(speed(lambda s: result.best("svip", s)[1])),
        "speed_vs_best_adaedl": geometric_mean(speed(lambda s: result.best("adaedl", s)[1])),
        "speed_vs_best_paper": geometric_mean(speed(lambda s: result.best("paper", s)[1])),
        "oracle_share": geometric_mean(speed(lambda s: result.oracle)),
        "acceptance_gain_vs_fixed8": float(np.mean(acceptance / fixed8.acceptance_rate)),
        "wdt_cut_vs_fixed8": float(wdt_cut.mean()),
        "wdt_cut_low_delay": float(wdt_cut[low_delay].mean()),
    }


def geometric_mean(values: np.ndarray) -> float:
    """Of positive values."""
    return float(np.exp(np.log(values).mean()))
