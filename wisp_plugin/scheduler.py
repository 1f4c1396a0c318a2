"""What goes into the next pass: `Scheduler.plan` / `Scheduler.complete` around a policy (DESIGN.md section 7).

The scheduler holds the sessions that may be served and the accounting of KV memory; a policy only orders
candidates. It is deterministic: equal calls give equal plans. It never sleeps, draws or measures: time is an
argument, so that the simulator drives this very code.

`continuous` is the centralized baseline: everyone takes part in every pass, as far as the token budget goes.
Sessions that only decode or verify come first, then prefills, each in the order in which they became ready;
in `sync` that is the order in which drafts arrived (FIFO).

Waiting is bounded: a session that has been due for `PREFILL_WAIT_S` stands in front of all that became ready after
it, and being served puts it behind. Under KV pressure the older session wins: blocks are given out oldest first, so
the oldest always runs, a younger one never evicts an older one that runs, and passes never thrash.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from wisp_plugin.config import EngineConfig
from wisp_plugin.messages import BatchPlan, Commit, PassItem, PassOutcome, Timing
from wisp_plugin.server_session import ServerSession

PREFILL_WAIT_S = 0.1  # a prefill that has waited this long queues with the running sessions
KV_IDLE_S = 1.0  # a session that waits for its client this long no longer keeps others from its KV blocks


class KvAccount(Protocol):
    """The part of `kv_blocks.BlockPool` that planning needs."""

    @property
    def num_blocks(self) -> int:
        """Blocks in all."""

    @property
    def block_tokens(self) -> int:
        """Tokens of one block."""

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""

    def blocks(self, session: str) -> Sequence[int]:
        """Blocks held by a session (empty if unknown)."""

    def num_missing(self, session: str, num_tokens: int) -> int:
        """Blocks still to be taken until the session can hold `num_tokens`."""


class Policy(Protocol):
    """Decides who is offered a place in the pass, and in which order."""

    def order(self, candidates: Sequence[ServerSession], now_s: float) -> list[ServerSession]:
        """The candidates to be served, best first; leaving one out holds it back for this pass."""


class Continuous:
    """Everyone, every pass: running sessions before prefills, in the order in which they became ready."""

    def order(self, candidates: Sequence[ServerSession], now_s: float) -> list[ServerSession]:
        """See `Policy.order`."""

        def place(s: ServerSession) -> tuple[bool, float, float, str]:
            is_young_prefill = s.num_uncached > 1 and now_s - s.ready_since_s < PREFILL_WAIT_S
            return is_young_prefill, s.ready_since_s, s.opened_s, s.id

        return sorted(candidates, key=place)


POLICIES: dict[str, Callable[[], Policy]] = {"continuous": Continuous}


class Scheduler:
    """Sessions that may be served, and the two questions asked about them: what next, and what did it give."""

    def __init__(self, policy: Policy, config: EngineConfig, kv: KvAccount) -> None:
        self._policy = policy
        self._config = config
        self._kv = kv
        self._sessions: dict[str, ServerSession] = {}

    @property
    def sessions(self) -> Iterable[ServerSession]:
        """Sessions that may be served, in the order of their opening."""
        return self._sessions.values()

    def add(self, session: ServerSession) -> None:
        """Let a session take part from now on."""
        self._sessions[session.id] = session

    def remove(self, session_id: str) -> None:
        """Take a session out; unknown ones are ignored. Its KV is the caller's to release."""
        self._sessions.pop(session_id, None)

    def plan(self, now_s: float) -> BatchPlan:
        """The next pass; empty if nobody is due."""
        candidates = [session for session in self.sessions if self._is_candidate(session)]
        memory = _Memory(self._kv, self.sessions, {s.id for s in candidates}, now_s)
        items: list[PassItem] = []
        num_left = self._config.max_pass_tokens
        for session in self._policy.order(candidates, now_s):
            if num_left == 0 or len(items) == self._config.max_pass_sessions:
                break
            item = memory.fit(session, num_left)
            if item is not None:
                items.append(item)
                num_left -= item.num_new_tokens
        return BatchPlan(tuple(items), memory.evicted)

    def evict(self, session_ids: Iterable[str]) -> None:
        """Note that the KV of these sessions is gone; it is computed again when their turn comes."""
        for session_id in session_ids:
            self._sessions[session_id].num_cached = 0

    def complete(
        self, plan: BatchPlan, outcomes: Sequence[PassOutcome], started_s: float, measured_s: float
    ) -> list[Commit]:
        """Apply the outcomes of a pass; one commit for each member that got tokens."""
        commits = []
        for item, outcome in zip(plan.items, outcomes, strict=True):
            assert outcome.session == item.session, "outcomes come in the order of the plan"
            session = self._sessions[item.session]
            timing = Timing(
                waited_us=round(1e6 * max(0.0, started_s - session.newest_input_s)),
                predicted_us=round(1e6 * plan.predicted_s),
                measured_us=round(1e6 * measured_s),
                num_sessions=len(plan.items),
            )
            commit = session.commit(item, outcome, timing, started_s + measured_s)
            if commit is not None:
                commits.append(commit)
        return commits

    def _is_candidate(self, session: ServerSession) -> bool:
        return session.is_due and not session.is_paused(self._config.max_unacked_tokens)


class _Memory:
    """Who may hold KV, and what is left, while a plan grows.

    Oldest first, every session that runs gets the blocks of its committed tokens and of the next one, as long
    as there are any; all others lose theirs when somebody needs them. What is left over takes draft tokens.
    """

    def __init__(self, kv: KvAccount, sessions: Iterable[ServerSession], running: set[str], now_s: float) -> None:
        self._kv = kv
        self._num_free = kv.num_free
        self._num_spare = kv.num_blocks
        self._needs: dict[str, int] = {}
        self._victims: list[str] = []
        self._evicted: list[str] = []
        for session in sorted(sessions, key=lambda s: (s.opened_s, s.id)):
            num_held = len(kv.blocks(session.id))
            need = max(num_held, self._num_blocks(session.num_committed + 1))
            if need <= self._num_spare and (session.id in running or now_s - session.ready_since_s < KV_IDLE_S):
                self._num_spare -= need
                self._needs[session.id] = need
            elif num_held:
                self._victims.append(session.id)

    @property
    def evicted(self) -> tuple[str, ...]:
        """Sessions whose KV must be dropped before the pass."""
        return tuple(self._evicted)

    def fit(self, session: ServerSession, max_new_tokens: int) -> PassItem | None:
        """The session's item with as many drafts as memory allows; None if it may not hold KV now."""
        if session.id not in self._needs:
            return None
        num_drafts = session.num_buffered
        while num_drafts and self._num_extra(session, num_drafts) > self._num_spare:
            num_drafts -= 1
        self._num_spare -= self._num_extra(session, num_drafts)
        num_missing = self._kv.num_missing(session.id, session.num_committed + num_drafts)
        while self._num_free < num_missing:
            self._evicted.append(self._victims.pop())
            self._num_free += len(self._kv.blocks(self._evicted[-1]))
        self._num_free -= num_missing
        return session.pass_item(min(max_new_tokens, session.num_uncached + num_drafts))

    def _num_extra(self, session: ServerSession, num_drafts: int) -> int:
        """Blocks for the drafts beyond those that the session was given."""
        return max(0, self._num_blocks(session.num_committed + num_drafts) - self._needs[session.id])

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._kv.block_tokens)
