"""The draft buffer of one session on the server (DESIGN.md sections 2 and 6). Its rules, in one place:

- a message with START = SEEN starts a new chain and replaces the buffer;
- a message with START > SEEN must continue the chain where the message before ended, else it is stale;
- draft tokens at positions committed meanwhile are late: they are compared, and the first difference breaks
  the chain;
- the token that a pass chose itself is compared with the next buffered one: equal keeps the tail, different
  breaks the chain;
- a broken chain is empty and takes nothing until START = SEEN starts the next one.

Draft tokens are kept in the session's own token array, behind the committed ones: a pass then reads committed
tokens and drafts as one view.

Survival of a draft token is the probability that it and all before it are right. The device may send it; without,
it follows from the session's own acceptance so far. A device that promises three times what comes true is not
believed, and of a session whose drafts hardly ever hold no more is taken than might: a pass that computes garbage takes
longer for everybody in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from wisp_plugin.coupling import count_accepted
from wisp_plugin.draft_rates import AcceptanceRate, Trust
from wisp_plugin.messages import Draft, Tokens

# A session with a lower acceptance than this gets a draft token verified only if it is right with that probability.
_LEAST_ACCEPTANCE, _LEAST_SURVIVAL = 0.3, 0.01


@dataclass(slots=True)
class DraftCounts:
    """What became of a session's draft tokens."""

    received: int = 0
    verified: int = 0
    accepted: int = 0
    late: int = 0
    stale: int = 0

    def copy(self) -> DraftCounts:
        """The counts as they are now (`dataclasses.replace` takes eight times as long)."""
        return DraftCounts(self.received, self.verified, self.accepted, self.late, self.stale)


class DraftBuffer:
    """Draft tokens in `tokens[num_committed : num_committed + num_tokens]`."""

    __slots__ = ("_chain_end", "_chain_start", "_rate", "_survival", "_tokens", "_told", "_trust", "counts",
                 "num_tokens")  # fmt: skip

    def __init__(self, tokens: Tokens) -> None:
        """`tokens` is the session's array, as long as the session may become."""
        self.num_tokens = 0
        self.counts = DraftCounts()
        self._tokens = tokens
        self._survival = np.ones(len(tokens), np.float32)  # by position, since the start of the chain
        self._told = np.zeros(len(tokens), np.bool_)  # by position: the device told it, whether it is believed or not
        self._chain_start = 0
        self._chain_end: int | None = None  # where the next message must continue; None: chain broken
        self._rate, self._trust = AcceptanceRate(), Trust()

    @property
    def acceptance(self) -> float:
        """Learnt probability that a draft token is accepted if all before it were."""
        return self._rate.value

    def survival(self, num_committed: int) -> npt.NDArray[np.float32]:
        """Survival of each buffered token, float32 `[num_tokens]`, never increasing."""
        ahead = self._survival[num_committed : num_committed + self.num_tokens]
        base = float(self._survival[num_committed - 1]) if num_committed > self._chain_start else 1.0
        return ahead / max(base, 1e-6)

    def is_new(self, num_committed: int) -> bool:
        """True if no pass has committed anything of the chain yet, or there is none."""
        return self._chain_end is None or self._chain_start >= num_committed

    def worth(self, draft: Draft) -> Draft:
        """What of a round in `sync`, where all of it would be verified, is worth that: the less the fewer ever held.

        A round may come in several messages; what counts is how far behind its beginning a token is.
        """
        if self.acceptance >= _LEAST_ACCEPTANCE:
            return draft
        num_worth = 1 + int(math.log(_LEAST_SURVIVAL) / math.log(max(self.acceptance, 1e-9)))
        num_worth = max(0, num_worth - (draft.start - draft.seen))
        num_cut = max(0, len(draft.tokens) - num_worth)
        self.counts.received += num_cut
        self.counts.stale += num_cut
        survival = None if draft.survival is None else draft.survival[:num_worth]
        return replace(draft, tokens=draft.tokens[:num_worth], survival=survival)

    def put(self, draft: Draft, num_committed: int) -> bool:
        """Take what is good of a message behind `num_committed` tokens; False if all of it is stale."""
        self.counts.received += len(draft.tokens)
        if draft.start == draft.seen:
            self.counts.stale += self.num_tokens
            self.num_tokens = 0
            self._chain_start = self._chain_end = draft.start
        if draft.start != self._chain_end:
            self.counts.stale += len(draft.tokens)
            return False
        self._extend(draft, num_committed)
        return True

    def _extend(self, draft: Draft, num_committed: int) -> None:
        num_late = min(max(0, num_committed - draft.start), len(draft.tokens))
        self.counts.late += num_late
        if num_late and count_accepted(draft.tokens[:num_late], self._tokens[draft.start : num_committed]) < num_late:
            self.counts.stale += len(draft.tokens) - num_late
            self.drop()
            return
        # The pass that verifies a draft adds a token of its own: there is no room for one at the last position.
        end = max(draft.start, min(draft.end, len(self._tokens) - 1))
        if end > draft.start:  # a chain may go on behind the end of the session
            self._note_survival(draft, end)
        first = max(draft.start, num_committed)
        if end > first:
            self._tokens[first:end] = draft.tokens[first - draft.start : end - draft.start]
            self.num_tokens += end - first
        self._chain_end = draft.end

    def _note_survival(self, draft: Draft, end: int) -> None:
        before = float(self._survival[draft.start - 1]) if draft.start > self._chain_start else 1.0
        self._told[draft.start : end] = draft.survival is not None
        if draft.survival is None or not self._trust.holds:
            steps = np.arange(1, end - draft.start + 1)
            self._survival[draft.start : end] = before * self.acceptance**steps
        else:
            # The device tells them given what it has seen; here they count from the start of the chain.
            seen = float(self._survival[draft.seen - 1]) if draft.seen > self._chain_start else 1.0
            lowest, unit = before, float(np.float32(seen / 255))
            for i, told in enumerate(draft.survival[: end - draft.start].tolist()):  # a few: faster than columns
                lowest = min(lowest, told * unit)
                self._survival[draft.start + i] = lowest

    def on_commit(self, committed: Tokens, num_committed: int, num_verified: int, num_accepted: int) -> None:
        """Compare what a pass commits behind `num_committed` with the head of the buffer: equal drops the head,
        different breaks the chain. Call it before the tokens are written to the session's array."""
        if num_verified:
            self.counts.verified += num_verified
            self.counts.accepted += num_accepted
            self._rate.learn(num_accepted, num_verified)
            told = self._told[num_committed : num_committed + num_verified]
            if np.count_nonzero(told):  # four times as fast as `any`
                promised = self.survival(num_committed)[:num_verified][told]
                self._trust.learn(float(promised.sum()), int(np.count_nonzero(told[:num_accepted])))
        if self._chain_end is None:
            return
        num_shared = min(len(committed), self.num_tokens)
        head = self._tokens[num_committed : num_committed + num_shared]
        if count_accepted(head, committed) == num_shared:
            self.num_tokens -= num_shared
        else:
            # Verified tokens, or the one that the target's own contradicts, are not stale: they were compared.
            self.num_tokens -= min(self.num_tokens, max(num_verified, len(committed)))
            self.drop()

    def drop(self) -> None:
        """Break the chain: what is buffered is stale."""
        self.counts.stale += self.num_tokens
        self.num_tokens = 0
        self._chain_end = None
