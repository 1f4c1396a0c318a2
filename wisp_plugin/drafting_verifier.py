"""A verifier that drafts before it verifies: what the plan wants drafted on the server (`server_drafts`).

The draft model is a second `Verifier` with a KV memory of its own: a step is one of its passes, in which each session
chooses one token behind what it has, by the session's own seed (DESIGN.md section 3). Its KV of a session lags behind
when the device drafts, and holds rejected tokens afterwards; before it drafts it is cut to what is right and catches
up. Drafting is never owed: who has no room gets none this time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from wisp_plugin.coupling import count_accepted
from wisp_plugin.estimator import Estimator
from wisp_plugin.kv_blocks import BlockPool
from wisp_plugin.messages import PassItem, PassOutcome, Tokens
from wisp_plugin.pass_features import pass_features
from wisp_plugin.protocols import Verifier

MAX_CATCH_UP_TOKENS = 2048  # that the draft model computes before a pass; who has more gets on, but no draft yet
_NONE: Tokens = np.empty(0, np.int32)


class DraftingVerifier:
    """See the top of this file. `drafting_s`: how long drafting took before the newest pass."""

    def __init__(
        self, target: Verifier, draft: Verifier, pool: BlockPool, steps: Estimator,
        clock: Callable[[], float] = time.monotonic, max_context_tokens: int = 1 << 30,
    ) -> None:  # fmt: skip
        """`pool` is the KV memory of `draft`, `steps` learns what a step takes, sessions longer than
        `max_context_tokens` get no drafts."""
        self._target, self._draft, self._pool, self._steps, self._clock = target, draft, pool, steps, clock
        self._max_context_tokens = max_context_tokens
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
                    further.append(replace(step, tokens=tokens, num_cached=len(step.tokens)))
            steps = further
        return drafted

    def _run_step(self, items: Sequence[PassItem]) -> list[PassOutcome]:
        started_s = self._clock()
        outcomes = self._draft.run(items)
        self._steps.observe(pass_features(items, outcomes), self._clock() - started_s)
        return outcomes

    def _first_steps(self, items: Sequence[PassItem]) -> list[PassItem]:
        """What the draft model lacks of each session, as far as there is room."""
        steps, room, num_promised = [], MAX_CATCH_UP_TOKENS, 0
        busy = {item.session for item in items}
        for item in items:
            computed = self._computed.pop(item.session, _NONE)
            self._computed[item.session] = computed  # used now
            num_cached = min(count_accepted(computed, item.tokens), len(item.tokens) - 1)
            end = min(len(item.tokens), num_cached + room)
            if end == num_cached or len(item.tokens) + item.num_to_draft > self._max_context_tokens:
                continue
            num_promised += self._make_room(item.session, num_cached, end + item.num_to_draft, num_promised, busy)
            if num_promised > self._pool.num_free:
                break  # nobody behind it has room either
            room -= end - num_cached
            steps.append(_first_step(item, num_cached, end))
        return steps

    def _make_room(self, session: str, num_cached: int, end: int, num_promised: int, busy: set[str]) -> int:
        """Blocks that `session` needs for `end` tokens, at the cost of sessions that do not draft now if need be."""
        pool = self._pool
        if pool.length(session) > num_cached:
            pool.truncate(session, num_cached)
        num_missing = pool.num_missing(session, end)
        for other in list(self._computed):
            if num_promised + num_missing <= pool.num_free:
                break
            if other not in busy:
                self._forget(other)
        return num_missing


def _first_step(item: PassItem, num_cached: int, end: int) -> PassItem:
    """The draft model's part of `item`: its first `end` tokens, and one more if these are all."""
    return replace(
        item,
        tokens=item.tokens[:end].copy(),  # of a view of the session's array
        num_cached=num_cached,
        num_draft_tokens=0,
        num_to_draft=0,
        is_prefill_chunk=end < len(item.tokens),
        logprobs=False,
    )


def _with(item: PassItem, drafted: Tokens) -> PassItem:
    """The item with what was drafted for it, as a part of its draft."""
    if not item.num_to_draft:
        return item
    num_drafts = item.num_draft_tokens + len(drafted)
    return replace(item, tokens=np.concatenate([item.tokens, drafted]), num_draft_tokens=num_drafts, num_to_draft=0)
