"""How long a pass may take so that whoever can keep the pace of its SLO keeps it, for policy `wisp`.

A session that is in every pass and gets n tokens from each on average bears passes of n x tpot. Longer ones cost it its
SLO; shorter ones carry less, and what all SLOs ask for, with the prompts that come along, has to fit: that takes passes
of `pace_s` on average, but never longer ones than save time: what a pass costs beside its tokens is a small share of it
then, and a burst of prompts is not served quicker by passes that nobody bears. Sessions that bear less than this are
beyond help and count no more. Of the others the one that bears least sets the budget. So passes are as long as they may
be, and all alike: a long pass costs the tightest more than a short one gives back. Where all keep the pace without
drafts, passes are no longer than those that save time.

New tokens per committed one (prompts and rejected drafts are in it) are those of the last passes.
"""

from __future__ import annotations

import math

import numpy as np

from wisp_plugin.estimator import EMPTY_PASS, Estimator, item_features, token_features
from wisp_plugin.policies import Choice, expected_tokens
from wisp_plugin.roster import Bools, Candidates, Floats, Ints
from wisp_plugin.wisp_parameters import WispParameters

_MEMORY_S = 10.0  # passes are remembered so long
_FIRST_TOKENS = (50.0, 25.0)  # new and committed, until there were passes
_ROUNDS = 3  # towards a pass that takes as long as its own work asks for
_SIZES: Floats = np.geomspace(8.0, 4096.0, 37)  # new tokens of a pass that are looked at


class PassBudget:
    """See the top of this file. It remembers the passes it is told of."""

    def __init__(self, estimator: Estimator, parameters: WispParameters) -> None:
        self._estimator = estimator
        self._parameters = parameters
        self._num_new, self._num_committed = _FIRST_TOKENS
        self._noted_s = 0.0

    def note(self, c: Candidates, choice: Choice, now_s: float) -> None:
        """`choice` is the next pass: how many new tokens it takes, and how many it is expected to commit."""
        if not len(choice.members):
            return
        kept = math.exp((self._noted_s - now_s) / _MEMORY_S)
        self._num_new = kept * self._num_new + float(choice.num_committed.sum() + choice.num_drafts.sum())
        self._num_committed = kept * self._num_committed + float(expected_tokens(c, choice).sum())
        self._noted_s = now_s

    def seconds(self, c: Candidates, is_prefill: Bools) -> float:
        """The budget for candidates of which there is at least one."""
        runs = np.flatnonzero(~is_prefill & (c.is_lost == 0))
        longest_s = self._longest_s(c.num_cached[runs if len(runs) else slice(None)])
        if not len(runs):
            return longest_s
        turn_s = c.tpot_s[runs] * self._tokens_per_turn(c, runs)  # what a turn is worth in time
        pace_s = min(self._pace_s(c, runs, turn_s), longest_s)
        is_helped = turn_s >= self._parameters.lost_pace * pace_s
        if not is_helped.any() or c.tpot_s[runs][is_helped].min() >= longest_s:
            return longest_s  # in the second case nobody needs a draft to keep the pace in such passes
        return max(pace_s, float(turn_s[is_helped].min()))

    def _longest_s(self, num_cached: Floats) -> float:
        """Seconds of a pass from which on longer ones save hardly anything: all but `least_saving` of it is what its
        tokens cost in a pass without end. The sessions with `num_cached` take part."""
        own = self._estimator.work(item_features(num_cached, np.ones(len(num_cached)), 1.0)).sum(axis=0)
        token = self._estimator.work(token_features(num_cached.mean()))
        beside = np.maximum(self._estimator.work(EMPTY_PASS) + own - len(num_cached) * token, 0.0)
        seconds = self._estimator.seconds(beside + _SIZES[:, None] * token)
        spent = _SIZES * float(self._estimator.seconds(token)) / seconds  # rises with the size
        enough = np.searchsorted(spent, 1.0 - self._parameters.least_saving)
        return float(seconds[min(int(enough), len(_SIZES) - 1)])

    def _tokens_per_turn(self, c: Candidates, runs: Ints) -> Floats:
        """Committed tokens per turn; of a session that has had few turns at least what the others have usually, or each
        newcomer would hold passes down to the time of one token."""
        is_young = c.num_turns[runs] < self._parameters.young_turns
        own = c.tokens_per_turn[runs]
        if not is_young.any() or is_young.all():
            return own
        return np.where(is_young, np.maximum(own, np.median(own[~is_young])), own)

    def _pace_s(self, c: Candidates, runs: Ints, turn_s: Floats) -> float:
        """Mean seconds of a pass if every session gets just what its SLO asks for: those that run take part as often
        as they have to, and new tokens are as many per committed token as lately."""
        new_per_s = float((1.0 / c.tpot_s[c.is_lost == 0]).sum()) * self._num_new / max(self._num_committed, 1.0)
        own = self._estimator.work(item_features(c.num_cached[runs], np.ones(len(runs)), 1.0))
        token = self._estimator.work(token_features(c.num_cached[runs].mean()))
        empty = self._estimator.work(EMPTY_PASS)
        pace_s = float(turn_s.min())
        for _ in range(_ROUNDS):
            shares = np.minimum(1.0, pace_s / turn_s)
            num_further = max(0.0, new_per_s * pace_s - float(shares.sum()))
            pace_s = float(self._estimator.seconds(empty + shares @ own + num_further * token))
        return pace_s
