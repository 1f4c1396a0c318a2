"""Hundreds of devices in one process, on a real server in real time.

Every device is the client of the simulation (`sim_client`: the real `EdgeSession` and controller, a link, a draft step
that takes its time), but behind the link there is a gRPC stream to a real server. A thread per device would measure
threads: here all of them share one event loop, with a stream per session on a few connections.

Nothing is omitted where this process is late: what is due happens in the order of its due times and at those times by
its own clock (`LiveEvents`), so a device drafts as fast as it would, sessions start when they should, and latency
counts from there. What may be late in truth is what leaves for the server: `lag_s` tells by how much.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import grpc

from bench.arrivals import Arrivals
from bench.commit_log import CommitLog, RecordingEvents
from bench.load_tokens import session_seed
from bench.load_wire import STREAM_METHOD, decode, encode
from bench.report import Progress
from bench.scenario import Scenario
from bench.sim_client import SimulatedClient
from bench.sim_result import SimulationError
from bench.workload import Device, SessionSpec
from edge_runtime.transport import VERIFIER_MODEL
from wisp_plugin.errors import ConfigError, RequestRefused, TransportError
from wisp_plugin.messages import Close, Commit, Draft, Open, Sampling, Status
from wisp_plugin.wire import new_session_id

log = logging.getLogger(__name__)

STREAMS_PER_CONNECTION = 32
_LOOK_S = 0.02  # the main task looks this often whether the run is over
_CLOSE_S = 3.0  # for the server's last words
_WRONG_TARGET = "is the target of --server the emulated one of this --profile and --trace?"


class LiveEvents(RecordingEvents):
    """Events in real time, on the running event loop. Each happens at or after its time, and `now_s` is its time."""

    def __init__(self, log: CommitLog, start_s: float) -> None:
        """`start_s`: when the clock of the events shows 0, by `time.monotonic`."""
        super().__init__(log)
        self._loop = asyncio.get_running_loop()
        self._start_s = start_s
        self._timer: asyncio.TimerHandle | None = None
        self._is_advancing = False
        self.has_stopped = False
        self.error: Exception | None = None  # of an event: nothing happens after it

    @property
    def real_s(self) -> float:
        """What time it really is."""
        return time.monotonic() - self._start_s

    def schedule(self, at_s: float, callback: Callable[[Any], None], argument: Any) -> None:
        """See `EventQueue.schedule`."""
        super().schedule(at_s, callback, argument)
        if not self._is_advancing and self.error is None and not self.has_stopped:
            self._arm()

    def stop(self) -> None:
        """Let nothing happen any more. `now_s` stays what it is."""
        self.has_stopped = True
        self._disarm()

    def _arm(self) -> None:
        """Come back for the next event."""
        wanted_s = self._start_s + self.next_s
        if self._timer is not None:
            if self._timer.when() <= wanted_s:
                return
            self._timer.cancel()
        self._timer = self._loop.call_at(wanted_s, self.catch_up)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def catch_up(self) -> None:
        """Let what is due by now happen. What an event raises is kept in `error`."""
        if self.error is not None or self.has_stopped:
            return
        self._disarm()
        self._is_advancing = True
        try:
            if (real_s := self.real_s) >= self.now_s:  # else the clock has not begun
                self.advance(real_s)
        except Exception as error:  # raised here, the event loop would print it and go on
            self.error = error
        finally:
            self._is_advancing = False
        if self._heap and self.error is None:
            self._arm()


class _Session:
    """One session's stream: requests from a queue, commits into the events of its client."""

    def __init__(self, world: LiveWorld, client: SimulatedClient, channel: grpc.aio.Channel, wire_id: str) -> None:
        self.client, self.wire_id = client, wire_id
        self.has_ended = False  # by a final status
        self._world = world
        self._requests: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._call = channel.stream_stream(STREAM_METHOD)(self._outgoing())
        self.task = asyncio.create_task(self._receive())

    def send(self, message: Open | Draft | Close) -> None:
        """To the server, in order."""
        self._requests.put_nowait(encode(message, VERIFIER_MODEL))

    def close(self) -> None:
        """No further requests."""
        self._requests.put_nowait(None)

    async def _outgoing(self) -> AsyncIterator[bytes]:
        while (data := await self._requests.get()) is not None:
            yield data

    async def _receive(self) -> None:
        try:
            async for data in self._call:
                try:
                    commit = decode(data)
                except RequestRefused:
                    if self.client.record.num_refused:  # a draft that was on its way when its session was refused
                        continue
                    raise
                self.has_ended = self.has_ended or commit.status is not Status.RUNNING
                self._world.on_commit(self.client, commit)
        except grpc.aio.AioRpcError as error:
            raise TransportError(f"the stream of a device broke: {error.details()}") from None


class LiveWorld:
    """What `simulator._World` is to the simulation: starts sessions at their times, until the run is over."""

    def __init__(self, url: str, scenario: Scenario, devices: Sequence[Device], start_s: float) -> None:
        """`devices` are those of `scenario.workload` that this process plays."""
        self.scenario = scenario
        self.log = CommitLog()
        self.events = LiveEvents(self.log, start_s)
        self.clients: list[SimulatedClient] = []
        self.lag_s: list[float] = []  # of every message: how much later than due it left
        self.received_s: list[float] = []  # when each commit came, by `time.monotonic`
        self._channels = [
            grpc.aio.insecure_channel(url, options=[("grpc.use_local_subchannel_pool", 1)])
            for _ in range(-(-len(devices) // STREAMS_PER_CONNECTION))
        ]
        self._settings = scenario.client_settings()
        self._devices = {device.index: device for device in devices}
        self._arrivals = Arrivals(scenario.workload, devices, scenario.duration_s)
        self._sessions: dict[str, _Session] = {}

    async def run(self, progress: Progress | None = None) -> None:
        """Until the end of the run: what comes later does not count. Raises whatever a session or an event raises.

        `progress` has a step for each second of the run.
        """
        for index in self._devices:
            self._schedule_next(index)
        is_whole = False
        try:
            while not self._is_over():
                await asyncio.sleep(_LOOK_S)
                self.events.catch_up()  # a late process has what was due before the end still to do
                self._check()
                if progress is not None:
                    progress.reach(round(min(self.events.now_s, self.scenario.duration_s)))
            is_whole = True
        finally:
            self.events.stop()
            await self._leave(is_whole)

    def _is_over(self) -> bool:
        goes_on = self._arrivals.num_sources and self.events.now_s < self.scenario.duration_s
        return not goes_on and not (self.scenario.drain and self._sessions)

    def _check(self) -> None:
        if isinstance(self.events.error, SimulationError):  # a status that a run on an emulated target never sees
            raise ConfigError(f"{self.events.error}; {_WRONG_TARGET}")
        if self.events.error is not None:
            raise self.events.error
        for session in self._sessions.values():
            if session.task.done():
                session.task.result()
                if not session.has_ended:
                    raise TransportError("the server has ended a device's stream in the middle of its session")

    async def _leave(self, tells: bool) -> None:
        """Close what still runs, and the connections. `tells`: of sessions that fail in it; where the run has failed
        its own error says why."""
        left = list(self._sessions.values())
        for session in left:
            session.send(Close(session.wire_id))
            session.close()
        if left:
            _, pending = await asyncio.wait([session.task for session in left], timeout=_CLOSE_S)
            for task in pending:
                task.cancel()
            for ended in await asyncio.gather(*(session.task for session in left), return_exceptions=True):
                if tells and isinstance(ended, Exception):  # a cancelled one is none
                    log.warning("a session that was closed at the end of the run failed: %s", ended)
        for channel in self._channels:
            await channel.close()

    # -- sessions -----------------------------------------------------------------------------------------------

    def _schedule_next(self, device_index: int) -> None:
        """The device's next session, at its time or now."""
        self._arrivals.schedule_next(device_index, self.events, self._start)

    def _start(self, spec: SessionSpec) -> None:
        scenario = self.scenario
        device = self._devices[spec.device]
        client = SimulatedClient(
            self.events, spec, device, scenario.tokens_of(spec), self._settings, self._submit, self._end
        )
        self.clients.append(client)
        channel = self._channels[len(self.clients) % len(self._channels)]
        self._sessions[client.id] = _Session(self, client, channel, new_session_id())
        client.open()
        if scenario.workload.timed:
            self._schedule_next(spec.device)

    def _submit(self, client: SimulatedClient, message: Open | Draft) -> None:
        """A message has come through the link of its device: to the server now."""
        session = self._sessions.get(client.id)
        if session is None:  # a last acknowledgement behind the end of its session
            return
        self.lag_s.append(self.events.real_s - self.events.now_s)
        message = dataclasses.replace(message, session=session.wire_id)
        if isinstance(message, Open):
            seed = session_seed(self.scenario.seed, client.record.spec)
            slo = dataclasses.replace(message.slo, name="")  # in numbers: the server has no classes of these names
            message = dataclasses.replace(message, sampling=Sampling(seed=seed), slo=slo)
        session.send(message)

    def on_commit(self, client: SimulatedClient, commit: Commit) -> None:
        """A commit has left the server: into the link of its device."""
        if self.events.has_stopped:  # behind the end of the run, an answer to `Close` among them
            return
        self.received_s.append(time.monotonic())
        self.events.schedule(client.downlink.arrival_s(self.events.real_s), client.receive, commit)

    def _end(self, client: SimulatedClient) -> None:
        self._sessions.pop(client.id).close()
        if not self.scenario.workload.timed:
            self._schedule_next(client.record.spec.device)
