"""What the engine counts over its life."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from wisp_plugin.messages import BatchPlan, Commit, Origin


def _counter(text: str) -> float:
    """A field of `Totals` with the help text of its Prometheus counter."""
    return field(default=0.0, metadata={"text": text})


@dataclass(slots=True)
class Totals:
    """Counters since the start of the engine. Names become `wisp_NAME_total`.

    Acceptance rate = accepted_tokens / verified_tokens; tokens per pass = committed_tokens / commits.
    """

    passes: float = _counter("Passes of the target model")
    pass_seconds: float = _counter("Time of passes, forward and choice of tokens, in seconds")
    new_tokens: float = _counter("Tokens computed by passes: prefill, decoding and drafts")
    commits: float = _counter("Commits: parts of a session in a pass that gave it tokens")
    committed_tokens: float = _counter("Tokens committed to sessions")
    verified_tokens: float = _counter("Draft tokens verified by passes")
    accepted_tokens: float = _counter("Draft tokens accepted")
    evictions: float = _counter("Sessions whose KV was dropped to make room")

    def count_pass(self, plan: BatchPlan, commits: Sequence[Commit], measured_s: float) -> None:
        """Count a pass."""
        self.passes += 1
        self.pass_seconds += measured_s
        self.new_tokens += plan.num_new_tokens
        self.evictions += len(plan.evict)
        self.commits += len(commits)
        self.committed_tokens += sum(len(commit.tokens) for commit in commits)
        self.verified_tokens += sum(item.num_draft_tokens for item in plan.items)
        self.accepted_tokens += sum(int(np.count_nonzero(c.origin == Origin.ACCEPTED)) for c in commits)

    @classmethod
    def descriptions(cls) -> dict[str, str]:
        """Prometheus name and help text of every counter, in the order of `values`."""
        return {f"wisp_{f.name}_total": str(f.metadata["text"]) for f in dataclasses.fields(cls)}

    def values(self) -> tuple[float, ...]:
        """The counters, in the order of `descriptions`."""
        return dataclasses.astuple(self)
