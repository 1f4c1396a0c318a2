"""The draft model beside the target, if `server_draft` names one (see `wisp_plugin.server_drafts`)."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass

from triton_models.emulated_verifier import EmulatedVerifier
from triton_models.model_settings import tokenizer_dir
from triton_models.profiling import ensure_profile
from triton_models.torch_verifier import TorchVerifier, load_verifier
from wisp_plugin.config import EngineConfig, VerifierConfig
from wisp_plugin.drafting_verifier import DraftingVerifier, DraftLimits
from wisp_plugin.errors import ConfigError
from wisp_plugin.estimator import Estimator
from wisp_plugin.vocabulary import vocab_hash

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServerDraft:
    """A loaded draft model, and what one of its steps takes here."""

    model: TorchVerifier
    steps: Estimator
    catch_up_tokens: int = 512  # that it may compute before a pass

    def beside(self, target: TorchVerifier | EmulatedVerifier) -> DraftingVerifier:
        """The target with this model in front of it."""
        draft = self.model
        limits = DraftLimits(draft.max_context_tokens, draft.vocab_size, self.catch_up_tokens)
        return DraftingVerifier(target, draft, draft.pool, self.steps, limits=limits)


def load_server_draft(
    config: VerifierConfig, engine_config: EngineConfig, target: TorchVerifier | EmulatedVerifier
) -> ServerDraft:
    """The draft model that `config` names, with a profile of its own.

    Raises:
        ModelError: it is missing, damaged or of an unsupported kind.
        ConfigError: its tokenizer is not the target's, or the target is emulated.
    """
    if isinstance(target, EmulatedVerifier):
        raise ConfigError("parameter 'server_draft' needs a real target; an emulated one has no tokenizer")
    draft_config = dataclasses.replace(
        config,
        target=config.server_draft,
        dtype=config.server_draft_dtype,
        kv_tokens=config.server_draft_kv_tokens or config.kv_tokens,
        server_draft="",
    )
    model = load_verifier(draft_config)
    theirs, ours = (vocab_hash(tokenizer_dir(of.target_dir)) for of in (target, model))
    if theirs != ours:
        raise ConfigError(
            f"server_draft {model.target_dir} has the vocabulary {ours[:12]}..., allowed: the target's {theirs[:12]}..."
        )
    if model.vocab_size > target.vocab_size:
        raise ConfigError(f"server_draft has {model.vocab_size} logits; allowed: the target's {target.vocab_size}")
    auto = dataclasses.replace(engine_config, profile="auto")
    profile = ensure_profile(model, auto, lambda line: log.info("wisp_verifier: server_draft: %s", line))
    log.info("wisp_verifier: drafts of its own by %s, %s, %d KV tokens",
             model.target_dir, model.dtype_name, draft_config.kv_tokens)  # fmt: skip
    return ServerDraft(model, profile.estimator(), engine_config.max_pass_tokens)
