"""Recorded drafting for sessions of any length (see `scenario.Scenario.tokens`).

Recorded texts are short (96 tokens), sessions are not. All texts of a trace are laid in a ring in their order; a
session begins at a text that its number chooses and walks on from text to text, past the last one to the first, until
it has its length. Inside a text its rejections and draft statistics are those that were recorded; where two texts meet,
the draft chain goes on into the next text, as if the draft model had expected its beginning as well as it did with the
right prefix. The prompt is made of hashed tokens, different in every session, so that no KV is shared.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from bench.sim_client import hashed_tokens
from bench.traces_folder import trace_path
from bench.workload import SessionSpec
from wisp_plugin.draft_stats import DraftStats
from wisp_plugin.draft_trace import DraftTrace
from wisp_plugin.messages import Tokens


class TraceRing:
    """All texts of a trace behind each other, as plain lists: a draft token is one look-up."""

    def __init__(self, trace: DraftTrace) -> None:
        """ValueError for a trace without chains behind rejections (`chain_length` 0), or without any text."""
        texts = [text for text in trace.texts if len(text.generated)]
        if not texts or not any(text.behind.shape[1] for text in texts):
            raise ValueError("a ring needs texts with recorded chains behind their rejections: an evaluation trace")
        self.generated: Tokens = np.concatenate([text.generated for text in texts])
        drafted = np.concatenate([text.drafted for text in texts])
        agrees = drafted == self.generated
        self.length = len(drafted)
        self.acceptance = float(agrees.mean())
        self.starts: list[int] = np.cumsum([0, *(len(text.generated) for text in texts[:-1])]).tolist()
        self.drafted: list[int] = drafted.tolist()
        self.stats = [DraftStats(*row) for text in texts for row in text.stats.tolist()]
        self.first_wrong = _first_wrong(agrees)
        self.wrong_number: list[int] = (np.cumsum(~agrees) - 1).tolist()  # of the wrong token at an index
        self.behind: list[list[tuple[int, DraftStats]]] = []
        for text in texts:
            chains = zip(text.behind_tokens.tolist(), text.behind.tolist(), strict=True)
            self.behind += [[(t, DraftStats(*s)) for t, s in zip(*chain, strict=True)] for chain in chains]

    def draft(self, index: int, ahead: int) -> tuple[int, DraftStats]:
        """Token `ahead` (from 0) of the chain behind ring position `index`, and its statistics.

        Past the recorded length behind a rejection the last ones repeat.
        """
        wrong = self.first_wrong[index % self.length] - index % self.length
        if ahead <= wrong:
            at = (index + ahead) % self.length
            return self.drafted[at], self.stats[at]
        chain = self.behind[self.wrong_number[(index + wrong) % self.length]]
        return chain[min(ahead - wrong - 1, len(chain) - 1)]


def _first_wrong(agrees: np.ndarray) -> list[int]:
    """For each position of a ring, where the first wrong draft token at or behind it is (past the end: next round)."""
    length = len(agrees)
    twice = np.concatenate([agrees, agrees])
    positions = np.where(twice, 2 * length, np.arange(2 * length))
    result: list[int] = np.minimum.accumulate(positions[::-1])[::-1][:length].tolist()
    return result


class WalkTokens:
    """What target and draft model say in one session, see the top of this file."""

    __slots__ = ("_offset", "_ring", "target")

    def __init__(self, ring: TraceRing, spec: SessionSpec, seed: int) -> None:
        key = (seed << 40) ^ spec.number
        start = ring.starts[int(np.random.default_rng((seed, spec.number)).integers(len(ring.starts)))]
        indices = (start + np.arange(spec.num_output_tokens)) % ring.length
        prompt = hashed_tokens(2 * key, spec.prompt_len)
        self.target: Tokens = np.concatenate([prompt, ring.generated[indices]]).astype(np.int32)
        self._ring, self._offset = ring, start - spec.prompt_len

    def draft(self, num_committed: int, position: int) -> tuple[int, DraftStats]:
        """See `SessionTokens.draft`."""
        return self._ring.draft(self._offset + num_committed, position - num_committed)


@functools.lru_cache(maxsize=4)
def load_ring(draft: str) -> TraceRing:
    """The ring of a default draft's evaluation trace.

    Raises:
        ModelError: there is no such trace.
    """
    return TraceRing(DraftTrace.load(trace_path(draft, "eval")))


@dataclass(frozen=True, slots=True)
class WalkOf:
    """Makes the tokens of sessions from the evaluation trace of `draft`; can be sent to another process."""

    draft: str
    seed: int = 0

    def __call__(self, spec: SessionSpec) -> WalkTokens:
        """What is said in a session."""
        return WalkTokens(load_ring(self.draft), spec, self.seed)
