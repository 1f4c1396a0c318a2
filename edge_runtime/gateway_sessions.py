"""Who may run: `max_requests` are in the house at once, one more is answered `overloaded`; `max_sessions` of them run
at the server, the others wait in the order of their coming.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, field

from edge_runtime.gateway_device import GatewayDevice
from edge_runtime.gateway_errors import overloaded
from edge_runtime.gateway_generation import Generation, Times
from edge_runtime.gateway_parameters import GenerationRequest

log = logging.getLogger(__name__)
JOIN_S = 5.0  # of waiting for the threads of sessions when the gateway ends


@dataclass(slots=True)
class Sessions:
    """Admits requests and keeps count of them. Used from the event loop alone."""

    device: GatewayDevice
    max_sessions: int
    max_requests: int
    num_requests: int = 0
    running: set[Generation] = field(default_factory=set)
    _slots: asyncio.Semaphore = field(init=False)

    def __post_init__(self) -> None:
        self._slots = asyncio.Semaphore(self.max_sessions)  # first come, first served

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a session."""
        return self.num_requests - len(self.running)

    async def start(self, request: GenerationRequest, times: Times) -> Generation:
        """The session of a request, running. Refusal 429 if there is no room, now or within `server_wait_s`."""
        if self.num_requests >= self.max_requests:
            raise overloaded(f"{self.num_requests} requests are being served; allowed: {self.max_requests}")
        self.num_requests += 1
        try:
            if self._slots.locked():
                async with asyncio.timeout(self.device.server_wait_s):
                    await self._slots.acquire()
            else:
                await self._slots.acquire()  # does not wait
        except BaseException as error:
            self.num_requests -= 1
            if isinstance(error, TimeoutError):
                raise overloaded(f"no session became free within {self.device.server_wait_s:g} s") from None
            raise
        times.started_s = time.monotonic()
        try:
            generation = Generation(self.device, request, times)
        except BaseException:
            self._give_back()
            raise
        generation.on_ended = lambda: self._on_ended(generation)
        self.running.add(generation)
        generation.thread.start()
        return generation

    def _on_ended(self, generation: Generation) -> None:
        self.running.discard(generation)
        self._give_back()

    def _give_back(self) -> None:
        self.num_requests -= 1
        self._slots.release()

    async def close(self) -> None:
        """End every session."""
        for generation in list(self.running):
            generation.leave()
        deadline_s = time.monotonic() + JOIN_S
        while self.running and time.monotonic() < deadline_s:
            await asyncio.sleep(0.02)
        if self.running:
            log.warning("%d sessions have not ended within %g s", len(self.running), JOIN_S)

