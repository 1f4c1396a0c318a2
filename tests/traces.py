"""Made-up traces: a draft that is right as often as its confidence says, so that a model has something to learn."""

from __future__ import annotations

import numpy as np

from wisp_plugin.draft_stats import NUM_STATS
from wisp_plugin.draft_trace import DraftTrace, TextTrace


def make_text(seed: int, num_generated: int = 60, prompt_len: int = 5, chain_length: int = 8) -> TextTrace:
    """A text of random tokens; the statistics of each draft token are those of a two-way choice."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(2, 1000, prompt_len + num_generated).astype(np.int32)
    confidence = rng.uniform(0.5, 1.0, num_generated)
    agrees = rng.random(num_generated) < confidence
    generated = tokens[prompt_len:]
    drafted = np.where(agrees, generated, generated ^ 1).astype(np.int32)
    behind = _stats(rng.uniform(0.5, 1.0, (int((~agrees).sum()), chain_length)))
    behind_tokens = rng.integers(2, 1000, behind.shape[:2]).astype(np.int32)
    return TextTrace(tokens, prompt_len, drafted, _stats(confidence), behind, behind_tokens)


def _stats(confidence: np.ndarray) -> np.ndarray:
    p = np.clip(confidence, 0.5, 0.999)
    entropy = -p * np.log(p) - (1 - p) * np.log(1 - p)
    columns = (p, entropy, 2 * p - 1, np.full_like(p, 3.0), p)
    assert len(columns) == NUM_STATS
    return np.stack(columns, axis=-1).astype(np.float32)


def make_trace(num_texts: int = 20, seed: int = 0, num_generated: int = 60) -> DraftTrace:
    """Several texts."""
    texts = [make_text(1000 * seed + i, num_generated) for i in range(num_texts)]
    return DraftTrace(texts, {"draft": "made-up", "draft_s": 0.005})
