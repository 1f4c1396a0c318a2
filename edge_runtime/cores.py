"""How many cores there are for this process, and how many of them draft."""

from __future__ import annotations

import os


def usable_cores() -> int:
    """Cores that this process may use."""
    has_affinity = hasattr(os, "sched_getaffinity")  # not on macOS and Windows
    return len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1


def drafting_threads() -> int:
    """Threads of the draft model unless the user says otherwise: one core fewer than this process may use.

    ONNX Runtime's threads spin between operations. On the core that they leave alone the other thread receives and
    applies commits, within a millisecond instead of whenever a draft step is over (see `drafting_thread`).
    """
    return max(1, usable_cores() - 1)
