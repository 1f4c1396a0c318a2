"""Open-loop load on a Triton model: every request leaves at its time, whatever has become of those before it.

Latency counts from the time at which a request was due to leave, so that a client that falls behind makes the figures
worse and never better (no coordinated omission).
"""

from __future__ import annotations

import queue
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import tritonclient.grpc as triton

from wisp_plugin.errors import ModelError

_DRAIN_S = 120.0  # for the answers behind the last request
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of request: its tokens, the time it has, its priority, and its share of all requests."""

    name: str
    num_tokens: int
    slo_s: float
    priority: int
    share: float


@dataclass(frozen=True, slots=True)
class Schedule:
    """When requests leave, seconds from the start, and of which kind each is: the same for every system."""

    kinds: tuple[Kind, ...]
    due_s: Floats
    kind_of: npt.NDArray[np.int64]

    @classmethod
    def poisson(cls, kinds: tuple[Kind, ...], requests_per_s: float, duration_s: float, seed: int) -> Schedule:
        """Poisson arrivals; kinds drawn by their shares."""
        random = np.random.default_rng(seed)
        gaps_s = random.exponential(1.0 / requests_per_s, int(2 * requests_per_s * duration_s) + 16)
        due_s = np.cumsum(gaps_s)
        due_s = due_s[due_s < duration_s]
        shares = np.array([kind.share for kind in kinds])
        return cls(kinds, due_s, random.choice(len(kinds), len(due_s), p=shares / shares.sum()))


@dataclass(frozen=True, slots=True)
class LoadResult:
    """Latency of every request in seconds."""

    schedule: Schedule
    latency_s: Floats

    def violations(self, kind: int | None = None) -> int:
        """Requests (of one kind) that were answered later than their SLO."""
        slo_s = np.array([kind.slo_s for kind in self.schedule.kinds])[self.schedule.kind_of]
        is_late = self.latency_s > slo_s
        return int(is_late.sum() if kind is None else is_late[self.schedule.kind_of == kind].sum())

    @property
    def requests_per_s(self) -> float:
        """Requests answered per second, from the first due time to the last: what is still in the queue is missing."""
        due_s = self.schedule.due_s
        return int((due_s + self.latency_s <= due_s[-1]).sum()) / float(due_s[-1] - due_s[0])


def alone_seconds(url: str, model: str, kind: Kind, times: int = 9) -> float:
    """Median time of a request of this kind that is alone at the server."""
    times_s = []
    with triton.InferenceServerClient(url) as client:
        for _ in range(times):
            start_s = time.perf_counter()
            client.infer(model, _input(kind.num_tokens))
            times_s.append(time.perf_counter() - start_s)
    return float(np.median(times_s))


def run_load(url: str, model: str, schedule: Schedule, with_priority: bool) -> LoadResult:
    """Send the schedule to `model` and wait for all answers. Raises ModelError if one fails or does not come."""
    client = triton.InferenceServerClient(url)
    answers: queue.SimpleQueue[tuple[int, float, Exception | None]] = queue.SimpleQueue()
    inputs = [_input(kind.num_tokens) for kind in schedule.kinds]
    start_s, start_unix_s = time.perf_counter() + 0.2, time.time() + 0.2
    for number, (due_s, which) in enumerate(zip(schedule.due_s.tolist(), schedule.kind_of.tolist(), strict=True)):
        kind = schedule.kinds[which]
        time.sleep(max(0.0, start_s + due_s - time.perf_counter()))
        client.async_infer(
            model,
            inputs[which],
            callback=lambda result, error, n=number: answers.put((n, time.perf_counter(), error)),
            priority=kind.priority if with_priority else 0,
            parameters={"wisp_deadline_us": round(1e6 * (start_unix_s + due_s + kind.slo_s))},
        )
    latency_s = np.full(len(schedule.due_s), np.nan)
    deadline_s = time.perf_counter() + _DRAIN_S
    for _ in range(len(schedule.due_s)):
        try:
            number, at_s, error = answers.get(timeout=max(0.0, deadline_s - time.perf_counter()))
        except queue.Empty:
            raise ModelError(f"{model} has left requests without answer for {_DRAIN_S:g} s") from None
        if error is not None:
            raise ModelError(f"{model} failed: {' '.join(str(error).split())}")
        latency_s[number] = at_s - start_s - schedule.due_s[number]
    client.close()
    return LoadResult(schedule, latency_s)


def _input(num_tokens: int) -> list[Any]:
    tensor = triton.InferInput("IDS", [1, num_tokens], "INT32")
    tensor.set_data_from_numpy(np.ones((1, num_tokens), np.int32))
    return [tensor]
