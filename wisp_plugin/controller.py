"""The speculation controller: beliefs about the chain, and a rule that says how far to draft (DESIGN.md section 8).

The session asks it before every draft token and tells it what became of every one. It sees the chain, never the
network: measured times reach it as numbers (`Pace`).

    controller.draft_on(pace, now_s)     go on, or leave it at what the chain has until the next commit?
    controller.on_drafted(token, stats)  a draft token has joined the chain
    controller.on_commit(...)            what became of the front of the chain
    controller.survival()                for the server: probability that the chain is right up to each token

Not drafting at all is a legal answer. It has hysteresis (`Abstention`), is probed from time to time, because nobody
learns from drafts that are not made, and is counted.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

from wisp_plugin.acceptance_model import AcceptanceModel, Calibration, features
from wisp_plugin.draft_stats import DraftStats
from wisp_plugin.errors import ConfigError
from wisp_plugin.pace import Pace

MAX_AHEAD = 64  # draft tokens in front of the last known committed token, whatever a rule says
_PRIOR = 0.75  # acceptance rate before anything is known and without a model


@dataclass(slots=True)
class Chain:
    """What a rule sees: the draft chain in front of the last known committed token.

    `survival[i]` is the probability that draft tokens 0 to i are all right, `following` that the token which would be
    drafted next is right if all of them are, `stats` the statistics of the last one (None: the chain is empty).
    """

    survival: list[float] = field(default_factory=list)
    following: float = _PRIOR
    acceptance: float = _PRIOR  # recent acceptance rate of the session
    stats: DraftStats | None = None
    accepts: float = 1.0  # predicted probability that the last token is accepted, given those before it

    def __len__(self) -> int:
        return len(self.survival)

    @property
    def alive(self) -> float:
        """Probability that the whole chain is right."""
        return self.survival[-1] if self.survival else 1.0

    def expected(self, num_more: int) -> float:
        """Probability that the chain and `num_more` further draft tokens (at least one) are all right."""
        return self.alive * self.following * self.acceptance ** (num_more - 1)


class StopRule(Protocol):
    """When to stop drafting. A rule has no beliefs of its own about tokens; those are in the chain."""

    def draft_on(self, chain: Chain, pace: Pace, now_s: float) -> bool:
        """True if one more draft token pays."""

    def waits(self, chain: Chain, pace: Pace) -> bool:
        """True if a pass that waits for the next draft token makes this session faster (`free`)."""

    def on_commit(self, num_right: int, num_drafted: int) -> None:
        """A commit settled `num_drafted` tokens of the chain: the first `num_right` are right, the others are dropped.

        What is still open, the rest of a chain that a commit agrees with, is not among them.
        """


class SpeculationController:
    """Beliefs of one session and the rule that decides by them."""

    def __init__(
        self, rule: StopRule, model: AcceptanceModel | None = None, abstention: Abstention | None = None
    ) -> None:
        """Without `model` every draft token is believed to be as good as the session's recent ones.

        `abstention` None: the rule's answer for an empty chain holds as it is.
        """
        self.rule = rule
        self.chain = Chain()
        self.num_choices = self.num_abstained = self.num_probes = 0  # empty chains: asked about, left empty, probed
        self._model = model
        base = model.base if model else _PRIOR
        self._own, self._following = Calibration(base), Calibration(base)
        self._tokens: deque[_Belief] = deque()
        self._abstention = abstention
        self._decided: bool | None = None  # about an empty chain, until the next commit
        self._is_probe = False
        self._note_chain()

    @property
    def calibration(self) -> Calibration:
        """Of the probability that a drafted token is accepted."""
        return self._own

    # -- decisions ----------------------------------------------------------------------------------------------

    def draft_on(self, pace: Pace, now_s: float) -> bool:
        """True to draft one more token; False to leave it at what the chain has until the next commit."""
        if len(self.chain) >= MAX_AHEAD:
            return False
        if self._is_probe:  # as if nothing were known of how the server waits: that is what it is to find out
            pace = dataclasses.replace(pace, wait_s=math.inf)
        if self.chain.survival:
            return self.rule.draft_on(self.chain, pace, now_s)
        if self._decided is None:
            self._decided = self._begin(pace, now_s)
        return self._decided

    def waits(self, pace: Pace) -> bool:
        """True if the server does well to wait for the next draft token."""
        return self.rule.waits(self.chain, pace)

    def _begin(self, pace: Pace, now_s: float) -> bool:
        """Whether to draft behind an empty chain."""
        pays = self.rule.draft_on(self.chain, pace, now_s)
        self.num_choices += 1
        if self._abstention is not None:
            pays, self._is_probe = self._abstention.decide(pays)
            self.num_probes += self._is_probe
        self.num_abstained += not pays
        return pays

    def survival(self) -> list[float]:
        """Probability that the chain is right up to each of its tokens."""
        return self.chain.survival

    # -- what happens -------------------------------------------------------------------------------------------

    def on_drafted(self, token: int, stats: DraftStats | None) -> None:
        """A draft token has joined the chain. Without `stats` it is believed to be as good as the recent ones."""
        tokens = self._tokens
        if self._model is None or stats is None:
            own = following = 0.0
        else:
            before = tokens[-1].stats if tokens else None
            rates = self._model.rates(token)
            own, following = self._model.log_odds(features(stats, before, len(tokens), self._own.recent, rates))
        tokens.append(_Belief(stats, own, following))
        self._extend(tokens[-1])

    def on_commit(self, num_right: int, found_wrong: bool, is_kept: bool) -> None:
        """The first `num_right` tokens of the chain are committed; the one behind them was wrong if `found_wrong`.

        `is_kept` False: the rest of the chain is dropped (a rollback, or the end of a round in `sync`).
        """
        num_drafted = len(self._tokens)
        self._decided, self._is_probe = None, self._is_probe and is_kept
        self.rule.on_commit(num_right, num_right if is_kept else num_drafted)
        for index in range(num_right + found_wrong):
            self._learn(index, accepted=index < num_right)
        for _ in range(num_right if is_kept else num_drafted):
            self._tokens.popleft()
        self._note_chain()

    def _learn(self, index: int, accepted: bool) -> None:
        self._own.learn(self._tokens[index].own, accepted)
        if index:  # what the token before it foretold
            self._following.learn(self._tokens[index - 1].following, accepted)

    # -- beliefs ------------------------------------------------------------------------------------------------

    def _note_chain(self) -> None:
        """Beliefs about the whole chain anew: what is committed is certain now."""
        self.chain = Chain(following=self._own.recent, acceptance=self._own.recent)
        for token in self._tokens:
            self._extend(token)

    def _extend(self, token: _Belief) -> None:
        chain = self.chain
        known = self._model is not None and token.stats is not None
        chain.accepts = self._own.probability(token.own) if known else chain.acceptance
        chain.survival.append(chain.alive * chain.accepts)
        chain.following = self._following.probability(token.following) if known else chain.acceptance
        chain.stats = token.stats


class _Belief:
    """A draft token and the model's log-odds that it, and the one behind it, are accepted."""

    __slots__ = ("following", "own", "stats")

    def __init__(self, stats: DraftStats | None, own: float, following: float) -> None:
        self.stats, self.own, self.following = stats, own, following


class Abstention:
    """Hysteresis and probing around the choice not to draft.

    Drafting stops after `patience` refusals of the rule in a row and resumes after as many consents. While it rests,
    a chain is drafted all the same now and then, at growing distances: what is not tried is not learnt.
    """

    def __init__(self, patience: int = 2, first_probe: int = 8, last_probe: int = 64) -> None:
        if not patience >= 1 or not 1 <= first_probe <= last_probe:
            raise ConfigError("an abstention needs patience >= 1 and 1 <= first_probe <= last_probe")
        self._patience, self._first_probe, self._last_probe = patience, first_probe, last_probe
        self._against = 0  # answers in a row that speak against what is being done
        self._is_resting = False
        self._until_probe = self._distance = first_probe

    def decide(self, pays: bool) -> tuple[bool, bool]:
        """(draft, is it a probe) from the rule's answer for an empty chain."""
        self._against = self._against + 1 if pays == self._is_resting else 0
        if self._against >= self._patience:
            self._is_resting, self._against = not self._is_resting, 0
            self._until_probe = self._distance = self._first_probe
        if not self._is_resting:
            return True, False
        self._until_probe -= 1
        if self._until_probe > 0:
            return False, False
        self._distance = min(2 * self._distance, self._last_probe)
        self._until_probe = self._distance
        return True, True
