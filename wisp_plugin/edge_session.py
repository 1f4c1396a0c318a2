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
import math

import numpy as np
import numpy.typing as npt

from wisp_plugin.controller import SpeculationController
from wisp_plugin.draft_stats import DraftStats
from wisp_plugin.errors import TransportError
from wisp_plugin.messages import Commit, Draft, Mode, Open, Origin, Status, Tokens
from wisp_plugin.pace import Pace, PaceMeter
from wisp_plugin.send_window import SendWindow

ACK_TOKENS = 64  # a client that sends no drafts acknowledges commits this often
MAX_MESSAGE_TOKENS = 16
_MAX_NEXT_US = 2**31 - 1  # NEXT_US is an INT32
_COST_MEMORY = 0.9  # share of the smoothed cost of a message that a message keeps


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
    num_messages: int = 0
    num_interrupted: int = 0  # draft tokens whose prefix was rolled back, or overtaken, while they were made
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
        controller: SpeculationController,
        message_tokens: int | None = None,
        max_context_tokens: int | None = None,
    ) -> None:
        """`message_tokens`: draft tokens that go into one message in `free` mode (None: chosen by measured cost, see
        `best_message_tokens`); `max_context_tokens`: what the draft model can stand behind (None: no limit); past it
        the server decodes alone."""
        self._opened = opened
        self.controller = controller
        self._fixed_message_tokens = message_tokens
        self._meter = PaceMeter()
        self._window = SendWindow()
        self._message_cost_s = 0.0  # of the device's own time, smoothed
        self._num_rollbacks = 0
        self._told_idle = False  # the server knows that no drafts come
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
        self._sent_s = np.zeros(opened.end)  # when each chain token left
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

    def next_step(self, now_s: float) -> Step:
        """What the client should do now."""
        if self.status is not Status.RUNNING:
            return Step.DONE
        if self._opened.mode is Mode.SYNC:
            if not self._round_open:
                return Step.WAIT
            return Step.DRAFT if self._may_draft(now_s) else Step.SEND
        if self._num_unsent >= self.message_tokens:
            return Step.SEND
        if self._may_draft(now_s):
            return Step.DRAFT
        return Step.SEND if self._num_unsent or self._owes_word else Step.WAIT

    def _may_draft(self, now_s: float) -> bool:
        if self._chain_end >= self._draft_end or not self._window.is_open(now_s):
            return False
        chain = self.chain
        if len(chain) and int(chain[-1]) in self._opened.eos_token_ids:
            return False
        return self.controller.draft_on(self.pace(now_s), now_s)

    def pace(self, now_s: float) -> Pace:
        """Measured times, as the controller sees them now."""
        pace = self._meter.pace
        if self._opened.mode is Mode.FREE:
            way_s = pace.rtt_s / 2
            start, sent_end = self._num_committed, max(self._sent_end, self._num_committed)
            sent = (self._sent_s[start:sent_end] + way_s).tolist()
            pace.arrivals_s = (*sent, *[now_s + way_s] * (self._chain_end - sent_end))
        return pace

    @property
    def message_tokens(self) -> int:
        """Draft tokens that go into the next message."""
        if self._fixed_message_tokens is not None:
            return self._fixed_message_tokens
        pace = self._meter.pace
        return best_message_tokens(self._message_cost_s, pace.draft_s, pace.verify_s + pace.next_pass_s)

    @property
    def _num_unsent(self) -> int:
        return self._chain_end - max(self._sent_end, self._num_committed)

    @property
    def _owes_word(self) -> bool:
        """True if an empty message is due: an acknowledgement, or the news that no drafts come."""
        if self._chain_end > self._num_committed:
            return False
        return self._num_committed - self._acked >= ACK_TOKENS or (bool(self.stats.num_sent) and not self._told_idle)

    def begin_draft(self) -> DraftJob:
        """The draft token that `Step.DRAFT` asks for."""
        return DraftJob(self.context().copy(), self._num_rollbacks)

    def on_drafted(self, job: DraftJob, token: int, drafting_s: float, stats: DraftStats | None = None) -> bool:
        """Append the draft token of `job`, which took `drafting_s`, to the chain.

        False if it came to nothing: meanwhile its prefix was rolled back, or the server was there first.
        """
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
        start = max(self._sent_end, self._num_committed)
        tokens = self._tokens[start : self._chain_end].copy()
        self._sent_s[start : self._chain_end] = now_s
        self._sent_end = self._chain_end
        self._acked = self._num_committed
        self._round_open = False
        self._told_idle = not len(tokens)
        self.stats.num_messages += 1
        self.stats.num_sent += len(tokens)
        if self._opened.mode is Mode.FREE:
            self._window.on_sent(len(tokens), now_s)
        if len(tokens) or self._opened.mode is Mode.SYNC:
            self._meter.on_sent(start + len(tokens), now_s)
        next_us = self._next_us(now_s) if len(tokens) else -1
        survival = self._survival(start) if len(tokens) else None
        return Draft(self._opened.session, start, self._num_committed, tokens, survival, next_us)

    def on_sent(self, cost_s: float) -> None:
        """To send the last message took `cost_s` of the device's own time."""
        before_s = self._message_cost_s or cost_s
        self._message_cost_s = _COST_MEMORY * before_s + (1.0 - _COST_MEMORY) * cost_s

    def _survival(self, start: int) -> npt.NDArray[np.uint8]:
        """Survival of the chain's tokens from position `start`, x 255."""
        survival = np.array(self.controller.survival()[start - self._num_committed :])
        scaled: npt.NDArray[np.uint8] = np.rint(255.0 * survival).astype(np.uint8)
        return scaled

    def _next_us(self, now_s: float) -> int:
        """Time to draft what the next message will hold, by the median of the last times per token."""
        if self._opened.mode is Mode.SYNC or not self._may_draft(now_s) or not self.controller.waits(self._meter.pace):
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
        differs = commit.tokens[:num_shared] != self.chain[:num_shared]
        num_right = int(differs.argmax()) if differs.any() else num_shared
        agrees = num_right == num_shared
        is_kept = agrees and self._opened.mode is Mode.FREE
        self._measure(commit, not is_kept or len(commit.tokens) > num_shared, now_s)
        self.controller.on_commit(num_right, not agrees, is_kept)
        self._tokens[commit.start : commit.end] = commit.tokens
        self._num_committed = commit.end
        if not is_kept:
            self._chain_end = self._sent_end = commit.end
            self._num_rollbacks += 1
        self._chain_end = max(self._chain_end, commit.end)
        self._round_open = self._opened.mode is Mode.SYNC
        return commit.tokens

    def _measure(self, commit: Commit, breaks: bool, now_s: float) -> None:
        if self._opened.mode is Mode.SYNC:
            self._meter.on_round(commit, len(self.chain), now_s)
        self._meter.on_commit(commit, breaks, now_s)

    def _count(self, commit: Commit) -> None:
        if (commit.origin != Origin.DECODED).any():
            self._window.on_sign()
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
        self._meter.on_lost()
        self._window.on_sign()
        self._told_idle = False
        self._round_open = self._opened.mode is Mode.SYNC and self._num_committed > self._opened.prompt_len
        return dataclasses.replace(self._opened, tokens=self.committed.copy())


def best_message_tokens(message_cost_s: float, draft_s: float, pass_period_s: float) -> int:
    """Draft tokens per message that cost least.

    A message costs the device `message_cost_s`, so m tokens together cost that / m each. But the first of them waits
    for the others, (m - 1) / 2 draft steps on average, and a pass that begins meanwhile, one in `pass_period_s`, goes
    without it: the loss is about as much drafting time. The sum is least at the square root (Harris 1913, the economic
    order quantity).
    """
    if draft_s <= 0.0:
        return MAX_MESSAGE_TOKENS
    return min(max(1, round(math.sqrt(2.0 * message_cost_s * pass_period_s) / draft_s)), MAX_MESSAGE_TOKENS)
