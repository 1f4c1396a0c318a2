"""Policies: who takes part in the next pass, with how many tokens (DESIGN.md section 7). Plain objects, one protocol.

`continuous`  centralized serving: everyone, every pass (Orca, Yu et al. 2022; vLLM)
`fcfs`        SLED: static batches in order of arrival, fired on size or timeout
`edf`         earliest deadline first: everyone in order of need, as far as the pass goes
`wisp`        by need within what the tightest bear, by value with time to spare, with holding (`wisp_policy.py`)

A policy sees columns (`Candidates`) and answers with indices into them. It is deterministic, without a clock or
randomness; the only state is what `wisp` remembers of its last passes (`wisp_budget`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from wisp_plugin.config import EngineConfig
from wisp_plugin.estimator import Estimator
from wisp_plugin.roster import Candidates, Floats, Ints

PREFILL_WAIT_S = 0.1  # a prefill that has waited this long queues with the running sessions
NEED, VALUE, PREFILL, TURN, BATCH, DEADLINE = "need", "value", "prefill", "turn", "batch", "deadline"


@dataclass(frozen=True, slots=True)
class Choice:
    """Members of a pass in order of service, as indices into `Candidates`; three columns of equal length.

    `num_committed` uncached tokens are computed (fewer than all: a chunk of prefill) and `num_drafts` draft tokens
    verified. `reasons` says for each member why it takes part. `wake_s`: when to decide again if nothing arrives.
    `num_to_draft`: draft tokens that the server is to make itself, behind those (None: none; see `server_drafts`).
    """

    members: Ints
    num_committed: Ints
    num_drafts: Ints
    reasons: tuple[str, ...]
    wake_s: float = math.inf
    num_to_draft: Ints | None = None

    def only(self, kept: Ints) -> Choice:
        """The members with the indices `kept`."""
        reasons = tuple([self.reasons[i] for i in kept.tolist()])
        own = None if self.num_to_draft is None else self.num_to_draft[kept]
        return Choice(self.members[kept], self.num_committed[kept], self.num_drafts[kept], reasons, self.wake_s, own)

    @property
    def all_drafts(self) -> Ints:
        """Draft tokens of each member, those that the server is to make included."""
        return self.num_drafts if self.num_to_draft is None else self.num_drafts + self.num_to_draft


def expected_tokens(c: Candidates, choice: Choice) -> Floats:
    """Tokens that each member is expected to commit, `[M]`. Those with a chunk of their prefill choose nothing."""
    chooses = choice.num_committed >= c.num_uncached[choice.members]
    is_verified = np.arange(c.survival.shape[1]) < choice.all_drafts[:, None]
    result: Floats = chooses + (c.survival[choice.members] * is_verified).sum(axis=1)
    return result


NOBODY = Choice(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.int64), ())


class Policy(Protocol):
    """Chooses the members of the next pass."""

    def choose(self, candidates: Candidates, now_s: float) -> Choice:
        """At most `max_pass_sessions` members with `max_pass_tokens` new tokens in all; nobody: all are held."""

    def note(self, candidates: Candidates, choice: Choice, now_s: float) -> None:
        """The next pass is `choice`: what was chosen, less what KV memory, equal prompts and drafting on the server
        leave out."""


class _Forgetful:
    def note(self, candidates: Candidates, choice: Choice, now_s: float) -> None:
        """See `Policy.note`: what was planned makes no difference."""


class Continuous(_Forgetful):
    """Everyone, every pass: running sessions before prefills, in the order in which they became ready.

    A prefill that has waited for `prefill_wait_s` queues like a running session; infinite: decodes always come first,
    as in vLLM with chunked prefill (Sarathi).
    """

    def __init__(self, config: EngineConfig, estimator: Estimator, prefill_wait_s: float = PREFILL_WAIT_S) -> None:
        self._config = config
        self._prefill_wait_s = prefill_wait_s

    def choose(self, candidates: Candidates, now_s: float) -> Choice:
        """See `Policy.choose`."""
        c = candidates
        is_young_prefill = (c.num_uncached > 1) & (now_s - c.ready_s < self._prefill_wait_s)
        order = np.lexsort((c.ready_s, is_young_prefill))
        return take_in_order(c, order, self._config, TURN)


class Edf(_Forgetful):
    """Everyone in order of need, drafts included, as far as the pass goes."""

    def __init__(self, config: EngineConfig, estimator: Estimator) -> None:
        self._config = config

    def choose(self, candidates: Candidates, now_s: float) -> Choice:
        """See `Policy.choose`."""
        return take_in_order(candidates, np.argsort(candidates.needed_s, kind="stable"), self._config, DEADLINE)


class Fcfs(_Forgetful):
    """Static batches in order of arrival: fired when one is full, or when its oldest member has waited long enough.

    A batch that is not full and not due waits, as in SLED (arXiv 2506.09397).
    """

    def __init__(self, config: EngineConfig, estimator: Estimator) -> None:
        self._config = config
        self._wait_s = config.static_batch_wait_ms / 1e3

    def choose(self, candidates: Candidates, now_s: float) -> Choice:
        """See `Policy.choose`."""
        if not len(candidates):
            return NOBODY
        order = np.argsort(candidates.ready_s, kind="stable")
        size = self._config.static_batch_sessions
        fires_s = float(candidates.ready_s[order[0]]) + self._wait_s
        if len(candidates) < size and now_s < fires_s:
            return Choice(NOBODY.members, NOBODY.members, NOBODY.members, (), wake_s=fires_s)
        return take_in_order(candidates, order[:size], self._config, BATCH)


def take_in_order(candidates: Candidates, order: Ints, config: EngineConfig, reason: str) -> Choice:
    """Members in `order`, each with all its tokens; the last one with what is left of the token budget."""
    members = order[: config.max_pass_sessions]
    uncached = candidates.num_uncached[members].astype(np.int64)
    wanted = uncached + candidates.num_buffered[members].astype(np.int64)
    room = config.max_pass_tokens - (np.cumsum(wanted) - wanted)
    fits = room > 0
    members, uncached, given = members[fits], uncached[fits], np.minimum(wanted, room)[fits]
    num_committed = np.minimum(uncached, given)
    return Choice(members, num_committed, given - num_committed, (reason,) * len(members))
