"""When a device's next draft tokens are to come, and how far it thinks a new chain worth waiting for."""

from __future__ import annotations

import math

from wisp_plugin.draft_buffer import DraftBuffer
from wisp_plugin.messages import Draft

_MEMORY = 0.8  # of what a chain was worth: how much the next one keeps of it


class ExpectedDrafts:
    """What a device's messages tell of those to come.

    `next_s` is when its next draft tokens are expected (inf: none are on the way), `gap_s` the time between its draft
    messages as it told that last (None: it does not draft). `worth_tokens` is how many draft tokens behind a rejection
    it thinks worth waiting for, `worth_gain` how many of them are likely to be accepted, smoothed.
    """

    __slots__ = ("_has_stopped", "gap_s", "next_s", "worth_gain", "worth_tokens")

    def __init__(self) -> None:
        self.next_s = math.inf
        self.gap_s: float | None = None
        self.worth_tokens = self.worth_gain = 0.0
        self._has_stopped = False  # in this chain

    def on_draft(self, draft: Draft, drafts: DraftBuffer, num_committed: int, now_s: float) -> None:
        """`drafts` has taken a message behind `num_committed` tokens. Not for stale ones: they tell nothing of the
        chain that is to come."""
        if draft.next_us >= 0:
            self.gap_s = draft.next_us / 1e6
            self.next_s = now_s + self.gap_s
            return
        self.next_s = math.inf
        if not len(draft.tokens):  # the device rests: no commit makes it draft
            self.gap_s = None
        elif drafts.is_new(num_committed) and not self._has_stopped:
            self._has_stopped = True
            self._note_worth(drafts.num_tokens, float(drafts.survival(num_committed).sum()))

    def _note_worth(self, num_tokens: int, gain: float) -> None:
        """The device has told how much of a new chain it thinks worth waiting for: all that is buffered."""
        keep = _MEMORY if self.worth_tokens else 0.0
        self.worth_tokens += (1.0 - keep) * (num_tokens - self.worth_tokens)
        self.worth_gain += (1.0 - keep) * (gain - self.worth_gain)

    def on_commit(self, has_drafts: bool, way_s: float, now_s: float) -> None:
        """The session has tokens for its device, `way_s` away. `has_drafts`: some are left behind them."""
        self._has_stopped = False
        if self.gap_s is not None and (not has_drafts or math.isinf(self.next_s)):
            # The device drafts on, or from here again, once it has the commit.
            self.next_s = now_s + 2 * way_s + self.gap_s

    def on_resume(self) -> None:
        """What was on its way is lost."""
        self.next_s = math.inf
