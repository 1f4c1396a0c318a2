"""When commits reached their devices, in a simulation as on a real server."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from bench.scenario import Scenario
from bench.sim_result import SimResult
from bench.simulator import simulate
from bench.virtual_time import EventQueue
from wisp_plugin.messages import Commit, Status


@dataclass(slots=True)
class CommitLog:
    """Arrival times of the commits with tokens, in seconds, by session, and the passes behind them; and when sessions
    were told that they have ended."""

    arrivals_s: dict[str, list[float]] = field(default_factory=dict)
    ended_s: dict[str, float] = field(default_factory=dict)
    pass_s: list[tuple[float, int]] = field(default_factory=list)  # of each commit: measured pass, sessions in it

    def add(self, commit: Commit, at_s: float) -> None:
        """A commit arrives `at_s`."""
        if len(commit.tokens):
            self.arrivals_s.setdefault(commit.session, []).append(at_s)
        if len(commit.tokens) and commit.timing.num_sessions:  # what was resent is of no pass
            self.pass_s.append((commit.timing.measured_us / 1e6, commit.timing.num_sessions))
        if commit.status is not Status.RUNNING:
            self.ended_s[commit.session] = at_s

    def passes(self) -> tuple[float, float]:
        """Mean measured seconds of a pass, and sessions in it (those that got tokens); NaN without any."""
        if not self.pass_s:
            return math.nan, math.nan
        weights = sum(1.0 / num_sessions for _, num_sessions in self.pass_s)  # a pass is told by each of its sessions
        return sum(seconds / n for seconds, n in self.pass_s) / weights, len(self.pass_s) / weights

    def gaps_s(self, start_s: float, end_s: float) -> list[float]:
        """Times between the commits of a session that ended from `start_s` to `end_s`.

        One that goes on at `end_s` counts with what it has lasted if it is the longest of its session: a stall shows,
        and what has just begun does not stand for a short one.
        """
        gaps: list[float] = []
        for session, times in self.arrivals_s.items():
            arrived = [at_s for at_s in times if at_s <= end_s]
            own = [after - before for before, after in itertools.pairwise(arrived) if after >= start_s]
            waits_s = end_s - arrived[-1] if arrived and self.ended_s.get(session, math.inf) > end_s else 0.0
            gaps += [*own, waits_s] if waits_s > max(own, default=0.0) else own
        return gaps


class RecordingEvents(EventQueue):
    """Events that keep a log of the commits among them."""

    def __init__(self, log: CommitLog) -> None:
        super().__init__()
        self._log = log

    def schedule(self, at_s: float, callback: Callable[[Any], None], argument: Any) -> None:
        """See `EventQueue.schedule`."""
        if isinstance(argument, Commit):
            self._log.add(argument, at_s)
        super().schedule(at_s, callback, argument)


def simulate_logged(scenario: Scenario) -> tuple[SimResult, CommitLog]:
    """`simulate`, and when its commits arrived."""
    log = CommitLog()
    return simulate(scenario, RecordingEvents(log)), log
