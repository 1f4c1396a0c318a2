"""What is simulated: a workload, the system that serves it, and what its passes cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from bench.gpu_cost import A100_32G
from bench.sim_client import ClientSettings, DraftsAlong, SessionTokens
from bench.sim_colocated import MESSAGE_TOKENS
from bench.workload import SessionSpec, Workload
from wisp_plugin.config import EngineConfig
from wisp_plugin.controller import SpeculationController
from wisp_plugin.estimator import Costs, Estimator
from wisp_plugin.messages import Mode
from wisp_plugin.policies import Policy
from wisp_plugin.stop_rules import Fixed


@dataclass(frozen=True, slots=True)
class Scenario:
    """A workload and the system that serves it.

    `policy`: a name of `scheduler.POLICIES`, or what makes a policy as its values do. `controller` makes the
    controller of a session; without, devices draft `ahead` tokens ahead (0: thin devices, the server decodes alone).
    `tokens` makes what target and draft say in a session; without, draft tokens are right with chance `acceptance`.
    `costs` is the true cost of a pass, `believed_costs` what the estimator starts with (None: the truth).
    `noise_sigma`: lognormal noise on the time of a pass, mean 1. `drain`: no session starts after `duration_s`, and
    the run ends with the last one. `engine`: overrides of `EngineConfig`. `colocated`: what a step of the draft model
    costs on the server, which then drafts for thin devices (None: devices draft). `server_draft`: the same of a draft
    model that the scheduler uses where devices have nothing ready (see `wisp_plugin.server_drafts`; None: there is
    none), which has KV of `server_draft_kv_tokens`. `draft_step`: what a step would cost on this server, if known.
    `prefill_factor`: see `Cell`.
    """

    workload: Workload = field(default_factory=Workload)
    policy: str | Callable[[EngineConfig, Estimator], Policy] = "continuous"
    mode: Mode = Mode.FREE
    ahead: int = 6
    controller: Callable[[], SpeculationController] | None = None
    message_tokens: int = 1
    acceptance: float = 0.75
    tokens: Callable[[SessionSpec], DraftsAlong] | None = None
    duration_s: float = 30.0
    warm_up_s: float = 10.0
    drain: bool = False
    costs: Costs = A100_32G
    believed_costs: Costs | None = None
    noise_sigma: float = 0.0
    kv_tokens: int = 131_072
    engine: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    colocated: Costs | None = None
    server_draft: Costs | None = None
    draft_step: Costs | None = None
    server_draft_kv_tokens: int = 131_072
    prefill_factor: float = 0.0

    def client_settings(self) -> ClientSettings:
        """What all its devices have in common."""
        return ClientSettings(
            self.mode,
            self.controller or (lambda: SpeculationController(Fixed(self.ahead))),
            MESSAGE_TOKENS if self.colocated else self.message_tokens,
            self.warm_up_s,
            self.duration_s,
            0.0 if self.colocated else self.prefill_factor,
        )

    def tokens_of(self, spec: SessionSpec) -> DraftsAlong:
        """What target and draft model say in a session."""
        return self.tokens(spec) if self.tokens else SessionTokens(self.seed, spec, self.acceptance)

    def with_devices(self, num_devices: int) -> Scenario:
        """The same with another number of devices."""
        return replace(self, workload=replace(self.workload, num_devices=num_devices))

    def with_seed(self, seed: int) -> Scenario:
        """The same with other sessions and other tokens."""
        return replace(self, workload=replace(self.workload, seed=seed), seed=seed)
