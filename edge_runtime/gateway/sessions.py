"""Who may run: `max_requests` are in the house at once, one more is answered `overloaded`; `max_sessions` of them run
at the server, the others wait in the order of their coming.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, field

from edge_runtime.drafting_thread import set_switch_interval
from edge_runtime.gateway.device import GatewayDevice
from edge_runtime.gateway.errors import overloaded
from edge_runtime.gateway.generation import Generation, Times
from edge_runtime.gateway.parameters import GenerationRequest
from edge_runtime.gateway.workers import Workers

log = logging.getLogger(__name__)
JOIN_S = 5.0  # of waiting for the threads of sessions when the gateway ends


@dataclass(slots=True)
class Sessions:
    """Admits requests and keeps count of them. Used from the event loop alone."""

    device: GatewayDevice
    max_sessions: int
    max_requests: int
    num_waiting: int = 0  # requests that wait for a session
    running: set[Generation] = field(default_factory=set)
    _served: set[Generation] = field(default_factory=set)  # those of `running` whose requests are not answered yet
    _slots: asyncio.Semaphore = field(init=False)
    _workers: Workers = field(default_factory=Workers)

    def __post_init__(self) -> None:
        self._slots = asyncio.Semaphore(self.max_sessions)  # first come, first served

    @property
    def num_requests(self) -> int:
        """Requests in the house. One that is answered is not, although its session may take a moment to close."""
        return self.num_waiting + len(self._served)

    @property
    def has_room(self) -> bool:
        """Whether `start` would not wait."""
        return not self._slots.locked()

    async def start(self, request: GenerationRequest, times: Times) -> Generation:
        """The session of a request, running. Refusal 429 if there is no room, now or within `server_wait_s`."""
        if self.num_requests >= self.max_requests:
            raise overloaded(f"{self.num_requests} requests are being served; allowed: {self.max_requests}")
        self.num_waiting += 1
        try:
            if self._slots.locked():
                async with asyncio.timeout(self.device.server_wait_s):
                    await self._slots.acquire()
            else:
                await self._slots.acquire()  # does not wait
        except TimeoutError:
            raise overloaded(f"no session became free within {self.device.server_wait_s:g} s") from None
        finally:
            self.num_waiting -= 1
        times.started_s = time.monotonic()
        try:
            generation = Generation(self.device, request, times)
            generation.on_ended = lambda: self._on_ended(generation)
            self._run(generation)
        except BaseException:
            self._slots.release()
            raise
        self.running.add(generation)
        self._served.add(generation)
        set_switch_interval(len(self.running))
        return generation

    def _run(self, generation: Generation) -> None:
        try:
            self._workers.run(generation.work)
        except RuntimeError:  # this machine has no room for a thread more
            self.device.end(generation.run)
            raise overloaded("no further session can be started on this device") from None

    def _on_ended(self, generation: Generation) -> None:
        self.running.discard(generation)
        self._served.discard(generation)
        set_switch_interval(len(self.running))
        self._slots.release()

    def leave(self, generation: Generation) -> None:
        """The request is answered, or its client has gone: end what still runs."""
        self._served.discard(generation)
        generation.leave()

    async def close(self) -> None:
        """End every session, and their threads."""
        for generation in list(self.running):
            generation.leave()
        deadline_s = time.monotonic() + JOIN_S
        while self.running and time.monotonic() < deadline_s:
            await asyncio.sleep(0.02)
        if self.running:
            log.warning("%d sessions have not ended within %g s", len(self.running), JOIN_S)
        self._workers.close()
