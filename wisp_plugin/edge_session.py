"""The edge's side of a session as a sans-IO state machine: what to draft, what to send, how a commit rolls back.

    step = session.next_step()
      Step.DRAFT  draft the token behind `session.context()`, then `session.on_drafted(token, seconds)`
      Step.SEND   send `session.take_message()`
      Step.WAIT   nothing to do until the next commit
      Step.DONE   the session has its final status
    session.on_commit(commit) whenever one has arrived

In `free` mode (DESIGN.md section 4) the device drafts on while commits arrive and sends draft tokens as they
come; a commit that agrees with the chain shortens it from the front, one that differs clears it. In `sync` mode
a round is one chain, one message, one commit.

After a lost connection `reopen` gives the message that resumes the session with all that was received.
"""

from __future__ import annotations

import dataclasses
import enum
import statistics
from collections import deque

import numpy as np

from wisp_plugin.controller import ChainState, Controller
from wisp_plugin.errors import TransportError
from wisp_plugin.messages import Commit, Draft, Mode, Open, Origin, Status, Tokens

ACK_TOKENS = 64  # a client that sends no drafts acknowledges commits this often
_DRAFTING_MEMORY = 9  # draft tokens whose time tells when the next message comes: up to 4 of them may be outliers
_MAX_NEXT_US = 2**31 - 1  # NEXT_US is an INT32


class Step(enum.Enum):
    """What the client should do next."""

    DRAFT = enum.auto()
    SEND = enum.auto()
    WAIT = enum.auto()
    DONE = enum.auto()


@dataclasses.dataclass(slots=True)
class EdgeStats:
    """What a session has drafted and received.

    WDT share (DESIGN.md section 2, our own definition): drafting time of tokens that were rejected, behind a
    rejection, late or stale, over all drafting time. A token counts as useful when a commit names it accepted.
    """

    num_committed: int = 0
    num_commits: int = 0
    num_accepted: int = 0
    num_corrections: int = 0
    num_drafted: int = 0
    num_sent: int = 0
    num_reopened: int = 0
    drafting_s: float = 0.0
    useful_drafting_s: float = 0.0

    @property
    def wdt_share(self) -> float:
        """Wasted drafting time / all drafting time (0 without drafts)."""
        return max(0.0, 1.0 - self.useful_drafting_s / self.drafting_s) if self.drafting_s else 0.0

    @property
    def tokens_per_pass(self) -> float:
        """Committed tokens per commit."""
        return self.num_committed / self.num_commits if self.num_commits else 0.0


class EdgeSession:
    """Committed tokens and draft chain of one session on the device."""

    def __init__(
        self, opened: Open, controller: Controller, message_tokens: int = 1, max_context_tokens: int | None = None
    ) -> None:
        """`message_tokens`: draft tokens that go into one message in `free` mode; `max_context_tokens`: what the
        draft model can stand behind (None: no limit); past it the server decodes alone."""
        self._opened = opened
        self._controller = controller
        self._message_tokens = message_tokens
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
        self._last_drafting_s: deque[float] = deque(maxlen=_DRAFTING_MEMORY)
        self._sent_end = self._num_committed  # chain tokens before this position were sent
        self._acked = self._num_committed  # SEEN of the newest message
        self._round_open = opened.mode is Mode.SYNC and self._num_committed > opened.prompt_len

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

    def next_step(self) -> Step:
        """What the client should do now."""
        if self.status is not Status.RUNNING:
            return Step.DONE
        if self._opened.mode is Mode.SYNC:
            if not self._round_open:
                return Step.WAIT
            return Step.DRAFT if self._may_draft() else Step.SEND
        if self._num_unsent >= self._message_tokens:
            return Step.SEND
        if self._may_draft():
            return Step.DRAFT
        return Step.SEND if self._num_unsent or self._owes_ack else Step.WAIT

    def _may_draft(self) -> bool:
        if self._chain_end >= self._draft_end:
            return False
        chain = self.chain
        if len(chain) and int(chain[-1]) in self._opened.eos_token_ids:
            return False
        return self._controller.draft_on(ChainState(num_ahead=len(chain)))

    @property
    def _num_unsent(self) -> int:
        return self._chain_end - max(self._sent_end, self._num_committed)

    @property
    def _owes_ack(self) -> bool:
        return self._chain_end == self._num_committed and self._num_committed - self._acked >= ACK_TOKENS

    def on_drafted(self, token: int, drafting_s: float) -> None:
        """Append a draft token that took `drafting_s` to the chain."""
        self._tokens[self._chain_end] = token
        self._draft_s[self._chain_end] = drafting_s
        self._last_drafting_s.append(drafting_s)
        self._chain_end += 1
        self.stats.num_drafted += 1
        self.stats.drafting_s += drafting_s

    def take_message(self) -> Draft:
        """The draft message that is due; the tokens in it count as sent.

        Its `next_us` tells the server when to expect the next one, if nothing is committed meanwhile; -1: none
        comes before a commit (always so in `sync`, behind an acknowledgement and where drafting has stopped).
        """
        start = max(self._sent_end, self._num_committed)
        tokens = self._tokens[start : self._chain_end].copy()
        self._sent_end = self._chain_end
        self._acked = self._num_committed
        self._round_open = False
        self.stats.num_sent += len(tokens)
        next_us = self._next_us() if len(tokens) else -1
        return Draft(self._opened.session, start, self._num_committed, tokens, next_us=next_us)

    def _next_us(self) -> int:
        """Time to draft what the next message will hold, by the median of the last times per token.

        The lower median: of two times, one an outlier (the first run of a graph), it takes the other.
        """
        if self._opened.mode is Mode.SYNC or not self._may_draft():
            return -1
        num_tokens = min(self._message_tokens, self._draft_end - self._chain_end)
        expected_s = num_tokens * statistics.median_low(self._last_drafting_s)
        return min(round(expected_s * 1e6), _MAX_NEXT_US)

    # -- what came back -----------------------------------------------------------------------------------------

    def on_commit(self, commit: Commit) -> Tokens:
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
        agrees = bool(np.array_equal(commit.tokens[:num_shared], self.chain[:num_shared]))
        self._tokens[commit.start : commit.end] = commit.tokens
        self._num_committed = commit.end
        if not agrees or self._opened.mode is Mode.SYNC:
            self._chain_end = self._sent_end = commit.end
        self._chain_end = max(self._chain_end, commit.end)
        self._round_open = self._opened.mode is Mode.SYNC
        return commit.tokens

    def _count(self, commit: Commit) -> None:
        accepted = commit.origin == Origin.ACCEPTED
        self.stats.num_commits += 1
        self.stats.num_committed += len(commit.tokens)
        self.stats.num_accepted += int(np.count_nonzero(accepted))
        self.stats.num_corrections += int(np.count_nonzero(commit.origin == Origin.CORRECTION))
        self.stats.useful_drafting_s += float(self._draft_s[commit.start : commit.end][accepted].sum())

    # -- connections --------------------------------------------------------------------------------------------

    def reopen(self) -> Open:
        """The message that starts the session, or resumes it on a new connection with all that was received."""
        self._sent_end = self._acked = self._num_committed
        self._round_open = self._opened.mode is Mode.SYNC and self._num_committed > self._opened.prompt_len
        return dataclasses.replace(self._opened, tokens=self.committed.copy())
