"""Prefill beside running sessions, for policy `wisp`: chunks that are soon enough and yet slow nobody down for long.

Every waiting prefill is to be done after `prefill_haste` of the time that its SLO allows to the first token, so it
earns a share of every pass on the way there; shares that were too small for a chunk are not lost. Together they may
not make a pass longer than what running sessions bear: what a turn of theirs is worth in time, and a part of what they
are ahead. (Chunked prefill: Sarathi-Serve, Agrawal et al. 2024.)
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from wisp_plugin.config import EngineConfig
from wisp_plugin.estimator import Estimator, item_features
from wisp_plugin.policies import PREFILL, Choice
from wisp_plugin.roster import Candidates, Floats, Ints
from wisp_plugin.wisp_parameters import WispParameters

_MOST_ALLOWED_S = 4.0


class WispPrefill:
    """See the top of this file."""

    def __init__(self, config: EngineConfig, estimator: Estimator, parameters: WispParameters) -> None:
        self._config = config
        self._estimator = estimator
        self._parameters = parameters

    def add(self, c: Candidates, rows: Ints, choice: Choice, work: Floats, now_s: float) -> Choice:
        """`choice`, a pass with `work` `[2]`, with chunks of the prefills `rows` that are due first."""
        limit_s = self._limit_s(c, rows, work, now_s)
        room = self._config.max_pass_tokens - int(choice.num_committed.sum() + choice.num_drafts.sum())
        places = self._config.max_pass_sessions - len(choice.members)
        members: list[int] = []
        chunks: list[int] = []
        for row in self._order(c, rows, now_s)[: max(0, places)]:
            smallest = 0 if members or len(choice.members) else self._parameters.prefill_tokens
            size = self._chunk(work, c, int(row), min(room, int(c.num_uncached[row])), smallest, limit_s)
            if size <= 0:
                break
            members.append(int(row))
            chunks.append(size)
            room -= size
            work = work + self._estimator.work(item_features(c.num_cached[row], size, 1.0))
        return dataclasses.replace(
            choice,
            members=np.concatenate([choice.members, np.array(members, np.int64)]),
            num_committed=np.concatenate([choice.num_committed, np.array(chunks, np.int64)]),
            num_drafts=np.concatenate([choice.num_drafts, np.zeros(len(members), np.int64)]),
            reasons=choice.reasons + (PREFILL,) * len(members),
        )

    def _order(self, c: Candidates, rows: Ints, now_s: float) -> Ints:
        """The prefills in the order in which their first tokens are needed, but late ones, who make nobody else late,
        behind the others; and before all one that has waited for too long."""
        order: Ints = rows[np.lexsort((c.needed_s[rows], c.needed_s[rows] < now_s))]
        oldest = rows[c.ready_s[rows].argmin()]
        if c.ready_s[oldest] + self._parameters.max_hold_s > now_s:
            return order
        return np.concatenate([[oldest], order[order != oldest]])

    def _limit_s(self, c: Candidates, rows: Ints, work: Floats, now_s: float) -> float:
        """How long the pass may take with prefill in it."""
        p = self._parameters
        if len(rows) == len(c):
            return math.inf
        turns_s = self._estimator.pass_s(work)
        # An old session computes again what it has lost: its age is no time that its SLO allows for that.
        allowed_s = np.minimum(c.needed_s[rows] - c.opened_s[rows], _MOST_ALLOWED_S)
        pace_s = np.maximum(c.opened_s[rows] + p.prefill_haste * allowed_s - now_s, 0.0)
        prefill = self._estimator.work(item_features(c.num_cached[rows], c.num_uncached[rows], 1.0))
        added_s = prefill @ self._estimator.weights(work + prefill.sum(axis=0))
        # What was not used in earlier passes is not lost: a chunk may have to be larger than one pass's share.
        earned_s = now_s - c.ready_s[rows] + turns_s
        share_s = float((added_s * np.minimum(1.0, earned_s / np.maximum(pace_s, turns_s))).sum())
        least_s = p.least_stretch * turns_s
        borne_s = self._borne_s(c, rows, now_s)
        if borne_s <= least_s:  # somebody cannot keep his pace even without prefill
            return max(least_s, turns_s + share_s)
        return max(least_s, min(turns_s + share_s, borne_s))

    def _borne_s(self, c: Candidates, rows: Ints, now_s: float) -> float:
        """How long passes may take on average so that running sessions (all but `rows`) keep their pace: what a turn
        of theirs is worth in time, and a part of what they are ahead."""
        runs = c.is_lost == 0
        runs[rows] = False
        if not runs.any():
            return math.inf
        ahead_s = np.maximum(0.0, c.needed_s[runs] - now_s)
        borne_s = c.tpot_s[runs] * c.tokens_per_turn[runs] + ahead_s / self._parameters.spend_passes
        return float(np.quantile(borne_s, self._parameters.borne_share))

    def _chunk(self, work: Floats, c: Candidates, row: int, most: int, least: int, limit_s: float) -> int:
        """Tokens of a prefill, at most `most`, that keep the pass within `limit_s`, or `least` if none do."""
        if most <= 0 or math.isinf(limit_s):
            return most
        sizes = np.unique(np.linspace(min(most, self._parameters.prefill_tokens), most, 16).astype(np.int64))
        added = self._estimator.work(item_features(c.num_cached[row], sizes, 1.0))
        fitting = sizes[self._estimator.seconds(work + added) <= limit_s]
        return int(fitting[-1]) if len(fitting) else min(most, least)
