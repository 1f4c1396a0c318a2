"""Who takes part in a pass of a busy server, for policy `wisp`: by need, within the budget of the pass.

Those that need a token are in, with their own. Then everybody in the order of need, prefills among them, each with all
that it has and that is worth its place (less has to be likely of what a session drafts that gets little from its
turns), until the pass takes as long as it may (`wisp_budget`). So whoever is ahead waits while its drafts come in, and
its turn is rich; a prompt waits until its first token is as urgent as what others need, and then gets whole passes.
(Earliest deadline first is optimal while everything can be in time: Liu and Layland 1973. It falls apart when not, so
sessions whose SLO is lost come last, for what is left, and prompts behind which others would be late as well come
later: `wisp_first_tokens`.)
"""

from __future__ import annotations

import numpy as np

from wisp_plugin.config import EngineConfig
from wisp_plugin.estimator import EMPTY_PASS, Estimator, item_features, token_features
from wisp_plugin.policies import NEED, PREFILL, VALUE, Choice
from wisp_plugin.roster import Bools, Candidates, Floats, Ints
from wisp_plugin.wisp_budget import Budget, OwnTokens
from wisp_plugin.wisp_fill import Fill, Wanted
from wisp_plugin.wisp_first_tokens import will_be_late
from wisp_plugin.wisp_offers import tells_turns
from wisp_plugin.wisp_parameters import WispParameters


class Turns:
    """See the top of this file."""

    def __init__(self, config: EngineConfig, estimator: Estimator, parameters: WispParameters) -> None:
        self._config = config
        self._estimator = estimator
        self._parameters = parameters
        self._chunk_tokens = min(parameters.prefill_tokens, config.max_pass_tokens)

    def choose(self, c: Candidates, is_prefill: Bools, must_s: Floats, now_s: float, budget: Budget) -> Choice:
        """The pass. `must_s` `[S]`: when a session takes part whatever it costs (infinite: never)."""
        must, without_room = self._musts(c, must_s, now_s)
        num_uncached = np.where(is_prefill, c.num_uncached, np.minimum(c.num_uncached, self._chunk_tokens))
        num_uncached[without_room] = np.minimum(num_uncached[without_room], self._chunk_tokens)
        num_drafts = np.where(num_uncached < c.num_uncached, 0.0, c.num_buffered)
        value, least_value = self._draft_rule(c, is_prefill, num_uncached, num_drafts, budget)
        num_drafts = self._valuable(c, value, least_value, num_drafts)
        if self._fits(c, num_uncached, num_drafts, budget.seconds):
            committed, drafts = num_uncached.astype(np.int64), num_drafts.astype(np.int64)
        else:
            order = self._order(c, is_prefill, must_s, without_room, now_s, budget)
            scarce = self._valuable(c, value, budget.draft_price, num_drafts)
            if budget.own_tokens is not OwnTokens.FALL_SHORT and (is_prefill & (c.is_lost == 0)).any():
                scarce = np.where(self._spares_drafts(c, now_s), 0.0, scarce)
            wanted = Wanted(num_uncached, scarce, must)
            fill = Fill(self._config, self._estimator, c, wanted, self._chunk_tokens, budget.seconds)
            committed, drafts = fill.take(order)
        members = np.flatnonzero(committed)
        kinds = np.where(is_prefill, 2, np.where(must, 1, 0))[members]
        reasons = tuple([(VALUE, NEED, PREFILL)[kind] for kind in kinds.tolist()])
        return Choice(members, committed[members], drafts[members], reasons)

    def _draft_rule(
        self, c: Candidates, is_prefill: Bools, num_uncached: Floats, num_drafts: Floats, budget: Budget
    ) -> tuple[Floats, float]:
        """What draft tokens count, `[S, K]`, and what one has to count where there is room for all."""
        if budget.own_tokens is OwnTokens.DO:
            # Nobody needs drafts: what a rejected one costs serves somebody else's own token, whoever's it is.
            return c.survival, budget.draft_price
        price = self._price(c, ~is_prefill, num_uncached) if num_drafts.any() else 0.0
        if budget.own_tokens is OwnTokens.NEARLY_DO:
            return c.survival, price
        return c.survival * self._weights(c, budget.seconds)[:, None], price

    def _musts(self, c: Candidates, must_s: Floats, now_s: float) -> tuple[Bools, Ints]:
        """Who takes part whatever it costs, `[S]`: in the order of need, as many as a pass has room for; and the rows
        of those without room."""
        must = np.zeros(len(c), bool)
        due = np.flatnonzero(must_s <= now_s)
        due = due[must_s[due].argsort(kind="stable")]
        fits = np.minimum(c.num_uncached[due], self._chunk_tokens).cumsum() <= self._config.max_pass_tokens
        fits[self._config.max_pass_sessions :] = False
        must[due[fits]] = True
        return must, due[~fits]

    def _order(
        self, c: Candidates, is_prefill: Bools, must_s: Floats, without_room: Ints, now_s: float, budget: Budget
    ) -> Ints:
        """Everybody, in the order of need. A first token that is late, or will be, makes nobody else late, but comes
        before what is far ahead, and does not wait for ever; and nobody overtakes those who would have to take part and
        have no room. Where nobody needs drafts, prompts that have time yet take what running sessions leave."""
        rank = (c.is_lost > 0).astype(np.int64)
        is_late = will_be_late(c, is_prefill, self._estimator, now_s)
        p = self._parameters
        latest_s = np.minimum(p.latest_first_tokens * c.tpot_s, p.latest_first_token_s)
        late_s = np.minimum(now_s + p.late_first_tokens * c.tpot_s, c.needed_s + latest_s)
        needed_s = np.where(is_late, late_s, c.needed_s)
        if budget.own_tokens is OwnTokens.DO:
            has_time = is_prefill & (needed_s > now_s + p.first_token_passes * budget.seconds)
            rank = np.where(rank > 0, 2, has_time)
        rank[without_room], needed_s[without_room] = -1, must_s[without_room]
        order: Ints = np.lexsort((needed_s, rank))
        return order

    def _weights(self, c: Candidates, budget_s: float) -> Floats:
        """What a draft token counts for each session, `[S]`: 1, but more for those whose turns are hardly worth a pass
        of `budget_s`: they need richer ones, or set its length, or are given up. A turn is worth its tokens times the
        tpot. 1 as well for those whose turns tell nothing."""
        p = self._parameters
        weights = p.poor_turn_passes * budget_s / (c.tpot_s * c.tokens_per_turn)
        return np.where(tells_turns(c, p), weights.clip(1.0, p.most_draft_weight), 1.0)

    def _price(self, c: Candidates, runs: Bools, num_uncached: Floats) -> float:
        """What the time of a draft token costs everybody else who `runs`, in tokens."""
        features = item_features(c.num_cached, np.minimum(num_uncached, 1.0), 1.0)
        own = self._estimator.work(EMPTY_PASS + runs @ features)
        token = self._estimator.work(token_features(c.num_cached.mean()))
        return np.count_nonzero(runs) / self._estimator.pass_s(own) * float(self._estimator.weights(own) @ token)

    def _spares_drafts(self, c: Candidates, now_s: float) -> Bools:
        """Who is so far ahead that its drafts save it nothing; not in `sync`, where they would be lost."""
        result: Bools = (c.needed_s > now_s + self._parameters.own_pace_tokens * c.tpot_s) & (c.is_sync == 0)
        return result

    def _valuable(self, c: Candidates, value: Floats, least_value: float, num_drafts: Floats) -> Floats:
        """Of `num_drafts` those with a `value` `[S, K]` of `least_value`; in `sync`, where a device gives up what is
        not verified, all."""
        valuable = (value >= least_value).sum(axis=1)
        return np.where(c.is_sync > 0, num_drafts, np.minimum(num_drafts, valuable))

    def _fits(self, c: Candidates, num_uncached: Floats, num_drafts: Floats, budget_s: float) -> bool:
        """Whether there is room for everything."""
        num_new = num_uncached + num_drafts
        if len(c) > self._config.max_pass_sessions or num_new.sum() > self._config.max_pass_tokens:
            return False
        features = item_features(c.num_cached, num_new, 1.0 + num_drafts).sum(axis=0)
        return self._estimator.pass_s(self._estimator.work(EMPTY_PASS + features)) <= budget_s
