"""One draft graph for many sessions: who drafts next, and who gets one of the few KVs.

A seat is a drafter: the graph with a KV of its own. Seats are few (`--drafters`), because a KV is memory; they are made
when they are first needed. While there are no more sessions than seats, each session that wants to draft has one.

When there are more, seats are dealt by need: a session whose tokens and chain reach a lead over the slowest one
(`LEAD_TOKENS`, later `LEAD_SHARE` of its tokens) gives its seat back and decodes on without drafts; one that is behind
takes it, if what it may win is worth feeding its context to the draft model. So sessions that began together stay
together, and drafts speed up all of them in turn.

The graph itself is used by one session at a time, in the order in which they asked (`Turns`). So drafting takes as many
cores as `--threads` says, whatever the number of sessions. A session measures the wait for its turn as time per draft
token: its stop rule sees a slower device and drafts less.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator

from edge_runtime.drafting_thread import STEP_LIMIT_S, TokenDrafter
from wisp_plugin.draft_stats import DraftStats
from wisp_plugin.errors import ModelError
from wisp_plugin.messages import Sampling, Tokens

LEAD_TOKENS = 4  # in front of the slowest session, that drafts may win while seats are scarce
LEAD_SHARE = 0.25  # of the slowest session's tokens, where that is more
FED_PER_WON = 8  # context tokens that may be fed for each token of that lead: feeding is cheaper than drafting


class Turns:
    """A lock that is given in the order of asking."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_taken = False
        self._waiting: deque[threading.Event] = deque()

    @contextlib.contextmanager
    def turn(self, limit_s: float = STEP_LIMIT_S) -> Iterator[None]:
        """Wait for the turn and hold it. ModelError if it does not come within `limit_s`."""
        self._take(limit_s)
        try:
            yield
        finally:
            self._pass_on()

    def _take(self, limit_s: float) -> None:
        mine = threading.Event()
        with self._lock:
            if not self._is_taken:
                self._is_taken = True
                return
            self._waiting.append(mine)
        if mine.wait(limit_s):
            return
        with self._lock:
            if mine.is_set():  # it came in this very moment
                return
            self._waiting.remove(mine)
        raise ModelError(f"the draft model was busy for {limit_s:g} s with other sessions")

    def _pass_on(self) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().set()
            else:
                self._is_taken = False


class DraftDealer:
    """Deals seats to sessions. Its lock is held for bookkeeping only."""

    def __init__(self, make_drafter: Callable[[], TokenDrafter], num_seats: int) -> None:
        """`make_drafter` makes one more drafter on the same graph."""
        self._make, self.num_seats = make_drafter, num_seats
        self._free: list[TokenDrafter] = []
        self._num_made = 0
        self._shares: set[DraftShare] = set()
        self._lock = threading.Lock()
        self.turns = Turns()

    def join(self, num_prompt: int) -> DraftShare:
        """The part of a new session behind `num_prompt` tokens. It counts as being where the slowest one is."""
        with self._lock:
            share = DraftShare(self, num_prompt, min((other.progress for other in self._shares), default=0))
            self._shares.add(share)
        return share

    def leave(self, share: DraftShare) -> None:
        """The session has ended, its drafting thread too."""
        with self._lock:
            self._shares.discard(share)
            self._take_back(share)

    @property
    def num_sessions(self) -> int:
        """Sessions that share the graph now."""
        return len(self._shares)

    @property
    def num_seated(self) -> int:
        """Sessions that have a seat now."""
        return self._num_made - len(self._free)

    def may_draft(self, share: DraftShare, num_ahead: int) -> bool:
        """Whether `share` has a seat, after giving it one or taking it back; `num_ahead`: length of its chain."""
        with self._lock:
            if not self._is_crowded:
                share.seat = share.seat or self._seat()
                return share.seat is not None
            slowest = min(other.progress for other in self._shares)
            lead = max(LEAD_TOKENS, LEAD_SHARE * slowest) - (share.progress + num_ahead - slowest)
            if lead <= 0:
                self._take_back(share)
            elif share.seat is None and lead * FED_PER_WON >= share.num_prompt + share.num_tokens:
                share.seat = self._seat()
            return share.seat is not None

    def rest(self, share: DraftShare) -> None:
        """`share` has chosen not to draft: others may have its seat."""
        with self._lock:
            if self._is_crowded:
                self._take_back(share)

    @property
    def _is_crowded(self) -> bool:
        return len(self._shares) > self.num_seats

    def _seat(self) -> TokenDrafter | None:
        if self._free:
            return self._free.pop()
        if self._num_made == self.num_seats:
            return None
        drafter = self._make()
        self._num_made += 1
        return drafter

    def _take_back(self, share: DraftShare) -> None:
        if share.seat is not None:
            self._free.append(share.seat)
            share.seat = None


class DraftShare:
    """One session's part of the draft model: a `TokenDrafter` while it has a seat.

    Its drafting thread asks `may_draft` before every step, and only there a seat is given or taken back.
    """

    def __init__(self, dealer: DraftDealer, num_prompt: int, began: int) -> None:
        self._dealer = dealer
        self.num_prompt, self.num_tokens = num_prompt, 0
        self._began = began  # where the slowest session was when this one came
        self.seat: TokenDrafter | None = None

    @property
    def progress(self) -> int:
        """How far the session is, in tokens that compare with those of the others."""
        return self._began + self.num_tokens

    def may_draft(self, num_ahead: int) -> bool:
        """Whether the session may draft its next token, behind a chain of `num_ahead`."""
        return self._dealer.may_draft(self, num_ahead)

    def rest(self) -> None:
        """The session does not want to draft for now."""
        self._dealer.rest(self)

    def advance(self, tokens: Tokens) -> int:
        """See `TokenDrafter.advance`."""
        with self._dealer.turns.turn():
            return self._drafter.advance(tokens)

    def draft_token_with_stats(self, tokens: Tokens, sampling: Sampling) -> tuple[int, DraftStats | None]:
        """See `TokenDrafter.draft_token_with_stats`."""
        with self._dealer.turns.turn():
            return self._drafter.draft_token_with_stats(tokens, sampling)

    @property
    def _drafter(self) -> TokenDrafter:
        assert self.seat is not None, "a session drafts only behind `may_draft`"
        return self.seat
