"""What an emulated target says: the token at every position of a session, a pure function of its `seed`.

Nothing else decides: not the prompt, not the batch, not what was drafted. So server and client know every text in
advance without telling each other, and whoever sees another token has found a bug.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from wisp_plugin.draft_trace import TextTrace
from wisp_plugin.messages import Tokens

VOCAB_SIZE = 1 << 18  # room for the ids of any tokenizer, draft tokens included
_HASH_BITS = 15
_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


class EmulatedText(Protocol):
    """The text of every session."""

    def tokens(self, seed: int, start: int, end: int) -> Tokens:
        """Tokens at positions `start` to `end` of the session with `seed` (0 <= seed < 2^63), its prompt included."""


@dataclass(frozen=True, slots=True)
class HashText:
    """Noise: a token is 15 bits of a hash of seed and position."""

    def tokens(self, seed: int, start: int, end: int) -> Tokens:
        """See `EmulatedText.tokens`."""
        return (position_hashes(2 * seed, start, end) >> np.uint64(64 - _HASH_BITS)).astype(np.int32)


@dataclass(frozen=True, slots=True)
class RingText:
    """Recorded text: `ring` int32 `[R]`, read round and round from where the seed says."""

    ring: Tokens

    def __post_init__(self) -> None:
        assert len(self.ring), "a ring without tokens"

    @classmethod
    def of(cls, texts: Sequence[TextTrace]) -> RingText:
        """What the target has generated in these texts, one behind the other, without their prompts.

        Raises:
            ValueError: that is nothing.
        """
        if not any(len(text.generated) for text in texts):
            raise ValueError("a trace with generated tokens is needed, this one has none")
        return cls(np.concatenate([text.generated for text in texts]))

    def first(self, seed: int) -> int:
        """Index in the ring of position 0 of the session with `seed`."""
        return int(position_hashes(seed, 0, 1)[0]) % len(self.ring)

    def tokens(self, seed: int, start: int, end: int) -> Tokens:
        """See `EmulatedText.tokens`."""
        tokens: Tokens = self.ring[(self.first(seed) + np.arange(start, end)) % len(self.ring)]
        return tokens


def position_hashes(key: int, start: int, end: int) -> npt.NDArray[np.uint64]:
    """splitmix64 of `key` and each position from `start` to `end`, uint64 `[end - start]`."""
    base = np.uint64(key * 0xD1342543DE82EF95 & _MASK64)
    x = base + np.arange(1 + start, 1 + end, dtype=np.uint64) * np.uint64(_GOLDEN)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: npt.NDArray[np.uint64] = x ^ (x >> np.uint64(31))
    return mixed
