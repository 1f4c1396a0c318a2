"""Where WISP keeps what it builds and downloads: `$WISP_HOME`, by default the user's cache folder."""

from __future__ import annotations

import os
from pathlib import Path

DEFAULT_MODEL = "smollm2-135m-instruct"  # the embedded pair; drafts carry their precision as a suffix
DRAFT_NAMES = ("int8", "int4", "mixed48")  # precisions of the drafts that `wisp-server models` builds
# By expected end-to-end tokens/s (`wisp-bench draft`) the best, or level with it, on a laptop and on devices 4 and 10
# times as slow: its agreement outweighs its time per token. Where 270 MB are too much, mixed48 is next.
DEFAULT_DRAFT = "int8"


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
    """Folder of the embedded draft graph of `precision` (one of `DRAFT_NAMES`)."""
    return wisp_home() / "models" / f"{DEFAULT_MODEL}-{precision}"


def draft_folder(name_or_folder: str) -> Path:
    """What `--draft` means: the name of an embedded draft, or a folder."""
    return default_draft_dir(name_or_folder) if name_or_folder in DRAFT_NAMES else Path(name_or_folder)


def profile_dir() -> Path:
    """Where the estimator's profiles are kept, one file per target and device."""
    return wisp_home() / "profiles"


def triton_dir() -> Path:
    """Where the tritonserver of the wheel is unpacked and laid out."""
    return wisp_home() / "triton"
