"""The engine's collaborators, as it sees them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from wisp_plugin.messages import Commit, PassItem, PassOutcome


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
