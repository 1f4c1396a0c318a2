"""The collaborators of the engine and of a device's session, as these see them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from wisp_plugin.draft_stats import DraftStats
from wisp_plugin.messages import Commit, PassItem, PassOutcome
from wisp_plugin.pace import Pace


class Reply(Protocol):
    """The answer channel of one request. Exactly one of `finish` and `fail` is called, once, last."""

    def send(self, commit: Commit) -> None:
        """Stream a commit to the client."""

    def finish(self) -> None:
        """End the response stream."""

    def fail(self, message: str) -> None:
        """End the request with an error of one line."""

    def is_cancelled(self) -> bool:
        """True if the client has left."""


class Verifier(Protocol):
    """The target model (torch, or emulated)."""

    def run(self, items: Sequence[PassItem]) -> list[PassOutcome]:
        """One pass. KV of rejected draft tokens is dropped before this returns."""

    def release(self, session: str) -> None:
        """Drop the KV of a session; unknown ones are ignored."""


class DraftController(Protocol):
    """How far a device drafts: a `SpeculationController`, or one with something around it."""

    def draft_on(self, pace: Pace, now_s: float) -> bool:
        """See `SpeculationController.draft_on`."""

    def waits(self, pace: Pace) -> bool:
        """See `SpeculationController.waits`."""

    def survival(self) -> list[float]:
        """See `SpeculationController.survival`."""

    def on_drafted(self, token: int, stats: DraftStats | None) -> None:
        """See `SpeculationController.on_drafted`."""

    def on_commit(self, num_right: int, found_wrong: bool, is_kept: bool) -> None:
        """See `SpeculationController.on_commit`."""
