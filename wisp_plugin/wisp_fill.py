"""Filling a pass in an order, for policy `wisp`: whole turns until it takes as long as it may, and a part of the next.

Some members are sure of their place whatever they cost, with their own token or the smallest chunk of their prompt.
What is left goes to everybody in the order given, so that nobody overtakes who needs more; a prompt for whose smallest
chunk there is no room is passed over.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from wisp_plugin.config import EngineConfig
from wisp_plugin.estimator import EMPTY_PASS, Estimator, item_features, token_features
from wisp_plugin.roster import Bools, Candidates, Floats, Ints


@dataclass(frozen=True, slots=True)
class Wanted:
    """What everybody would get in a pass without limits: tokens to commit, drafts to verify, `[S]`; and who is sure of
    a place."""

    num_uncached: Floats
    num_drafts: Floats
    must: Bools


class Fill:
    """One pass of at most `budget_s` seconds, but for those who are sure of their place."""

    def __init__(
        self, config: EngineConfig, estimator: Estimator, c: Candidates, wanted: Wanted, chunk_tokens: int,
        budget_s: float,
    ) -> None:  # fmt: skip
        """`chunk_tokens`: the smallest part of a prompt."""
        self._config, self._estimator, self._c, self._wanted = config, estimator, c, wanted
        self._chunk_tokens, self._budget_s = chunk_tokens, budget_s
        committed, drafts = self._sure()
        sure_work = self._work(committed, drafts) * wanted.must[:, None]
        self._base = estimator.work(EMPTY_PASS) + sure_work.sum(axis=0)
        self._further = self._work(wanted.num_uncached, wanted.num_drafts) - sure_work
        self._num_sure = float(committed.sum() + drafts.sum())
        self._num_further = wanted.num_uncached + wanted.num_drafts - committed - drafts
        self._committed, self._drafts = committed.astype(np.int64), drafts.astype(np.int64)

    def take(self, order: Ints) -> tuple[Ints, Ints]:
        """Committed and draft tokens of each session, int `[S]`."""
        blocked = self._fill_until_blocked(order)
        if blocked is not None:
            rest = order[blocked:]  # there is no room for prompts any more; they keep nobody else out
            rest = rest[self._wanted.num_uncached[rest] <= self._chunk_tokens]
            self._fill_until_blocked(np.concatenate([order[:blocked], rest]))
        return self._committed, self._drafts

    def _sure(self) -> tuple[Floats, Floats]:
        """Committed and draft tokens that are sure: in `sync` all drafts, if there is room, as what a device gives up
        belongs to its turn."""
        c, must = self._c, self._wanted.must
        committed = np.where(must, np.minimum(self._wanted.num_uncached, self._chunk_tokens), 0.0)
        is_whole = must & (committed == c.num_uncached)  # a chunk carries no drafts
        drafts = np.where(is_whole & (c.is_sync > 0), self._wanted.num_drafts, 0.0)
        has_room = committed.sum() + drafts.sum() <= self._config.max_pass_tokens
        return committed, drafts if has_room else np.zeros(len(c))

    def _work(self, num_uncached: Floats, num_drafts: Floats) -> Floats:
        features = item_features(self._c.num_cached, num_uncached + num_drafts, 1.0 + num_drafts)
        return self._estimator.work(features)

    def _fill_until_blocked(self, order: Ints) -> int | None:
        """Take whole turns as far as they fit, and a part of the next one. Index in `order` of a prompt that is next
        and has no room for its smallest chunk, of which nothing is taken; None: the pass is full, or has everybody."""
        config, must = self._config, self._wanted.must
        reached = self._base + self._further[order].cumsum(axis=0)
        tokens = self._num_sure + self._num_further[order].cumsum()
        places = np.count_nonzero(must) + (~must[order]).cumsum()
        fits = (self._estimator.seconds(reached) <= self._budget_s) & (tokens <= config.max_pass_tokens)
        fits &= places <= config.max_pass_sessions
        num_whole = len(order) if fits.all() else int(fits.argmin())
        taken = order[:num_whole]
        self._committed[taken], self._drafts[taken] = self._wanted.num_uncached[taken], self._wanted.num_drafts[taken]
        if num_whole == len(order) or places[num_whole] > config.max_pass_sessions:
            return None
        row, is_first = int(order[num_whole]), not self._committed.any()
        before = reached[num_whole - 1] if num_whole else self._base
        room = int(config.max_pass_tokens - (tokens[num_whole - 1] if num_whole else self._num_sure))
        num_committed, num_drafts = self._part(row, before, room, is_first)
        self._committed[row] += num_committed
        self._drafts[row] += num_drafts
        is_prompt = self._wanted.num_uncached[row] > self._chunk_tokens
        return num_whole if is_prompt and not num_committed + num_drafts else None

    def _part(self, row: int, before: Floats, room: int, is_first: bool) -> tuple[int, int]:
        """Further tokens to commit and to verify of one session, in a pass with work `before`."""
        num_uncached = int(self._wanted.num_uncached[row]) - int(self._committed[row])
        num_drafts = int(self._wanted.num_drafts[row]) - int(self._drafts[row])
        sizes = np.arange(1, min(room, num_uncached + num_drafts) + 1)
        if not len(sizes):
            return 0, 0
        if self._wanted.must[row]:  # it takes part already
            added = sizes[:, None] * self._estimator.work(token_features(self._c.num_cached[row]))
        else:
            drafts = np.maximum(0, sizes - num_uncached)
            added = self._estimator.work(item_features(self._c.num_cached[row], sizes, 1.0 + drafts))
        size = int(np.count_nonzero(self._estimator.seconds(before + added) <= self._budget_s))
        if is_first:
            size = max(size, min(len(sizes), self._chunk_tokens))  # an empty pass helps nobody
        is_crumb = size < min(num_uncached, self._chunk_tokens)
        is_torn = self._c.is_sync[row] > 0 and num_uncached <= size < num_uncached + num_drafts
        if is_crumb or (is_torn and not is_first):
            return 0, 0
        return min(size, num_uncached), max(0, size - num_uncached)
