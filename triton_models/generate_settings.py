"""Settings of `wisp_generate` from its model configuration and the launcher."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triton_models.emulated_verifier import is_emulated
from triton_models.lookup_reply import CHOICES
from triton_models.model_settings import BACKEND_PARAMETERS, tokenizer_dir
from wisp_plugin.config import SETTINGS_VARIABLE, from_mapping
from wisp_plugin.errors import ConfigError, ModelError
from wisp_plugin.home import default_target_dir


@dataclass(frozen=True, slots=True)
class GenerateConfig:
    """Limits of `wisp_generate`. It has a thread per session."""

    target: str = "default"  # Hugging Face id or folder, as the verifier's: only its tokenizer is loaded
    lookup: str = "auto"  # auto | off: drafting from earlier occurrences, for requests that do not say
    max_sessions: int = 256  # at once; one more is answered `overloaded`
    max_text_bytes: int = 1 << 20  # of text_input
    silence_limit_s: float = 120.0  # a session that hears nothing from the verifier for so long is given up
    cancel_poll_s: float = 0.1  # how often Triton is asked whether clients left

    def __post_init__(self) -> None:
        if self.lookup not in CHOICES:
            raise ConfigError(f"parameter 'lookup' is {self.lookup!r}; allowed: {', '.join(CHOICES)}")
        for name, low, high in (
            ("max_sessions", 1, 4096),
            ("max_text_bytes", 1, 1 << 26),
            ("silence_limit_s", 1.0, 1e5),
            ("cancel_poll_s", 0.01, 0.5),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ConfigError(f"parameter {name!r} is {value}; allowed: {low} to {high}")


def read_generate_settings(model_config: Mapping[str, Any]) -> GenerateConfig:
    """Settings from the model's parameters and, over them, those of the launcher that concern this model too.

    Raises:
        ConfigError: an unknown name, a value out of range.
    """
    parameters = model_config.get("parameters", {})
    values = {n: value["string_value"] for n, value in parameters.items() if n not in BACKEND_PARAMETERS}
    names = {field.name for field in dataclasses.fields(GenerateConfig)} - {"max_sessions"}  # the verifier's own
    launched = json.loads(os.environ.get(SETTINGS_VARIABLE, "{}"))
    return from_mapping(GenerateConfig, values | {n: value for n, value in launched.items() if n in names})


def tokenizer_folder(target: str) -> Path:
    """Folder with the tokenizer of `target`. ModelError if there is none."""
    if is_emulated(target):
        raise ModelError("an emulated target has no tokenizer: wisp_generate needs a real one")
    folder = default_target_dir() if target == "default" else Path(target).expanduser()
    if target == "default" and not folder.is_dir():
        raise ModelError(f"the default target is not at {folder}; `wisp-server models` prepares it")
    return tokenizer_dir(str(folder) if folder.is_dir() else target)
