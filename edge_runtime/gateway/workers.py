"""The threads of sessions, kept for the next one: to start a thread takes a millisecond where others compute."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

NUM_KEPT = 8  # that wait for work; further ones end with theirs

Work = Callable[[], None]
_Inbox = queue.SimpleQueue[Work | None]


class Workers:
    """Runs pieces of work beside the caller, each in a thread of its own. A thread that hangs ends with the process."""

    def __init__(self, num_kept: int = NUM_KEPT) -> None:
        self._num_kept = num_kept
        self._idle: list[_Inbox] = []
        self._lock = threading.Lock()  # of `_idle` and `_num_kept`

    def run(self, work: Work) -> None:
        """Begin `work`, which must not raise. RuntimeError if there can be no further thread."""
        with self._lock:
            inbox = self._idle.pop() if self._idle else None
        if inbox is None:
            inbox = _Inbox()
            threading.Thread(target=self._serve, args=(inbox,), name="wisp-session", daemon=True).start()
        inbox.put(work)

    def close(self) -> None:
        """Keep no thread any more."""
        with self._lock:
            self._num_kept = 0
            idle, self._idle = self._idle, []
        for inbox in idle:
            inbox.put(None)

    def _serve(self, inbox: _Inbox) -> None:
        while (work := inbox.get()) is not None:
            work()
            del work  # and with it the session: this thread may wait for long
            with self._lock:
                if len(self._idle) >= self._num_kept:
                    return
                self._idle.append(inbox)
