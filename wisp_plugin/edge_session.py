"""The edge's side of a session as a sans-IO state machine: what to draft, what to send, how a commit rolls back.

    step = session.next_step(now_s)
      Step.DRAFT  draft the token of `session.begin_draft()`, then `session.on_drafted(job, token, seconds, stats)`
      Step.SEND   send `session.take_message(now_s)`
      Step.WAIT   nothing to do until the next commit
      Step.DONE   the session has its final status
    session.on_commit(commit, now_s) whenever one has arrived, also while a draft token is in the making

In `free` mode (DESIGN.md section 4) the device drafts on while commits arrive and sends draft tokens as they
come; a commit that agrees with the chain shortens it from the front, one that differs clears it. In `sync` mode
a round is one chain, one message, one commit.

After a lost connection `reopen` gives the message that resumes the session with all that was received.
"""

from __future__ import annotations

import dataclasses
import enum

import numpy as np
import numpy.typing as npt

from wisp_plugin.coupling import count_accepted
from wisp_plugin.draft_stats import DraftStats
from wisp_plugin.edge_stats import EdgeStats
from wisp_plugin.errors import TransportError
from wisp_plugin.messages import Commit, Draft, Mode, Open, Status, Tokens
from wisp_plugin.outbox import ACK_TOKENS, Outbox
from wisp_plugin.pace import Pace, PaceMeter
from wisp_plugin.protocols import DraftController

__all__ = ["ACK_TOKENS", "DraftJob", "EdgeSession", "EdgeStats", "Step"]

_MAX_NEXT_US = 2**31 - 1  # NEXT_US is an INT32


class Step(enum.Enum):
    """What the client should do next."""

    DRAFT = enum.auto()
    SEND = enum.auto()
    WAIT = enum.auto()
    DONE = enum.auto()


@dataclasses.dataclass(frozen=True, slots=True)
class DraftJob:
    """A draft token to be made: the one behind `context`, a copy that commits do not touch."""

    context: Tokens
    rollbacks: int  # of the session when the job was given out


class EdgeSession:
    """Committed tokens and draft chain of one session on the device."""

    def __init__(
        self,
        opened: Open,
        controller: DraftController,
        message_tokens: int | None = None,
        max_context_tokens: int | None = None,
    ) -> None:
        """`message_tokens`: draft tokens per message in `free` mode (None: by measured cost, see `outbox`);
        `max_context_tokens`: what the draft model can stand behind (None: no limit); past it the server decodes alone.
        """
        self._opened = opened
        self._is_sync = opened.mode is Mode.SYNC
        self.controller = controller
        self._meter = PaceMeter()
        self._outbox = Outbox(opened, message_tokens)
        self._num_rollbacks = 0
        # The pass that verifies a draft adds a token of its own: a draft for the last position never pays.
        self._draft_end = opened.end - 1 if max_context_tokens is None else min(opened.end - 1, max_context_tokens)
        self.status = Status.RUNNING
        self.stats = EdgeStats()
        # Committed tokens, then the chain: one buffer, so that the drafter's context is a view.
        self._tokens = np.empty(opened.end, np.int32)
        self._tokens[: len(opened.tokens)] = opened.tokens
        self._num_committed = len(opened.tokens)
        self._chain_end = self._num_committed
        self._draft_s = np.zeros(opened.end)
        self._num_begun = 0  # calls of `begin_draft` for the draft token in the making
        self._round_open = self._is_sync and self._num_committed > opened.prompt_len

    # -- reading ------------------------------------------------------------------------------------------------

    @property
    def committed(self) -> Tokens:
        """All committed tokens, prompt included (a view: do not write)."""
        return self._tokens[: self._num_committed]

    @property
    def generated(self) -> Tokens:
        """Committed tokens behind the prompt (a view)."""
        return self._tokens[self._opened.prompt_len : self._num_committed]

    @property
    def chain(self) -> Tokens:
        """The draft chain behind the committed tokens (a view)."""
        return self._tokens[self._num_committed : self._chain_end]

    def context(self) -> Tokens:
        """Committed tokens and draft chain: what the next draft token stands behind (a view)."""
        return self._tokens[: self._chain_end]

    # -- what next ----------------------------------------------------------------------------------------------

    def next_step(self, now_s: float) -> Step:
        """What the client should do now."""
        if self.status is not Status.RUNNING:
            return Step.DONE
        if self._is_sync:
            if not self._round_open:
                return Step.WAIT
            return Step.DRAFT if self._may_draft(now_s) else Step.SEND
        ends = self._num_committed, self._chain_end
        owes_acknowledgement = self._outbox.owes_acknowledgement(*ends)
        if self._num_unsent >= self.message_tokens or (self._num_begun > 1 and owes_acknowledgement):
            return Step.SEND
        if self._may_draft(now_s):
            return Step.DRAFT
        is_due = self._num_unsent or owes_acknowledgement or self._outbox.owes_news(*ends)
        return Step.SEND if is_due else Step.WAIT

    def _may_draft(self, now_s: float) -> bool:
        if self._chain_end >= self._draft_end or not self._outbox.may_send(now_s):
            return False
        chain = self.chain
        if len(chain) and int(chain[-1]) in self._opened.eos_token_ids:
            return False
        return self.controller.draft_on(self.pace(now_s), now_s)

    def pace(self, now_s: float) -> Pace:
        """Measured times, as the controller sees them now."""
        pace = self._meter.pace
        if not self._is_sync:
            way_s = pace.rtt_s / 2
            pace.arrivals_s = self._outbox.arrivals_s(self._num_committed, self._chain_end, way_s, now_s)
        return pace

    @property
    def message_tokens(self) -> int:
        """Draft tokens that go into the next message."""
        return self._outbox.message_tokens(self._meter.pace)

    @property
    def _num_unsent(self) -> int:
        return self._chain_end - self._outbox.start(self._num_committed)

    def begin_draft(self) -> DraftJob:
        """The draft token that `Step.DRAFT` asks for. Asked for again, its context is still being read: a long one is
        read in parts, between which an acknowledgement may be due."""
        self._num_begun += 1
        return DraftJob(self.context().copy(), self._num_rollbacks)

    def on_drafted(self, job: DraftJob, token: int, drafting_s: float, stats: DraftStats | None = None) -> bool:
        """Append the draft token of `job`, which took `drafting_s`, to the chain.

        False if it came to nothing: meanwhile its prefix was rolled back, or the server was there first.
        """
        self._num_begun = 0
        self.stats.num_drafted += 1
        self.stats.drafting_s += drafting_s
        self._meter.on_drafted(drafting_s)
        if job.rollbacks != self._num_rollbacks or len(job.context) != self._chain_end:
            self.stats.num_interrupted += 1
            return False
        self._tokens[self._chain_end] = token
        self._draft_s[self._chain_end] = drafting_s
        self._chain_end += 1
        self.controller.on_drafted(token, stats)
        return True

    def take_message(self, now_s: float) -> Draft:
        """The draft message that is due; the tokens in it count as sent.

        Its `next_us` tells the server when to expect the next one, if nothing is committed meanwhile; -1: none
        is worth waiting for (always so in `sync`, behind an acknowledgement and where drafting has stopped).
        """
        start = self._outbox.start(self._num_committed)
        tokens = self._tokens[start : self._chain_end].copy()
        self._outbox.on_message(self._num_committed, self._chain_end, now_s)
        self._round_open = False
        self.stats.num_messages += 1
        self.stats.num_sent += len(tokens)
        if len(tokens) or self._is_sync:
            self._meter.on_sent(start + len(tokens), now_s)
        next_us = self._next_us(now_s) if len(tokens) else -1
        survival = self._survival(start) if len(tokens) else None
        return Draft(self._opened.session, start, self._num_committed, tokens, survival, next_us)

    def on_sent(self, cost_s: float) -> None:
        """To send the last message took `cost_s` of the device's own time."""
        self._outbox.on_sent(cost_s)

    def _survival(self, start: int) -> npt.NDArray[np.uint8]:
        """Survival of the chain's tokens from position `start`, x 255."""
        survival = self.controller.survival()[start - self._num_committed :]
        return np.array([round(255.0 * probability) for probability in survival], np.uint8)

    def _next_us(self, now_s: float) -> int:
        """Time to draft what the next message will hold, by the median of the last times per token."""
        if self._is_sync or not self._may_draft(now_s) or not self.controller.waits(self._meter.pace):
            return -1
        num_tokens = min(self.message_tokens, self._draft_end - self._chain_end)
        return min(round(1e6 * num_tokens * self._meter.pace.draft_s), _MAX_NEXT_US)

    # -- what came back -----------------------------------------------------------------------------------------

    def on_commit(self, commit: Commit, now_s: float) -> Tokens:
        """Apply a commit and return its tokens. A difference to the chain rolls the chain back.

        Raises:
            TransportError: the commit leaves a gap or runs past the end (a defect of the peer).
        """
        if len(commit.tokens) and (commit.start != self._num_committed or commit.end > self._opened.end):
            raise TransportError(
                f"the server committed positions {commit.start} to {commit.end}; "
                f"{self._num_committed} was due and {self._opened.end} is the end"
            )
        self.status = commit.status
        if not len(commit.tokens):
            return commit.tokens
        self._count(commit)
        num_shared = min(len(commit.tokens), len(self.chain))
        num_right = count_accepted(self.chain, commit.tokens)
        agrees = num_right == num_shared
        is_kept = agrees and not self._is_sync
        chain_ends = not is_kept or len(commit.tokens) > num_shared
        self._measure(commit, chain_ends, now_s)
        self.controller.on_commit(num_right, not agrees, is_kept)
        self._tokens[commit.start : commit.end] = commit.tokens
        self._num_committed = commit.end
        if not is_kept:
            self._chain_end = commit.end
            self._outbox.on_rollback(commit.end)
            self._num_rollbacks += 1
        self._chain_end = max(self._chain_end, commit.end)
        self._round_open = self._is_sync
        return commit.tokens

    def _measure(self, commit: Commit, chain_ends: bool, now_s: float) -> None:
        if self._is_sync:
            self._meter.on_round(commit, len(self.chain), now_s)
        self._meter.on_commit(commit, chain_ends, now_s)

    def _count(self, commit: Commit) -> None:
        if any(commit.origin.tolist()):  # `Origin.DECODED` is 0
            self._outbox.on_verified()
        self.stats.on_commit(commit, self._draft_s[commit.start : commit.end])

    # -- connections --------------------------------------------------------------------------------------------

    def reopen(self) -> Open:
        """The message that starts the session, or resumes it on a new connection with all that was received."""
        self._outbox.on_reopened(self._num_committed)
        self._meter.on_lost()
        self._round_open = self._is_sync and self._num_committed > self._opened.prompt_len
        return dataclasses.replace(self._opened, tokens=self.committed.copy())
