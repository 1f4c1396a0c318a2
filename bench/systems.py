"""The systems that are compared, and what may be tuned about each of them (issue: every baseline at its best).

    centralized    continuous batching, no edge (Orca, vLLM, with chunked prefill), decodes first or in turn
    sled           `sync`, drafting to a confidence threshold, FIFO static batches (arXiv 2506.09397)
    published      WISP as published: `sync`, drafting to the predicted rejection, SLO-aware batches (2601.11652)
    slo-central    policy `wisp` without drafts: what scheduling alone brings
    colocated      drafts made on the server at its cost; continuous batching, or earliest deadline first
    fixed-edf      `free`, a fixed draft length, earliest deadline first
    wisp           `free`, `price`, `wisp`: ours, one set of constants everywhere; only devices draft, or a draft model
                   beside the target as well, for who has nothing ready (`server_drafts`, which takes KV memory)
    wisp-edge-only ours without that draft model
    wisp-no-*      ours without drafts of devices, without its controller, its scheduler, its holding; with the same
                   choice of a draft model on the server

A setting is a `Setting`; `Kind` lists those of a system that a search begins with, the usual one first. From the best
of them it goes on to the next chunk sizes and draft lengths (`neighbours`), until none is better: no baseline is held
back by where its list ends, on whatever profile. All have the same KV memory, but that what drafts on the server keeps
its draft model and its KV there too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from bench.baseline_rules import ControllerOf, RuleSpec
from bench.gpu_profile import QWEN3_06B, draft_step_costs, kv_tokens
from bench.scenario import Scenario
from wisp_plugin.messages import Mode
from wisp_plugin.policies import Continuous
from wisp_plugin.wisp_policy import Wisp, WispParameters

WHOLE = 2048  # tokens of a pass: no prompt of the workload is longer
CHUNKS = (32, 48, 64, 80, 96, 112, 128, 192, 256, 384, 512, 768, 1024)  # steps of a search, like the next
LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24)
NO_DRAFTS = RuleSpec("fixed", 0)
PRICE = RuleSpec("price")
SIX, THREE = RuleSpec("fixed", 6), RuleSpec("fixed", 3)
# Of the target's tokens, whose KV a draft model holds that does not draft for everybody: for most, or for a few.
DRAFT_KV_SHARES = (0.7, 0.35)


@dataclass(frozen=True, slots=True)
class Setting:
    """A system with all its numbers. `batch`: sessions and longest wait (ms) of a static batch."""

    system: str
    policy: str
    rule: RuleSpec
    chunk: int = 96
    mode: Mode = Mode.FREE
    batch: tuple[int, float] | None = None
    on_server: bool = False
    server_drafts: int = 0  # draft tokens per pass that the server may add where devices have nothing ready
    draft_kv_share: float = 1.0  # of the target's tokens, whose KV the draft model on the server holds
    decodes_first: bool = False  # `continuous`: prefill gets what running sessions leave of a pass
    parameters: WispParameters | None = None

    @property
    def kv_share(self) -> float:
        """KV memory for the target's tokens, of what there is without a draft model beside it."""
        has_draft = self.on_server or self.server_drafts > 0
        return kv_tokens(draft=QWEN3_06B, draft_share=self.draft_kv_share) / kv_tokens() if has_draft else 1.0

    def serve(self, base: Scenario, draft: str) -> Scenario:
        """`base` with this system; `draft` is the draft model whose acceptance model the controllers use."""
        engine: dict[str, Any] = {"max_pass_tokens": self.chunk}
        if self.batch is not None:
            engine |= {"static_batch_sessions": self.batch[0], "static_batch_wait_ms": self.batch[1]}
        num_kv = int(self.kv_share * base.kv_tokens)
        if self.server_drafts:
            engine["max_server_drafts"] = self.server_drafts
        step = base.draft_step or draft_step_costs(norm=base.costs.norm)
        return replace(
            base,
            policy=self._policy(),
            mode=self.mode,
            controller=ControllerOf(self.rule, draft),
            engine=engine,
            colocated=step if self.on_server else None,
            server_draft=step if self.server_drafts else None,
            server_draft_kv_tokens=int(self.draft_kv_share * num_kv),
            kv_tokens=num_kv,
        )

    def _policy(self) -> Any:
        if self.parameters:
            return partial(Wisp, parameters=self.parameters)
        return partial(Continuous, prefill_wait_s=math.inf) if self.decodes_first else self.policy

    def __str__(self) -> str:
        policy = f"{self.policy}, decodes first" if self.decodes_first else self.policy
        parts = [policy, str(self.rule) if self.rule != NO_DRAFTS else "no drafts", f"chunk {self.chunk}"]
        if self.server_drafts:
            parts.append(f"{self.server_drafts} server drafts (KV {self.draft_kv_share:.0%})")
        if self.batch:
            parts.append(f"batch {self.batch[0]} / {self.batch[1]:g} ms")
        return ", ".join(parts)


def neighbours(setting: Setting) -> list[Setting]:
    """Settings with the next smaller and larger chunk, and the next shorter and longer draft, where there is a chunk
    and a draft of a certain length."""
    chunks = [replace(setting, chunk=chunk) for chunk in _next_to(setting.chunk, CHUNKS)]
    rule = setting.rule
    lengths = _next_to(rule.length, LENGTHS) if rule.name in ("fixed", "confidence", "paper") else []
    return [*chunks, *(replace(setting, rule=replace(rule, length=length)) for length in lengths)]


def _next_to(value: int, steps: Sequence[int]) -> list[int]:
    """The steps before and behind `value`; none if it is no step."""
    if value not in steps:
        return []
    at = steps.index(value)
    return [*steps[max(0, at - 1) : at], *steps[at + 1 : at + 2]]


def reachable(settings: Sequence[Setting]) -> dict[str, Setting]:
    """Every setting that a search from `settings` may come to, by name."""
    found = {str(setting): setting for setting in settings}
    waiting = list(settings)
    while waiting:
        new = {str(n): n for n in neighbours(waiting.pop()) if str(n) not in found}
        found |= new
        waiting += new.values()
    return found


@dataclass(frozen=True, slots=True)
class Kind:
    """A system and the settings that a search begins with, the usual one first. `is_open`: it goes on to others."""

    name: str
    settings: Sequence[Setting]
    is_open: bool = True

    @property
    def sees(self) -> tuple[str, ...]:
        """Fields of a cell, beside SLO, link and profile, that make a difference to the system: without drafts neither
        the devices nor the draft does, with thin devices and drafts made on the server the draft alone."""
        is_thin = all(setting.rule == NO_DRAFTS or setting.on_server for setting in self.settings)
        on_server = any(setting.on_server or setting.server_drafts for setting in self.settings)
        return ("draft",) if is_thin and on_server else () if is_thin else ("speeds", "draft")

    def only(self, setting: Setting) -> Kind:
        """The system with one setting and no other."""
        return replace(self, settings=(setting,), is_open=False)

    def neighbours(self, setting: Setting) -> list[Setting]:
        """Where a search goes on from `setting`."""
        return neighbours(setting) if self.is_open else []

    def parts(self, size: int) -> list[Kind]:
        """The system with at most `size` of its settings each, in their order; 0: as it is."""
        size = size or len(self.settings)
        return [replace(self, settings=self.settings[i : i + size]) for i in range(0, len(self.settings), size)]


def _centralized(chunks: Sequence[int], decodes_first: Sequence[int]) -> Kind:
    usual = [Setting("centralized", "continuous", NO_DRAFTS, chunk) for chunk in chunks]
    first = [Setting("centralized", "continuous", NO_DRAFTS, chunk, decodes_first=True) for chunk in decodes_first]
    return Kind("centralized", [*first, *usual])


def _sled(
    lengths: Sequence[int], thresholds: Sequence[float], batches: Sequence[tuple[int, float]], chunks: Sequence[int]
) -> Kind:
    """`chunks`: of the last length and the first threshold and batch, with chunked prefill."""
    grid = itertools.product(lengths, thresholds, batches)
    rules = [(RuleSpec("confidence", length, threshold), batch) for length, threshold, batch in grid]
    whole = [Setting("sled", "fcfs", rule, WHOLE, Mode.SYNC, batch) for rule, batch in rules]
    longest = RuleSpec("confidence", lengths[-1], thresholds[0])
    return Kind("sled", [*whole, *(Setting("sled", "fcfs", longest, c, Mode.SYNC, batches[0]) for c in chunks)])


def _published(
    thresholds: Sequence[float], chunks: Sequence[int], edf_chunks: Sequence[int], lengths: Sequence[int]
) -> Kind:
    """`chunks` and `lengths`: of policy `wisp` with the first threshold; `edf_chunks`: of `edf` with every one."""
    rules = [RuleSpec("paper", LENGTHS[-1], threshold) for threshold in thresholds]
    ours = [Setting("published", "wisp", rule, WHOLE, Mode.SYNC) for rule in rules]
    ours += [replace(ours[0], chunk=chunk) for chunk in chunks]
    ours += [replace(ours[0], rule=replace(rules[0], length=length)) for length in lengths]
    edf = [Setting("published", "edf", rule, chunk, Mode.SYNC) for rule in rules for chunk in edf_chunks]
    return Kind("published", [*ours, *edf])


def _colocated(policies: Sequence[str], chunks: Sequence[int], rules: Sequence[RuleSpec]) -> Kind:
    grid = itertools.product(policies, chunks, rules)
    return Kind("colocated", [Setting("colocated", p, rule, chunk, on_server=True) for p, chunk, rule in grid])


def _fixed_edf(lengths: Sequence[int], chunks: Sequence[int]) -> Kind:
    settings = [Setting("fixed-edf", "edf", RuleSpec("fixed", n), chunks[0]) for n in lengths]
    return Kind("fixed-edf", [*settings, *(replace(settings[0], chunk=c) for c in chunks[1:])])


_EDGE_ONLY = Setting("wisp", "wisp", PRICE, WHOLE)
_OURS, _OURS_LITTLE_KV = [replace(_EDGE_ONLY, server_drafts=3, draft_kv_share=share) for share in DRAFT_KV_SHARES]
WISP = Kind("wisp", [_EDGE_ONLY, _OURS, replace(_OURS, server_drafts=2), _OURS_LITTLE_KV])
SLO_CENTRAL = Kind("slo-central", [Setting("slo-central", "wisp", NO_DRAFTS, WHOLE)])


def _without(name: str, *changes: dict[str, Any], settings: Sequence[Setting] = WISP.settings) -> Kind:
    """WISP with its own choice of a draft model on the server, and otherwise each of `changes`."""
    return Kind(name, [replace(setting, system=name, **change) for change in changes for setting in settings])


ABLATIONS = (
    _without("wisp-edge-only", {}, settings=[_EDGE_ONLY]),
    _without("wisp-no-devices", {"rule": NO_DRAFTS}, settings=WISP.settings[1:]),
    _without("wisp-no-controller", {"rule": SIX}, {"rule": THREE}),
    _without("wisp-no-scheduler", *({"policy": "edf", "chunk": chunk} for chunk in (96, 192))),
    _without("wisp-no-holding", {"parameters": WispParameters(holds=False)}),
)
# What the full sweeps begin with; `FEW` are those that were best in the default mix.
FULL: tuple[Kind, ...] = (
    _centralized((96, 64, 128, 192, 256, 384), (96, 80, 112, 128)),
    _sled((4, 1, 2, 6, 12, 8), (0.3, 0.6), ((16, 10.0), (64, 0.0), (8, 10.0)), (128, 192)),
    _published((0.7, 0.5, 0.3), (192,), (128, 192), (1, 2, 4)),
    SLO_CENTRAL,
    _colocated(
        ("edf", "continuous"),
        (192, 256, 384),
        [*(RuleSpec("fixed", n) for n in (1, 2, 3, 4)), RuleSpec("paper", 8, 0.6)],
    ),
    _fixed_edf((4, 2, 6, 8), (192, 96, 256, 384)),
)
FEW: tuple[Kind, ...] = (
    _centralized((192, 256), (96, 112)),
    _sled((4, 1, 8), (0.3,), ((16, 10.0),), (128,)),
    _published((0.7,), (192,), (128,), (1, 4)),
    SLO_CENTRAL,
    _colocated(("edf",), (192, 256), [RuleSpec("fixed", 1), RuleSpec("fixed", 2)]),
    _fixed_edf((4, 2), (192, 96, 256)),
)
BASELINES = tuple(kind.name for kind in FULL)
SYSTEMS = {kind.name: kind for kind in (*FULL, WISP, *ABLATIONS)}
# What people call them, in tables and plots.
LABELS = {
    "wisp": "WISP",
    "centralized": "centralized serving",
    "slo-central": "our scheduler, no drafts",
    "sled": "SLED",
    "published": "WISP as published",
    "colocated": "co-located speculation",
    "fixed-edf": "fixed draft length, EDF",
    "wisp-no-controller": "WISP without its controller",
    "wisp-no-scheduler": "WISP without its scheduler",
    "wisp-no-holding": "WISP without holding",
    "wisp-edge-only": "WISP, devices draft alone",
    "wisp-no-devices": "WISP, server drafts alone",
}
