"""Figures of a load, simulated or live, in the same words (see `sim_result` for how sessions are judged)."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.commit_log import CommitLog
from bench.load_run import LiveRun
from bench.sim_result import SimResult

_TICKS_PER_S = 100


def load_figures(result: SimResult, log: CommitLog, dilation: float = 1.0) -> dict[str, float]:
    """Rates per second and times in ms of the emulated GPU, and shares; NaN for what was not seen."""
    start_s, end_s = result.warm_up_s, result.duration_s
    gaps_s = np.array(log.gaps_s(start_s, end_s) or [np.nan]) / dilation
    ended = [s for s in result.judged if np.isfinite(s.ended_s)]
    met = [s for s in ended if s.is_met(result.end_s)]
    seconds = (end_s - start_s) / dilation
    passes, sessions = log.passes()
    ttft_s = [s.waited_s(result.end_s) for s in result.judged] or [np.nan]
    figures = {
        "goodput": result.goodput * dilation,
        "throughput": result.throughput * dilation,
        "requests_per_s": len(ended) / seconds,
        "request_goodput": len(met) / seconds,
        "attainment": result.attainment(),
        "strict_attainment": result.strict_attainment(),
        "commit_gap_ms": 1e3 * float(np.median(gaps_s)),
        "commit_gap_p95_ms": 1e3 * float(np.quantile(gaps_s, 0.95)),
        "median_ttft_ms": 1e3 * float(np.median(ttft_s)) / dilation,
        "wdt_share": max(0.0, 1.0 - result.useful_drafting_s / result.drafting_s) if result.drafting_s else 0.0,
        "pass_ms": 1e3 * passes / dilation,
        "pass_sessions": sessions,
        "sessions": float(len(result.judged)),
        **{
            f"attainment_{name}": result.attainment(name) if result.num_judged(name) else math.nan
            for name in result.class_names
        },
    }
    return {name: float(value) for name, value in figures.items()}


def machine_figures(run: LiveRun, server_cpu_s: Mapping[str, float]) -> dict[str, float]:
    """What the run asked of this machine, in its own time: rates, shares of a core, and how late messages left."""
    lag_s = np.array(run.lag_s or [0.0])
    return {
        "commits_per_s": len(run.received_s) / run.elapsed_s,
        "messages_per_s": run.num_messages / run.elapsed_s,
        "client_cores": run.client_cpu_s / run.elapsed_s,
        **{f"{name}_cores": seconds / run.elapsed_s for name, seconds in server_cpu_s.items()},
        "lag_ms": 1e3 * float(np.median(lag_s)),
        "lag_p99_ms": 1e3 * float(np.quantile(lag_s, 0.99)),
        "mismatches": float(run.num_mismatches),
    }


def pass_figures(path: Path, received_s: Sequence[float]) -> dict[str, float]:
    """Of the server's passes, from its trace (`wisp_plugin.pass_trace`), in the machine's time.

    The way of a commit is from the end of the last pass that had ended to when it was received, `received_s`.
    Only passes right behind each other count: where the engine was idle, the next one started late.
    """
    passes = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    between_s = [
        after["time_s"] - before["time_s"] - before["measured_s"]
        for before, after in itertools.pairwise(passes)
        if after["pass"] == before["pass"] + 1 and not after["idle"]
    ]
    ends_s = np.array([one["time_s"] + one["measured_s"] for one in passes] or [np.nan])
    last = np.searchsorted(ends_s, received_s, side="right") - 1
    ways_s = (np.asarray(received_s) - ends_s[last])[last >= 0] if len(received_s) else np.array([np.nan])
    return {
        "passes": float(len(passes)),
        "between_ms": 1e3 * float(np.median(between_s or [np.nan])),
        "way_ms": 1e3 * float(np.median(ways_s)),
        "way_p95_ms": 1e3 * float(np.quantile(ways_s, 0.95)),
    }


@dataclass(frozen=True, slots=True)
class ServerCpu:
    """Processor time of tritonserver and of its Python stub up to some moment, in seconds."""

    seconds: Mapping[str, float]

    @classmethod
    def now(cls, group: int) -> ServerCpu:
        """Of the process group `group`; empty where there is no /proc."""
        seconds: dict[str, float] = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                text = stat.read_text()
            except OSError:
                continue
            name, fields = text[text.index("(") + 1 : text.rindex(")")], text[text.rindex(")") + 2 :].split()
            if int(fields[2]) == group:
                part = "server" if name.startswith("tritonserver") else "stub"
                seconds[part] = seconds.get(part, 0.0) + sum(map(int, fields[11:13])) / _TICKS_PER_S
        return cls(seconds)

    def since(self, before: ServerCpu) -> dict[str, float]:
        """Seconds between two looks."""
        return {name: value - before.seconds.get(name, 0.0) for name, value in self.seconds.items()}
