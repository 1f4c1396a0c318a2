"""Settings of our verifiers from the model configuration and the launcher, and the wire limits that follow."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, Protocol

from triton_models.emulated_verifier import is_emulated
from wisp_plugin.config import (
    DEFAULT_SLO_CLASS,
    SETTINGS_VARIABLE,
    EngineConfig,
    VerifierConfig,
    from_mapping,
    parse_slo_classes,
)
from wisp_plugin.errors import ConfigError
from wisp_plugin.messages import Slo
from wisp_plugin.vocabulary import vocab_hash
from wisp_plugin.wire import WireLimits

# Parameters that the Python backend itself understands.
BACKEND_PARAMETERS = frozenset({"EXECUTION_ENV_PATH", "FORCE_CPU_ONLY_INPUT_TENSORS"})
STRATEGY_PREFIX = "WISP_"  # of parameters that are for the batching strategy beside the model (`batchstrategy.so`)


class Target(Protocol):
    """What a verifier tells about its model."""

    vocab_size: int
    max_context_tokens: int
    eos_token_ids: tuple[int, ...]
    target_dir: str  # as `VerifierConfig.target`


def read_settings(model_config: dict[str, Any]) -> tuple[VerifierConfig, EngineConfig]:
    """Settings from the model's parameters and, over them, from the launcher.

    Raises:
        ConfigError: an unknown name, a value out of range, or more than one instance.
    """
    groups = model_config.get("instance_group", [])
    num_instances = sum(int(group.get("count", 1)) * max(1, len(group.get("gpus") or ())) for group in groups)
    if num_instances > 1:
        raise ConfigError(f"instance_group has {num_instances} instances; allowed: 1, which holds all sessions")
    parameters = model_config.get("parameters", {})
    values = {
        name: value["string_value"]
        for name, value in parameters.items()
        if name not in BACKEND_PARAMETERS and not name.startswith(STRATEGY_PREFIX)
    }
    values |= json.loads(os.environ.get(SETTINGS_VARIABLE, "{}"))
    names = {f.name for f in dataclasses.fields(VerifierConfig)}
    verifier_config = from_mapping(VerifierConfig, {k: v for k, v in values.items() if k in names})
    return verifier_config, from_mapping(EngineConfig, {k: v for k, v in values.items() if k not in names})


def tokenizer_dir(source: str) -> Path:
    """Folder with the tokenizer of a target: the target's own, or where the hub's client has put it."""
    if Path(source).is_dir():
        return Path(source)
    from transformers.utils.hub import cached_file  # not at the top: slow, and an emulated target has no use for it

    path = cached_file(source, "tokenizer.json")
    assert path is not None, "it raises what is missing"
    return Path(path).parent


def wire_limits(verifier: Target, config: EngineConfig) -> WireLimits:
    """What this server accepts: the model's own limits, and that a session alone fits into KV memory."""
    return WireLimits(
        vocab_size=verifier.vocab_size,
        max_context_tokens=verifier.max_context_tokens,
        max_draft_ahead=config.max_draft_ahead,
        # An emulated target has no tokenizer: clients of any are served.
        vocab_hash="" if is_emulated(verifier.target_dir) else vocab_hash(tokenizer_dir(verifier.target_dir)),
        eos_token_ids=verifier.eos_token_ids,
        default_slo=Slo(config.ttft_ms, config.tpot_ms, DEFAULT_SLO_CLASS),
        slo_classes=parse_slo_classes(config.slo_classes),
    )
