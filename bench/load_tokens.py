"""What an emulated device drafts, live and simulated alike: the chains of a trace along the emulated target's text."""

from __future__ import annotations

from dataclasses import dataclass

from bench.sim_client import SessionTokens
from bench.trace_walk import TraceRing
from bench.workload import SessionSpec
from triton_models.emulated_text import RingText
from wisp_plugin.draft_stats import DraftStats
from wisp_plugin.messages import Tokens


def session_seed(seed: int, spec: SessionSpec) -> int:
    """Seed of the session `spec` in the run with `seed`: it names the text, on the server as here."""
    return (seed << 40) ^ spec.number


class RingTokens:
    """One session on a ring of texts, which the emulated target reads from where the session's seed says."""

    __slots__ = ("_first", "_ring", "target")

    def __init__(self, ring: TraceRing, seed: int, num_tokens: int) -> None:
        text = RingText(ring.generated)
        self._ring, self._first = ring, text.first(seed)
        self.target: Tokens = text.tokens(seed, 0, num_tokens)

    def draft(self, num_committed: int, position: int) -> tuple[int, DraftStats | None]:
        """See `SessionTokens.draft`."""
        return self._ring.draft(self._first + num_committed, position - num_committed)


@dataclass(frozen=True, slots=True)
class LoadTokens:
    """Makes what target and draft say in a session: from a trace, or (`ring` None) hashes and chance."""

    ring: TraceRing | None
    acceptance: float = 0.75
    seed: int = 0

    def __call__(self, spec: SessionSpec) -> SessionTokens | RingTokens:
        """Tokens of a session; `triton_models.emulated_text` says the same on the server."""
        if self.ring is None:
            return SessionTokens(self.seed, spec, self.acceptance)
        num_tokens = spec.prompt_len + spec.num_output_tokens
        return RingTokens(self.ring, session_seed(self.seed, spec), num_tokens)
