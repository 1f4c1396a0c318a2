"""Which prompts cannot have their first token in time, for policy `wisp`, so that the fewest are late.

When more prompts arrive at once than can be computed in time, earliest deadline first makes nearly all of them a little
late. The fewest are late if jobs are taken by due date and, whenever one would be late, the longest taken so far is
put off (Moore 1968, with Hodgson's algorithm). It is asked again at every pass, and as a prompt that is computed gets
shorter, hardly ever another one is chosen. What is put off waits longer than by deadline; `wisp_turns` bounds that.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

from wisp_plugin.estimator import EMPTY_PASS, Estimator, token_features
from wisp_plugin.roster import Bools, Candidates

_LEAST_SHARE = 0.2  # of the server's time, for prompts


def will_be_late(c: Candidates, is_prefill: Bools, estimator: Estimator, now_s: float) -> Bools:
    """Of the prefills those that are late, and those that have to be so that no more are; `[S]`.

    Prefills have the time of the server that the pace of those who run leaves.
    """
    result: Bools = is_prefill & (c.needed_s < now_s)
    waiting = np.flatnonzero(is_prefill & ~result & (c.is_lost == 0))  # lost ones come last, and take no time before
    if not len(waiting):
        return result
    token_s = estimator.pass_s(estimator.work(token_features(c.num_cached.mean())))
    alone_s = estimator.pass_s(estimator.work(EMPTY_PASS))  # nobody gets tokens more often, whatever its SLO asks for
    paces = 1.0 / np.maximum(c.tpot_s[~is_prefill & (c.is_lost == 0)], alone_s)
    share = max(_LEAST_SHARE, 1.0 - float(paces.sum()) * token_s)
    waiting = waiting[c.needed_s[waiting].argsort(kind="stable")]
    sizes_s = c.num_uncached[waiting] * (token_s / share)
    result[waiting[put_off(sizes_s.tolist(), (c.needed_s[waiting] - now_s).tolist())]] = True
    return result


def put_off(sizes_s: Sequence[float], due_s: Sequence[float]) -> list[int]:
    """Indices of the jobs to put off so that the most of the others end in time, one after the other from time 0.

    `due_s` has to rise.
    """
    taken: list[tuple[float, int]] = []  # longest first
    late, end_s = [], 0.0
    for job, (size_s, job_due_s) in enumerate(zip(sizes_s, due_s, strict=True)):
        heapq.heappush(taken, (-size_s, job))
        end_s += size_s
        if end_s > job_due_s:
            longest_s, longest = heapq.heappop(taken)
            end_s += longest_s
            late.append(longest)
    return late
