"""What of a draft chain has left, how the rest is grouped into messages, and which word is owed without any draft.

The chain itself is the session's (`edge_session`): positions are absolute, `committed` is the number of tokens that
are known to be committed, `chain_end` the end of the chain.
"""

from __future__ import annotations

import math

from wisp_plugin.messages import Mode, Open
from wisp_plugin.pace import Pace
from wisp_plugin.send_window import SendWindow

ACK_TOKENS = 64  # a client that sends no drafts acknowledges commits this often
MAX_MESSAGE_TOKENS = 16
_COST_MEMORY = 0.9  # share of the smoothed cost of a message that a message keeps


class Outbox:
    """The way of one session's draft tokens to the server."""

    def __init__(self, opened: Open, message_tokens: int | None) -> None:
        """`message_tokens`: draft tokens that go into one message (None: by measured cost, `best_message_tokens`)."""
        self._is_free = opened.mode is Mode.FREE
        self._fixed_message_tokens = message_tokens
        self._window = SendWindow()
        self._message_cost_s = 0.0  # of the device's own time, smoothed
        self._has_sent = False  # any draft token ever
        self._told_idle = False  # the server knows that no drafts come
        self._sent_s = [0.0] * opened.end  # when each chain token left
        self._sent_end = self._acked = len(opened.tokens)  # end of what was sent; SEEN of the newest message

    def start(self, committed: int) -> int:
        """Position of the first chain token that has not left."""
        return max(self._sent_end, committed)

    def may_send(self, now_s: float) -> bool:
        """True if more draft tokens may be on their way (see `send_window`)."""
        return self._window.is_open(now_s)

    def message_tokens(self, pace: Pace) -> int:
        """Draft tokens that go into the next message."""
        if self._fixed_message_tokens is not None:
            return self._fixed_message_tokens
        return best_message_tokens(self._message_cost_s, pace.draft_s, pace.verify_s + pace.next_pass_s)

    def owes_acknowledgement(self, committed: int, chain_end: int) -> bool:
        """True if an empty message is due, to tell how far the commits have come."""
        return chain_end <= committed and committed - self._acked >= ACK_TOKENS

    def owes_news(self, committed: int, chain_end: int) -> bool:
        """True if the server is to know that no drafts come, given that none does."""
        return chain_end <= committed and self._has_sent and not self._told_idle

    def arrivals_s(self, committed: int, chain_end: int, way_s: float, now_s: float) -> tuple[float, ...]:
        """Expected arrival at the server of each chain token, `way_s` away; what has not left would leave now."""
        start = self.start(committed)
        sent = [sent_s + way_s for sent_s in self._sent_s[committed:start]]
        return (*sent, *[now_s + way_s] * (chain_end - start))

    # -- what happens -------------------------------------------------------------------------------------------

    def on_message(self, committed: int, chain_end: int, now_s: float) -> None:
        """All of the chain that had not left goes now, in one message."""
        start = self.start(committed)
        self._sent_s[start:chain_end] = [now_s] * (chain_end - start)
        self._sent_end, self._acked = chain_end, committed
        self._told_idle = chain_end == start
        self._has_sent |= chain_end > start
        if self._is_free:
            self._window.on_sent(chain_end - start, now_s)

    def on_sent(self, cost_s: float) -> None:
        """To send the last message took `cost_s` of the device's own time."""
        before_s = self._message_cost_s or cost_s
        self._message_cost_s = _COST_MEMORY * before_s + (1.0 - _COST_MEMORY) * cost_s

    def on_verified(self) -> None:
        """A pass has looked at a draft token: drafts arrive."""
        self._window.on_sign()

    def on_rollback(self, committed: int) -> None:
        """The chain was given up; the next one begins behind `committed`."""
        self._sent_end = committed

    def on_reopened(self, committed: int) -> None:
        """A new connection that knows `committed` tokens: the chain has to be sent again."""
        self._sent_end = self._acked = committed
        self._told_idle = False
        self._window.on_sign()


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
