"""A verifier that drafts before it verifies: what the plan wants drafted on the server (`server_drafts`).

The draft model is a second `Verifier` with a KV memory of its own: a step is one of its passes, in which each session
chooses one token behind what it has, by the session's own seed (DESIGN.md section 3). Its KV of a session lags behind
when the device drafts, and holds rejected tokens afterwards; before it drafts it is cut to what is right and catches
up. Drafting is never owed: who has no room gets none this time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from wisp_plugin.estimator import Estimator
from wisp_plugin.kv_blocks import BlockPool
from wisp_plugin.messages import PassItem, PassOutcome, Sampling, Tokens
from wisp_plugin.pass_features import pass_features
from wisp_plugin.protocols import Verifier

_NONE: Tokens = np.empty(0, np.int32)


@dataclass(frozen=True, slots=True)
class DraftLimits:
    """What the draft model can do. Who is beyond it gets no draft: longer than its context, with tokens that it does
    not know; or not yet, with more than `catch_up_tokens` that it has to compute first."""

    max_context_tokens: int = 1 << 30
    vocab_size: int = 1 << 30
    catch_up_tokens: int = 512  # of all sessions before a pass

    def allow(self, item: PassItem) -> bool:
        """True if the model can draft for `item`."""
        if len(item.tokens) + item.num_to_draft > self.max_context_tokens:
            return False
        return int(item.tokens.max(initial=0)) < self.vocab_size

    def sampling(self, sampling: Sampling) -> Sampling:
        """Without bans of tokens that the model does not know."""
        known = tuple(token for token in sampling.banned_token_ids if token < self.vocab_size)
        return sampling if known == sampling.banned_token_ids else replace(sampling, banned_token_ids=known)


class DraftingVerifier:
    """See the top of this file. `drafting_s`: how long drafting took before the newest pass."""

    def __init__(
        self, target: Verifier, draft: Verifier, pool: BlockPool, steps: Estimator,
        clock: Callable[[], float] = time.monotonic, limits: DraftLimits | None = None,
    ) -> None:  # fmt: skip
        """`pool` is the KV memory of `draft`, `steps` learns what a step takes."""
        self._target, self._draft, self._pool, self._steps, self._clock = target, draft, pool, steps, clock
        self._limits = limits or DraftLimits()
        self._computed: dict[str, Tokens] = {}  # what the draft model has KV of, least recently used first
        self.drafting_s = 0.0

    def run(self, items: Sequence[PassItem]) -> list[PassOutcome]:
        """See `Verifier.run`."""
        started_s = self._clock()
        drafted = self._draft_for([item for item in items if item.num_to_draft])
        self.drafting_s = self._clock() - started_s
        outcomes = self._target.run([_with(item, drafted.get(item.session, _NONE)) for item in items])
        return [replace(o, drafted=drafted[o.session]) if o.session in drafted else o for o in outcomes]

    def release(self, session: str) -> None:
        """See `Verifier.release`."""
        self._target.release(session)
        self._forget(session)

    def _forget(self, session: str) -> None:
        if self._computed.pop(session, None) is not None:
            self._draft.release(session)

    def _draft_for(self, items: Sequence[PassItem]) -> dict[str, Tokens]:
        """Draft tokens by session, for those that got any."""
        wanted = {item.session: item.num_to_draft for item in items}
        drafted: dict[str, Tokens] = {}
        steps = self._first_steps(items)
        while steps:
            outcomes = self._run_step(steps)
            further = []
            for step, outcome in zip(steps, outcomes, strict=True):
                session = step.session
                self._computed[session] = step.tokens
                if step.is_prefill_chunk:
                    continue
                drafted[session] = np.concatenate([drafted.get(session, _NONE), outcome.chosen])
                if len(drafted[session]) < wanted[session]:
                    tokens = np.concatenate([step.tokens, outcome.chosen])
                    further.append(PassItem(session, tokens, len(step.tokens), 0, step.sampling, reason=step.reason))
            steps = further
        return drafted

    def _run_step(self, items: Sequence[PassItem]) -> list[PassOutcome]:
        started_s = self._clock()
        outcomes = self._draft.run(items)
        self._steps.observe(pass_features(items, outcomes), self._clock() - started_s)
        return outcomes

    def _first_steps(self, items: Sequence[PassItem]) -> list[PassItem]:
        """What the draft model lacks of each session, as far as there is room; those that lack least come first."""
        allowed = [item for item in items if self._limits.allow(item)]
        lacking = sorted((self._use(item), i) for i, item in enumerate(allowed))
        steps, room, num_promised = [], self._limits.catch_up_tokens, 0
        busy = {item.session for item in allowed}
        for num_lacking, i in lacking:
            item = allowed[i]
            num_cached = len(item.tokens) - num_lacking
            end = min(len(item.tokens), num_cached + room)
            num_blocks = self._make_room(item.session, num_cached, end + item.num_to_draft, num_promised, busy)
            if end == num_cached or num_blocks is None:
                continue
            num_promised += num_blocks
            room -= end - num_cached
            steps.append(_first_step(item, num_cached, end, self._limits))
        return steps

    def _use(self, item: PassItem) -> int:
        """Note that the session drafts now; tokens that the draft model has to compute before it can."""
        computed = self._computed.pop(item.session, _NONE)
        self._computed[item.session] = computed
        return len(item.tokens) - min(_num_common(computed, item.tokens), len(item.tokens) - 1)

    def _make_room(self, session: str, num_cached: int, end: int, num_promised: int, busy: set[str]) -> int | None:
        """Blocks that `session` needs for `end` tokens, at the cost of sessions that do not draft now if need be;
        None: there are not so many."""
        pool = self._pool
        if pool.length(session) > num_cached:
            pool.truncate(session, num_cached)
        num_missing = pool.num_missing(session, end)
        if num_promised + num_missing <= pool.num_free:
            return num_missing
        others = [other for other in self._computed if other not in busy]
        if num_promised + num_missing > pool.num_free + sum(map(pool.num_exclusive, others)):
            return None
        for other in others:
            if num_promised + num_missing <= pool.num_free:
                break
            self._forget(other)
        return num_missing


def _num_common(computed: Tokens, tokens: Tokens) -> int:
    """Leading tokens in which two whole texts agree; `coupling.count_accepted` is quicker for a few and slow here."""
    shorter = min(len(computed), len(tokens))
    different = (computed[:shorter] != tokens[:shorter]).nonzero()[0]
    return int(different[0]) if len(different) else shorter


def _first_step(item: PassItem, num_cached: int, end: int, limits: DraftLimits) -> PassItem:
    """The draft model's part of `item`: its first `end` tokens, and one more if these are all."""
    tokens = item.tokens[:end].copy()  # of a view of the session's array
    is_part = end < len(item.tokens)
    return PassItem(item.session, tokens, num_cached, 0, limits.sampling(item.sampling), is_part, reason=item.reason)


def _with(item: PassItem, drafted: Tokens) -> PassItem:
    """The item with what was drafted for it, as a part of its draft."""
    if not item.num_to_draft:
        return item
    tokens, num_drafts = np.concatenate([item.tokens, drafted]), item.num_draft_tokens + len(drafted)
    return PassItem(item.session, tokens, item.num_cached, num_drafts, item.sampling, logprobs=item.logprobs,
                    reason=item.reason)  # fmt: skip
