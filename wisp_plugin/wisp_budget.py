"""How long a pass may take so that whoever can keep the pace of its SLO keeps it, for policy `wisp`.

A session that is in every pass and gets n tokens from each on average bears passes of n x tpot, with what the server
drafts before them. Longer ones cost it its SLO; shorter ones carry less, and what all SLOs ask for, with the prompts
that come along, has to fit: that takes passes of `pace_s` on average, but never longer ones than save time: what a pass
costs beside its tokens is a small share of it then, and a burst of prompts is not served quicker by passes that nobody
bears. Sessions that bear less than this are beyond help. (Nobody counts as asking for more than passes with it alone
would give, or one impossible SLO would make all others hopeless.) Of the others the one that bears least sets the
budget. So passes are as long as they may be, and all alike: a long pass costs the tightest more than a short one gives
back. Only while everybody is far enough ahead of its schedule to bear a longer pass, it takes that, if it still saves
something. Where no server drafts, sessions keep a reserve then: behind rejections it takes them long to win one back.
But there is always room for the smallest chunk of a prompt that waits: it cannot win back what it loses.

Where all keep the pace with their own token of every pass, passes are alike for another reason: reading and computing
overlap, so a pass full of prompts and one without take longer together than two that share them. Such a pass has the
new tokens that come with what it commits, and a few more, so that prompts do not queue up; and it takes no longer than
the tightest session bears, which hardly gets ahead where devices are slow, and would win nothing back. Nor do drafts of
sessions that are ahead save an SLO there; what they cost makes prompts late, and keeps slow devices from getting ahead:
they come behind prompts that wait, where the own tokens nearly do as well. Where they only nearly do, what turns have
brought tells little then: a session bears passes as long as what its turn would bring now is worth, with the drafts
that wait, and no draft token is worth more because turns are poor.

A draft token that is right saves the time of a committed token, but not the prompts that come along: where time is
scarce it has to be as likely as its own time is to that of a committed token, prompts apart.

New tokens per committed one (prompts and rejected drafts are in it) are those of the last passes.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

import numpy as np

from wisp_plugin.estimator import EMPTY_PASS, Estimator, item_features, token_features
from wisp_plugin.policies import Choice, expected_tokens
from wisp_plugin.roster import Bools, Candidates, Floats, Ints
from wisp_plugin.wisp_parameters import WispParameters

_MEMORY_S = 10.0  # passes are remembered so long
_FIRST_TOKENS: Floats = np.array([50.0, 25.0, 25.0])  # new, of prompts, and committed, until there were passes
_LEAST_TURN_S = 1e-3  # of the target, however long the server drafts
_ROUNDS = 3  # towards a pass that takes as long as its own work asks for
_SIZES: Floats = np.geomspace(8.0, 4096.0, 37)  # new tokens of a pass that are looked at


class OwnTokens(enum.Enum):
    """Whether sessions keep their pace with their own token of every pass."""

    FALL_SHORT = enum.auto()  # some need drafts
    NEARLY_DO = enum.auto()  # some need drafts, but those of who is ahead come behind prompts
    DO = enum.auto()


@dataclass(frozen=True, slots=True)
class Budget:
    """How long the next pass may take, and how likely a draft token has to be in it where time is scarce."""

    seconds: float
    draft_price: float
    own_tokens: OwnTokens = OwnTokens.FALL_SHORT


@dataclass(frozen=True, slots=True)
class _Work:
    """Work of an empty pass `[2]`, of each session with its own token `[S, 2]`, of a pass with all of those `[2]`, of
    one token more `[2]`."""

    empty: Floats
    own: Floats
    everyone: Floats
    token: Floats

    @property
    def fixed(self) -> Floats:
        """Work of a pass with everybody, without that of the tokens."""
        return np.maximum(self.everyone - len(self.own) * self.token, 0.0)


class PassBudget:
    """See the top of this file. It remembers the passes it is told of."""

    def __init__(self, estimator: Estimator, parameters: WispParameters) -> None:
        self._estimator = estimator
        self._parameters = parameters
        self._recent = _FIRST_TOKENS.copy()
        self._noted_s: float | None = None

    def note(self, c: Candidates, choice: Choice, now_s: float) -> None:
        """`choice` is the next pass: how many new tokens it takes, and how many it is expected to commit."""
        if not len(choice.members):
            return
        if self._noted_s is not None:
            # What is forgotten makes place for the first guess: behind a pause a single pass tells little.
            self._recent += (1.0 - math.exp((self._noted_s - now_s) / _MEMORY_S)) * (_FIRST_TOKENS - self._recent)
        num_new = choice.num_committed.sum() + choice.all_drafts.sum()
        num_prompt = choice.num_committed[choice.num_committed > 1].sum()
        self._recent += (num_new, num_prompt, expected_tokens(c, choice).sum())
        self._noted_s = now_s

    @property
    def _per_committed(self) -> Floats:
        """New tokens, and those of prompts, per committed one, lately."""
        result: Floats = self._recent[:2] / max(float(self._recent[2]), 1.0)
        return result

    def of(self, c: Candidates, is_prefill: Bools, now_s: float) -> Budget:
        """The budget for candidates of which there is at least one."""
        runs = np.flatnonzero(~is_prefill & (c.is_lost == 0))
        work = self._work(c.num_cached[runs] if len(runs) else c.num_cached)
        with_chunk_s = self._with_chunk_s(work)
        seconds_by_size = self._seconds_by_size(work)
        longest_s = max(with_chunk_s, self._longest_s(work, seconds_by_size, self._parameters.least_saving))
        if not len(runs):
            return self._needing_drafts(work, seconds_by_size, longest_s)
        tokens_per_turn = self._tokens_per_turn(c, runs)
        worth_s = c.tpot_s[runs] * tokens_per_turn  # what a turn is worth in time, and of that in time of the target:
        turn_s = np.maximum(worth_s - c.drafting_s, _LEAST_TURN_S)
        pace_s = min(self._pace_s(c, is_prefill, turn_s, work, now_s), longest_s)
        can_keep_slo = worth_s >= self._parameters.lost_pace * pace_s  # nobody is given up because the server drafts
        if not can_keep_slo.any():
            return self._needing_drafts(work, seconds_by_size, longest_s)
        tightest_tpot_s = float(c.tpot_s[runs][can_keep_slo].min())
        if tightest_tpot_s >= longest_s:
            even_s, draft_price = self._even_pass(work, float(tokens_per_turn.sum()))
            even_s = max(longest_s, min(even_s, float(turn_s[can_keep_slo].min())))
            return Budget(even_s, draft_price, OwnTokens.DO)
        own_tokens = OwnTokens.FALL_SHORT
        if tightest_tpot_s >= self._parameters.own_pace * longest_s:
            own_tokens = OwnTokens.NEARLY_DO
            least_value = self._needing_drafts(work, seconds_by_size, longest_s).draft_price
            turn_s = np.maximum(turn_s, _with_drafts_s(c, runs, least_value))
        # The tightest session bears what its turn is worth, and more if it is ahead, while that saves something.
        borne_s = float((turn_s + self._spared_s(c, runs, now_s))[can_keep_slo].min())
        saving_s = self._longest_s(work, seconds_by_size, self._parameters.least_saving_ahead)
        tightest_s = max(float(turn_s[can_keep_slo].min()), min(borne_s, saving_s))
        least_s = with_chunk_s if is_prefill.any() else 0.0
        return self._needing_drafts(work, seconds_by_size, max(least_s, pace_s, tightest_s), own_tokens)

    def _spared_s(self, c: Candidates, runs: Ints, now_s: float) -> Floats:
        """What each session can spend on a longer pass, of what it is ahead of its schedule."""
        passes = self._parameters.spend_passes
        ahead_s = (c.needed_s[runs] - now_s) / passes
        reserve_s = 0.0 if c.drafting_s else self._parameters.reserve_tokens * c.tpot_s[runs]
        result: Floats = np.maximum(ahead_s - reserve_s / passes, 0.0)
        return result

    def _work(self, num_cached: Floats) -> _Work:
        estimator = self._estimator
        own = estimator.work(item_features(num_cached, np.ones(len(num_cached)), 1.0))
        empty, token = estimator.work(EMPTY_PASS), estimator.work(token_features(num_cached.mean()))
        return _Work(empty, own, empty + own.sum(axis=0), token)

    def _seconds_by_size(self, work: _Work) -> Floats:
        """Seconds of passes with `_SIZES` new tokens in all."""
        return self._estimator.seconds(work.fixed + _SIZES[:, None] * work.token)

    def _longest_s(self, work: _Work, seconds_by_size: Floats, least_saving: float) -> float:
        """Seconds of the shortest pass that longer ones save hardly anything against: all but `least_saving` of it is
        what its tokens would cost if nothing came with them. With room for a few thousand tokens at most."""
        spent = _SIZES * self._estimator.pass_s(work.token) / seconds_by_size  # rises with the size
        enough = np.searchsorted(spent, 1.0 - least_saving)
        return float(seconds_by_size[min(int(enough), len(_SIZES) - 1)])

    def _needing_drafts(
        self, work: _Work, seconds_by_size: Floats, budget_s: float, own_tokens: OwnTokens = OwnTokens.FALL_SHORT
    ) -> Budget:
        """The budget where some session needs drafts: their price in a pass that takes all of it."""
        num_new = float(np.interp(budget_s, seconds_by_size, _SIZES))
        draft_price = min(1.0, self._draft_price(work, work.fixed + num_new * work.token, num_new))
        return Budget(budget_s, draft_price, own_tokens)

    def _with_chunk_s(self, work: _Work) -> float:
        """Seconds of a pass with everybody's own token and the smallest chunk of prefill."""
        return self._estimator.pass_s(work.everyone + self._parameters.prefill_tokens * work.token)

    def _even_pass(self, work: _Work, num_committed: float) -> tuple[float, float]:
        """Seconds of a pass with all new tokens that come with `num_committed`, and the price of a draft token."""
        p = self._parameters
        num_new = num_committed * float(self._per_committed[0])
        even = work.everyone + max(0.0, num_new - len(work.own)) * work.token
        longer = work.everyone + max(0.0, p.level_margin * num_new - len(work.own)) * work.token
        return self._estimator.pass_s(longer), min(1.0, p.draft_margin * self._draft_price(work, even, num_new))

    def _draft_price(self, work: _Work, whole: Floats, num_new: float) -> float:
        """A draft token's time in those of a committed token, without what is computed for prompts, in a pass with work
        `whole` `[2]` that has `num_new` new tokens."""
        per_new, per_prompt = self._per_committed
        num_committed = num_new / max(1.0, float(per_new))
        token_s = float(self._estimator.weights(whole) @ work.token)
        committing_s = self._estimator.pass_s(whole) - num_committed * float(per_prompt) * token_s
        return token_s * num_committed / max(committing_s, _LEAST_TURN_S)

    def _tokens_per_turn(self, c: Candidates, runs: Ints) -> Floats:
        """Committed tokens per turn; of a session that has had few turns at least what the others have usually, or each
        newcomer would hold passes down to the time of one token."""
        is_young = c.num_turns[runs] < self._parameters.young_turns
        own = c.tokens_per_turn[runs]
        if not is_young.any() or is_young.all():
            return own
        return np.where(is_young, np.maximum(own, np.median(own[~is_young])), own)

    def _pace_s(self, c: Candidates, is_prefill: Bools, turn_s: Floats, work: _Work, now_s: float) -> float:
        """Mean seconds of a pass if every session gets just what its SLO asks for: those that run take part as often
        as they have to, and new tokens are as many per committed token as lately, or as many as those of the prompts
        that wait if these are more: where prompts are not computed, few new tokens were needed lately."""
        alone_s = self._estimator.pass_s(work.empty + work.own.min(axis=0))
        asked_per_s = float((1.0 / np.maximum(c.tpot_s[c.is_lost == 0], alone_s)).sum())
        waits = is_prefill & (c.is_lost == 0) & (c.needed_s > now_s)
        due_per_s = float((c.num_uncached[waits] / np.maximum(c.needed_s[waits] - now_s, alone_s)).sum())
        new_per_s = max(asked_per_s * self._per_committed[0], asked_per_s + due_per_s)
        pace_s = float(turn_s.min())
        for _ in range(_ROUNDS):
            shares = np.minimum(1.0, pace_s / turn_s)
            num_further = max(0.0, new_per_s * pace_s - float(shares.sum()))
            pace_s = self._estimator.pass_s(work.empty + shares @ work.own + num_further * work.token)
        return pace_s


def _with_drafts_s(c: Candidates, runs: Ints, least_value: float) -> Floats:
    """What a turn of the sessions `runs` would be worth now, as `turn_s`: with the draft tokens that wait and are right
    with a probability of `least_value`."""
    survival = c.survival[runs]
    num_right: Floats = np.where(survival >= least_value, survival, 0.0).sum(axis=1)
    return c.tpot_s[runs] * (1.0 + num_right) - c.drafting_s
