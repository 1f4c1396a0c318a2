"""Stand-ins with the contracts of the real collaborators: a target, a verifier, a reply, a clock."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.factories import ids, make_config, make_estimator, make_session, session_id
from wisp_plugin.config import EngineConfig
from wisp_plugin.coupling import count_accepted
from wisp_plugin.drafting_verifier import DraftingVerifier
from wisp_plugin.engine import Engine
from wisp_plugin.estimator import Costs, Estimator
from wisp_plugin.kv_blocks import BlockPool, Slots, token_slots
from wisp_plugin.messages import BatchPlan, Commit, Draft, PassItem, PassOutcome, Status, Tokens
from wisp_plugin.scheduler import make_scheduler
from wisp_plugin.server_session import ServerSession

VOCAB_SIZE = 7


def target_token(prefix: Tokens) -> int:
    """The fake target: a fixed function of the whole prefix."""
    return zlib.crc32(np.ascontiguousarray(prefix, np.int32).tobytes()) % VOCAB_SIZE


def draft_token(prefix: Tokens) -> int:
    """The fake draft model: the target's token about four times in five."""
    mood = zlib.crc32(np.ascontiguousarray(prefix, np.int32).tobytes() + b"draft")
    return target_token(prefix) if mood % 5 else mood // 5 % VOCAB_SIZE


def target_alone(prompt: Tokens, end: int, eos: Sequence[int] = ()) -> list[int]:
    """What the target generates behind `prompt` up to position `end` or an EOS."""
    tokens = [int(t) for t in prompt]
    while len(tokens) < end and not (len(tokens) > len(prompt) and tokens[-1] in eos):
        tokens.append(target_token(np.array(tokens, np.int32)))
    return tokens


@dataclass
class FakeClock:
    """Time that moves when told."""

    now_s: float = 100.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class FakeReply:
    """Records an answer and holds its contract: commits, then exactly one end."""

    commits: list[Commit] = field(default_factory=list)
    finished: bool = False
    error: str | None = None
    cancelled: bool = False

    def send(self, commit: Commit) -> None:
        assert not self.ended, "a commit after the end"
        self.commits.append(commit)

    def finish(self) -> None:
        assert not self.ended, "a second end"
        self.finished = True

    def fail(self, message: str) -> None:
        assert not self.ended, "a second end"
        assert message
        assert "\n" not in message
        self.error = message

    def is_cancelled(self) -> bool:
        return self.cancelled

    @property
    def ended(self) -> bool:
        return self.finished or self.error is not None

    @property
    def tokens(self) -> list[int]:
        return [int(t) for commit in self.commits for t in commit.tokens]

    @property
    def status(self) -> Status:
        return self.commits[-1].status


class FakeVerifier:
    """The verifier's contract on `target_token`, with the real accounting of KV memory.

    Its KV is the token itself: what lies in the slots of a session must be the tokens that a pass counts on.
    """

    def __init__(
        self,
        num_blocks: int = 64,
        block_tokens: int = 4,
        on_run: Callable[[], None] = lambda: None,
        chooses: Callable[[Tokens], int] = target_token,
    ) -> None:
        self.pool = BlockPool(num_blocks, block_tokens)
        self._chooses = chooses
        self.passes: list[tuple[PassItem, ...]] = []
        self._kv = np.full(self.pool.num_tokens, -1, np.int32)
        self._on_run = on_run

    def run(self, items: Sequence[PassItem]) -> list[PassOutcome]:
        self._on_run()
        # Copies: the tokens of an item are a view that holds only until the session changes.
        self.passes.append(tuple(dataclasses.replace(item, tokens=item.tokens.copy()) for item in items))
        for item in items:
            self.pool.truncate(item.session, item.num_cached)
        copies = [copy for item in items for copy in self.pool.extend(item.session, len(item.tokens))]
        kv = self._kv.reshape(-1, self.pool.block_tokens)
        for source, destination in copies:
            kv[destination] = kv[source]
        for item in items:
            self._kv[self._slots(item)[item.num_cached :]] = item.tokens[item.num_cached :]
        for item in items:
            assert self._kv[self._slots(item)].tolist() == item.tokens.tolist(), "KV of other tokens"
        return [self._choose(item) for item in items]

    def _slots(self, item: PassItem) -> Slots:
        return token_slots(self.pool.blocks(item.session), self.pool.block_tokens, len(item.tokens))

    def _choose(self, item: PassItem) -> PassOutcome:
        first = item.first_choice_position
        chosen = np.array([self._chooses(item.tokens[: first + i]) for i in range(item.num_choices)], np.int32)
        num_kept = len(item.tokens) if item.is_prefill_chunk else first + count_accepted(item.tokens[first:], chosen)
        self.pool.truncate(item.session, num_kept)
        self.pool.remember(item.session, item.tokens[:num_kept])
        self.pool.check_integrity()
        return PassOutcome(item.session, chosen)

    def release(self, session: str) -> None:
        self.pool.release(session)


def make_engine(
    verifier: FakeVerifier,
    clock: FakeClock,
    config: EngineConfig | None = None,
    on_failure: Callable[[], None] = lambda: None,
    server_draft: FakeVerifier | None = None,
) -> Engine:
    """An engine without a thread: tests call `step`. `server_draft`: a draft model beside the verifier."""
    config = config or EngineConfig()
    if server_draft is None:
        scheduler = make_scheduler(config, verifier.pool, make_estimator())
        return Engine(scheduler, verifier, config, clock, on_failure=on_failure)
    steps = Estimator(Costs(memory=(0.001, 0, 0, 0, 0, 0), arithmetic=(0.0, 0, 1e-5, 0, 0, 0)))
    drafting = DraftingVerifier(verifier, server_draft, server_draft.pool, steps, clock)
    scheduler = make_scheduler(config, verifier.pool, make_estimator(), steps)
    return Engine(
        scheduler, drafting, config, clock, on_failure=on_failure, drafting_s=lambda: drafting.drafting_s
    )


class ServingLoop:
    """A scheduler and a fake verifier without an engine. Checks every plan; the verifier refuses what does not fit.

    `live` are the sessions that have not finished, `all` those that were ever added, in this order.
    """

    def __init__(self, num_blocks: int = 256, costs: Costs | None = None, **config: Any) -> None:
        self.config = make_config(**config)
        self.verifier = FakeVerifier(num_blocks, block_tokens=4)
        self.estimator = Estimator(costs) if costs else make_estimator()
        self.scheduler = make_scheduler(self.config, self.verifier.pool, self.estimator)
        self.now_s = 100.0
        self.all: list[ServerSession] = []
        self.commits: list[Commit] = []

    @property
    def live(self) -> list[ServerSession]:
        return [session for session in self.all if not session.finished]

    @property
    def candidates(self) -> list[ServerSession]:
        return [s for s in self.live if s.is_due and not s.is_paused(self.config.max_unacked_tokens)]

    def add(self, num_prompt: int = 3, opened_s: float | None = None, **values: Any) -> ServerSession:
        number = len(self.all)
        defaults = {"prompt": np.arange(num_prompt) + 5 * number, "session": session_id(number)}
        session = make_session(self.now_s if opened_s is None else opened_s, **(defaults | values))
        self.all.append(session)
        self.scheduler.add(session)
        return session

    def draft(self, session: ServerSession, *tokens: int, survival: Any = None, next_us: int = -1) -> None:
        """The client has seen every commit and drafts behind them."""
        at = session.num_committed
        told = None if survival is None else np.array(survival, np.uint8)
        session.on_draft(Draft(session.id, at, at, ids(*tokens), told, next_us), self.now_s)
        self.scheduler.note(session)

    def draft_well(self, session: ServerSession, num_tokens: int, **values: Any) -> None:
        """As `draft`, with the target's own tokens."""
        end = session.num_committed
        self.draft(session, *target_alone(session.committed, end + num_tokens)[end:], **values)

    def plan(self) -> BatchPlan:
        """The next plan, checked but not run."""
        candidates = {session.id: session for session in self.candidates}
        num_buffered = {session.id: session.num_buffered for session in self.live}
        plan = self.scheduler.plan(self.now_s)
        members = {item.session for item in plan.items}
        assert len(plan.items) == len(members) <= self.config.max_pass_sessions
        assert plan.num_new_tokens <= self.config.max_pass_tokens
        assert members <= candidates.keys()
        assert plan.num_held == len(candidates) - len(members)
        assert plan.num_trimmed_tokens == sum(num_buffered[i.session] - i.num_draft_tokens for i in plan.items)
        assert len(set(plan.evict)) == len(plan.evict)
        assert not members & set(plan.evict), "a member without its KV"
        assert (plan.predicted_s > 0) == bool(members)
        assert 0 <= plan.price < np.inf
        if candidates and not members:
            assert self.now_s < plan.wake_s < np.inf, "held without end"
        return plan

    def step(self, pass_s: float = 0.01) -> BatchPlan:
        """Plan and run a pass of `pass_s`; time stands still if nobody takes part."""
        plan = self.plan()
        if not plan.items:
            return plan
        for session in plan.evict:
            self.verifier.release(session)
        self.scheduler.evict(plan.evict)
        outcomes = self.verifier.run(plan.items)
        commits = self.scheduler.complete(plan, outcomes, self.now_s, pass_s)
        for commit in commits:
            if commit.status:
                self.scheduler.remove(commit.session)
                self.verifier.release(commit.session)
        self.commits += commits
        self.now_s += pass_s
        return plan

    def members(self, plan: BatchPlan) -> list[int]:
        """Numbers of the members of a pass, in order of service."""
        return [int(item.session, 16) for item in plan.items]
