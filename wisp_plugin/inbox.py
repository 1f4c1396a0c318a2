"""Requests on their way to the engine thread: a queue with a bound that wakes the engine and can be closed."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from wisp_plugin.messages import Close, Draft, Open
from wisp_plugin.protocols import Reply
from wisp_plugin.wire import UNAVAILABLE

Request = tuple[float, Open | Draft | Close, Reply]  # with the time of its arrival


class Inbox:
    """`put` from any thread; `requests` belongs to the engine thread, which takes from its left end."""

    def __init__(self, max_messages: int, clock: Callable[[], float], on_full: Callable[[], None]) -> None:
        """`on_full` is called for every request that finds the queue full, under the queue's lock."""
        self.requests: deque[Request] = deque()
        self.refusal: str | None = None  # told to every request from now on
        self._max_messages = max_messages
        self._clock = clock
        self._on_full = on_full
        self._wake = threading.Condition()

    def put(self, message: Open | Draft | Close, reply: Reply) -> None:
        """Queue a request, or fail it at once."""
        with self._wake:
            refusal = self.refusal
            if refusal is None and len(self.requests) >= self._max_messages:
                refusal = f"{UNAVAILABLE}the queue is full ({self._max_messages} messages)"
                self._on_full()
            if refusal is None:
                self.requests.append((self._clock(), message, reply))
                self._wake.notify()
        if refusal is not None:
            reply.fail(refusal)

    def close(self, reason: str) -> None:
        """Refuse every request from now on, and end a `wait`."""
        with self._wake:
            self.refusal = f"{UNAVAILABLE}{reason}"
            self._wake.notify()

    def wait(self, timeout_s: float) -> None:
        """Until a request is there, the queue is closed, or the time is over."""
        with self._wake:
            if not self.requests and self.refusal is None:
                self._wake.wait(max(0.0, timeout_s))
