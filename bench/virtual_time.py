"""Virtual time: a queue of events and links that delay messages. No threads, no real clock."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable
from typing import Any


class EventQueue:
    """Callbacks in the order of their times; equal times in the order of scheduling. Times are in seconds."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._heap: list[tuple[float, int, Callable[[Any], None], Any]] = []
        self._num_scheduled = 0

    @property
    def next_s(self) -> float:
        """Time of the next event; inf without one."""
        return self._heap[0][0] if self._heap else math.inf

    def schedule(self, at_s: float, callback: Callable[[Any], None], argument: Any) -> None:
        """Call `callback(argument)` at `at_s`, which is not in the past."""
        self._num_scheduled += 1
        heapq.heappush(self._heap, (at_s, self._num_scheduled, callback, argument))

    def advance(self, to_s: float) -> None:
        """Let all events up to `to_s` happen, each at its time, then stand at `to_s`."""
        heap = self._heap
        while heap and heap[0][0] <= to_s:
            self.now_s, _, callback, argument = heapq.heappop(heap)
            callback(argument)
        self.now_s = to_s


class Link:
    """One direction of a connection: a fixed delay and uniform jitter on top. Messages never overtake each other."""

    __slots__ = ("_delay_s", "_jitter_s", "_last_s", "_random")

    def __init__(self, delay_s: float, jitter_s: float, seed: int) -> None:
        self._delay_s, self._jitter_s = delay_s, jitter_s
        self._random = random.Random(seed)
        self._last_s = 0.0

    def arrival_s(self, now_s: float) -> float:
        """When a message that is sent now arrives."""
        jitter_s = self._jitter_s * self._random.random() if self._jitter_s else 0.0
        self._last_s = max(self._last_s, now_s + self._delay_s + jitter_s)
        return self._last_s
