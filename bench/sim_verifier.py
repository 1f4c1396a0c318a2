"""The simulated verifier: a pass takes what its features cost, and the target says what it says."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from bench.sim_client import SimulatedClient
from bench.sim_result import ServerRecord
from bench.virtual_time import EventQueue
from wisp_plugin.coupling import count_accepted
from wisp_plugin.estimator import EMPTY_PASS, Costs, Estimator
from wisp_plugin.kv_blocks import BlockPool
from wisp_plugin.kv_pass import reserve
from wisp_plugin.messages import PassItem, PassOutcome, Tokens
from wisp_plugin.pass_features import member_features
from wisp_plugin.server_session import ServerSession

_KV_BLOCK_TOKENS = 32


@dataclass(frozen=True, slots=True)
class PassTiming:
    """True cost of passes, lognormal noise (mean 1) on top, and from when on passes are counted.

    `drafting`: what it costs to draft on the server (see `sim_colocated`).
    """

    costs: Costs
    noise_sigma: float
    seed: int
    warm_up_s: float
    drafting: DraftingCost | None = None


class DraftingCost(Protocol):
    """Time of drafting on the server."""

    def before(self, items: Sequence[PassItem]) -> float:
        """Seconds that it took to draft what is in `items`."""


class SimulatedVerifier:
    """The verifier's contract in virtual time: a pass takes what its features cost."""

    def __init__(
        self, timing: PassTiming, kv_tokens: int, record: ServerRecord, events: EventQueue,
        clients: Mapping[str, SimulatedClient],
    ) -> None:  # fmt: skip
        """`record` is written; `clients` by session know what the target says."""
        self.pool = BlockPool(-(-kv_tokens // _KV_BLOCK_TOKENS), _KV_BLOCK_TOKENS)
        self.record = record
        self.sessions: Callable[[], Iterable[ServerSession]] = tuple  # those of the scheduler, once there is one
        self._known: dict[str, ServerSession] = {}
        self._events, self._clients = events, clients
        self._costs, self._noise_sigma = Estimator(timing.costs), timing.noise_sigma
        self._rng = np.random.default_rng((timing.seed, 2))
        self.warm_up_s = timing.warm_up_s
        self._drafting = timing.drafting

    def run(self, items: Sequence[PassItem]) -> list[PassOutcome]:
        """See `engine.Verifier`. Events up to the end of the pass happen meanwhile."""
        features = member_features(items)
        expected_s = float(self._costs.predict(EMPTY_PASS + features.sum(axis=0)))
        drafting_s = self._drafting.before(items) if self._drafting is not None else 0.0
        pass_s = expected_s * self._noise() + drafting_s
        if self._events.now_s >= self.warm_up_s:
            self._count(items, expected_s - self._costs.predict(EMPTY_PASS + features), pass_s)
        self._count_drafts(items)
        reserve(self.pool, items)
        self._events.advance(self._events.now_s + pass_s)
        return [self._choose(item) for item in items]

    def release(self, session: str) -> None:
        """See `engine.Verifier`."""
        self.pool.release(session)

    def num_committed(self, session_id: str) -> int:
        """Committed tokens of a session that the scheduler has."""
        return self._session(session_id).num_committed

    def _session(self, session_id: str) -> ServerSession:
        if session_id not in self._known:
            self._known |= {session.id: session for session in self.sessions()}
        return self._known[session_id]

    def _choose(self, item: PassItem) -> PassOutcome:
        first, target = item.first_choice_position, self._clients[item.session].tokens.target
        chosen = target[first : first + item.num_choices]
        num_kept = first
        if item.num_draft_tokens:
            num_accepted = count_accepted(item.tokens[first:], chosen)
            num_kept += num_accepted
            self.record.accepted += num_accepted
            self.pool.truncate(item.session, num_kept)
        self.pool.remember(item.session, item.tokens[:num_kept])
        return PassOutcome(item.session, chosen)

    def _count_drafts(self, items: Sequence[PassItem]) -> None:
        for item in items:
            num_buffered = self._session(item.session).drafts.num_tokens
            self.record.verified += item.num_draft_tokens
            self.record.trimmed += max(0, num_buffered - item.num_draft_tokens)

    def note_end(self, session_id: str) -> None:
        """A session has ended, or the run has: keep what its server side has counted."""
        session = self._known.pop(session_id, None)
        if session is not None:
            self.record.late += session.drafts.counts.late
            self.record.stale += session.drafts.counts.stale

    def _noise(self) -> float:
        sigma = self._noise_sigma
        return math.exp(sigma * self._rng.standard_normal() - sigma**2 / 2) if sigma else 1.0

    def _count(self, items: Sequence[PassItem], interference_s: npt.NDArray[np.float64], pass_s: float) -> None:
        record = self.record
        record.num_passes += 1
        record.pass_s += pass_s
        record.pass_sessions += len(items)
        record.pass_new_tokens += sum(item.num_new_tokens for item in items)
        classes = [self._clients[item.session].record.spec.class_index for item in items]
        num_classes = len(record.num_places)
        record.interference_s += np.bincount(classes, interference_s, num_classes)
        record.num_places += np.bincount(classes, minlength=num_classes)


class SimulatedDraftModel:
    """A draft model on the server, in virtual time: a step takes what `costs` say, and it drafts as the devices do."""

    def __init__(
        self, costs: Costs, kv_tokens: int, target: SimulatedVerifier, events: EventQueue,
        clients: Mapping[str, SimulatedClient],
    ) -> None:  # fmt: skip
        """It drafts before the passes of `target`."""
        self.pool = BlockPool(-(-kv_tokens // _KV_BLOCK_TOKENS), _KV_BLOCK_TOKENS)
        self._costs, self._target, self._events, self._clients = Estimator(costs), target, events, clients
        self._warm_up_s = target.warm_up_s

    def run(self, items: Sequence[PassItem]) -> list[PassOutcome]:
        """See `engine.Verifier`."""
        step_s = float(self._costs.predict(EMPTY_PASS + member_features(items).sum(axis=0)))
        reserve(self.pool, items)
        if self._events.now_s >= self._warm_up_s:
            self._target.record.pass_s += step_s
        self._events.advance(self._events.now_s + step_s)
        return [PassOutcome(item.session, self._draft(item)) for item in items]

    def release(self, session: str) -> None:
        """See `engine.Verifier`."""
        self.pool.release(session)

    def _draft(self, item: PassItem) -> Tokens:
        if item.is_prefill_chunk:
            return np.empty(0, np.int32)
        num_committed = self._target.num_committed(item.session)
        token, _ = self._clients[item.session].tokens.draft(num_committed, len(item.tokens))
        return np.array([token], np.int32)
