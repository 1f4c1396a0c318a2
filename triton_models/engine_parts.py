"""What the streaming verifier is made of, by its configuration. torch is imported only for a real target."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from triton_models.emulated_verifier import EmulatedVerifier, is_emulated, load_emulated
from triton_models.reply_sender import ReplySender
from wisp_plugin.config import EngineConfig, VerifierConfig
from wisp_plugin.engine import Engine
from wisp_plugin.estimator import Estimator
from wisp_plugin.pass_trace import PassTrace
from wisp_plugin.profile import Profile, load_profile
from wisp_plugin.protocols import Verifier
from wisp_plugin.scheduler import make_scheduler

if TYPE_CHECKING:
    from triton_models.server_draft import ServerDraft
    from triton_models.torch_verifier import TorchVerifier

log = logging.getLogger(__name__)


def load_verifier(config: VerifierConfig) -> TorchVerifier | EmulatedVerifier:
    """The target that `config` names. Raises ModelError or ConfigError."""
    if is_emulated(config.target):
        return load_emulated(config)
    from triton_models import torch_verifier

    return torch_verifier.load_verifier(config)


def profile_of(verifier: TorchVerifier | EmulatedVerifier, config: EngineConfig) -> Profile:
    """What the estimator starts with. An emulated target's own unless `config` names another. Raises ConfigError."""
    if isinstance(verifier, EmulatedVerifier):
        return verifier.profile if config.profile == "auto" else load_profile(Path(config.profile).expanduser())
    from triton_models.profiling import ensure_profile

    return ensure_profile(verifier, config, lambda line: log.info("wisp_verifier: %s", line))


def load_draft(
    config: VerifierConfig, engine_config: EngineConfig, verifier: TorchVerifier | EmulatedVerifier
) -> ServerDraft | None:
    """The draft model that `config` names (see `server_draft.load_server_draft`); None if it names none."""
    if not config.server_draft:
        return None
    from triton_models.server_draft import load_server_draft

    return load_server_draft(config, engine_config, verifier)


def build_engine(
    verifier: TorchVerifier | EmulatedVerifier,
    config: EngineConfig,
    estimator: Estimator,
    on_failure: Callable[[], None],
    trace: PassTrace | None = None,
    sender: ReplySender | None = None,
    server_draft: ServerDraft | None = None,
) -> Engine:
    """The engine with its collaborators; a `sender` is told when passes run, a `server_draft` drafts before them."""
    scheduler = make_scheduler(config, verifier.pool, estimator, server_draft.steps if server_draft else None)
    runs: Verifier = verifier
    options: dict[str, Any] = {"on_failure": on_failure, "trace": trace}
    if server_draft is not None:
        runs = drafting = server_draft.beside(verifier)
        options["drafting_s"] = lambda: drafting.drafting_s
    if sender is not None:
        runs = sender.watch(runs)
        options["on_idle"] = sender.let_go
    return Engine(scheduler, runs, config, **options)
