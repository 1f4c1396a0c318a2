"""Recorded drafting: what a draft model proposes along texts of the target, and where it would be rejected.

The chain that is drafted behind a committed position follows the text until the draft's first wrong token. As long as
the draft agrees, the chain behind the next position is the rest of the same chain; behind a rejection it starts anew.
So one draft token per position of the text (with its prefix as the target wrote it), and `chain_length` tokens behind
each wrong one, hold the chain behind *every* position, to that length behind its first wrong token.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wisp_plugin.draft_stats import NUM_STATS, DraftStats
from wisp_plugin.errors import ModelError
from wisp_plugin.messages import Tokens
from wisp_plugin.npz_file import DAMAGED

Stats = npt.NDArray[np.float32]
FORMAT = 1
_ARRAYS = ("prompt_lens", "lengths", "tokens", "drafted", "stats", "behind", "behind_tokens")


@dataclass(frozen=True, slots=True)
class TextTrace:
    """One text of the target and the drafts along it.

    `tokens` int32 `[L]`, the prompt included. For position `prompt_len + i`: `drafted[i]` is the draft's token behind
    `tokens[: prompt_len + i]` and `stats[i]` its statistics, `[N, NUM_STATS]` with N = L - prompt_len. `behind[j]`,
    `[num_wrong, chain_length, NUM_STATS]`, are the statistics of what is drafted behind the j-th wrong token, and
    `behind_tokens` `[num_wrong, chain_length]` the tokens.
    """

    tokens: Tokens
    prompt_len: int
    drafted: Tokens
    stats: Stats
    behind: Stats
    behind_tokens: Tokens
    first_wrong: npt.NDArray[np.int64] = field(init=False)  # per generated index: of the first wrong at or behind it

    def __post_init__(self) -> None:
        num_generated = len(self.tokens) - self.prompt_len
        assert len(self.drafted) == len(self.stats) == num_generated, "one draft token for each generated one"
        positions = np.where(self.agrees, num_generated, np.arange(num_generated))
        object.__setattr__(self, "first_wrong", np.minimum.accumulate(positions[::-1])[::-1])

    @property
    def generated(self) -> Tokens:
        """The target's tokens behind the prompt (a view)."""
        return self.tokens[self.prompt_len :]

    @property
    def agrees(self) -> npt.NDArray[np.bool_]:
        """Per generated token: whether the draft says the same behind the same prefix."""
        return np.asarray(self.drafted == self.generated)

    def run_length(self, index: int) -> int:
        """Draft tokens behind generated index `index` that the target accepts in a row."""
        return int(self.first_wrong[index]) - index if index < len(self.first_wrong) else 0

    def chain_token(self, index: int, ahead: int) -> tuple[int, DraftStats]:
        """Token `ahead` (from 0) of the chain behind generated index `index`, and its statistics.

        Past the recorded length behind a rejection the last ones repeat.
        """
        run = self.run_length(index)
        if ahead <= run and index + ahead < len(self.stats):
            return int(self.drafted[index + ahead]), DraftStats(*self.stats[index + ahead].tolist())
        wrong = int(np.count_nonzero(~self.agrees[: index + run]))
        if not self.behind.shape[1] or wrong >= len(self.behind):
            return int(self.drafted[-1]), DraftStats(*self.stats[-1].tolist())
        depth = min(ahead - run - 1, self.behind.shape[1] - 1)
        return int(self.behind_tokens[wrong, depth]), DraftStats(*self.behind[wrong, depth].tolist())


@dataclass(frozen=True, slots=True)
class DraftTrace:
    """Traces of one draft model along many texts. `about`: how they were made, JSON values only."""

    texts: Sequence[TextTrace]
    about: dict[str, Any]

    @property
    def draft_s(self) -> float:
        """Median seconds of a draft step when the trace was recorded."""
        return float(self.about["draft_s"])

    @property
    def acceptance(self) -> float:
        """Share of positions at which draft and target agree."""
        agrees = np.concatenate([text.agrees for text in self.texts])
        return float(agrees.mean())

    def save(self, path: Path) -> None:
        """Write a compressed `.npz`; statistics as float16, which keeps three digits."""
        arrays = {
            "prompt_lens": np.array([text.prompt_len for text in self.texts], np.int32),
            "lengths": np.array([len(text.tokens) for text in self.texts], np.int32),
            "tokens": np.concatenate([text.tokens for text in self.texts]),
            "drafted": np.concatenate([text.drafted for text in self.texts]),
            "stats": np.concatenate([text.stats for text in self.texts]).astype(np.float16),
            "behind": np.concatenate([text.behind for text in self.texts]).astype(np.float16),
            "behind_tokens": np.concatenate([text.behind_tokens for text in self.texts]),
        }
        about = json.dumps({"format": FORMAT, **self.about})
        np.savez_compressed(path, about=np.array(about), **arrays)

    @classmethod
    def load(cls, path: Path) -> DraftTrace:
        """Read what `save` wrote.

        Raises:
            ModelError: no such file, or not a trace of this format.
        """
        try:
            with np.load(path, allow_pickle=False) as data:
                about = json.loads(str(data["about"]))
                if about.pop("format") != FORMAT:
                    raise ModelError(f"trace {path} has another format; record it again with `wisp-edge trace`")
                texts = list(_texts(*[data[name] for name in _ARRAYS]))
        except FileNotFoundError:
            raise ModelError(f"trace {path} does not exist") from None
        except DAMAGED as error:
            raise ModelError(f"{path} is no trace of `wisp-edge trace`: {error}") from None
        return cls(texts, about)


def _texts(
    prompt_lens: npt.NDArray[np.int32],
    lengths: npt.NDArray[np.int32],
    tokens: Tokens,
    drafted: Tokens,
    stats: npt.NDArray[np.float16],
    behind: npt.NDArray[np.float16],
    behind_tokens: Tokens,
) -> Iterator[TextTrace]:
    if stats.shape[1:] != (NUM_STATS,) or behind.shape[2:] != (NUM_STATS,):
        raise ValueError(f"it holds other statistics than {', '.join(DraftStats._fields)}")
    at = at_generated = at_wrong = 0
    for prompt_len, length in zip(prompt_lens.tolist(), lengths.tolist(), strict=True):
        own = tokens[at : at + length]
        mine = slice(at_generated, at_generated + length - prompt_len)
        num_wrong = int(np.count_nonzero(drafted[mine] != own[prompt_len:])) if behind.shape[1] else 0
        wrong = slice(at_wrong, at_wrong + num_wrong)
        yield TextTrace(
            own, prompt_len, drafted[mine], stats[mine].astype(np.float32), behind[wrong].astype(np.float32),
            behind_tokens[wrong],
        )  # fmt: skip
        at, at_generated, at_wrong = at + length, mine.stop, at_wrong + num_wrong
    told = len(tokens), len(drafted), len(stats), len(behind), len(behind_tokens)
    needed = at, at_generated, at_generated, at_wrong, at_wrong
    if told != (needed if behind.shape[1] else (*needed[:3], *told[3:])):
        raise ValueError(f"its arrays have {told} rows where its texts need {needed}")
