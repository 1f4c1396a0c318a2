"""Measured times of one device, its link and its server: what a stop rule weighs against the value of a draft token.

Times are seconds. Nothing here reads a clock: every event brings its time.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass

from wisp_plugin.messages import Commit, Origin

_DRAFTING_MEMORY = 9  # draft tokens whose median is the drafting time: up to 4 of them may be outliers
_ROUND_MEMORY = 0.85  # share of smoothed figures that a commit keeps
_TRIP_MEMORY = 24  # commits among which the shortest way is looked for
_LEAST_S = 1e-6  # of a round or a gap: a clock may tell the same time twice
_CORRECTION = int(Origin.CORRECTION)
FIRST_GUESS_S = 0.05  # of a pass and of a round trip, before the first commit


@dataclass(slots=True)
class Pace:
    """What rules may know. Before the first commit the times of server and link are `FIRST_GUESS_S`."""

    draft_s: float = 0.02  # per draft token, median of the last ones
    rtt_s: float = FIRST_GUESS_S  # way to the server and back, without waiting and verification
    verify_s: float = FIRST_GUESS_S  # measured time of a pass, smoothed
    next_pass_s: float = 0.0  # LOAD: from the end of a pass to the start of the session's next one
    wait_broken_s: float = math.inf  # the same, measured: behind a commit that broke the chain, if drafts followed it
    wait_alive_s: float = 0.0  # and behind one that the chain survived
    wait_s: float = math.inf  # that of the two which holds for the newest commit; inf: not known yet
    committed_per_s: float = 0.0  # `free`: committed tokens per second, smoothed; 0 before the second commit
    num_in_pass: int = 1  # sessions in the pass of the newest commit
    price: float = 0.0  # LOAD: commits of others that one more draft token displaces
    overhead_s: float = 2 * FIRST_GUESS_S  # `sync`: from a round's message to its commit, smoothed
    tokens_per_round: float = 0.0  # `sync`: committed tokens, smoothed; 0 before the first round
    drafted_per_round: float = 0.0  # `sync`: draft tokens, smoothed
    heard_s: float = 0.0  # when the newest commit arrived; 0: none yet on this connection
    arrivals_s: tuple[float, ...] = ()  # expected arrival at the server of each chain token that was sent

    @property
    def tokens_per_s(self) -> float:
        """`sync`: committed tokens per second over the last rounds."""
        round_s = self.drafted_per_round * self.draft_s + self.overhead_s
        return self.tokens_per_round / max(round_s, _LEAST_S)


class PaceMeter:
    """Keeps the `Pace` of a session from what it sends and gets."""

    __slots__ = (
        "_broke", "_drafting_s", "_gap_s", "_is_measured", "_last_sent_s", "_sent", "_tokens", "_trips_s", "pace",
    )  # fmt: skip

    def __init__(self) -> None:
        self.pace = Pace()
        self._drafting_s: deque[float] = deque(maxlen=_DRAFTING_MEMORY)
        self._trips_s: deque[float] = deque(maxlen=_TRIP_MEMORY)
        self._sent: deque[tuple[int, float]] = deque(maxlen=4 * _TRIP_MEMORY)  # end of each message, when sent
        self._last_sent_s: float | None = None  # the newest message with draft tokens since the last commit
        self._broke = True  # whether the last commit broke the chain
        self._is_measured = False  # whether `verify_s` is more than a first guess
        self._tokens = self._gap_s = 0.0  # of a commit and in front of it, smoothed

    def on_drafted(self, drafting_s: float) -> None:
        """A draft token took so long.

        The lower median: of two times, one an outlier (the first run of a graph), it takes the other.
        """
        self._drafting_s.append(drafting_s)
        self.pace.draft_s = statistics.median_low(self._drafting_s)

    def on_sent(self, end: int, now_s: float) -> None:
        """A message with draft tokens up to position `end` left (in `sync` perhaps without any)."""
        self._sent.append((end, now_s))
        self._last_sent_s = now_s

    def on_commit(self, commit: Commit, breaks: bool, now_s: float) -> None:
        """A commit with tokens has arrived; `breaks`: it differs from the chain, or there was none to survive."""
        pace = self.pace
        measured_s = commit.timing.measured_us / 1e6
        before_s, pace.heard_s = pace.heard_s, now_s
        # The first pass on a connection computes the prompt as well: good for a first guess and for nothing more.
        if measured_s and (before_s or not self._is_measured):
            pace.verify_s += (1.0 - _ROUND_MEMORY if self._is_measured else 1.0) * (measured_s - pace.verify_s)
            self._is_measured = before_s > 0.0
        pace.next_pass_s, pace.price = commit.load_next_pass_s, commit.load_price
        pace.num_in_pass = commit.timing.num_sessions
        if before_s:
            self._note_wait(max(0.0, now_s - before_s - measured_s))
            self._tokens = _ROUND_MEMORY * self._tokens + len(commit.tokens)
            self._gap_s = _ROUND_MEMORY * self._gap_s + now_s - before_s
            pace.committed_per_s = self._tokens / max(self._gap_s, _LEAST_S)
        self._broke = breaks
        pace.wait_s = pace.wait_broken_s if breaks else pace.wait_alive_s
        sent_s = self._sent_for(commit)
        if sent_s is not None:
            self._note_trip(commit, now_s - sent_s)

    def _note_wait(self, wait_s: float) -> None:
        """A pass began `wait_s` behind the end of the one before. Without drafts that tells nothing about holding."""
        pace = self.pace
        if not self._broke:
            pace.wait_alive_s += (1.0 - _ROUND_MEMORY) * (wait_s - pace.wait_alive_s)
        elif self._last_sent_s is not None:
            before_s = pace.wait_broken_s
            known = math.isfinite(before_s)
            pace.wait_broken_s = _ROUND_MEMORY * before_s + (1.0 - _ROUND_MEMORY) * wait_s if known else wait_s
        self._last_sent_s = None

    def on_round(self, commit: Commit, num_drafted: int, now_s: float) -> None:
        """`sync`: the round of the newest message, with `num_drafted` tokens, has ended with `commit`."""
        if self._last_sent_s is None:
            return
        pace, overhead_s = self.pace, now_s - self._last_sent_s
        self._last_sent_s = None
        self._note_trip(commit, overhead_s)
        keep = _ROUND_MEMORY if pace.tokens_per_round else 0.0
        pace.overhead_s = keep * pace.overhead_s + (1.0 - keep) * overhead_s
        pace.tokens_per_round = keep * pace.tokens_per_round + (1.0 - keep) * len(commit.tokens)
        pace.drafted_per_round = keep * pace.drafted_per_round + (1.0 - keep) * num_drafted

    def _note_trip(self, commit: Commit, elapsed_s: float) -> None:
        """`elapsed_s` from a message to a commit that has seen it: never less than the round trip, the pass and the
        wait behind the newest message, so that the shortest of the last ones is nearest to the truth."""
        timing = commit.timing
        self._trips_s.append(max(0.0, elapsed_s - (timing.waited_us + timing.measured_us) / 1e6))
        self.pace.rtt_s = min(self._trips_s)

    def _sent_for(self, commit: Commit) -> float | None:
        """`free`: when the newest message left that surely reached the pass behind `commit`; None: there is none.

        A rejected token was in the pass, and so was every accepted one. Older messages are forgotten.
        """
        is_corrected = commit.last_origin == _CORRECTION
        # Tokens that the server drafted itself tell nothing about what has arrived there.
        last_seen = commit.end if is_corrected else commit.start + commit.num_accepted
        sent_s = None
        while self._sent and self._sent[0][0] <= last_seen:
            end, at_s = self._sent.popleft()
            sent_s = at_s if end > commit.start else None
        if is_corrected:
            if self._sent and sent_s is None:
                sent_s = self._sent[0][1]
            self._sent.clear()  # on a chain that was rolled back
        return sent_s

    def on_lost(self) -> None:
        """The connection was lost: what was sent tells nothing any more."""
        self._sent.clear()
        self._last_sent_s = None
        # Nor does the time until the next commit: neither a pass nor a wait, and no pass is due before it.
        self.pace.heard_s, self.pace.wait_s = 0.0, math.inf
