"""Where WISP keeps what it builds and downloads: `$WISP_HOME`, by default the user's cache folder."""

from __future__ import annotations

import os
from pathlib import Path

DEFAULT_MODEL = "smollm2-135m-instruct"  # the embedded pair; drafts carry their precision as a suffix


def wisp_home() -> Path:
    """`$WISP_HOME`, else `$XDG_CACHE_HOME/wisp`, else `~/.cache/wisp`. Not created here."""
    if os.environ.get("WISP_HOME"):
        return Path(os.environ["WISP_HOME"]).expanduser().absolute()
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache).expanduser().absolute() / "wisp"


def default_target_dir() -> Path:
    """Hugging Face folder of the embedded target model."""
    return wisp_home() / "models" / DEFAULT_MODEL


def default_draft_dir(precision: str) -> Path:
    """Folder of the embedded draft graph of `precision` (`int8` or `int4`)."""
    return wisp_home() / "models" / f"{DEFAULT_MODEL}-{precision}"


def profile_dir() -> Path:
    """Where the estimator's profiles are kept, one file per target and device."""
    return wisp_home() / "profiles"


def triton_dir() -> Path:
    """Where the tritonserver of the wheel is unpacked and laid out."""
    return wisp_home() / "triton"
