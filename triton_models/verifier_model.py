"""`TritonPythonModel` of `wisp_verifier`: configuration in, engine up, requests through, engine down."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from triton_models import pb_adapter
from triton_models.emulated_verifier import EmulatedVerifier
from triton_models.engine_parts import build_engine, load_draft, load_verifier, profile_of
from triton_models.local_server import LocalServer
from triton_models.model_settings import read_settings, wire_limits
from triton_models.reply_sender import ReplySender, SendingEngine
from triton_models.termination import on_termination
from triton_models.watcher import Watcher
from wisp_plugin.config import EngineConfig
from wisp_plugin.errors import WispError
from wisp_plugin.pass_trace import PassTrace
from wisp_plugin.profile import Profile

if TYPE_CHECKING:  # torch is imported only when a real target is loaded
    from triton_models.torch_verifier import TorchVerifier

# Requests arrive on Triton's thread while the engine's thread holds the interpreter: hand it over soon.
SWITCH_INTERVAL_S = 0.0005

log = logging.getLogger(__name__)


class TritonPythonModel:
    """The streaming verifier as Triton sees it."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the target model and start the engine; a configuration that cannot work fails the load."""
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        pb_adapter.log_to_triton()
        try:
            verifier_config, engine_config = read_settings(json.loads(args["model_config"]))
            self._trace = open_trace(engine_config)
            verifier = load_verifier(verifier_config)
            self._limits = wire_limits(verifier, engine_config)
            profile = profile_of(verifier, engine_config)
            server_draft = load_draft(verifier_config, engine_config, verifier)
            self._sender = None if verifier.device_name == "cpu" else ReplySender()
            self._engine = build_engine(
                verifier, engine_config, profile.estimator(), lambda: _leave(args["model_name"], self._sender),
                self._trace, self._sender, server_draft,
            )  # fmt: skip
            self._receiver = SendingEngine(self._engine, self._sender) if self._sender else self._engine
            self._local = LocalServer(self._engine.submit, self._limits)
        except WispError as error:
            raise pb_adapter.fail_load(str(error)) from None
        metrics = pb_adapter.Metrics(self._engine.telemetry)
        self._watcher = Watcher(engine_config.cancel_poll_s, lambda: self._look_after(metrics, verifier))
        for started in (self._engine, self._watcher, self._local):
            started.start()
        on_termination(self._engine.stop)
        log.info(
            "wisp_verifier: target %s, %s on %s, %d KV tokens, policy %s, %s",
            verifier.target_dir, verifier.dtype_name, verifier.device_name, verifier_config.kv_tokens,
            engine_config.policy, profile_line(profile),
        )  # fmt: skip

    def _look_after(self, metrics: pb_adapter.Metrics, verifier: TorchVerifier | EmulatedVerifier) -> None:
        """What the watcher does every time: metrics, and the trace."""
        if self._trace is not None:
            self._trace.flush()
        metrics.publish(time.monotonic(), lambda: self._engine.refresh_gauges(verifier.pool))

    def execute(self, requests: list[Any]) -> None:
        """Hand requests to the engine, which answers from its own thread."""
        for request in requests:
            pb_adapter.submit(self._receiver, request, self._limits, self._watcher)

    def finalize(self) -> None:
        """End open streams and the engine."""
        try:
            self._engine.stop()
        finally:
            self._local.stop()
            if self._sender is not None:
                self._sender.close()
            self._watcher.stop()
            if self._trace is not None:
                self._trace.close()


def open_trace(config: EngineConfig) -> PassTrace | None:
    """The trace that `config` names, if it does. ConfigError if its file cannot be written."""
    return PassTrace(Path(config.trace_file).expanduser().absolute()) if config.trace_file else None


def profile_line(profile: Profile) -> str:
    """What predictions are made with, in a few words."""
    measured = profile.measured
    return f"profile of {measured.created} ({measured.num_passes} passes, mean error {100 * measured.fit_error:.1f} %)"


def _leave(model_name: str, sender: ReplySender | None) -> None:
    """Withdraw the model: Triton then reports it as not ready, refuses requests at once and stops promptly.

    A server without explicit model control does not allow that; ending this process at least fails what comes.
    """
    if sender is not None:
        sender.close()
    try:
        pb_adapter.unload(model_name)
    except Exception:
        log.exception("the model cannot be unloaded; its process ends")
        os._exit(1)
