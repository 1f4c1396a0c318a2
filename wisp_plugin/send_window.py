"""A bound on draft tokens that are sent without a sign that they arrive: a link that swallows them must not fill up.

In `free` mode the device never waits for an answer, and over a way up that is stalled, or far too slow, every commit of
the server's own would make it draft and send a new chain behind the old ones. A commit with a verified draft token is
the sign that drafts arrive in time. Without one the device stops after `_TOKENS` of them, and then tries a short chain
after pauses that grow. No clock: every event brings its time.
"""

from __future__ import annotations

import math

from wisp_plugin.controller import MAX_AHEAD

_TOKENS = 2 * MAX_AHEAD  # a chain, and another one behind the first rollback
_PROBE_TOKENS = MAX_AHEAD // 2  # of one try: a shorter chain might lie behind the server whole, and tell nothing
_FIRST_PAUSE_S = 0.5
_LAST_PAUSE_S = 8.0


class SendWindow:
    """Whether a device may go on sending draft tokens."""

    __slots__ = ("_closed_until_s", "_num_left", "_pause_s")

    def __init__(self) -> None:
        self._num_left = _TOKENS
        self._pause_s = _FIRST_PAUSE_S
        self._closed_until_s = -math.inf

    def is_open(self, now_s: float) -> bool:
        """True if more may be sent."""
        return now_s >= self._closed_until_s

    def on_sent(self, num_tokens: int, now_s: float) -> None:
        """`num_tokens` draft tokens left."""
        self._num_left -= num_tokens
        if self._num_left <= 0:
            self._closed_until_s = now_s + self._pause_s
            self._pause_s = min(2 * self._pause_s, _LAST_PAUSE_S)
            self._num_left = _PROBE_TOKENS

    def on_sign(self) -> None:
        """Drafts arrive (or the connection is new, and nothing is under way)."""
        self._num_left, self._pause_s, self._closed_until_s = _TOKENS, _FIRST_PAUSE_S, -math.inf
