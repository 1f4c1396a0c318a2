"""What a simulated run gave: its sessions, judged against their SLOs, and what the server did.

Goodput, capacity and interference are our own definitions (DESIGN.md section 2). Judging a session:

- ttft counts from the client's open to the first token at the device; tpot is the mean time per further token there.
- Who is judged is decided by when a session was opened, never by how it went: early enough to have `MIN_JUDGED_TOKENS`
  tokens (or all it wants) by its SLO before the run ends. If all sessions of a run have ended, all are judged.
- A session that the end of the run has cut is judged on what it has; the token that it waits for counts as arriving
  then.
- Sessions that ended during the warm-up are not judged, and tokens that arrived then are not counted.
- Strict: every token by its due time, which counts from the arrival of the open at the server.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from bench.workload import SessionSpec

MIN_JUDGED_TOKENS = 20
_ROUNDING_S = 1e-9  # a session at exactly its pace meets its SLO, however its times were summed up


class SimulationError(RuntimeError):
    """The simulated system did something that the modelled part cannot go on from."""


@dataclass(slots=True)
class SessionRecord:
    """One session at its client. Times are virtual seconds; `num_counted` tokens arrived behind the warm-up."""

    spec: SessionSpec
    opened_s: float
    arrived_s: float = math.inf  # of the open, at the server
    first_s: float = math.inf
    last_s: float = math.inf
    ended_s: float = math.inf  # of the final status; inf: cut by the end of the run
    num_tokens: int = 0
    num_counted: int = 0
    num_overdue: int = 0
    num_refused: int = 0  # times that the server answered `overloaded`

    @property
    def ttft_s(self) -> float:
        """Time to the first token; inf without one."""
        return self.first_s - self.opened_s

    def waited_s(self, end_s: float) -> float:
        """Time to the first token, or up to `end_s` where there is none yet."""
        return min(self.ttft_s, end_s - self.opened_s)

    def mean_tpot_s(self, end_s: float) -> float:
        """Mean time per token behind the first one; of a cut session with the token that it waits for at `end_s`.

        0 for a complete session of one token, inf without any.
        """
        if not self.num_tokens:
            return math.inf
        past_s = (self.last_s - self.first_s) / max(1, self.num_tokens - 1)
        return past_s if math.isfinite(self.ended_s) else max(past_s, (end_s - self.first_s) / self.num_tokens)

    def was_due(self, end_s: float) -> bool:
        """Whether it was opened early enough to be judged in a run that ends at `end_s`."""
        slo, num_tokens = self.spec.slo, min(MIN_JUDGED_TOKENS, self.spec.num_output_tokens)
        return end_s - self.opened_s >= (slo.ttft_ms + num_tokens * slo.tpot_ms) / 1e3

    def is_met(self, end_s: float) -> bool:
        """Whether the SLO holds."""
        ttft_s, tpot_s = self.spec.slo.ttft_ms / 1e3, self.spec.slo.tpot_ms / 1e3
        return self.ttft_s <= ttft_s + _ROUNDING_S and self.mean_tpot_s(end_s) <= tpot_s + _ROUNDING_S

    def is_strictly_met(self, end_s: float) -> bool:
        """Whether every token came by its due time, the one that a cut session waits for included."""
        has_arrived = math.isfinite(self.arrived_s)
        overdue = math.isinf(self.ended_s) and end_s > self.due_s(self.num_tokens)
        return has_arrived and not self.num_overdue and not overdue

    def due_s(self, index: int) -> float:
        """Due time of token `index` at the client."""
        return self.arrived_s + (self.spec.slo.ttft_ms + index * self.spec.slo.tpot_ms) / 1e3 + _ROUNDING_S


@dataclass(slots=True)
class ServerRecord:
    """What the server did behind the warm-up; draft counts are those of the whole run.

    `interference_s` and `num_places` are per class: summed over (session, pass) pairs, and their number.
    """

    interference_s: npt.NDArray[np.float64]
    num_places: npt.NDArray[np.int64]
    num_passes: int = 0
    pass_s: float = 0.0
    pass_sessions: int = 0
    pass_new_tokens: int = 0
    committed: int = 0
    verified: int = 0
    accepted: int = 0
    trimmed: int = 0
    late: int = 0
    stale: int = 0

    @classmethod
    def of(cls, num_classes: int) -> ServerRecord:
        """An empty record."""
        return cls(np.zeros(num_classes), np.zeros(num_classes, np.int64))


@dataclass(slots=True)
class SimResult:
    """A run of `duration_s` virtual seconds that ended at `end_s` (later if it was drained)."""

    class_names: tuple[str, ...]
    duration_s: float
    warm_up_s: float
    end_s: float
    sessions: list[SessionRecord]
    server: ServerRecord
    drafting_s: float = 0.0
    useful_drafting_s: float = 0.0
    judged: list[SessionRecord] = field(init=False)

    def __post_init__(self) -> None:
        all_ended = all(math.isfinite(s.ended_s) for s in self.sessions)
        behind = [s for s in self.sessions if s.ended_s >= self.warm_up_s]
        self.judged = [s for s in behind if all_ended or s.was_due(self.end_s)]

    def attainment(self, class_name: str | None = None) -> float:
        """Share of judged sessions (of one class) that met their SLO; 1 without any."""
        return _share([s.is_met(self.end_s) for s in self._judged_of(class_name)])

    def num_judged(self, class_name: str) -> int:
        """Judged sessions of one class."""
        return len(self._judged_of(class_name))

    def strict_attainment(self, class_name: str | None = None) -> float:
        """Share of judged sessions (of one class) with every token by its due time; 1 without any."""
        return _share([s.is_strictly_met(self.end_s) for s in self._judged_of(class_name)])

    @property
    def goodput(self) -> float:
        """Tokens per second of judged sessions that met their SLO."""
        return sum(s.num_counted for s in self.judged if s.is_met(self.end_s)) / self._counted_s

    @property
    def arrivals_goodput(self) -> float:
        """Goodput of the sessions that were opened behind the warm-up, all their tokens, per second of opening.

        With timed arrivals and a drained run these are the same sessions under every system: none gains by tokens
        that it sends early, or late from the warm-up.
        """
        opened = [s for s in self.sessions if s.opened_s >= self.warm_up_s]
        return sum(s.num_tokens for s in opened if s.is_met(self.end_s)) / self._counted_s

    @property
    def throughput(self) -> float:
        """Tokens per second that reached the devices."""
        return sum(s.num_counted for s in self.sessions) / self._counted_s

    def interference_ms(self, class_name: str) -> float:
        """Mean interference of sessions of a class in a pass; 0 if none took part."""
        i = self.class_names.index(class_name)
        return float(1e3 * self.server.interference_s[i] / max(1, self.server.num_places[i]))

    @property
    def _counted_s(self) -> float:
        return self.duration_s - self.warm_up_s

    def _judged_of(self, class_name: str | None) -> list[SessionRecord]:
        return [s for s in self.judged if class_name is None or s.spec.slo.name == class_name]

    def figures(self) -> dict[str, float]:
        """All figures by name; milliseconds, tokens, seconds or shares."""
        server, passes = self.server, max(1, self.server.num_passes)
        ttft_ms = [1e3 * s.waited_s(self.end_s) for s in self.judged]
        figures = {
            "sessions": len(self.judged),
            "attainment": self.attainment(),
            "strict_attainment": self.strict_attainment(),
            "goodput": self.goodput,
            "arrivals_goodput": self.arrivals_goodput,
            "throughput": self.throughput,
            "busy_share": server.pass_s / (max(self.end_s, self.duration_s) - self.warm_up_s),
            "committed_per_busy_s": server.committed / server.pass_s if server.pass_s else 0.0,
            "mean_pass_ms": 1e3 * server.pass_s / passes,
            "mean_pass_sessions": server.pass_sessions / passes,
            "mean_pass_new_tokens": server.pass_new_tokens / passes,
            "acceptance_rate": server.accepted / max(1, server.verified),
            "wdt_share": max(0.0, 1.0 - self.useful_drafting_s / self.drafting_s) if self.drafting_s else 0.0,
            "verified": server.verified,
            "trimmed": server.trimmed,
            "late": server.late,
            "stale": server.stale,
            "refused": sum(s.num_refused for s in self.sessions),
            "median_ttft_ms": float(np.median(ttft_ms)) if ttft_ms else math.inf,
        }
        for name in self.class_names:
            figures[f"attainment_{name}"] = self.attainment(name)
            figures[f"interference_ms_{name}"] = self.interference_ms(name)
        return {name: float(value) for name, value in figures.items()}


def _share(outcomes: Sequence[bool]) -> float:
    return sum(outcomes) / len(outcomes) if outcomes else 1.0
