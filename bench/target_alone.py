"""Is a text the target's own? Transformers' unmodified model (fp32, sdpa) judges a whole text in one forward.

By induction from the prompt, every token being the model's own greedy choice behind those before it is the same as
equality with the target alone; and behind a tie (DESIGN.md section 3) the rest is still judged.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from bench.lossless_reference import TIE_GAP, torch_threads
from wisp_plugin.messages import Tokens


class TargetAlone:
    """The target without any of our verifier."""

    def __init__(self, folder: Path, num_threads: int) -> None:
        """`folder` is a Hugging Face folder of the target."""
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
        self._model.eval()
        self._num_threads = num_threads

    @torch.inference_mode()
    def judge(self, prompt: Tokens, generated: Tokens) -> tuple[int, list[int]]:
        """Number of ties in `generated`, and the indices of tokens that are not the target's own greedy choice.

        A token is a tie if another one scores higher by less than TIE_GAP.
        """
        with torch_threads(self._num_threads):
            ids = torch.cat([torch.from_numpy(part.astype("int64")) for part in (prompt, generated)])[None]
            logits = self._model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        found = logits.gather(1, ids[0, len(prompt) :, None])[:, 0]
        gaps = logits.max(dim=1).values - found
        wrong = (gaps >= TIE_GAP).nonzero()[:, 0].tolist()
        return int(((gaps > 0) & (gaps < TIE_GAP)).sum()), wrong
