"""A session's speculation controller as the gateway has it: behind the dealer of seats, and with a window to look in.

The inner controller decides whether a draft token pays; the dealer, whether the session may. What is seen through the
window are plain values that one thread writes and others read: the chain now, and what the last decision was.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from edge_runtime.gateway.drafting import DraftShare
from wisp_plugin.acceptance_model import Calibration
from wisp_plugin.controller import Chain, SpeculationController
from wisp_plugin.draft_stats import DraftStats
from wisp_plugin.pace import Pace

DRAFTING, NOT_DRAFTING, NO_DRAFTS = "drafting", "not drafting: does not pay", "not drafting: no draft model in use"
WAITING, NO_SEAT = "waiting: the chain is long enough", "waiting: other sessions draft"


@dataclass(frozen=True, slots=True)
class ChainView:
    """The draft chain behind `num_committed` tokens that commits have settled since the session began."""

    num_commits: int = 0
    tokens: tuple[int, ...] = ()
    survival: tuple[float, ...] = ()


@dataclass(slots=True)
class Window:
    """What can be seen of a session's drafting. Attributes are replaced, never changed in place."""

    chain: ChainView = field(default_factory=ChainView)
    choice: str = NO_DRAFTS
    rtt_s: float = 0.0
    num_struck: int = 0  # draft tokens that commits have dropped


class GatedController:
    """A `SpeculationController` that drafts only while its session has a seat (`share` None: it never has one)."""

    def __init__(self, inner: SpeculationController, share: DraftShare | None) -> None:
        self._inner, self._share = inner, share
        self._tokens: list[int] = []
        self.window = Window()

    @property
    def chain(self) -> Chain:
        """See `SpeculationController.chain`."""
        return self._inner.chain

    @property
    def calibration(self) -> Calibration:
        """See `SpeculationController.calibration`."""
        return self._inner.calibration

    def draft_on(self, pace: Pace, now_s: float) -> bool:
        """See `SpeculationController.draft_on`; called by the drafting thread alone, which holds the session."""
        self.window.rtt_s = pace.rtt_s
        if self._share is None:
            return False
        if not self._inner.draft_on(pace, now_s):
            if not self._tokens:
                self._share.rest()
            self.window.choice = WAITING if self._tokens else NOT_DRAFTING
            return False
        may_draft = self._share.may_draft(len(self._tokens))
        self.window.choice = DRAFTING if may_draft else NO_SEAT
        return may_draft

    def waits(self, pace: Pace) -> bool:
        """See `SpeculationController.waits`."""
        return self._inner.waits(pace)

    def survival(self) -> list[float]:
        """See `SpeculationController.survival`."""
        return self._inner.survival()

    def on_drafted(self, token: int, stats: DraftStats | None) -> None:
        """See `SpeculationController.on_drafted`."""
        self._inner.on_drafted(token, stats)
        self._tokens.append(token)
        self._look(self.window.chain.num_commits)

    def on_commit(self, num_right: int, found_wrong: bool, is_kept: bool) -> None:
        """See `SpeculationController.on_commit`."""
        self._inner.on_commit(num_right, found_wrong, is_kept)
        num_dropped = 0 if is_kept else len(self._tokens) - num_right
        self.window.num_struck += num_dropped
        del self._tokens[: num_right if is_kept else len(self._tokens)]
        self._look(self.window.chain.num_commits + 1)

    def _look(self, num_commits: int) -> None:
        survival = self._inner.survival()
        self.window.chain = ChainView(num_commits, tuple(self._tokens), tuple(survival[: len(self._tokens)]))
