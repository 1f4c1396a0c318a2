"""Policy `wisp`: by need, within what the tightest sessions bear; by value where there is time to spare; with holding.

A busy server: passes of the length that the tightest sessions bear (`wisp_budget`), filled in the order of need with
whole turns, prefills among them (`wisp_turns`).

A server with time to spare, or few sessions, whose speed is what counts: by value per added second (`wisp_spare`), then
chunks of prefill, those that are due first, as many tokens as keep every waiting prefill on the way to a first token
after a fraction of the time that its SLO allows (`wisp_prefill`).

A prefill that has waited for `max_hold_s` takes part like those who need a token, with a chunk, one in each pass.

Holding: under load, if nobody needs a token yet and everybody's drafts are on their way, nobody runs until somebody
needs one. So turns are rich, and passes fewer. Else a few sessions wait for their drafts where that gives each of them
more tokens per second (`wisp_hold`). Nobody is held for more than `max_hold_s`; then it waits at most for those that
have waited longer.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from wisp_plugin.config import EngineConfig
from wisp_plugin.estimator import EMPTY_PASS, Estimator, item_features, token_features
from wisp_plugin.policies import NOBODY, Choice
from wisp_plugin.roster import Bools, Candidates, Floats, Ints
from wisp_plugin.wisp_budget import PassBudget
from wisp_plugin.wisp_hold import FEW_SESSIONS, MAX_SESSIONS, waits_for_drafts
from wisp_plugin.wisp_offers import Running
from wisp_plugin.wisp_parameters import WispParameters
from wisp_plugin.wisp_prefill import WispPrefill
from wisp_plugin.wisp_spare import Spare
from wisp_plugin.wisp_turns import Turns

__all__ = ["Wisp", "WispParameters"]


class Wisp:
    """See the top of this file."""

    def __init__(self, config: EngineConfig, estimator: Estimator, parameters: WispParameters | None = None) -> None:
        self._config = config
        self._estimator = estimator
        self._parameters = parameters or WispParameters()
        self._chunk_tokens = min(self._parameters.prefill_tokens, config.max_pass_tokens)
        self._prefill = WispPrefill(config, estimator, self._parameters)
        self._spare = Spare(config, estimator, self._parameters)
        self._turns = Turns(config, estimator, self._parameters)
        self._budget = PassBudget(estimator, self._parameters)

    def choose(self, candidates: Candidates, now_s: float) -> Choice:
        """See `Policy.choose`."""
        if not len(candidates):
            return NOBODY
        is_prefill = candidates.num_uncached > self._chunk_tokens
        has_prefill = bool(is_prefill.any())
        running = self.running(candidates, now_s, np.flatnonzero(~is_prefill) if has_prefill else None)
        # When a prefill has waited for too long; infinite for others: see `Running.due_s`.
        expires_s = np.where(is_prefill, candidates.ready_s + self._parameters.max_hold_s, np.inf)
        if len(running.rows) and expires_s.min() <= now_s:
            return self._busy(candidates, running, is_prefill, expires_s, now_s)
        held_until_s = self._held_until_s(candidates, running, now_s)
        if held_until_s is not None:
            choice, work = replace(NOBODY, wake_s=held_until_s), self._empty_work
        elif self._is_idle(candidates, running):
            choice, work = self._spare.choose(running, is_alone=not has_prefill)
        else:
            return self._busy(candidates, running, is_prefill, expires_s, now_s)
        return self._prefill.add(candidates, np.flatnonzero(is_prefill), choice, work, now_s) if has_prefill else choice

    def _busy(self, c: Candidates, running: Running, is_prefill: Bools, expires_s: Floats, now_s: float) -> Choice:
        """A pass of a server whose time is scarce, or one behind which a prefill would have waited for too long: then
        the one that has waited longest is in, with a chunk."""
        must_s = np.where(expires_s > expires_s.min(), np.inf, expires_s)
        must_s[running.rows] = running.due_s
        return self._turns.choose(c, is_prefill, must_s, now_s, self._budget.of(c, is_prefill, now_s))

    def note(self, candidates: Candidates, choice: Choice, now_s: float) -> None:
        """See `Policy.note`."""
        self._budget.note(candidates, choice, now_s)

    def running(self, c: Candidates, now_s: float, rows: Ints | None = None) -> Running:
        """The candidates `rows` (None: all of them) as running sessions."""
        p = self._parameters
        rows = np.arange(len(c)) if rows is None else rows
        c = c if len(rows) == len(c) else c.only(rows)
        num_uncached = np.minimum(c.num_uncached, self._chunk_tokens)
        own_work = self._estimator.work(item_features(c.num_cached, num_uncached, 1.0))
        everyone_s = self._estimator.pass_s(self._empty_work + own_work.sum(axis=0))
        slack_s = c.needed_s - now_s - everyone_s
        due_s = np.where(c.is_lost > 0, np.inf, now_s + slack_s - p.need_tokens * c.tpot_s)
        # Nobody's need is older than its last turn: those who are hopelessly behind starve nobody.
        due_s = np.clip(due_s, c.ready_s, c.ready_s + p.max_hold_s)
        if not p.holds:
            due_s = np.minimum(due_s, now_s)
        return Running(rows, c, num_uncached, own_work, slack_s, due_s, due_s <= now_s)

    def _held_until_s(self, c: Candidates, running: Running, now_s: float) -> float | None:
        """When to decide again, if everybody's drafts are on their way and waiting for them is worth while: under load
        because nobody needs a token yet, or for the speed of few sessions. None: somebody takes part now."""
        p = self._parameters
        if not len(running.rows):
            return None
        expires_s = running.sessions.next_draft_s + p.draft_grace_s
        expires_s = np.where(np.isfinite(expires_s), expires_s, 0.0)
        if (expires_s <= now_s).any() or not p.holds:
            return None
        is_ahead = not running.is_due.any() and not running.sessions.is_lost.all()
        if is_ahead and len(c) > FEW_SESSIONS and self._load_of(running.sessions, running.own_work) >= p.hold_load:
            return float(min(running.due_s.min(), expires_s.min()))
        if len(running.rows) == len(c) <= MAX_SESSIONS and self._waits_for_drafts(running, now_s):
            return float(min(expires_s.min(), (c.ready_s + p.max_hold_s).min()))
        return None

    def _waits_for_drafts(self, running: Running, now_s: float) -> bool:
        """True if everybody commits more tokens per second when the next pass waits (see `wisp_hold`)."""
        c = running.sessions
        if (c.ready_s + self._parameters.max_hold_s <= now_s).any():
            return False
        work = self._empty_work + running.own_work.sum(axis=0)
        draft_work = self._estimator.work(token_features(c.num_cached.mean()))
        token_s = float(self._estimator.weights(work) @ draft_work)
        return bool(waits_for_drafts(c, now_s, self._estimator.pass_s(work), token_s).all())

    @property
    def _empty_work(self) -> Floats:
        """That of a pass without sessions, `[2]`, as it is known now."""
        return self._estimator.work(EMPTY_PASS)

    def _is_idle(self, c: Candidates, running: Running) -> bool:
        """True if there is nobody to save server time for: hardly any sessions, or hardly any load of some."""
        if not FEW_SESSIONS < len(c) <= MAX_SESSIONS:
            return len(c) <= FEW_SESSIONS
        own_work = running.own_work
        if len(running.rows) < len(c):  # prefills as well
            num_uncached = np.minimum(c.num_uncached, self._chunk_tokens)
            own_work = self._estimator.work(item_features(c.num_cached, num_uncached, 1.0))
        return self._load_of(c, own_work) < self._parameters.hold_load

    def _load_of(self, c: Candidates, own_work: Floats) -> float:
        """How much of the server's time these sessions need to keep their SLOs (as `admission.predicted_load`; like
        there, an SLO shorter than a pass alone sets no rhythm).

        `own_work` `[S, 2]`: that of each session's own tokens.
        """
        period_s = c.tpot_s * c.tokens_per_turn
        alone_s = self._estimator.pass_s(self._empty_work + own_work.min(axis=0))
        can_be_kept = period_s >= alone_s
        if not can_be_kept.any():
            return 0.0
        rhythm_s = float(period_s[can_be_kept].min())
        work = self._empty_work + np.minimum(rhythm_s / period_s, 1.0) @ own_work
        return self._estimator.pass_s(work) / rhythm_s
