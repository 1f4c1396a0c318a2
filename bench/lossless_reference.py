"""What the target alone generates, computed without any of our verifier, and the verdict on what was generated.

The reference is transformers' unmodified model (fp32, sdpa), one sequence at a time: its own `generate` at
temperature 0; otherwise one token per forward with a `DynamicCache`, chosen by the numpy form of the coupling.

Floating point differs between batch shapes, so a first difference is looked into (DESIGN.md section 3): the reference
scores the position behind the common prefix. It is a tie only if the two tokens in question are the two best and
their scores are less than `TIE_GAP` apart. Anything else is a mismatch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from wisp_plugin.coupling import Float64s, choose_token, final_scores
from wisp_plugin.messages import Sampling, Tokens

_CPU = torch.device("cpu")
TIE_GAP = 1e-3  # in final scores of an fp32 target (DESIGN.md section 3)


@dataclass(frozen=True, slots=True)
class Case:
    """One generation: prompt `number` of the evaluation, and how its tokens are chosen."""

    number: int
    prompt: Tokens
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class Difference:
    """The first difference of a session from the reference, `index` tokens behind the prompt.

    `expected` and `found` are tokens, None where that side had ended. `best` are the reference's two best tokens
    at this position and `best_scores` their final scores; `scores` those of `expected` and `found` (None: the token
    cannot be chosen at all, or there is none). Positions are absolute.
    """

    prompt: int
    sampling: Sampling
    position: int
    index: int
    expected: int | None
    found: int | None
    best: tuple[int, int]
    best_scores: tuple[float, float]
    scores: tuple[float | None, float | None]

    @property
    def gap(self) -> float:
        """Score of the best token minus that of the second."""
        return self.best_scores[0] - self.best_scores[1]

    @property
    def is_tie(self) -> bool:
        """True if the difference is between the two best tokens and within `TIE_GAP`."""
        return {self.expected, self.found} == set(self.best) and self.gap < TIE_GAP


@contextmanager
def torch_threads(num_threads: int) -> Iterator[None]:
    """Within, torch uses `num_threads` per operation."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Reference:
    """The target alone."""

    def __init__(
        self, folder: Path, max_new_tokens: int, eos_token_ids: Sequence[int], device: torch.device = _CPU
    ) -> None:
        """`folder` is a Hugging Face folder of the target. A generation ends behind an EOS or at `max_new_tokens`."""
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
        self._model = model.to(device).eval()
        self._device = device
        self._max_new_tokens = max_new_tokens
        self._eos_token_ids = list(eos_token_ids)

    def generate(self, case: Case) -> Tokens:
        """The generated tokens, int32 `[<= max_new_tokens]`, an EOS included."""
        return self._generate_greedy(case) if case.sampling == Sampling() else self._generate_coupled(case)

    @torch.inference_mode()
    def _generate_greedy(self, case: Case) -> Tokens:
        ids = self._row(case.prompt)
        output = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=self._max_new_tokens,
            eos_token_id=self._eos_token_ids or None,
            pad_token_id=0,
        )
        return output[0, len(case.prompt) :].cpu().numpy().astype(np.int32)

    @torch.inference_mode()
    def _generate_coupled(self, case: Case) -> Tokens:
        tokens, cache = case.prompt, DynamicCache(config=self._model.config)
        for _ in range(self._max_new_tokens):
            uncached = self._row(tokens[cache.get_seq_length() :])
            logits = self._model(input_ids=uncached, past_key_values=cache, use_cache=True).logits[0, -1]
            token = choose_token(logits.cpu().numpy(), case.sampling, len(tokens), tokens)
            tokens = np.append(tokens, np.int32(token))
            if token in self._eos_token_ids:
                break
        return tokens[len(case.prompt) :]

    @torch.inference_mode()
    def scores(self, case: Case, generated: Tokens) -> Float64s:
        """Final scores of all tokens behind the prompt and `generated`, float64 `[V]`."""
        tokens = np.concatenate([case.prompt, generated])
        logits = self._model(input_ids=self._row(tokens), use_cache=False).logits[0, -1]
        return final_scores(logits.cpu().numpy(), case.sampling, len(tokens), tokens)

    def _row(self, tokens: Tokens) -> torch.Tensor:
        """A batch of one, int64 `[1, T]` on the model's device."""
        return torch.from_numpy(tokens.astype(np.int64))[None].to(self._device)


def first_difference(
    case: Case, expected: Tokens, found: Tokens, scores: Callable[[Case, Tokens], Float64s]
) -> Difference | None:
    """None if `found` is `expected`, token for token and in length. `scores` is asked only at a difference."""
    num_compared = min(len(expected), len(found))
    differs = np.flatnonzero(expected[:num_compared] != found[:num_compared])
    if not len(differs) and len(expected) == len(found):
        return None
    index = int(differs[0]) if len(differs) else num_compared
    row = scores(case, expected[:index])
    best = np.argsort(-row, kind="stable")[:2]
    pair = [int(side[index]) if index < len(side) else None for side in (expected, found)]
    expected_score, found_score = (None if t is None or row[t] == -np.inf else float(row[t]) for t in pair)
    return Difference(
        prompt=case.number,
        sampling=case.sampling,
        position=len(case.prompt) + index,
        index=index,
        expected=pair[0],
        found=pair[1],
        best=(int(best[0]), int(best[1])),
        # A filter may leave one token only: then nothing is near the best.
        best_scores=(float(row[best[0]]), max(float(row[best[1]]), -1e30)),
        scores=(expected_score, found_score),
    )
