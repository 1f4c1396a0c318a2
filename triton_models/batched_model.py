"""`TritonPythonModel` of `wisp_verifier_batched`: unary requests, batched by Triton, one verification each."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

from triton_models import pb_adapter
from triton_models.model_settings import read_settings, wire_limits
from triton_models.plugin_install import PROFILE
from triton_models.profiling import ensure_profile
from triton_models.torch_verifier import load_verifier
from triton_models.verifier_model import open_trace, profile_line
from triton_models.watcher import Watcher
from wisp_plugin.errors import ConfigError, WispError
from wisp_plugin.profile import Profile, load_profile, save_profile
from wisp_plugin.unary_engine import UnaryEngine

log = logging.getLogger(__name__)


class TritonPythonModel:
    """The unary verifier as Triton sees it."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the target model; a configuration that cannot work fails the load."""
        pb_adapter.log_to_triton()
        try:
            verifier_config, config = read_settings(json.loads(args["model_config"]))
            if verifier_config.server_draft:
                raise ConfigError("parameter 'server_draft' is for wisp_verifier; here drafts come with their requests")
            self._trace = open_trace(config)
            verifier = load_verifier(verifier_config)
            self._limits = wire_limits(verifier, config)
            profile = ensure_profile(verifier, config, lambda line: log.info("wisp_verifier_batched: %s", line))
            share_profile(profile, Path(args["model_repository"]) / PROFILE)
        except WispError as error:
            raise pb_adapter.fail_load(str(error)) from None
        self._engine = UnaryEngine(
            verifier, verifier.pool, self._limits, config, profile.estimator(), trace=self._trace
        )
        metrics = pb_adapter.Metrics(self._engine.telemetry)
        self._watcher = Watcher(config.cancel_poll_s, lambda: self._look_after(metrics))
        self._watcher.start()
        log.info(
            "wisp_verifier_batched: target %s, %s on %s, %d KV tokens, %s",
            verifier.target_dir, verifier.dtype_name, verifier.device_name, verifier_config.kv_tokens,
            profile_line(profile),
        )  # fmt: skip

    def _look_after(self, metrics: pb_adapter.Metrics) -> None:
        """What the watcher does every time: metrics, and the trace."""
        if self._trace is not None:
            self._trace.flush()
        metrics.publish(time.monotonic(), self._engine.refresh_gauges)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer a batch, in order."""
        return pb_adapter.answer_batch(self._engine, requests, self._limits)

    def finalize(self) -> None:
        """End what runs beside."""
        self._watcher.stop()
        if self._trace is not None:
            self._trace.close()


def share_profile(profile: Profile, path: Path) -> None:
    """Give the profile to the batching strategy, which reads `path` (WISP_PROFILE) anew when it has changed."""
    try:
        if load_profile(path) == profile:
            return
    except ConfigError as error:
        log.info("%s; it is written", error)
    try:
        save_profile(profile, path)
    except ConfigError as error:
        log.warning("%s: the batching strategy goes on with another profile", error)
