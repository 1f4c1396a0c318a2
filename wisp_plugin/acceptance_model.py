"""How likely is it that the target accepts a draft token? A tiny model over draft statistics (DESIGN.md section 8).

`AcceptanceModel` is trained offline on traces (`wisp-edge train-controller`) and kept in an `.npz`: one hidden layer,
two answers. `Calibration` bends its answers to what the commits of this very session show: another domain, another
temperature or another draft shift and stretch the log-odds, so it learns just those two numbers, within bounds.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

import wisp_plugin
from wisp_plugin.draft_stats import DraftStats
from wisp_plugin.errors import ModelError
from wisp_plugin.npz_file import DAMAGED

Array = npt.NDArray[np.float32]
FORMAT = 1
RATE_SCALE = 32.0
FEATURES = (
    "log_confidence", "gap", "entropy", "root_entropy", "margin", "spread", "log_chosen", "log_ahead", "recent",
    "gap_before", "entropy_before", "token_rate", "following_rate",
)  # fmt: skip
_LEAST = 1e-6
_MAX_GAP = 12.0
_RECENT_MEMORY = 0.9  # share of recent acceptance that a resolved token keeps


def features(
    stats: DraftStats, before: DraftStats | None, num_ahead: int, recent: float, rates: tuple[float, float]
) -> list[float]:
    """Values of FEATURES for a draft token with `num_ahead` unverified ones in front of it.

    `before`: statistics of the draft token in front of it (None: it is the first). `gap` is the distance of the two
    best logits; `recent` the log-odds of the session's recent acceptance; `rates` those of this very token (see
    `AcceptanceModel.rates`): some words are safe, and behind some words everything is open.
    """
    confidence, entropy, margin, spread, chosen = stats
    earlier = before or stats
    return [
        math.log(confidence + _LEAST),
        _gap(stats),
        entropy,
        math.sqrt(entropy),
        margin,
        spread,
        math.log(chosen / confidence + _LEAST),
        math.log1p(num_ahead),
        log_odds(recent),
        _gap(earlier),
        earlier.entropy,
        *rates,
    ]


def _gap(stats: DraftStats) -> float:
    return min(_MAX_GAP, -math.log(max(1.0 - stats.margin / stats.confidence, _LEAST)))


def log_odds(probability: float) -> float:
    """ln(p / (1 - p)), within +-7."""
    p = min(max(probability, 0.001), 0.999)
    return math.log(p / (1.0 - p))


def sigmoid(z: float) -> float:
    """1 / (1 + e^-z)."""
    return 1.0 / (1.0 + math.exp(-z)) if z > -700.0 else 0.0


@dataclass(frozen=True, slots=True)
class AcceptanceModel:
    """Log-odds of acceptance: tanh layer `[F, H]`, then two outputs `[H, 2]`: this draft token, and the one behind it.

    `mean` and `scale` `[F]` standardize features. `token_rates` int8 `[V, 2]`: by how much the acceptance of a token,
    and of the one behind it, differed from the mean in training, log-odds x `RATE_SCALE`. `base` is the acceptance rate
    of the training data, `false_alarm_cost` what stopping in front of an accepted token costs, in wasted draft tokens.
    """

    mean: Array
    scale: Array
    weights: Array
    bias: Array
    out_weights: Array
    out_bias: Array
    token_rates: npt.NDArray[np.int8]
    base: float
    false_alarm_cost: float

    def rates(self, token: int) -> tuple[float, float]:
        """Log-odds of the acceptance of `token` and of the one behind it, against the mean; 0 for unknown tokens."""
        if not 0 <= token < len(self.token_rates):
            return 0.0, 0.0
        now, following = self.token_rates[token].tolist()
        return now / RATE_SCALE, following / RATE_SCALE

    def log_odds(self, values: list[float]) -> tuple[float, float]:
        """Of the token with these features, and of the one behind it (if this one is accepted)."""
        hidden = np.array(values, np.float32)  # the steps of `log_odds_of`, in place: this runs for every draft token
        hidden -= self.mean
        hidden *= self.scale
        hidden = np.dot(hidden, self.weights)
        hidden += self.bias
        result = np.dot(np.tanh(hidden, hidden), self.out_weights)
        result += self.out_bias
        now, following = result.tolist()
        return now, following

    def log_odds_of(self, values: Array) -> Array:
        """The same for many tokens: `[N, F]` to `[N, 2]`."""
        hidden = np.tanh((values - self.mean) * self.scale @ self.weights + self.bias)
        result: Array = hidden @ self.out_weights + self.out_bias
        return result

    def save(self, path: Path, about: str) -> None:
        """Write the `.npz`; `about` says what it was trained on."""
        arrays: dict[str, Any] = {name: getattr(self, name) for name in _FIELDS}
        np.savez_compressed(path, format=FORMAT, features=np.array(FEATURES), about=np.array(about), **arrays)

    @classmethod
    def load(cls, path: Path) -> AcceptanceModel:
        """Read what `save` wrote. Raises ModelError if it is missing, damaged or of other features."""
        try:
            with np.load(path, allow_pickle=False) as data:
                if int(data["format"]) != FORMAT or tuple(data["features"].tolist()) != FEATURES:
                    raise ModelError(f"{path} was trained for another version; run `wisp-edge train-controller` again")
                arrays = {name: np.asarray(data[name], np.float32) for name in _FIELDS if name != "token_rates"}
                token_rates = np.asarray(data["token_rates"], np.int8)
            base, cost = float(arrays.pop("base")), float(arrays.pop("false_alarm_cost"))
        except FileNotFoundError:
            raise ModelError(f"controller weights {path} do not exist") from None
        except DAMAGED as error:
            raise ModelError(f"{path} holds no controller weights of `wisp-edge train-controller`: {error}") from None
        model = cls(**arrays, token_rates=token_rates, base=base, false_alarm_cost=cost)
        model._check(path)
        return model

    def _check(self, path: Path) -> None:
        num_features, num_hidden = len(FEATURES), self.bias.size
        values = (self.mean, self.scale, self.weights, self.bias, self.out_weights, self.out_bias)
        shapes = tuple(array.shape for array in values)
        wanted = ((num_features,), (num_features,), (num_features, num_hidden), (num_hidden,), (num_hidden, 2), (2,))
        if self.token_rates.ndim != 2 or self.token_rates.shape[1] != 2:
            raise ModelError(f"{path} holds damaged controller weights: token rates {self.token_rates.shape}")
        if shapes != wanted or not all(np.isfinite(array).all() for array in values) or not 0.0 < self.base < 1.0:
            raise ModelError(f"{path} holds damaged controller weights: shapes {shapes}")


_FIELDS = tuple(field.name for field in dataclasses.fields(AcceptanceModel))


@lru_cache(maxsize=8)
def shipped_model(draft: str) -> AcceptanceModel:
    """The weights that are shipped for a default draft.

    For any other, those of the plain 4-bit draft without what they know of single tokens: another tokenizer has others.
    """
    folder = Path(wisp_plugin.__file__).with_name("weights")  # compiled, this module believes to lie elsewhere
    path = folder / f"{draft}.npz"
    if path.is_file():
        return AcceptanceModel.load(path)
    return dataclasses.replace(AcceptanceModel.load(folder / "int4.npz"), token_rates=np.zeros((0, 2), np.int8))


class Calibration:
    """p = sigmoid(slope * z + shift), learnt online by gradient steps on the log loss, forgetting towards (1, 0).

    Bounded, so that no run of luck or of bad luck makes a controller that never drafts, or never stops.
    """

    __slots__ = ("recent", "shift", "slope")
    RATE: Final = 0.03
    FORGETTING: Final = 0.002
    SLOPES: Final = (0.4, 2.0)
    SHIFTS: Final = (-2.5, 2.5)

    def __init__(self, base: float) -> None:
        """`base`: the acceptance rate to start from."""
        self.slope, self.shift = 1.0, 0.0
        self.recent = base

    def probability(self, z: float) -> float:
        """The calibrated probability of log-odds `z`."""
        return sigmoid(self.slope * z + self.shift)

    def learn(self, z: float, accepted: bool) -> None:
        """A draft token with log-odds `z` behind a right prefix turned out so."""
        error = self.probability(z) - accepted
        slope = self.slope - self.RATE * error * max(-3.0, min(3.0, z)) + self.FORGETTING * (1.0 - self.slope)
        shift = self.shift - self.RATE * error - self.FORGETTING * self.shift
        self.slope = min(max(slope, self.SLOPES[0]), self.SLOPES[1])
        self.shift = min(max(shift, self.SHIFTS[0]), self.SHIFTS[1])
        self.recent = _RECENT_MEMORY * self.recent + (1.0 - _RECENT_MEMORY) * accepted
