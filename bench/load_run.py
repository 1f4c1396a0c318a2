"""One run of emulated devices against a server at HOST:PORT, in one or several client processes, and its figures."""

from __future__ import annotations

import asyncio
import resource
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing import active_children, get_context

import numpy as np

from bench.commit_log import CommitLog
from bench.load_clients import LiveWorld
from bench.report import Progress
from bench.scenario import Scenario
from bench.sim_result import ServerRecord, SimResult
from wisp_plugin.acceptance_model import shipped_model
from wisp_plugin.controller import SpeculationController
from wisp_plugin.errors import ConfigError
from wisp_plugin.messages import Mode
from wisp_plugin.speculation import make_controller, no_drafts

# Before the first session: time to connect, and to start processes.
_CONNECT_S, _START_PROCESSES_S = 0.3, 3.0
_SWITCH_S = 5e-4


@dataclass(frozen=True, slots=True)
class MakeController:
    """Makes the controller of a session, in any process: a stop rule of `wisp_plugin.speculation`, or `none`."""

    rule: str
    mode: Mode
    draft: str = "int4"

    def __call__(self) -> SpeculationController:
        """A fresh one."""
        return no_drafts() if self.rule == "none" else make_controller(self.rule, self.mode, shipped_model(self.draft))


@dataclass(slots=True)
class LiveRun:
    """What came of a run. Times in seconds."""

    result: SimResult
    log: CommitLog
    lag_s: list[float]
    received_s: list[float]  # when each commit came, by `time.monotonic`
    num_messages: int
    num_mismatches: int  # sessions with a token that is not the target's own
    verified: int
    accepted: int
    client_cpu_s: float
    elapsed_s: float


def run_load(url: str, scenario: Scenario, num_processes: int = 1, label: str = "") -> LiveRun:
    """All devices of `scenario.workload` on the server; its `policy` and costs are the server's affair. With progress
    under `label`, in seconds.

    Raises:
        TransportError, RequestRefused: a session failed.
        ConfigError: no session lasted long enough to be judged, so that there is nothing to tell; or one ended as the
            emulated target ends none.
    """
    label = label or f"{scenario.workload.num_devices} devices, seconds"
    run = _run_processes(url, scenario, num_processes, label)
    if not run.result.judged:
        raise ConfigError(
            f"none of {len(run.result.sessions)} sessions could be judged in {scenario.duration_s:g} s; more "
            "--devices, a longer --duration, a shorter --warm-up or --stagger are needed"
        )
    return run


def _run_processes(url: str, scenario: Scenario, num_processes: int, label: str) -> LiveRun:
    devices = scenario.workload.devices()
    indices = [[d.index for d in devices[i::num_processes]] for i in range(num_processes)]
    start_s = time.monotonic() + (_CONNECT_S if num_processes == 1 else _START_PROCESSES_S)
    if num_processes == 1:
        return _run_devices(url, scenario, indices[0], start_s, label)
    others = set(active_children())
    with ProcessPoolExecutor(num_processes, get_context("spawn")) as pool:
        labels = [label] + [""] * (num_processes - 1)  # all of them are as far
        runs = [
            pool.submit(_run_devices, url, scenario, some, start_s, label)
            for some, label in zip(indices, labels, strict=True)
        ]
        try:
            for run in as_completed(runs):
                run.result()
        except BaseException:  # the pool would wait for the end of the run
            for process in set(active_children()) - others:
                process.terminate()
            raise
        return _merged([run.result() for run in runs])


def _run_devices(url: str, scenario: Scenario, indices: Sequence[int], start_s: float, label: str) -> LiveRun:
    """What the devices `indices` do in this process; without a `label` it shows no progress."""
    sys.setswitchinterval(_SWITCH_S)
    wanted = set(indices)
    devices = [device for device in scenario.workload.devices() if device.index in wanted]

    async def play() -> LiveWorld:
        world = LiveWorld(url, scenario, devices, start_s)
        with Progress(round(scenario.duration_s), label) if label else nullcontext() as progress:
            await world.run(progress)
        return world

    before_s = _cpu_s()
    world = asyncio.run(play())
    return _run_of(world, _cpu_s() - before_s)


def _run_of(world: LiveWorld, cpu_s: float) -> LiveRun:
    scenario, clients = world.scenario, world.clients
    stats = [client.edge.stats for client in clients]
    end_s = max(world.events.now_s, scenario.duration_s)
    result = SimResult(
        tuple(c.name for c in scenario.workload.classes), scenario.duration_s, scenario.warm_up_s, end_s,
        [client.record for client in clients], ServerRecord.of(len(scenario.workload.classes)),
        sum(s.drafting_s for s in stats), sum(s.useful_drafting_s for s in stats),
    )  # fmt: skip
    mismatches = sum(
        not np.array_equal(client.edge.committed, client.tokens.target[: len(client.edge.committed)])
        for client in clients
    )
    return LiveRun(
        result, world.log, world.lag_s, world.received_s, len(world.lag_s), mismatches, sum(s.num_sent for s in stats),
        sum(s.num_accepted for s in stats), cpu_s, end_s,
    )  # fmt: skip


def _merged(runs: Sequence[LiveRun]) -> LiveRun:
    first = runs[0]
    result = SimResult(
        first.result.class_names, first.result.duration_s, first.result.warm_up_s,
        max(run.result.end_s for run in runs), [s for run in runs for s in run.result.sessions], first.result.server,
        sum(run.result.drafting_s for run in runs), sum(run.result.useful_drafting_s for run in runs),
    )  # fmt: skip
    log = CommitLog()
    for run in runs:
        log.arrivals_s |= run.log.arrivals_s
        log.ended_s |= run.log.ended_s
        log.pass_s += run.log.pass_s
    return LiveRun(
        result, log, [lag for run in runs for lag in run.lag_s], [at_s for run in runs for at_s in run.received_s],
        sum(r.num_messages for r in runs), sum(r.num_mismatches for r in runs), sum(r.verified for r in runs),
        sum(r.accepted for r in runs), sum(r.client_cpu_s for r in runs), max(r.elapsed_s for r in runs),
    )  # fmt: skip


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
