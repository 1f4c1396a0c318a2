"""What may be tuned about a system: a `Setting` is one with all its numbers, a `Kind` those that a search begins with.

From the best of them a search goes on to the next chunk sizes and draft lengths (`neighbours`), until none is better:
no baseline is held back by where its list ends, on whatever profile. All have the same KV memory, but that what drafts
on the server keeps its draft model and its KV there too.
"""

from __future__ import annotations

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

    @property
    def before_last(self) -> Kind | None:
        """The system without its last setting, of which a search may go on with the last alone; None if its settings
        lead to others, or there is only one."""
        if len(self.settings) == 1 or any(map(self.neighbours, self.settings)):
            return None
        return replace(self, settings=self.settings[:-1])

    def parts(self, size: int) -> list[Kind]:
        """The system with at most `size` of its settings each, in their order; 0: as it is."""
        size = size or len(self.settings)
        return [replace(self, settings=self.settings[i : i + size]) for i in range(0, len(self.settings), size)]
