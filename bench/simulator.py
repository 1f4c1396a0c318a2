"""Simulated serving in virtual time: the real engine, scheduler and sessions, server and edge.

Only three things are modelled: the link (`Link`), the device's drafting (`SimulatedClient`) and the duration of a pass
(`SimulatedVerifier`, from `Costs`). Deterministic by seed: no threads, no real clock, no global randomness.

    result = simulate(Scenario(Workload(num_devices=64), policy="wisp"))
    result.figures()["attainment"]
"""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Callable, Iterator

from bench.arrivals import Arrivals
from bench.bisection import most_that_hold
from bench.report import Progress
from bench.scenario import Scenario
from bench.sim_client import SimulatedClient
from bench.sim_colocated import DraftingCost
from bench.sim_result import ServerRecord, SimResult, SimulationError
from bench.sim_verifier import PassTiming, SimulatedDraftModel, SimulatedVerifier
from bench.virtual_time import EventQueue
from bench.workload import SessionSpec
from wisp_plugin.config import EngineConfig
from wisp_plugin.drafting_verifier import DraftingVerifier, DraftLimits
from wisp_plugin.engine import Engine
from wisp_plugin.estimator import Estimator
from wisp_plugin.messages import Commit, Draft, Open, Status
from wisp_plugin.scheduler import POLICIES, Scheduler


def build_engine(
    scenario: Scenario,
    verifier: SimulatedVerifier,
    clock: Callable[[], float],
    draft: SimulatedDraftModel | None = None,
) -> Engine:
    """The real engine with the scenario's policy, and with `draft` beside the target if the server drafts as well."""
    room = max(256, 2 * scenario.workload.num_devices)
    config = EngineConfig(**{"max_sessions": room, "max_pass_sessions": room, "max_load": 0.0, **scenario.engine})
    estimator = Estimator(scenario.believed_costs or scenario.costs)
    make_policy = POLICIES[scenario.policy] if isinstance(scenario.policy, str) else scenario.policy
    draft_steps = Estimator(scenario.server_draft) if scenario.server_draft else None
    scheduler = Scheduler(make_policy(config, estimator), config, verifier.pool, estimator, draft_steps)
    if draft is None or draft_steps is None:
        return Engine(scheduler, verifier, config, clock)
    limits = DraftLimits(catch_up_tokens=config.max_pass_tokens)
    drafting = DraftingVerifier(verifier, draft, draft.pool, draft_steps, clock, limits)
    return Engine(scheduler, drafting, config, clock, drafting_s=lambda: drafting.drafting_s)


def simulate(scenario: Scenario, events: EventQueue | None = None) -> SimResult:
    """Run a scenario, with a queue of your own if you like to see what happens.

    Raises SimulationError if a request fails or sessions are left that nothing would serve.
    """
    with _no_collector():
        return _World(scenario, events).run()


@contextlib.contextmanager
def _no_collector() -> Iterator[None]:
    """Meanwhile nothing looks for cycles among the sessions of the run, which takes a tenth of its time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class _Reply:
    """Answers of one client: commits reach the device behind the downlink, other answers only if they are failures."""

    __slots__ = ("_client", "_world", "was_refused")

    def __init__(self, world: _World, client: SimulatedClient) -> None:
        self._world, self._client = world, client
        self.was_refused = False

    def send(self, commit: Commit) -> None:
        self.was_refused = commit.status is Status.OVERLOADED
        if commit.status is not Status.RUNNING:
            self._world.verifier.note_end(commit.session)
        events = self._world.events
        if events.now_s >= self._world.scenario.warm_up_s:
            self._world.verifier.record.committed += len(commit.tokens)
        self._client.answer(commit)

    def finish(self) -> None:
        pass

    def fail(self, message: str) -> None:
        if not self.was_refused:  # drafts that were on their way when their session was refused
            self._world.failures.append(message)

    def is_cancelled(self) -> bool:
        return False


class _World:
    """Clients, links and the engine's loop."""

    def __init__(self, scenario: Scenario, events: EventQueue | None = None) -> None:
        self.scenario = scenario
        self.events = EventQueue() if events is None else events
        self.failures: list[str] = []  # of answers: the engine survives what a reply raises
        self._clients: dict[str, SimulatedClient] = {}
        self._replies: dict[str, _Reply] = {}
        self._num_active = 0
        self._drafting = DraftingCost(scenario.colocated) if scenario.colocated else None
        timing = PassTiming(scenario.costs, scenario.noise_sigma, scenario.seed, scenario.warm_up_s, self._drafting)
        record = ServerRecord.of(len(scenario.workload.classes))
        self.verifier = SimulatedVerifier(timing, scenario.kv_tokens, record, self.events, self._clients)
        draft = None
        if scenario.server_draft:
            room = scenario.server_draft_kv_tokens
            draft = SimulatedDraftModel(scenario.server_draft, room, self.verifier, self.events, self._clients)
        self._engine = build_engine(scenario, self.verifier, lambda: self.events.now_s, draft)
        self.verifier.sessions = lambda: self._engine.scheduler.sessions
        self._settings = scenario.client_settings()
        self._devices = scenario.workload.devices()
        self._arrivals = Arrivals(scenario.workload, self._devices, scenario.duration_s)
        for device in self._devices:
            self._schedule_next(device.index)

    def run(self) -> SimResult:
        """The engine's loop until the end of the run."""
        scenario, events, engine = self.scenario, self.events, self._engine
        while (self._arrivals.num_sources and events.now_s < scenario.duration_s) or (
            scenario.drain and self._num_active
        ):
            if not engine.step():
                self._advance_idle()
            if self.failures:
                raise SimulationError(f"at {events.now_s:.3f} s a request failed: {self.failures[0]}")
        return self._result()

    def _advance_idle(self) -> None:
        """Nothing to run: on to what happens next."""
        events, wake_s = self.events, self._engine.wake_s
        if wake_s <= events.now_s:
            raise SimulationError(f"at {events.now_s:.3f} s the scheduler ran nothing, but asked to plan again at once")
        next_s = min(events.next_s, wake_s)
        if events.now_s < self.scenario.duration_s:
            next_s = min(next_s, self.scenario.duration_s)
        if math.isinf(next_s):
            raise SimulationError(f"{self._num_active} sessions are left at {events.now_s:.3f} s, none is served")
        events.advance(next_s)

    # -- sessions -----------------------------------------------------------------------------------------------

    def _schedule_next(self, device_index: int) -> None:
        """The device's next session, at its time or now."""
        self._arrivals.schedule_next(device_index, self.events, self._start)

    def _start(self, spec: SessionSpec) -> None:
        scenario = self.scenario
        tokens = scenario.tokens_of(spec)
        device = self._devices[spec.device]
        make_client = self._drafting.client if self._drafting else SimulatedClient
        client = make_client(self.events, spec, device, tokens, self._settings, self._submit, self._end)
        self._clients[client.id] = client
        self._replies[client.id] = _Reply(self, client)
        self._num_active += 1
        client.open()
        if scenario.workload.timed:
            self._schedule_next(spec.device)

    def _submit(self, client: SimulatedClient, message: Open | Draft) -> None:
        self._engine.submit(message, self._replies[client.id])

    def _end(self, client: SimulatedClient) -> None:
        self._num_active -= 1
        if not self.scenario.workload.timed:
            self._schedule_next(client.record.spec.device)

    def _result(self) -> SimResult:
        scenario, clients = self.scenario, self._clients.values()
        for client in clients:
            self.verifier.note_end(client.id)
        return SimResult(
            tuple(c.name for c in scenario.workload.classes),
            scenario.duration_s,
            scenario.warm_up_s,
            self.events.now_s,
            [client.record for client in clients],
            self.verifier.record,
            sum(client.edge.stats.drafting_s for client in clients),
            sum(client.edge.stats.useful_drafting_s for client in clients),
        )


def attainment_of(scenario: Scenario) -> float:
    """Attainment of one run."""
    return simulate(scenario).attainment()


def capacity(
    scenario: Scenario,
    attainment: float = 0.95,
    max_devices: int = 1024,
    progress: Progress | None = None,
    measure: Callable[[Scenario], float] = attainment_of,
) -> int:
    """The most devices with at least `attainment` of sessions meeting their SLO (0: not even one).

    To 3 % or one device, if more devices never raise the attainment, which `measure` tells.
    """

    def holds(num_devices: int) -> bool:
        reached = measure(scenario.with_devices(num_devices))
        if progress is not None:
            progress.step(note=f"{num_devices} devices: {reached:.3f}")
        return reached >= attainment

    return most_that_hold(holds, 0, 8, max_devices, 0.03)
