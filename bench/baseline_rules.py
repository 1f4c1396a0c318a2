"""Controllers of the systems that are compared, as values that can be sent to another process."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from wisp_plugin.acceptance_model import AcceptanceModel, shipped_model
from wisp_plugin.controller import Abstention, Chain, SpeculationController, StopRule
from wisp_plugin.pace import Pace
from wisp_plugin.stop_rules import DEFAULT_ENERGY_PRICE, Fixed, Paper, Price, Ratio


class Confidence:
    """SLED (arXiv 2506.09397): draft until a token's confidence is below `threshold`, at most `max_tokens`."""

    def __init__(self, threshold: float, max_tokens: int) -> None:
        self._threshold, self._max_tokens = threshold, max_tokens

    def draft_on(self, chain: Chain, pace: Pace, now_s: float) -> bool:
        """See `StopRule.draft_on`."""
        if len(chain) >= self._max_tokens:
            return False
        return chain.stats is None or chain.stats.confidence >= self._threshold

    def waits(self, chain: Chain, pace: Pace) -> bool:
        """See `StopRule.waits`."""
        return True

    def on_commit(self, num_right: int, num_drafted: int) -> None:
        """See `StopRule.on_commit`."""


@dataclass(frozen=True, slots=True)
class RuleSpec:
    """A stop rule and its numbers. `name`: fixed, confidence, paper, ratio or price; not all use both numbers.

    `length` is the fixed or the longest draft, `threshold` that of `confidence` and `paper`, or the energy price.
    """

    name: str
    length: int = 0
    threshold: float = DEFAULT_ENERGY_PRICE

    def rule(self) -> StopRule:
        """A fresh rule. Raises ValueError for an unknown name."""
        if self.name == "fixed":
            return Fixed(self.length)
        if self.name == "confidence":
            return Confidence(self.threshold, self.length)
        if self.name == "paper":
            return Paper(self.threshold, self.length)
        if self.name == "ratio":
            return Ratio(self.threshold)
        if self.name == "price":
            return Price(self.threshold)
        raise ValueError(f"no rule {self.name!r}")

    def __str__(self) -> str:
        numbers = {"fixed": f" {self.length}", "confidence": f" {self.threshold:g} up to {self.length}",
                   "paper": f" {self.threshold:g} up to {self.length}"}  # fmt: skip
        return self.name + numbers.get(self.name, "")


@functools.lru_cache(maxsize=4)
def _model(draft: str) -> AcceptanceModel:
    return shipped_model(draft)


@dataclass(frozen=True, slots=True)
class ControllerOf:
    """Makes the real controller of a session: a rule on the shipped acceptance model of a draft."""

    rule: RuleSpec
    draft: str

    def __call__(self) -> SpeculationController:
        """A fresh controller; `ratio` and `price` may abstain."""
        abstains = self.rule.name in ("ratio", "price")
        return SpeculationController(self.rule.rule(), _model(self.draft), Abstention() if abstains else None)
