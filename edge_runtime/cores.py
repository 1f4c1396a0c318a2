"""How many of the machine's cores draft."""

from __future__ import annotations

import os


def drafting_threads() -> int:
    """Threads of the draft model unless the user says otherwise: one core fewer than this process may use.

    ONNX Runtime's threads spin between operations. On the core that they leave alone the other thread receives and
    applies commits, within a millisecond instead of whenever a draft step is over (see `drafting_thread`).
    """
    has_affinity = hasattr(os, "sched_getaffinity")  # not on macOS and Windows
    num_cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return max(1, num_cores - 1)
