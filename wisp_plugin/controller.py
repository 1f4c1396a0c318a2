"""How far to draft: controllers behind one protocol (DESIGN.md section 8).

A controller is asked before every draft token and told about every commit. It sees the chain, never the
network: measured times reach it as numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from wisp_plugin.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ChainState:
    """What a controller knows when it decides about the next draft token."""

    num_ahead: int  # draft tokens in front of the last known committed token


class Controller(Protocol):
    """Decides, token by token, whether drafting on pays."""

    def draft_on(self, chain: ChainState) -> bool:
        """True to draft one more token, False to leave it at what the chain has until the next commit."""


class FixedAhead:
    """At most a fixed number of draft tokens in front of the last known committed token."""

    def __init__(self, max_ahead: int) -> None:
        if not 0 <= max_ahead <= 64:
            raise ConfigError(f"draft length is {max_ahead}; allowed: 0 (draft nothing) to 64")
        self._max_ahead = max_ahead

    def draft_on(self, chain: ChainState) -> bool:
        """See `Controller.draft_on`."""
        return chain.num_ahead < self._max_ahead
