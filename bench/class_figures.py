"""Figures of `wisp-bench classes`: per run and SLO class, medians over rounds, and the table. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.class_workload import LOOSE, TIGHT
from bench.emulated_device import DeviceResult
from bench.report import median, percentile, print_table
from wisp_plugin.messages import Slo


@dataclass(frozen=True, slots=True)
class ClassFigures:
    """One class in one run. Times in ms; `tpot_ms` and `ttft_ms` are medians over sessions."""

    attainment: float
    tpot_ms: float
    worst_tpot_ms: float
    p95_tpot_ms: float  # over tokens
    ttft_ms: float
    interference_ms: float  # mean over commits behind the first
    num_sessions: float  # in the passes behind these commits, mean

    @classmethod
    def of(cls, results: Sequence[DeviceResult], slo: Slo, unloaded_pass_s: float) -> ClassFigures:
        """Figures of the sessions of one class."""
        gaps_ms = [gap_ms for result in results for gap_ms in result.token_gaps_ms()]
        later = [arrival for result in results for arrival in result.arrivals[1:]]
        if not gaps_ms:
            raise ValueError(f"no session of class {slo.name!r} has got a second token; the run was too short")
        return cls(
            attainment=sum(result.meets(slo) for result in results) / len(results),
            tpot_ms=median(result.tpot_ms for result in results),
            worst_tpot_ms=max(result.tpot_ms for result in results),
            p95_tpot_ms=percentile(gaps_ms, 95),
            ttft_ms=median(result.times.ttft_ms for result in results),
            interference_ms=1e3 * (sum(arrival.measured_s for arrival in later) / len(later) - unloaded_pass_s),
            num_sessions=sum(arrival.num_sessions for arrival in later) / len(later),
        )


@dataclass(frozen=True, slots=True)
class RunFigures:
    """One policy in one round. `tokens_per_s` is of all sessions, from the first open to the last commit."""

    slos: Mapping[str, Slo]
    unloaded_pass_s: float
    classes: Mapping[str, ClassFigures]
    tokens_per_s: float
    acceptance_rate: float  # accepted / drafted
    num_ended_early: int  # loose sessions that had all their tokens before the end of the run: load that was missing

    @classmethod
    def of(cls, results: Sequence[DeviceResult], slos: Mapping[str, Slo], unloaded_pass_s: float) -> RunFigures:
        """Figures of one run; `slos` by class."""
        of_class = {name: [result for result in results if result.slo_class == name] for name in slos}
        began_s = min(result.times.opened_s for result in results)
        seconds = max(result.times.last_s for result in results if result.arrivals) - began_s
        return cls(
            slos=slos,
            unloaded_pass_s=unloaded_pass_s,
            classes={name: ClassFigures.of(of_class[name], slo, unloaded_pass_s) for name, slo in slos.items()},
            tokens_per_s=sum(len(result.tokens) for result in results) / seconds,
            acceptance_rate=sum(r.num_accepted for r in results) / max(1, sum(r.num_drafted for r in results)),
            num_ended_early=sum(result.cut_s is None for result in of_class[LOOSE]),
        )


def figures_over_rounds(runs: Mapping[str, Sequence[RunFigures]]) -> dict[str, float]:
    """Figures of the report by name: medians over the rounds of each policy, and the worst attainment."""
    figures: dict[str, float] = {}
    for policy, rounds in runs.items():
        for name in (TIGHT, LOOSE):
            of_class = [run.classes[name] for run in rounds]
            key = f"{name}_{policy}"
            figures[f"attainment_{key}"] = median(figure.attainment for figure in of_class)
            figures[f"worst_attainment_{key}"] = min(figure.attainment for figure in of_class)
            figures[f"tpot_ms_{key}"] = median(figure.tpot_ms for figure in of_class)
            figures[f"tpot_over_slo_{key}"] = median(
                run.classes[name].tpot_ms / run.slos[name].tpot_ms for run in rounds
            )
            figures[f"p95_tpot_ms_{key}"] = median(figure.p95_tpot_ms for figure in of_class)
            figures[f"ttft_ms_{key}"] = median(figure.ttft_ms for figure in of_class)
        figures[f"interference_ms_tight_{policy}"] = median(run.classes[TIGHT].interference_ms for run in rounds)
        figures[f"tokens_per_s_{policy}"] = median(run.tokens_per_s for run in rounds)
    return figures


def show(title: str, runs: Mapping[str, Sequence[RunFigures]]) -> None:
    """One line per run and class, round by round."""
    columns = (
        "round", "policy", "class", "in SLO", "tpot SLO, ms", "tpot, ms", "worst", "p95", "ttft SLO", "ttft, ms",
        "interference", "in pass", "tokens/s",
    )  # fmt: skip
    rows = []
    for at in range(max(map(len, runs.values()))):
        for policy, rounds in runs.items():
            for name, figure in rounds[at].classes.items():
                slo = rounds[at].slos[name]
                rows.append((
                    at + 1, policy, name, figure.attainment, slo.tpot_ms, figure.tpot_ms, figure.worst_tpot_ms,
                    figure.p95_tpot_ms, slo.ttft_ms, figure.ttft_ms, figure.interference_ms, figure.num_sessions,
                    rounds[at].tokens_per_s,
                ))  # fmt: skip
    print_table(title, columns, rows)
