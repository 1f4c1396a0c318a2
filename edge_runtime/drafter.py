"""Drafting with KV rollback: logits and draft tokens behind any token sequence, computing only what is new."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from edge_runtime.draft_graph import DraftGraph, load_graph
from wisp_plugin.coupling import choose_token
from wisp_plugin.draft_stats import DraftStats
from wisp_plugin.errors import ModelError
from wisp_plugin.messages import Sampling, Tokens

Logits = npt.NDArray[np.float32]


class Drafter:
    """A draft model that remembers what it was fed.

    Every call names the whole sequence. The KV of the longest common prefix with the sequence before is kept, so a
    longer chain costs one token and a rollback nothing. Not thread-safe: one thread drafts.
    """

    chunk_tokens = 64  # fed at once; bounds the time of a step and the memory of its activations

    def __init__(self, graph: DraftGraph, max_context_tokens: int = 4096) -> None:
        self._graph = graph
        self.vocab_size = graph.vocab_size
        self.max_context_tokens = min(max_context_tokens, graph.context_length)
        self._fed = np.zeros(self.max_context_tokens, np.int32)
        self._num_fed = 0

    @classmethod
    def load(cls, folder: Path, num_threads: int = 0, max_context_tokens: int = 4096) -> Drafter:
        """The drafter of the graph in `folder`; see `draft_graph.load_graph` for layouts, threads and errors."""
        return cls(load_graph(folder, num_threads), max_context_tokens)

    def sibling(self) -> Drafter:
        """A drafter on the same graph with a KV of its own; the two may be used by two threads."""
        return Drafter(self._graph.sibling(), self.max_context_tokens)

    def next_logits(self, tokens: Tokens) -> Logits:
        """float32 `[vocab_size]`: the logits behind `tokens` (int32, at least one), an array of the caller's own.

        Raises:
            ModelError: more tokens than `max_context_tokens`, or an id outside the draft's vocabulary.
        """
        while self.advance(tokens):
            pass
        num_kept = self._common_prefix(tokens)
        return self._feed(tokens[num_kept:], num_kept).copy()

    def advance(self, tokens: Tokens) -> int:
        """Feed a chunk of `tokens` if `next_logits` would have to feed more than one.

        Returns how many tokens are still in front of the last chunk; 0: `next_logits` is one run. So a caller can look
        after commits between the chunks of a long prompt. Raises as `next_logits`.
        """
        if not 0 < len(tokens) <= self.max_context_tokens:
            raise ModelError(f"cannot draft behind {len(tokens)} tokens; allowed: 1 to {self.max_context_tokens}")
        num_kept = self._common_prefix(tokens)
        end = num_kept + self.chunk_tokens
        if end >= len(tokens):
            return 0
        self._feed(tokens[num_kept:end], num_kept)
        return max(0, len(tokens) - end - self.chunk_tokens)

    def draft_token(self, tokens: Tokens, sampling: Sampling) -> int:
        """The draft token behind `tokens`, chosen by seeded coupling (section 3); raises as `next_logits`."""
        return choose_token(self.next_logits(tokens), sampling, len(tokens), tokens)

    def draft_token_with_stats(self, tokens: Tokens, sampling: Sampling) -> tuple[int, DraftStats]:
        """As `draft_token`, with the statistics that a speculation controller looks at (section 8)."""
        logits = self.next_logits(tokens)
        token = choose_token(logits, sampling, len(tokens), tokens)
        return token, DraftStats.of(logits, token)

    def _common_prefix(self, tokens: Tokens) -> int:
        """How many tokens of `tokens`, the last one excluded, the KV already covers."""
        num_compared = min(len(tokens) - 1, self._num_fed)
        differs = tokens[:num_compared] != self._fed[:num_compared]
        first = int(differs.argmax()) if num_compared else 0
        return first if num_compared and differs[first] else num_compared

    def _feed(self, tokens: Tokens, num_past: int) -> Logits:
        """Logits behind `tokens`, which stand at `num_past`; valid until the next call."""
        if not 0 <= int(tokens.min()) <= int(tokens.max()) < self.vocab_size:
            found = f"{tokens.min()} to {tokens.max()}"
            raise ModelError(f"the draft knows token ids 0 to {self.vocab_size - 1}, not {found}")
        self._num_fed = num_past  # what a failing run leaves behind is not trusted
        logits = self._graph.forward(tokens, num_past)
        self._num_fed = num_past + len(tokens)
        self._fed[num_past : self._num_fed] = tokens
        return logits
