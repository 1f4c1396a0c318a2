"""Who takes part in a pass of a server that has time to spare, for policy `wisp`: by value per second. On columns.

1. `offers`: what every session offers, its own token and then its buffered draft tokens, with the value of each and
   its features. A token is worth 1 to a session on or behind schedule and less the further the session is ahead, but 1
   while nobody else needs the server; a draft token that times its survival.
2. `fill`: offers in order of value per added second. The pass ends where the value per second of the whole is
   highest: then no further offer brings more per second than the pass has already.
"""

from __future__ import annotations

import numpy as np

from wisp_plugin.config import EngineConfig
from wisp_plugin.estimator import EMPTY_PASS, Estimator, token_features
from wisp_plugin.policies import NEED, VALUE, Choice
from wisp_plugin.roster import Candidates, Floats, Ints
from wisp_plugin.wisp_offers import Offers, Running
from wisp_plugin.wisp_parameters import WispParameters

_SAME_WEIGHT = 0.2  # weights of memory and arithmetic that differ by less give nearly the same order
_MAX_ROUNDS = 2  # the price of an offer depends on the pass that it enters, so the order is found twice
_LEAST_S = 1e-9  # what a token costs of which a profile says that it costs nothing
_NEEDED = 1e15  # density of what is needed: above that of any other offer


class Spare:
    """See the top of this file."""

    def __init__(self, config: EngineConfig, estimator: Estimator, parameters: WispParameters) -> None:
        self._config = config
        self._estimator = estimator
        self._parameters = parameters

    def choose(self, running: Running, is_alone: bool) -> tuple[Choice, Floats]:
        """The pass, and its work `[2]`; `is_alone`: no prefill waits."""
        offers = self.offers(running, is_alone)
        taken, work = self.fill(offers)
        turns = np.flatnonzero(taken)
        choice = Choice(
            members=running.rows[turns],
            num_committed=running.num_uncached[turns].astype(np.int64),
            num_drafts=self._drafts_of(running.sessions, offers, turns, taken[turns] - 1),
            reasons=tuple([NEED if is_due else VALUE for is_due in running.is_due[turns].tolist()]),
        )
        return choice, work

    def _drafts_of(self, c: Candidates, offers: Offers, turns: Ints, num_drafts: Ints) -> Ints:
        """Draft tokens of the members: what was taken, but in `sync`, where a device gives up what is not verified,
        all of them, as far as the pass goes."""
        is_sync = c.is_sync[turns] > 0
        if not is_sync.any():
            return num_drafts
        whole = np.where(is_sync, offers.num_levels[turns] - 1, num_drafts)
        num_new = float(offers.num_uncached[turns].sum())
        return whole if num_new + whole.sum() <= self._config.max_pass_tokens else num_drafts

    def offers(self, running: Running, is_alone: bool = True) -> Offers:
        """What running sessions offer; `is_alone`: nobody else needs the time of the server, so what is ahead
        of its SLO counts in full."""
        p, c, num_uncached = self._parameters, running.sessions, running.num_uncached
        levels = np.arange(c.survival.shape[1] + 1)
        ahead = (running.slack_s / c.tpot_s)[:, None] + levels
        if is_alone:
            ahead[:] = 0.0
        slope = (1.0 - p.least_value) / p.horizon_tokens
        value = np.minimum(np.maximum(1.0 - slope * ahead, p.least_value), p.most_value)
        value[:, 1:] *= c.survival
        value[c.is_lost > 0] *= p.lost_value
        num_levels = 1 + np.where(num_uncached < c.num_uncached, 0.0, c.num_buffered).astype(np.int64)
        exists = levels < num_levels[:, None]
        value *= exists
        work = self._offered_work(c, running.own_work, len(levels))
        existing = np.flatnonzero(exists)
        return Offers(value, num_levels, num_uncached, levels, existing, work, running.is_due, running.due_s)

    def _offered_work(self, c: Candidates, own_work: Floats, num_levels: int) -> Floats:
        """Work `[2, S, L]`; that of a session's draft tokens taken as equal, behind half of the buffer."""
        draft = token_features(c.num_cached + c.num_uncached + 0.5 * c.num_buffered)
        work = np.empty((2, len(c), num_levels))
        work[:, :, 0] = own_work.T
        work[:, :, 1:] = self._estimator.work(draft).T[:, :, None]
        return work

    def fill(self, offers: Offers) -> tuple[Ints, Floats]:
        """Levels taken of each session, int `[S]` (0: not in the pass), and the work of the pass `[2]`."""
        empty_work = self._estimator.work(EMPTY_PASS)
        num_sessions, num_levels = offers.value.shape
        if not num_sessions:
            return np.empty(0, np.int64), empty_work
        flat_value, flat_work = offers.value.reshape(-1), offers.work.reshape(2, -1)
        num_needed, before = int(np.count_nonzero(offers.is_due)), None
        work = empty_work + offers.work[:, :, :2].sum(axis=(1, 2))  # a guess: own tokens and one draft token each
        for _ in range(_MAX_ROUNDS):
            weights = self._estimator.weights(work)
            if before is not None and np.abs(weights - before).max() < _SAME_WEIGHT:
                break
            before, order = weights, self._order(offers, weights)
            num_fit = self._num_that_fit(offers, order)
            reached = flat_work[:, order].cumsum(axis=1) + empty_work[:, None]
            density = flat_value[order].cumsum() / self._estimator.seconds(reached.T)
            first = min(max(num_needed, 1), num_fit) - 1
            last = first + int(density[first:num_fit].argmax())
            work = reached[:, last]
        return np.bincount(order[: last + 1] // num_levels, minlength=num_sessions), work

    def _order(self, offers: Offers, weights: Floats) -> Ints:
        """Flat indices of all offers, best first and each behind those it needs."""
        cost = np.maximum(weights[0] * offers.work[0] + weights[1] * offers.work[1], _LEAST_S)
        # A session enters with as many drafts as make its turn richest: those before the best share one density.
        together = offers.value.cumsum(axis=1) / cost.cumsum(axis=1)
        is_head = offers.levels <= together.argmax(axis=1)[:, None]
        density = np.where(is_head, together.max(axis=1)[:, None], offers.value / cost)
        needed = offers.is_due.nonzero()[0]
        if len(needed):
            density[needed[offers.due_s[needed].argsort(kind="stable")], 0] = _NEEDED - np.arange(len(needed))
        order: Ints = offers.existing[(-density.reshape(-1)[offers.existing]).argsort(kind="stable")]
        return order

    def _num_that_fit(self, offers: Offers, order: Ints) -> int:
        """How many offers, in order, the limits of a pass allow (at least one)."""
        config, num_sessions = self._config, len(offers.value)
        num_tokens = float(offers.num_uncached.sum()) + len(order) - num_sessions
        if num_tokens <= config.max_pass_tokens and num_sessions <= config.max_pass_sessions:
            return len(order)
        sessions, levels = np.divmod(order, offers.value.shape[1])
        is_own = levels == 0
        tokens = np.cumsum(np.where(is_own, offers.num_uncached[sessions], 1.0))
        fits = (tokens <= config.max_pass_tokens) & (np.cumsum(is_own) <= config.max_pass_sessions)
        return max(1, int(fits.sum()))
