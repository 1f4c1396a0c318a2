"""Which session comes next on a device, and when: for the simulation and for load in real time alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from bench.virtual_time import EventQueue
from bench.workload import Device, SessionSpec, Workload


class Arrivals:
    """The sessions of `devices`, one after the other, none of which starts at `duration_s` or later."""

    def __init__(self, workload: Workload, devices: Sequence[Device], duration_s: float) -> None:
        self.num_sources = len(devices)  # devices that have sessions left to start
        self._duration_s = duration_s
        self._specs: dict[int, Iterator[SessionSpec]] = {d.index: workload.sessions(d) for d in devices}

    def schedule_next(self, device_index: int, events: EventQueue, start: Callable[[SessionSpec], None]) -> None:
        """Let `events` call `start` with the device's next session: at its time, or after a pause from now."""
        spec = next(self._specs[device_index], None)
        if spec is None:
            self.num_sources -= 1
            return
        start_s = events.now_s + spec.think_s if spec.start_s is None else spec.start_s
        if start_s < self._duration_s:
            events.schedule(start_s, start, spec)
