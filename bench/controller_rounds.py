"""`sync` rounds over recorded traces: the real edge session and controller, with a modelled link and verification.

In `sync` the server's side is plain arithmetic: of a chain, the tokens in front of the first wrong one are accepted,
the target's own token follows, and the commit comes a round trip and a verification after the message.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from wisp_plugin.controller import SpeculationController
from wisp_plugin.draft_trace import DraftTrace, TextTrace
from wisp_plugin.edge_session import EdgeSession, Step
from wisp_plugin.messages import Commit, Mode, Open, Origin, Sampling, Slo, Status, Timing

_ANY_SLO = Slo(1e6, 1e6)


@dataclass(frozen=True, slots=True)
class Setting:
    """A modelled link and verification, in seconds."""

    rtt_s: float
    verify_s: float

    @property
    def overhead_s(self) -> float:
        """Of a round: from its message to its commit."""
        return self.rtt_s + self.verify_s


@dataclass(slots=True)
class RoundTotals:
    """Sums over all rounds of all texts behind their first tokens, which the prefill commits."""

    draft_s: float  # of a draft token
    committed: int = 0
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0

    def tokens_per_s(self, setting: Setting) -> float:
        """Committed tokens per second."""
        return self.committed / (self.drafted * self.draft_s + self.rounds * setting.overhead_s)

    @property
    def tokens_per_round(self) -> float:
        """Committed tokens per round."""
        return self.committed / self.rounds

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted of the draft tokens that were verified; None without any."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def wdt_share(self) -> float:
        """Time spent on draft tokens that were not accepted, over all drafting time (our definition)."""
        return 1.0 - self.accepted / self.drafted if self.drafted else 0.0


def run_rounds(
    trace: DraftTrace, setting: Setting, draft_s: float, make_controller: Callable[[TextTrace], SpeculationController]
) -> RoundTotals:
    """All texts of a trace, one session each. Rules that look at no time give the same totals in every setting."""
    totals = RoundTotals(draft_s)
    for text in trace.texts:
        if len(text.generated) > 1:
            _run_text(text, setting, make_controller(text), totals)
    return totals


def _run_text(text: TextTrace, setting: Setting, controller: SpeculationController, totals: RoundTotals) -> None:
    start = text.prompt_len + 1
    opened = Open("0" * 32, text.tokens[:start], text.prompt_len, len(text.generated), Sampling(), _ANY_SLO, Mode.SYNC)
    session, now_s = EdgeSession(opened, controller), 1.0
    session.reopen()
    while (step := session.next_step(now_s)) is not Step.DONE:
        if step is Step.DRAFT:
            job = session.begin_draft()
            index, ahead = len(session.committed) - text.prompt_len, len(session.chain)
            now_s += totals.draft_s
            token, stats = text.chain_token(index, ahead)
            session.on_drafted(job, token, totals.draft_s, stats)
        else:
            assert step is Step.SEND, "a round is open until its commit"
            session.take_message(now_s)
            now_s += setting.overhead_s
            session.on_commit(_commit(text, session, setting), now_s)
    totals.committed += session.stats.num_committed
    totals.rounds += session.stats.num_commits
    totals.drafted += session.stats.num_sent
    totals.accepted += session.stats.num_accepted


def _commit(text: TextTrace, session: EdgeSession, setting: Setting) -> Commit:
    start, num_drafts = len(session.committed), len(session.chain)
    num_accepted = min(num_drafts, text.run_length(start - text.prompt_len))
    tokens = text.tokens[start : start + num_accepted + 1]
    own = Origin.DECODED if not num_drafts else Origin.BONUS if num_accepted == num_drafts else Origin.CORRECTION
    origin = np.full(len(tokens), Origin.ACCEPTED, np.uint8)
    origin[num_accepted:] = own
    status = Status.LENGTH if start + len(tokens) == len(text.tokens) else Status.RUNNING
    timing = Timing(measured_us=round(1e6 * setting.verify_s), num_sessions=1)
    return Commit("0" * 32, start, tokens, origin, status, timing)


class Oracle:
    """Knows the first rejection: drafts up to it, as far as a draft token pays at all. No rule can do better."""

    def __init__(self, text: TextTrace) -> None:
        self._text = text
        self.committed = 1

    def draft_on(self, chain: object, pace: object, now_s: float) -> bool:
        """See `StopRule.draft_on`."""
        return len(chain) < self._text.run_length(self.committed)  # type: ignore[arg-type]

    def waits(self, chain: object, pace: object) -> bool:
        """See `StopRule.waits`."""
        return True

    def on_commit(self, num_right: int, num_drafted: int) -> None:
        """See `StopRule.on_commit`."""
        self.committed += num_right + 1
