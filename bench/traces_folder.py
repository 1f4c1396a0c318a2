"""Where the committed traces of the default drafts lie (`bench/traces.py` records them)."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).with_name("traces")


def trace_path(draft: str, part: str) -> Path:
    """Where the trace of a default draft is kept."""
    return FOLDER / f"{draft}-{part}.npz"
