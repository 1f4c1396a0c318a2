"""The verifier on torch: one packed forward of the target over a whole pass, then the choice of tokens.

Prefill chunks, plain decoding and the verification of drafts are the same thing here: uncached tokens of a
session, computed behind its cached ones.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch

from triton_models.packed_attention import Span, build_pass
from triton_models.target_model import TargetModel, load_target
from triton_models.torch_coupling import ChoiceRow, choose_tokens, chosen_logprobs
from wisp_plugin.config import VerifierConfig
from wisp_plugin.coupling import count_accepted
from wisp_plugin.kv_blocks import BlockPool
from wisp_plugin.kv_pass import reserve
from wisp_plugin.messages import PassItem, PassOutcome

log = logging.getLogger(__name__)


def load_verifier(config: VerifierConfig) -> TorchVerifier:
    """Load the target and allocate the KV memory that `config` asks for.

    Raises:
        ModelError: the target is missing, damaged or of an unsupported kind.
        ConfigError: the device does not exist here.
    """
    if config.num_threads:
        torch.set_num_threads(config.num_threads)  # 0: torch's own choice, one per core
    pool = BlockPool(config.kv_tokens // config.kv_block_tokens, config.kv_block_tokens)
    target = load_target(config)
    try:
        return TorchVerifier(target, pool)
    except torch.OutOfMemoryError:
        if config.compile != "auto" or not target.graphs.sizes:
            raise
        log.warning("no memory for %d tokens of KV beside recorded passes: kernels are launched one by one, which is "
                    "slower; fewer kv_tokens leave room", config.kv_tokens)  # fmt: skip
        target.graphs.forget()
    torch.cuda.empty_cache()
    return TorchVerifier(target, pool)


class TorchVerifier:
    """Runs passes. Not thread-safe: it belongs to the engine thread.

    `gather` chooses the implementation of attention (see packed_attention); by default by device.
    """

    def __init__(self, target: TargetModel, pool: BlockPool, gather: bool | None = None) -> None:
        self.pool = pool
        self.cache = target.new_cache(pool)
        self.vocab_size = target.vocab_size
        self.max_context_tokens = min(target.max_context_tokens, pool.num_tokens)
        self.eos_token_ids = target.eos_token_ids
        self.device_name = str(target.device)
        self.dtype_name = str(target.dtype).removeprefix("torch.")
        self.target_dir = target.source
        self._target = target
        self._gather = target.device.type != "cpu" if gather is None else gather

    def run(self, items: Sequence[PassItem]) -> list[PassOutcome]:
        """Compute and choose for every item; outcomes in the order of `items`.

        Afterwards the KV of each session ends behind its accepted prefix: the committed tokens of the item and
        the draft tokens that equal the target's own choice. If anything fails, it ends at `num_cached`.
        What the sessions hold is remembered, so that others with the same prefix can adopt it.

        Raises:
            CapacityError: the KV memory cannot hold the pass, or holds less than an item counts on.
        """
        logits = self.compute_logits(items)
        try:
            outcomes = self.choose(items, logits)
            for item, outcome in zip(items, outcomes, strict=True):
                self._keep_accepted(item, outcome)
        except BaseException:
            self._roll_back(items)
            raise
        return outcomes

    @torch.inference_mode()
    def compute_logits(self, items: Sequence[PassItem]) -> torch.Tensor:
        """The forward alone: logits `[R, V]` of all choices, item after item. KV then holds all tokens of the items."""
        self._reserve(items)
        try:
            spans = [Span(item.session, item.num_cached, len(item.tokens)) for item in items]
            target = self._target
            packed = build_pass(self.cache, spans, target.dtype, target.num_query_groups, self._gather)
            ids = np.concatenate([item.tokens[item.num_cached :] for item in items]).astype(np.int64)
            positions = np.concatenate([np.arange(span.num_cached, span.num_tokens) for span in spans])
            keep = self._to_device(choice_rows(items))
            return target.compute(self._to_device(ids)[None], self._to_device(positions)[None], packed, keep)
        except BaseException:
            self._roll_back(items)
            raise

    def release(self, session: str) -> None:
        """Forget the KV of `session`; its tokens can be computed again at any time."""
        self.pool.release(session)

    def choose(self, items: Sequence[PassItem], logits: torch.Tensor) -> list[PassOutcome]:
        """The target's own tokens from `logits` `[R, V]`, each with the tokens before its position as context."""
        rows = [row for item in items for row in choice_contexts(item)]
        chosen = choose_tokens(logits, rows) if rows else np.empty(0, dtype=np.int32)
        outcomes, start = [], 0
        for item in items:
            own = slice(start, start + item.num_choices)
            start = own.stop
            logprobs = chosen_logprobs(logits[own], chosen[own]) if item.logprobs and item.num_choices else None
            outcomes.append(PassOutcome(item.session, chosen[own], logprobs))
        return outcomes

    def _keep_accepted(self, item: PassItem, outcome: PassOutcome) -> None:
        """Drop the KV behind the accepted draft tokens. A token of the target's own has no KV yet."""
        draft = item.tokens[item.first_choice_position :]
        num_kept = len(item.tokens) - len(draft) + count_accepted(draft, outcome.chosen)
        self.pool.truncate(item.session, num_kept)
        self.pool.remember(item.session, item.tokens[:num_kept])

    def _reserve(self, items: Sequence[PassItem]) -> None:
        """`kv_pass.reserve`; a shared block that the pass goes on in is copied, so that it writes only its own."""
        copies = reserve(self.pool, items)
        try:
            self.cache.copy_blocks(copies)
        except BaseException:
            for item in items:  # their tables name blocks that may lack the copied tokens
                self.pool.release(item.session)
            raise

    def _roll_back(self, items: Sequence[PassItem]) -> None:
        """After a failure: nothing behind the cached tokens can be relied on."""
        for item in items:
            self.pool.truncate(item.session, min(item.num_cached, self.pool.length(item.session)))

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._target.device)


def choice_rows(items: Sequence[PassItem]) -> np.ndarray:
    """Rows of the packed pass whose logits choose a token, int64, item after item: the last `num_choices` of each."""
    ends = np.cumsum([item.num_new_tokens for item in items])
    return np.concatenate([np.arange(end - item.num_choices, end) for item, end in zip(items, ends, strict=True)])


def choice_contexts(item: PassItem) -> list[ChoiceRow]:
    """One row per choice: behind the last committed token, then behind each draft token."""
    first = item.first_choice_position
    return [ChoiceRow(item.sampling, at, item.tokens[:at]) for at in range(first, first + item.num_choices)]
