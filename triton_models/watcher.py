"""A thread for what the engine thread should not wait for: asking Triton whether clients left, publishing metrics.

Each such question is a round trip to tritonserver's process (0.1 to 0.4 ms). Responses stay with the engine thread:
sending them from several threads at once was tried, alone and together with waiting for all of them, and was slower
(eight replaying clients on two cores: median 4.6 ms directly, 6.0 with four threads and waiting, 7.2 without).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Protocol

STOP_LIMIT_S = 5.0

log = logging.getLogger(__name__)


class Watched(Protocol):
    """Something to be looked after from time to time."""

    def poll(self) -> None:
        """Ask; called in the watcher's thread."""


class Watcher:
    """Polls what is registered every `period_s`, then calls `each_round`."""

    def __init__(self, period_s: float, each_round: Callable[[], None]) -> None:
        self._period_s = period_s
        self._each_round = each_round
        self._watched: dict[int, Watched] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="wisp-watcher", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def add(self, watched: Watched) -> None:
        """Poll `watched` from now on."""
        self._watched[id(watched)] = watched

    def discard(self, watched: Watched) -> None:
        """Poll it no more."""
        self._watched.pop(id(watched), None)

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join(STOP_LIMIT_S)

    def _run(self) -> None:
        while not self._stop.wait(self._period_s):
            for watched in list(self._watched.values()):
                self._guarded(watched.poll)
            self._guarded(self._each_round)

    def _guarded(self, question: Callable[[], None]) -> None:
        try:
            question()
        except Exception:
            # A request may end while it is asked about; the others still have to be looked after.
            log.exception("a question to tritonserver has failed")
