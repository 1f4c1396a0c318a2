"""Admission control: can the predicted load be served if one more session comes? (DESIGN.md section 7, point 5)

The predicted load is that of the most relaxed rhythm of passes that keeps every SLO: one pass every T seconds, T so
long that the tightest session just makes its tpot with what it commits per turn. A session i that needs a turn only
every `tokens_per_turn * tpot` seconds is in the share T / (tokens_per_turn * tpot) of these passes. Load is the
predicted time of such a pass divided by T: up to 1 it can be kept up. Waiting prefills come on top: a newcomer waits
for them in what the others leave.

A session whose SLO is shorter than its own pass cannot be helped by refusing others, nor does it make all others
hopeless: it sets no rhythm, and counts as a member of every pass. If there are no others, nothing can be lost: load 0.
"""

from __future__ import annotations

import numpy as np

from wisp_plugin.estimator import EMPTY_PASS, Estimator, item_features
from wisp_plugin.messages import Open
from wisp_plugin.roster import Candidates

LEAST_RETRY_S, MOST_RETRY_S = 0.1, 10.0
_DRAFTS_PER_ACCEPTED = 1.4  # verified draft tokens per accepted one
_MOST_DECODE_LOAD = 0.95  # beyond it a prefill would wait without end


def predicted_load(everyone: Candidates, newcomer: Open | None, estimator: Estimator) -> float:
    """Load (1: just served) of all sessions, and of `newcomer` if there is one; 0 without any SLO that can be kept."""
    tpot_s, context, per_turn = everyone.tpot_s, everyone.num_cached + everyone.num_uncached, everyone.tokens_per_turn
    if newcomer is not None:
        usual = float(per_turn.mean()) if len(everyone) else 1.0
        tpot_s = np.append(tpot_s, newcomer.slo.tpot_ms / 1e3)
        context = np.append(context, len(newcomer.tokens))
        per_turn = np.append(per_turn, usual)
    num_drafts = _DRAFTS_PER_ACCEPTED * np.maximum(0.0, per_turn - 1.0)
    turns = item_features(context, 1.0 + num_drafts, 1.0 + num_drafts)
    alone_s = estimator.predict(EMPTY_PASS + turns)
    period_s = np.maximum(tpot_s * per_turn, alone_s)
    can_be_kept = tpot_s * per_turn >= alone_s
    if not can_be_kept.any():
        return 0.0
    rhythm_s = float(period_s[can_be_kept].min())
    members = turns * np.minimum(rhythm_s / period_s, 1.0)[:, None]
    return float(estimator.predict(EMPTY_PASS + members.sum(axis=0))) / rhythm_s


def prefill_wait_s(candidates: Candidates, load: float, estimator: Estimator) -> float:
    """Seconds until the prefills that wait already are done, beside decoding at `load`."""
    waiting = np.flatnonzero(candidates.num_uncached > 1)
    if not len(waiting):
        return 0.0
    work = item_features(candidates.num_cached[waiting], candidates.num_uncached[waiting], np.ones(len(waiting)))
    work_s = float(estimator.predict(EMPTY_PASS + work.sum(axis=0)))
    return work_s / (1.0 - min(load, _MOST_DECODE_LOAD))


def retry_after_s(load: float, max_load: float, num_sessions: int, mean_session_s: float) -> float:
    """When a refused client should come again: when as many sessions are expected to have ended as are too many."""
    too_many = max(1.0, num_sessions * (1.0 - max_load / load)) if load > 0 else 1.0
    return min(max(LEAST_RETRY_S, mean_session_s * too_many / max(1, num_sessions)), MOST_RETRY_S)
