"""`wisp-bench generate`: the replay is arithmetic that can be checked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from bench.generate import geometric_mean, replay
from wisp_plugin.draft_stats import NUM_STATS
from wisp_plugin.draft_trace import TextTrace

PHRASE = list(range(10, 30))


def trace(prompt: list[int], generated: list[int]) -> TextTrace:
    """A text; what a draft model would say of it plays no part here."""
    tokens = np.array([*prompt, *generated], np.int32)
    stats = np.zeros((len(generated), NUM_STATS), np.float32)
    behind, behind_tokens = np.zeros((0, 0, NUM_STATS), np.float32), np.zeros((0, 0), np.int32)
    return TextTrace(tokens, len(prompt), tokens[len(prompt) :], stats, behind, behind_tokens)


def test_a_text_without_repetition_is_as_fast_as_before() -> None:
    assert replay(trace([1, 2, 3], list(range(100, 160))), 0.1) == 1.0


def test_a_copied_text_takes_few_passes() -> None:
    """Two tokens to find the place; then 0.7^1 ... until it does not pay, and the target's own token each time."""
    fast, slow = (replay(trace(PHRASE, PHRASE), cost) for cost in (0.01, 0.2))
    assert 2.0 < fast < 10.0
    assert 1.0 < slow < fast


def test_geometric_mean() -> None:
    assert geometric_mean([0.5, 2.0]) == pytest.approx(1.0)
