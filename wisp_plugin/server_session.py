"""One session on the server: committed tokens, the draft buffer behind them and the SLO timeline (DESIGN.md
sections 2, 4 and 6). Pure state: no clock, no I/O. Positions are absolute.
"""

from __future__ import annotations

import numpy as np

from wisp_plugin.coupling import count_accepted
from wisp_plugin.draft_buffer import DraftBuffer
from wisp_plugin.draft_rates import ServerDraftRate
from wisp_plugin.errors import InvalidRequest
from wisp_plugin.expected_drafts import ExpectedDrafts
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
from wisp_plugin.timeline import Timeline

_ACCEPTED, _DECODED = int(Origin.ACCEPTED), int(Origin.DECODED)
_TURN_MEMORY = 0.8  # of smoothed figures about a session's turns: how much a turn keeps of what was


class ServerSession:
    """Committed tokens, draft buffer and state of one session.

    `ready_since_s` is when the session could first have taken part in the next pass: the order of service.
    `newest_own` is how many tokens the server itself drafted for it in the newest pass, and how many of them were
    accepted.
    """

    def __init__(self, opened: Open, now_s: float) -> None:
        self.opened = opened
        self.id = opened.session  # the session's capability
        self.status = Status.RUNNING
        self.opened_s = now_s
        self.ready_since_s = now_s
        self.newest_input_s = now_s
        self.num_cached = 0
        self.has_place = False  # it has run since it last held no KV: others do not take its place lightly
        self.num_acked = len(opened.tokens)
        self.num_committed = 0
        self.tokens_per_turn = 1.0  # committed, smoothed
        self.num_turns = 0  # passes that gave it tokens
        self.turn_gap_s = 0.0  # from turn to turn, smoothed
        self.timeline = Timeline(opened.slo, now_s)
        self._tokens = np.empty(opened.end, np.int32)
        self._origin = np.zeros(opened.end, np.uint8)
        self._logprobs = np.full(opened.end if opened.logprobs else 0, np.nan, np.float32)  # for a client that resumes
        self.drafts = DraftBuffer(self._tokens)
        self.expected = ExpectedDrafts()
        self.own_rate = ServerDraftRate()
        self.newest_own = (0, 0)
        self._append(opened.tokens, Origin.DECODED)
        self._round_armed = False  # sync: a draft, possibly empty, has arrived for this round

    # -- reading ------------------------------------------------------------------------------------------------

    @property
    def committed(self) -> Tokens:
        """All committed tokens, prompt included (a view: do not write)."""
        return self._tokens[: self.num_committed]

    @property
    def num_buffered(self) -> int:
        """Draft tokens that wait behind the last committed token."""
        return self.drafts.num_tokens

    @property
    def num_uncached(self) -> int:
        """Committed tokens that the next pass has to compute (at least one)."""
        return self.num_committed - self.num_cached

    @property
    def num_left(self) -> int:
        """Tokens that the session may still commit."""
        return self.opened.end - self.num_committed

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
        self.timeline.on_acknowledged(draft.seen, now_s)
        if self.finished:
            self.drafts.counts.received += len(draft.tokens)
            return
        if draft.start == draft.seen == self.num_committed and not self._round_armed:
            self._round_armed = True
            if self.opened.mode is Mode.SYNC:
                self.ready_since_s = now_s
        if self.opened.mode is Mode.SYNC:
            draft = self.drafts.worth(draft)
        if self.drafts.put(draft, self.num_committed):
            self.newest_input_s = now_s
            self.expected.on_draft(draft, self.drafts, self.num_committed, now_s)

    # -- passes -------------------------------------------------------------------------------------------------

    def pass_item(self, num_uncached: int, num_drafts: int, reason: str = "", num_to_draft: int = 0) -> PassItem:
        """This session's part of a pass: `num_uncached` (> 0) committed tokens, and behind all of them `num_drafts`
        draft tokens and `num_to_draft` that the server is to draft. Fewer than all uncached tokens are a chunk of
        prefill. `tokens` is a view that holds until the next draft or commit of the session."""
        num_cached = self.num_cached
        end = num_cached + num_uncached
        return PassItem(
            self.id,
            self._tokens[: end + num_drafts],
            num_cached,
            num_drafts,
            self.opened.sampling,
            end < self.num_committed,
            self.opened.logprobs,
            reason,
            num_to_draft,
        )

    def commit(
        self, item: PassItem, outcome: PassOutcome, timing: Timing, now_s: float, price: float = 0.0
    ) -> Commit | None:
        """Apply a pass: accepted draft tokens, then the target's own. None for a prefill chunk.

        An accepted EOS and the length limit end the commit there. `price`: that of the pass, for the client.
        """
        if item.is_prefill_chunk:
            self.num_cached = len(item.tokens)
            self.ready_since_s = now_s  # a chunk is a turn: the next one queues behind those who wait
            return None
        start, num_drafts = self.num_committed, item.num_draft_tokens
        num_right = count_accepted(item.tokens[start:], outcome.chosen)  # of the device's draft
        num_accepted = num_right
        if num_right == num_drafts:
            num_accepted += self.own_rate.count(item, outcome)
        tokens, origin = self._until_end(outcome.chosen[: num_accepted + 1], num_right, num_drafts)
        num_drafted = 0 if outcome.drafted is None else len(outcome.drafted)
        self.newest_own = num_drafted, min(num_accepted, len(tokens)) - min(num_right, len(tokens))
        self.drafts.on_commit(tokens, start, num_drafts, min(num_right, len(tokens)))
        self.num_cached = start + min(num_accepted, len(tokens))
        self._append(tokens, origin)
        self._note_turn(len(tokens), now_s)
        logprobs = None if outcome.logprobs is None else outcome.logprobs[: len(tokens)]
        if self.opened.logprobs and logprobs is not None:
            self._logprobs[start : self.num_committed] = logprobs
        next_pass_s = max(0.0, self.turn_gap_s - timing.measured_us / 1e6)
        return Commit(self.id, start, tokens, origin, self.status, timing, logprobs, next_pass_s, price)

    def _note_turn(self, num_tokens: int, now_s: float) -> None:
        before_s = self.timeline.last_s
        self.num_turns += 1
        if before_s is not None:
            gap_s = now_s - before_s
            self.turn_gap_s = gap_s + _TURN_MEMORY * (self.turn_gap_s - gap_s) if self.turn_gap_s else gap_s
            self.tokens_per_turn = num_tokens + _TURN_MEMORY * (self.tokens_per_turn - num_tokens)
        self.timeline.on_commit(num_tokens, self.num_committed, now_s)
        self._round_armed = False
        self.ready_since_s = self.newest_input_s = now_s
        self.expected.on_commit(self.drafts.num_tokens > 0, self.timeline.way_s, now_s)

    def _until_end(self, chosen: Tokens, num_right: int, num_drafts: int) -> tuple[Tokens, Origins]:
        """Cut `chosen` behind the first EOS or at the length limit, name origins, and set the status.

        Origins tell what became of the device's draft, of which the first `num_right` tokens were accepted: tokens
        that the server drafted itself are decoded ones to the device.
        """
        own = Origin.DECODED if num_drafts == 0 else Origin.BONUS if num_right == num_drafts else Origin.CORRECTION
        length = min(len(chosen), self.opened.end - self.num_committed)
        if self.num_committed + length == self.opened.end:
            self.status = Status.LENGTH
        for i, token in enumerate(chosen[:length].tolist()):
            if token in self.opened.eos_token_ids:
                length = i + 1
                self.status = Status.EOS
                break
        num_accepted = min(num_right, length)
        origins = [_ACCEPTED] * num_accepted + [_DECODED] * (length - num_accepted)
        if length == len(chosen):
            origins[-1] = int(own)
        return chosen[:length], np.array(origins, np.uint8)

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
        self.drafts.drop()
        self.expected.on_resume()
        self._round_armed = False
        self.num_acked = known
        self.ready_since_s = self.newest_input_s = now_s
        self.settle_status()
        if known == self.num_committed and not self.finished:
            return None
        missing = slice(known, self.num_committed)
        logprobs = self._logprobs[missing].copy() if self.opened.logprobs else None
        if logprobs is not None and np.isnan(logprobs).any():  # tokens that another client brought
            logprobs = None
        return Commit(
            self.id, known, self._tokens[missing].copy(), self._origin[missing].copy(), self.status, logprobs=logprobs
        )  # fmt: skip

    def settle_status(self) -> None:
        """Finish at once if the tokens that the client holds already end with an EOS or at the limit."""
        generated = self.committed[self.opened.prompt_len :]
        if len(generated) and int(generated[-1]) in self.opened.eos_token_ids:
            self.status = Status.EOS
        elif self.num_committed == self.opened.end:
            self.status = Status.LENGTH
