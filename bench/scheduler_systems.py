"""Systems that `wisp-bench scheduler` compares, and what may be tuned about the baselines.

A baseline is compared at its best. Its settings are tried in short runs, first all of its kind with one chunk size,
then all chunk sizes with the best of these. The best goodput of arrivals wins, then attainment, then the earlier.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from bench.lab import Figures, Lab
from bench.report import print_table
from bench.scenario import Scenario
from bench.simulator import capacity
from wisp_plugin.messages import Mode
from wisp_plugin.wisp_policy import Wisp, WispParameters

CHUNKS = (64, 96, 128, 192, 256, 512)
FREE_AHEAD = (3, 6)
SLED_AHEAD, SLED_SESSIONS, SLED_WAIT_MS = (2, 4, 6, 8), (8, 16, 64), (0.0, 10.0)  # 64: all that wait
WHOLE_PROMPTS = 2048  # no prompt of the workload is longer
WISP_CHUNK, WISP_AHEAD = WHOLE_PROMPTS, 6
# Timed runs start their devices over the whole warm-up: in less time they would queue for prefill as never later.
WARM_UP_S = 12.0
_FIRST_CHUNK = 128


@dataclass(frozen=True, slots=True)
class System:
    """A way to serve: policy, mode, how far devices draft ahead (0: not at all), and limits of a pass.

    `max_pass_tokens` is the chunk size of a baseline. The batch is that of `fcfs` alone.
    """

    name: str
    policy: str
    ahead: int
    max_pass_tokens: int = _FIRST_CHUNK
    mode: Mode = Mode.FREE
    batch_sessions: int | None = None
    batch_wait_ms: float | None = None
    has_chunks: bool = True  # the chunk size may be tuned
    parameters: WispParameters | None = None

    def serve(self, base: Scenario) -> Scenario:
        """`base` with this system as its server."""
        engine: dict[str, Any] = {"max_pass_tokens": self.max_pass_tokens}
        if self.batch_sessions is not None:
            engine |= {"static_batch_sessions": self.batch_sessions, "static_batch_wait_ms": self.batch_wait_ms}
        policy = partial(Wisp, parameters=self.parameters) if self.parameters else self.policy
        return replace(base, policy=policy, ahead=self.ahead, mode=self.mode, engine=engine)

    @property
    def setting(self) -> str:
        """What was tuned, for tables."""
        batch = "" if self.batch_sessions is None else f", batch {self.batch_sessions} / {self.batch_wait_ms:g} ms"
        return f"ahead {self.ahead}, chunk {self.max_pass_tokens}{batch}"


WISP = System("wisp", "wisp", WISP_AHEAD, WISP_CHUNK)
WISP_ALONE = System("wisp, no drafts", "wisp", 0, WISP_CHUNK)


def centralized() -> list[System]:
    """`continuous` without drafts."""
    return [System("continuous, no drafts", "continuous", 0)]


def with_drafts(policy: str) -> list[System]:
    """`continuous` or `edf` with drafts."""
    return [System(policy, policy, ahead) for ahead in FREE_AHEAD]


def sled() -> list[System]:
    """`fcfs`: SLED as published: devices draft a fixed length and wait, a static batch takes requests as they are."""
    grid = itertools.product(SLED_AHEAD, SLED_SESSIONS, SLED_WAIT_MS)
    return [
        System("fcfs", "fcfs", ahead, WHOLE_PROMPTS, Mode.SYNC, num_sessions, wait_ms, has_chunks=False)
        for ahead, num_sessions, wait_ms in grid
    ]


def sled_with_chunks() -> list[System]:
    """SLED with chunked prefill (Sarathi-Serve, 2024), which it has not been published with; batches of 16."""
    return [System("fcfs, chunked", "fcfs", ahead, _FIRST_CHUNK, Mode.SYNC, 16, 10.0) for ahead in SLED_AHEAD]


BASELINES: tuple[list[System], ...] = (
    sled(),
    sled_with_chunks(),
    with_drafts("edf"),
    with_drafts("continuous"),
    centralized(),
)


def tune(lab: Lab, base: Scenario, kinds: Sequence[Sequence[System]], chunks: Sequence[int] = CHUNKS) -> list[System]:
    """The best system of each kind at serving `base` (timed and drained), see above. Prints what was tried."""
    tried: list[tuple[System, Figures]] = []
    bests = _best_of_each(lab, base, "settings", kinds, tried)
    rechunked = [[replace(s, max_pass_tokens=n) for n in chunks] if s.has_chunks else [s] for s in bests]
    bests = _best_of_each(lab, base, "chunk sizes", rechunked, tried)
    names = ("attainment", "arrivals_goodput", "interference_ms_tight")
    rows = [(s.name, s.setting, *(f[name] for name in names), "best" if s in bests else "") for s, f in tried]
    title = f"Sweep at {base.workload.num_devices} devices, {base.duration_s:g} s each"
    print_table(title, ("system", "setting", "attainment", "goodput", "tight interf. ms", ""), rows)
    return bests


def best_centralized(lab: Lab, base: Scenario, chunks: Sequence[int], num_seeds: int) -> tuple[System, int]:
    """`continuous` without drafts with its best chunk size, and its capacity: `num_seeds` seeds, runs twice as long.

    Chunk sizes are tried with `base` and one seed. Prints what was tried.
    """
    systems = [replace(system, max_pass_tokens=chunk) for chunk in chunks for system in centralized()]
    tried = lab.map("chunk sizes of continuous", capacity, [s.serve(base) for s in systems])
    best = systems[max(range(len(systems)), key=lambda i: tried[i])]
    long = replace(base, duration_s=2 * base.duration_s, warm_up_s=2 * base.warm_up_s)
    reached = lab.capacity("capacity of continuous", best.serve(long), num_seeds)
    arrivals = "timed arrivals" if base.workload.timed else "closed loop"
    rows = [(system.setting, num_devices) for system, num_devices in zip(systems, tried, strict=True)]
    print_table(f"Capacity of continuous without drafts, {arrivals}", ("setting", "devices"), rows)
    return best, reached


def _best_of_each(
    lab: Lab, base: Scenario, what: str, kinds: Sequence[Sequence[System]], tried: list[tuple[System, Figures]]
) -> list[System]:
    systems = [system for kind in kinds for system in kind]
    figures = lab.means(f"sweep of {what}", [system.serve(base) for system in systems], 1)
    answers = iter(zip(systems, figures, strict=True))
    bests = []
    for kind in kinds:
        own = [next(answers) for _ in kind]
        tried += own
        bests.append(max(own, key=lambda pair: (pair[1]["arrivals_goodput"], pair[1]["attainment"]))[0])
    return bests
