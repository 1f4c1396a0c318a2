"""Noticing SIGTERM and SIGINT inside Triton's Python stub.

Triton waits for open streams before it calls `finalize`, and clients wait for commits: without this a server with
running sessions would sit out its whole exit timeout. The stub's main thread is inside C++ and never gets to a
Python signal handler, but Python writes the signal's number to a wake-up file descriptor at once.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def on_termination(callback: Callable[[], None]) -> None:
    """Call `callback` in a thread of its own at the first SIGTERM or SIGINT. To be called in the main thread."""
    read_fd, write_fd = os.pipe()
    os.set_blocking(write_fd, False)
    signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
    for number in _SIGNALS:
        signal.signal(number, lambda _number, _frame: None)  # the wake-up needs a Python handler; Triton ends us

    def watch() -> None:
        while os.read(read_fd, 1)[0] not in _SIGNALS:
            pass
        callback()

    threading.Thread(target=watch, name="wisp-termination", daemon=True).start()
