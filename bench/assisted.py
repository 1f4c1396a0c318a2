"""The peer of `wisp-bench e2e`: transformers' assisted generation with the same target and the same draft graph.

transformers wants a torch model as assistant; this one answers from the ONNX draft graph, which keeps its own KV.
The rest (how many tokens to draft, when to stop, how to verify) is transformers' own, at its defaults.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from edge_runtime.drafter import Drafter
from wisp_plugin.messages import Tokens


class OnnxAssistant(PreTrainedModel, GenerationMixin):
    """A draft graph in the clothes of a transformers model."""

    config_class = PretrainedConfig
    _supports_sdpa = True  # there is no attention here to choose

    def __init__(self, config: PretrainedConfig, drafter: Drafter) -> None:
        super().__init__(config)
        self._drafter = drafter
        self._device_holder = torch.nn.Parameter(torch.zeros(1), requires_grad=False)  # tells transformers the device
        self.generation_config = GenerationConfig.from_model_config(config)
        self.generation_config.use_cache = False

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, past_key_values: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """The drafter finds by itself which tokens are new: no cache of transformers' is used."""
        return {"input_ids": input_ids}

    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None, **kwargs: Any) -> CausalLMOutputWithPast:
        """Logits `[1, 1, V]` behind the last of `input_ids` `[1, T]`."""
        logits = self._drafter.next_logits(input_ids[0].numpy().astype(np.int32))
        return CausalLMOutputWithPast(logits=torch.from_numpy(logits)[None, None])


class AssistedPeer:
    """Greedy assisted generation, one sequence at a time."""

    def __init__(self, target_dir: Path, drafter: Drafter) -> None:
        self._target = AutoModelForCausalLM.from_pretrained(target_dir, dtype=torch.float32)
        self._target.generation_config.eos_token_id = None  # to the length, as the sessions it is compared with
        self._assistant = OnnxAssistant(self._target.config, drafter)

    def timed(self, max_new_tokens: int) -> Callable[[Tokens], tuple[Tokens, float]]:
        """A function from a prompt to its tokens and tokens per second."""

        def run(prompt: Tokens) -> tuple[Tokens, float]:
            started_s = time.monotonic()
            tokens = self.generate(prompt, max_new_tokens)
            return tokens, len(tokens) / (time.monotonic() - started_s)

        return run

    def generate(self, prompt: Tokens, max_new_tokens: int) -> Tokens:
        """The tokens behind `prompt`."""
        input_ids = torch.from_numpy(prompt.astype(np.int64))[None]
        output = self._target.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            assistant_model=self._assistant,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            pad_token_id=0,
        )
        tokens: Tokens = output[0, len(prompt) :].numpy().astype(np.int32)
        return tokens
