"""One session on the server: committed tokens and the draft buffer behind them (DESIGN.md sections 4 and 6).

The rules of the draft buffer, in one place:

- a message with START = SEEN starts a new chain and replaces the buffer;
- a message with START > SEEN must continue the chain where the message before ended, else it is stale;
- draft tokens at positions committed meanwhile are late: they are compared, and the first difference breaks
  the chain;
- the token that a pass chose itself is compared with the next buffered one: equal keeps the tail, different
  breaks the chain;
- a broken chain is empty and takes nothing until START = SEEN starts the next one.

Pure state: no clock, no I/O. Positions are absolute.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from wisp_plugin.coupling import count_accepted
from wisp_plugin.errors import InvalidRequest
from wisp_plugin.messages import (
    Commit,
    Draft,
    Mode,
    Open,
    Origin,
    Origins,
    PassItem,
    PassOutcome,
    Status,
    Timing,
    Tokens,
)


@dataclass(slots=True)
class DraftCounts:
    """What became of a session's draft tokens."""

    received: int = 0
    verified: int = 0
    accepted: int = 0
    late: int = 0
    stale: int = 0


class ServerSession:
    """Committed tokens, draft buffer and state of one session.

    `ready_since_s` is when the session could first have taken part in the next pass: the order of service.
    """

    def __init__(self, opened: Open, now_s: float) -> None:
        self.opened = opened
        self.status = Status.RUNNING
        self.opened_s = now_s
        self.ready_since_s = now_s
        self.newest_input_s = now_s
        self.num_cached = 0
        self.num_acked = len(opened.tokens)
        self.counts = DraftCounts()
        self._tokens = np.empty(opened.end, np.int32)
        self._origin = np.zeros(opened.end, np.uint8)
        self.num_committed = 0
        self._append(opened.tokens, Origin.DECODED)
        self._buffer: list[int] = []
        self._chain_end: int | None = None  # where the next message must continue; None: chain broken
        self._round_armed = False  # sync: a draft, possibly empty, has arrived for this round

    # -- reading ------------------------------------------------------------------------------------------------

    @property
    def id(self) -> str:
        """The session's capability."""
        return self.opened.session

    @property
    def committed(self) -> Tokens:
        """All committed tokens, prompt included (a view: do not write)."""
        return self._tokens[: self.num_committed]

    @property
    def num_buffered(self) -> int:
        """Draft tokens that wait behind the last committed token."""
        return len(self._buffer)

    @property
    def num_uncached(self) -> int:
        """Committed tokens that the next pass has to compute (at least one)."""
        return self.num_committed - self.num_cached

    @property
    def finished(self) -> bool:
        """True once a final status is set."""
        return self.status is not Status.RUNNING

    @property
    def is_due(self) -> bool:
        """True if the session may take part in a pass: always in `free`, once per draft in `sync`."""
        if self.finished:
            return False
        starting = self.num_committed == self.opened.prompt_len
        return self.opened.mode is Mode.FREE or starting or self._round_armed

    def is_paused(self, max_unacked_tokens: int) -> bool:
        """True if the client has not acknowledged the last `max_unacked_tokens` tokens."""
        return self.num_committed - self.num_acked >= max_unacked_tokens

    # -- input from the client ----------------------------------------------------------------------------------

    def on_draft(self, draft: Draft, now_s: float) -> None:
        """Take a draft message into the buffer; late and stale tokens are dropped and counted.

        Raises:
            InvalidRequest: SEEN lies outside the session's generated tokens.
        """
        if not self.opened.prompt_len <= draft.seen <= self.num_committed:
            raise InvalidRequest(
                f"SEEN is {draft.seen}; allowed for this session: {self.opened.prompt_len} to {self.num_committed}"
            )
        self.num_acked = max(self.num_acked, draft.seen)
        self.counts.received += len(draft.tokens)
        if self.finished:
            return
        if draft.start == draft.seen:
            self._buffer.clear()
            self._chain_end = draft.start
            if draft.seen == self.num_committed and not self._round_armed:
                self._round_armed = True
                self._make_ready(now_s)
        if draft.start != self._chain_end:
            self.counts.stale += len(draft.tokens)
            return
        self._extend_chain(draft)
        self.newest_input_s = now_s

    def _make_ready(self, now_s: float) -> None:
        if self.opened.mode is Mode.SYNC:
            self.ready_since_s = now_s

    def _extend_chain(self, draft: Draft) -> None:
        num_late = min(max(0, self.num_committed - draft.start), len(draft.tokens))
        self.counts.late += num_late
        late = draft.tokens[:num_late]
        if not np.array_equal(late, self._tokens[draft.start : draft.start + num_late]):
            self.counts.stale += len(draft.tokens) - num_late
            self._break_chain()
            return
        room = self.opened.end - 1 - max(self.num_committed + len(self._buffer), draft.start)
        self._buffer.extend(draft.tokens[num_late : num_late + max(0, room)].tolist())
        self._chain_end = draft.end

    def _break_chain(self) -> None:
        self.counts.stale += len(self._buffer)
        self._buffer.clear()
        self._chain_end = None

    # -- passes -------------------------------------------------------------------------------------------------

    def pass_item(self, max_new_tokens: int, reason: str = "") -> PassItem:
        """This session's part of a pass with at most `max_new_tokens` (> 0): a chunk of prefill, or everything
        uncached and as many draft tokens as fit."""
        num_uncached = self.num_uncached
        if num_uncached > max_new_tokens:
            tokens, num_drafts = self._tokens[: self.num_cached + max_new_tokens], 0
        else:
            num_drafts = min(len(self._buffer), max_new_tokens - num_uncached)
            drafts = np.array(self._buffer[:num_drafts], np.int32)
            tokens = np.concatenate([self.committed, drafts]) if num_drafts else self.committed
        return PassItem(
            session=self.id,
            tokens=tokens,
            num_cached=self.num_cached,
            num_draft_tokens=num_drafts,
            sampling=self.opened.sampling,
            is_prefill_chunk=num_uncached > max_new_tokens,
            logprobs=self.opened.logprobs,
            reason=reason,
        )

    def commit(self, item: PassItem, outcome: PassOutcome, timing: Timing, now_s: float) -> Commit | None:
        """Apply a pass: accepted draft tokens, then the target's own. None for a prefill chunk.

        An accepted EOS and the length limit end the commit there.
        """
        if item.is_prefill_chunk:
            self.num_cached = len(item.tokens)
            self.ready_since_s = now_s  # a chunk is a turn: the next one queues behind those who wait
            return None
        start = self.num_committed
        drafted = item.tokens[start:]
        num_accepted = count_accepted(drafted, outcome.chosen)
        tokens, origin = self._until_end(outcome.chosen[: num_accepted + 1], num_accepted, item.num_draft_tokens)
        self.counts.verified += item.num_draft_tokens
        self.counts.accepted += int(np.count_nonzero(origin == Origin.ACCEPTED))
        self.num_cached = start + min(num_accepted, len(tokens))
        self._append(tokens, origin)
        self._advance_buffer(tokens, item.num_draft_tokens)
        self._round_armed = False
        self.ready_since_s = self.newest_input_s = now_s
        logprobs = None if outcome.logprobs is None else outcome.logprobs[: len(tokens)]
        return Commit(self.id, start, tokens, origin, self.status, timing, logprobs)

    def _until_end(self, chosen: Tokens, num_accepted: int, num_drafts: int) -> tuple[Tokens, Origins]:
        """Cut `chosen` behind the first EOS or at the length limit, name origins, and set the status."""
        own = Origin.DECODED if num_drafts == 0 else Origin.BONUS if num_accepted == num_drafts else Origin.CORRECTION
        length = min(len(chosen), self.opened.end - self.num_committed)
        if self.num_committed + length == self.opened.end:
            self.status = Status.LENGTH
        for i, token in enumerate(chosen[:length].tolist()):
            if token in self.opened.eos_token_ids:
                length = i + 1
                self.status = Status.EOS
                break
        origin = np.full(length, Origin.ACCEPTED, np.uint8)
        origin[num_accepted:] = own
        return chosen[:length], origin

    def _advance_buffer(self, tokens: Tokens, num_verified: int) -> None:
        """Compare what was committed with the head of the buffer: equal drops the head, different breaks."""
        if self._chain_end is None:
            return
        head = self._buffer[: len(tokens)]
        if head == tokens[: len(head)].tolist():
            del self._buffer[: len(head)]
        else:
            del self._buffer[: max(num_verified, len(tokens))]  # verified, or the one that the own token contradicts
            self._break_chain()

    def _append(self, tokens: Tokens, origin: Origins | Origin) -> None:
        end = self.num_committed + len(tokens)
        self._tokens[self.num_committed : end] = tokens
        self._origin[self.num_committed : end] = origin
        self.num_committed = end

    # -- life cycle ---------------------------------------------------------------------------------------------

    def conflicts_with(self, opened: Open) -> bool:
        """True if `opened` cannot resume this session: other parameters, or tokens that contradict ours."""
        mine, theirs = self.opened, opened
        same = (
            mine.prompt_len == theirs.prompt_len
            and mine.max_new_tokens == theirs.max_new_tokens
            and mine.sampling == theirs.sampling
            and mine.slo == theirs.slo
            and mine.mode == theirs.mode
            and mine.eos_token_ids == theirs.eos_token_ids
            and mine.logprobs == theirs.logprobs
        )
        common = min(self.num_committed, len(theirs.tokens))
        return not same or not np.array_equal(self._tokens[:common], theirs.tokens[:common])

    def resume(self, opened: Open, now_s: float) -> Commit | None:
        """Go on after a new open: take over tokens that only the client has, return those that it lacks.

        The draft chain starts anew. Returns None if there is nothing to tell yet.
        """
        known = len(opened.tokens)
        if known > self.num_committed:
            self._append(opened.tokens[self.num_committed :], Origin.DECODED)
        self._break_chain()
        self._round_armed = False
        self.num_acked = known
        self.ready_since_s = self.newest_input_s = now_s
        self.settle_status()
        if known == self.num_committed and not self.finished:
            return None
        missing = slice(known, self.num_committed)
        return Commit(self.id, known, self._tokens[missing].copy(), self._origin[missing].copy(), self.status)

    def settle_status(self) -> None:
        """Finish at once if the tokens that the client holds already end with an EOS or at the limit."""
        generated = self.committed[self.opened.prompt_len :]
        if len(generated) and int(generated[-1]) in self.opened.eos_token_ids:
            self.status = Status.EOS
        elif self.num_committed == self.opened.end:
            self.status = Status.LENGTH
