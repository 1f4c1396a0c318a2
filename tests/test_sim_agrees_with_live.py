"""The scheduler decides in the simulator as it decided live: a recorded run, played again in virtual time.

Live: an engine, the emulated verifier that sleeps for as long as a pass takes, and devices in
threads, with the clock of the machine. Recorded are the messages with the times of their arrival, every look at the
clock, and every call of the scheduler with what came of it. Then the simulator's engine gets the same messages at the
same times; it has to make the same calls and to get the same plans, to the last digit.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from bench.gpu_cost import A100_32G
from bench.load_options import dilated
from bench.scenario import Scenario
from bench.simulator import build_engine
from bench.workload import Workload
from tests.test_emulated_verifier import PROFILE, RING, Answers
from triton_models.emulated_verifier import EmulatedVerifier
from wisp_plugin import scheduler
from wisp_plugin.config import EngineConfig
from wisp_plugin.controller import SpeculationController
from wisp_plugin.edge_session import EdgeSession, Step
from wisp_plugin.engine import Engine
from wisp_plugin.estimator import Estimator
from wisp_plugin.kv_blocks import BlockPool
from wisp_plugin.messages import BatchPlan, Commit, Draft, Open, PassOutcome, Sampling, Slo
from wisp_plugin.scheduler import make_scheduler
from wisp_plugin.stop_rules import Fixed

NUM_DEVICES, NUM_TOKENS = 8, 40
COSTS = dilated(A100_32G, 0.1)  # a pass takes 4 ms
SCENARIO = Scenario(Workload(num_devices=NUM_DEVICES), policy="wisp", costs=COSTS)
Call = tuple[Any, ...]


@dataclass
class Recording:
    """What happened, in order: per step the messages taken in, and all looks at the clock in the engine's thread."""

    arrived: list[list[tuple[float, Open | Draft]]] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)


def record_calls(engine: Engine, calls: list[Call]) -> None:
    """Note every call that the engine makes of its scheduler."""
    scheduler: Any = engine.scheduler
    plan, complete = scheduler.plan, scheduler.complete

    def noted_plan(now_s: float) -> BatchPlan:
        made: BatchPlan = plan(now_s)
        items = [(i.session, i.num_cached, i.num_new_tokens, i.num_draft_tokens, i.reason) for i in made.items]
        calls.append(("plan", now_s, items, made.evict, made.predicted_s, made.price, made.num_held, made.wake_s))
        return made

    def noted_complete(
        made: BatchPlan, outcomes: list[PassOutcome], started_s: float, seconds: float, drafting_s: float
    ) -> list[Commit]:
        commits: list[Commit] = complete(made, outcomes, started_s, seconds, drafting_s)
        told = [(c.session, c.start, c.tokens.tolist(), c.origin.tolist(), c.status, c.load_price) for c in commits]
        calls.append(("complete", started_s, seconds, told))
        return commits

    scheduler.plan, scheduler.complete = noted_plan, noted_complete
    for name in ("add", "note", "remove"):
        original = getattr(scheduler, name)

        def noted(what: Any, name: str = name, original: Callable[[Any], None] = original) -> None:
            calls.append((name, what if isinstance(what, str) else what.id))
            original(what)

        setattr(scheduler, name, noted)


def record_messages(engine: Any, recording: Recording) -> None:
    """Note which messages the engine takes in, and when they had arrived."""
    on_open, on_draft = engine._on_open, engine._on_draft

    def taken_open(message: Open, reply: Answers, now_s: float) -> None:
        recording.arrived[-1].append((now_s, message))
        on_open(message, reply, now_s)

    def taken_draft(message: Draft, now_s: float) -> None:
        recording.arrived[-1].append((now_s, message))
        on_draft(message, now_s)

    engine._on_open, engine._on_draft = taken_open, taken_draft


class DeviceReply(Answers):
    """A reply that hands commits to a device in another thread."""

    def __init__(self) -> None:
        super().__init__()
        self.arriving: queue.SimpleQueue[Commit] = queue.SimpleQueue()

    def send(self, commit: Commit) -> None:
        self.arriving.put(commit)


def run_device(engine: Engine, number: int) -> None:
    """A device that drafts a token in 2 ms, every fifth of them wrong."""
    prompt = RING.tokens(number, 0, 30 + number)
    slo = Slo(1000.0, (5.0, 8.0, 12.0)[number % 3])
    opened = Open(f"{number:032x}", prompt, len(prompt), NUM_TOKENS, Sampling(seed=number), slo)
    edge, reply = EdgeSession(opened, SpeculationController(Fixed(6)), 1), DeviceReply()
    engine.submit(edge.reopen(), reply)
    while (step := edge.next_step(time.monotonic())) is not Step.DONE:
        if step is Step.SEND:
            engine.submit(edge.take_message(time.monotonic()), Answers())
        elif step is Step.DRAFT:
            job = edge.begin_draft()
            time.sleep(0.002)  # what drafting takes
            position = len(job.context)
            token = int(RING.tokens(number, position, position + 1)[0]) ^ (position % 5 == 0)
            edge.on_drafted(job, token, 0.002)
        while step is Step.WAIT or not reply.arriving.empty():
            edge.on_commit(reply.arriving.get(timeout=10.0), time.monotonic())
            step = Step.DRAFT
    tokens = edge.generated
    assert np.array_equal(tokens, RING.tokens(number, len(prompt), len(prompt) + NUM_TOKENS))


def run_live() -> Recording:
    """Serve all devices on the machine's clock, and record it."""
    recording, served_by = Recording(), threading.get_ident()

    def clock() -> float:
        now_s = time.monotonic()
        if threading.get_ident() == served_by:
            recording.times_s.append(now_s)
        return now_s

    verifier = EmulatedVerifier(RING, replace(PROFILE, costs=COSTS), BlockPool(256, 32))
    config = EngineConfig(max_sessions=256, max_pass_sessions=256, max_load=0.0, policy="wisp")
    engine = Engine(make_scheduler(config, verifier.pool, Estimator(COSTS)), verifier, config, clock)
    record_calls(engine, recording.calls)
    record_messages(engine, recording)
    limit_s = time.monotonic() + 60.0
    with ThreadPoolExecutor(NUM_DEVICES) as pool:
        devices = [pool.submit(run_device, engine, number) for number in range(NUM_DEVICES)]
        while not all(device.done() for device in devices):
            assert time.monotonic() < limit_s, "the devices do not come to an end"
            recording.arrived.append([])
            if not engine.step():
                engine._inbox.wait(0.01)
    for device in devices:
        device.result()  # a device that failed fails the test
    return recording


def play_again(recording: Recording) -> list[Call]:
    """The calls that the simulator's engine makes with the same messages at the same times."""
    times_s = deque(recording.times_s)
    arrival_s: list[float] = []
    clock: Callable[[], float] = lambda: arrival_s.pop() if arrival_s else times_s.popleft()  # noqa: E731
    verifier = EmulatedVerifier(RING, replace(PROFILE, costs=COSTS), BlockPool(256, 32), sleep=lambda seconds: None)
    verifier.pass_s = lambda items: 0.0  # type: ignore[method-assign]  # the recorded clock says how long it took
    calls: list[Call] = []
    engine = build_engine(SCENARIO, verifier, clock)  # type: ignore[arg-type]
    record_calls(engine, calls)
    for messages in recording.arrived:
        for at_s, message in messages:
            arrival_s.append(at_s)
            engine.submit(message, Answers())
        engine.step()
    assert not times_s, "the simulator's engine looked at the clock less often"
    return calls


@pytest.mark.skipif(not scheduler.__file__.endswith(".py"), reason="methods of a compiled class cannot be replaced")
def test_the_scheduler_decides_as_it_did_live() -> None:
    recording = run_live()
    plans = [call for call in recording.calls if call[0] == "plan" and call[2]]
    assert len(plans) >= NUM_TOKENS // 4
    assert sum(item[3] for plan in plans for item in plan[2]) > NUM_TOKENS, "drafts were verified"
    assert max(len(plan[2]) for plan in plans) > 2, "sessions shared passes"
    again = play_again(recording)
    for live, simulated in zip(recording.calls, again, strict=True):
        assert live == simulated
