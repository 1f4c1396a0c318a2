"""`TritonPythonModel` of `wisp_verifier`: configuration in, engine up, requests through, engine down."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from triton_models import pb_adapter
from triton_models.termination import on_termination
from triton_models.torch_verifier import TorchVerifier, load_verifier
from triton_models.watcher import Watcher
from wisp_plugin.config import SETTINGS_VARIABLE, EngineConfig, VerifierConfig, from_mapping
from wisp_plugin.engine import Engine
from wisp_plugin.errors import ConfigError, WispError
from wisp_plugin.messages import Slo
from wisp_plugin.scheduler import POLICIES, Scheduler
from wisp_plugin.vocabulary import vocab_hash
from wisp_plugin.wire import WireLimits

# Requests arrive on Triton's thread while the engine's thread holds the interpreter: hand it over soon.
SWITCH_INTERVAL_S = 0.0005
# Parameters that the Python backend itself understands.
BACKEND_PARAMETERS = frozenset({"EXECUTION_ENV_PATH", "FORCE_CPU_ONLY_INPUT_TENSORS"})

log = logging.getLogger(__name__)


class TritonPythonModel:
    """The streaming verifier as Triton sees it."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the target model and start the engine; a configuration that cannot work fails the load."""
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        logging.basicConfig(level=logging.INFO, handlers=[pb_adapter.TritonLogHandler()], format="%(message)s")
        try:
            verifier_config, engine_config = read_settings(json.loads(args["model_config"]))
            verifier = load_verifier(verifier_config)
            self._limits = wire_limits(verifier, engine_config)
            self._engine = build_engine(verifier, engine_config, lambda: _leave(args["model_name"]))
        except WispError as error:
            raise pb_adapter.fail_load(str(error)) from None
        metrics = pb_adapter.Metrics()
        self._watcher = Watcher(engine_config.cancel_poll_s, lambda: metrics.publish(self._engine.totals))
        self._engine.start()
        self._watcher.start()
        on_termination(self._engine.stop)
        log.info(
            "wisp_verifier: target %s, %s on %s, %d KV tokens, policy %s",
            verifier.target_dir, verifier.dtype_name, verifier.device_name, verifier_config.kv_tokens,
            engine_config.policy,
        )  # fmt: skip

    def execute(self, requests: list[Any]) -> None:
        """Hand requests to the engine, which answers from its own thread."""
        for request in requests:
            pb_adapter.submit(self._engine, request, self._limits, self._watcher)

    def finalize(self) -> None:
        """End open streams and the engine."""
        try:
            self._engine.stop()
        finally:
            self._watcher.stop()


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
    values = {name: value["string_value"] for name, value in parameters.items() if name not in BACKEND_PARAMETERS}
    values |= json.loads(os.environ.get(SETTINGS_VARIABLE, "{}"))
    names = {f.name for f in dataclasses.fields(VerifierConfig)}
    verifier_config = from_mapping(VerifierConfig, {k: v for k, v in values.items() if k in names})
    return verifier_config, from_mapping(EngineConfig, {k: v for k, v in values.items() if k not in names})


def tokenizer_dir(source: str) -> Path:
    """Folder with the tokenizer of a target: the target's own, or where the hub's client has put it."""
    if Path(source).is_dir():
        return Path(source)
    return Path(cached_file(source, "tokenizer.json")).parent


def wire_limits(verifier: TorchVerifier, config: EngineConfig) -> WireLimits:
    """What this server accepts: the model's own limits, and that a session alone fits into KV memory."""
    return WireLimits(
        vocab_size=verifier.vocab_size,
        max_context_tokens=verifier.max_context_tokens,
        max_draft_ahead=config.max_draft_ahead,
        vocab_hash=vocab_hash(tokenizer_dir(verifier.target_dir)),
        eos_token_ids=verifier.eos_token_ids,
        default_slo=Slo(config.ttft_ms, config.tpot_ms),
    )


def build_engine(verifier: TorchVerifier, config: EngineConfig, on_failure: Callable[[], None]) -> Engine:
    """The engine with its collaborators."""
    if config.policy not in POLICIES:
        raise ConfigError(f"policy is {config.policy!r}; allowed: {', '.join(POLICIES)}")
    scheduler = Scheduler(POLICIES[config.policy](), config, verifier.pool)
    return Engine(scheduler, verifier, config, on_failure=on_failure)


def _leave(model_name: str) -> None:
    """Withdraw the model: Triton then reports it as not ready, refuses requests at once and stops promptly.

    A server without explicit model control does not allow that; ending this process at least fails what comes.
    """
    try:
        pb_adapter.unload(model_name)
    except Exception:
        log.exception("the model cannot be unloaded; its process ends")
        os._exit(1)
