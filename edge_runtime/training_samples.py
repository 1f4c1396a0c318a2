"""What an acceptance model is trained on: draft tokens of traces as features and outcomes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from wisp_plugin.acceptance_model import FEATURES, RATE_SCALE, Calibration, features
from wisp_plugin.draft_stats import DraftStats
from wisp_plugin.draft_trace import TextTrace

Floats = npt.NDArray[np.float64]
_MAX_AHEAD = 16
_RATE_PRIOR = 4.0  # tokens of the mean rate that a token's own count is mixed with


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """How often each token was accepted, and the one behind it: `[V, 2]`, columns rejected and accepted."""

    now: Floats
    following: Floats

    @classmethod
    def of(cls, texts: Sequence[TextTrace], num_tokens: int) -> TokenCounts:
        """Counts over `texts`; only draft tokens behind right prefixes."""
        counts = cls(np.zeros((num_tokens, 2)), np.zeros((num_tokens, 2)))
        for text in texts:
            counts.add(text, 1)
        return counts

    def add(self, text: TextTrace, times: int) -> None:
        """Count a text; with -1 take it out."""
        agrees = text.agrees
        right = np.flatnonzero(agrees[:-1])
        np.add.at(self.now, (text.drafted, agrees.astype(int)), times)
        np.add.at(self.following, (text.drafted[right], agrees[right + 1].astype(int)), times)

    def rates(self, base: float) -> npt.NDArray[np.int8]:
        """`AcceptanceModel.token_rates`: log-odds against the mean rate, drawn to it as by a few more tokens."""
        columns = []
        for counts in (self.now, self.following):
            p = (counts[:, 1] + _RATE_PRIOR * base) / (counts.sum(axis=1) + _RATE_PRIOR)
            columns.append(np.log(p / (1 - p)) - np.log(base / (1 - base)))
        return np.clip(np.rint(RATE_SCALE * np.stack(columns, axis=1)), -127, 127).astype(np.int8)


@dataclass(frozen=True, slots=True)
class Samples:
    """Draft tokens behind right prefixes: `values` `[N, F]`, whether the target accepts the token, and the one behind
    it (`following`, NaN where there is none or this one is wrong)."""

    values: Floats
    accepted: Floats
    following: Floats

    @classmethod
    def of(cls, texts: Sequence[TextTrace], base: float, rates: npt.NDArray[np.int8], seed: int) -> Samples:
        """A sample of each token, in chains that begin at random behind the rejection before."""
        rng = np.random.default_rng(seed)
        return cls.join([cls._of_text(text, base, rates, rng) for text in texts])

    @classmethod
    def for_training(
        cls, texts: Sequence[TextTrace], base: float, counts: TokenCounts, seed: int, copies: int
    ) -> Samples:
        """`copies` samples of each token. What is known of its tokens excludes the text that a sample is from."""
        rng = np.random.default_rng(seed)
        parts = []
        for text in texts:
            counts.add(text, -1)
            rates = counts.rates(base)
            parts += [cls._of_text(text, base, rates, rng) for _ in range(copies)]
            counts.add(text, 1)
        return cls.join(parts)

    @classmethod
    def join(cls, parts: Sequence[Samples]) -> Samples:
        """One behind the other."""
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in cls.__slots__))

    @classmethod
    def _of_text(cls, text: TextTrace, base: float, rates: npt.NDArray[np.int8], rng: np.random.Generator) -> Samples:
        agrees = text.agrees.tolist()
        padded = np.concatenate([rates, np.zeros((1, 2), np.int8)])  # tokens that were never counted are like the mean
        told = (padded[np.minimum(text.drafted, len(rates))] / RATE_SCALE).tolist()
        stats = [DraftStats(*row) for row in text.stats.tolist()]
        recent = recent_acceptance(agrees, base)
        rows, following, segment = [], [], 0
        for t, agree in enumerate(agrees):
            ahead = int(rng.integers(0, min(t - segment, _MAX_AHEAD) + 1))
            now, behind = told[t]
            rows.append(features(stats[t], stats[t - 1] if ahead else None, ahead, recent[t - ahead], (now, behind)))
            following.append(float(agrees[t + 1]) if agree and t + 1 < len(agrees) else np.nan)
            segment = segment if agree else t + 1
        return cls(np.array(rows).reshape(-1, len(FEATURES)), np.array(agrees, float), np.array(following))


def recent_acceptance(agrees: Sequence[bool], base: float) -> list[float]:
    """What a controller knows as recent acceptance in front of each token."""
    calibration, known = Calibration(base), []
    for agree in agrees:
        known.append(calibration.recent)
        calibration.learn(0.0, agree)
    return known
