"""SLO timeline of one session: when its tokens are due and how long the way to its client is (DESIGN.md section 2).

Token i (from 0) is due at the arrival of the open + ttft + i * tpot, less the expected way to the client. The SLO
itself asks for the mean time per token behind the first one, so an early first token does not buy later ones time:
a token is *needed* by its due time or by the pace that the first token has set, whichever comes first. Schedulers
work with `needed_s`; reports of the strict form use `due_s`.
"""

from __future__ import annotations

from collections import deque

from wisp_plugin.messages import Slo

_MAX_PENDING = 32  # commits whose acknowledgement is awaited
RECOVERY = 0.4  # share of its tpot that a session behind schedule can win back with every token
_WAY_MEMORY = 16  # acknowledgements that the shortest way is taken from


class Timeline:
    """Due times of one session. Times are those of the engine's clock, in seconds."""

    __slots__ = (
        "_pending", "_round_trips_s", "first_s", "is_told", "last_s", "num_tokens", "opened_s", "tpot_s", "ttft_s",
        "way_s",
    )  # fmt: skip

    def __init__(self, slo: Slo, opened_s: float) -> None:
        self.opened_s = opened_s
        self.ttft_s = slo.ttft_ms / 1e3
        self.tpot_s = slo.tpot_ms / 1e3
        self.way_s = 0.0
        self.num_tokens = 0  # committed on this timeline
        self.first_s: float | None = None  # when the first token was committed
        self.last_s: float | None = None
        self.is_told = False  # whether its session has been counted as ended
        self._pending: deque[tuple[int, float]] = deque(maxlen=_MAX_PENDING)
        self._round_trips_s: deque[float] = deque(maxlen=_WAY_MEMORY)

    def due_s(self, index: int) -> float:
        """Due time of token `index`."""
        return self.opened_s + self.ttft_s + index * self.tpot_s - self.way_s

    @property
    def needed_s(self) -> float:
        """When the next token has to be committed so that the SLO holds."""
        if self.first_s is None:
            return self.due_s(0)
        # The way shifts the first token and the next one alike: at the client the pace is the same.
        return min(self.due_s(self.num_tokens), self.first_s + self.num_tokens * self.tpot_s)

    @property
    def is_met(self) -> bool | None:
        """Whether the SLO holds so far, at the client as far as the server can tell. None before the first token."""
        if self.first_s is None or self.last_s is None:
            return None
        in_time = self.first_s + self.way_s <= self.opened_s + self.ttft_s
        return in_time and self.last_s - self.first_s <= (self.num_tokens - 1) * self.tpot_s

    def is_lost(self, num_left: int) -> bool:
        """True if the SLO cannot be met any more: the first token was late, or the session is further behind than
        it can make up with the `num_left` tokens that it may still commit."""
        if self.first_s is None or self.last_s is None:
            return False
        if self.first_s + self.way_s > self.opened_s + self.ttft_s:
            return True
        behind_s = self.last_s - self.first_s - (self.num_tokens - 1) * self.tpot_s
        return behind_s > RECOVERY * num_left * self.tpot_s

    def on_commit(self, num_tokens: int, end: int, now_s: float) -> None:
        """`num_tokens` were committed, up to position `end`."""
        if self.first_s is None:
            self.first_s = now_s
        self.last_s = now_s
        self.num_tokens += num_tokens
        self._pending.append((end, now_s))

    def on_acknowledged(self, seen: int, now_s: float) -> None:
        """The client told that it has `seen` tokens: its way is learnt.

        The delay between a commit and its acknowledgement is the round trip and what the client did meanwhile
        (the rest of a draft step); the shortest of the last ones is nearest to the round trip.
        """
        sent_s = None
        while self._pending and self._pending[0][0] <= seen:
            sent_s = self._pending.popleft()[1]
        if sent_s is None:
            return
        self._round_trips_s.append(now_s - sent_s)
        # A client that thinks before it answers (`sync` drafts a whole chain) must not eat up its own SLO.
        self.way_s = min(min(self._round_trips_s) / 2, self.ttft_s / 4)
