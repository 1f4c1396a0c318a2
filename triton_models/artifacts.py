"""Folders under `$WISP_HOME` that are built once, checked by hash and never seen half-finished.

A folder carries `wisp_manifest.json`: the recipe that built it, size and sha256 of each file. It is filled
under a temporary name and renamed, so that a reader sees all of it or nothing; a file lock keeps a second
builder out.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

MANIFEST = "wisp_manifest.json"
Progress = Callable[[str], None]


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fault(folder: Path, recipe: str, *, check_hashes: bool = True) -> str | None:
    """Why `folder` cannot be used as the product of `recipe`, in a few words; None if it can.

    `check_hashes=False` compares names and sizes only, which takes no time for gigabytes.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files = {name: (int(entry["size"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
        built_by = manifest["recipe"]
    except FileNotFoundError:
        return "missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its {MANIFEST} is damaged ({error})"
    if built_by != recipe:
        return f"built by recipe {built_by!r}, wanted {recipe!r}"
    for name, (size, sha256) in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size or (check_hashes and sha256_of(path) != sha256):
            return f"{name} is damaged"
    return None


def ensure(
    folder: Path,
    recipe: str,
    fill: Callable[[Path], None],
    progress: Progress,
    *,
    force: bool = False,
    check_hashes: bool = True,
) -> bool:
    """Make `folder` hold the product of `recipe`, calling `fill(empty_folder)` only if it does not.

    Returns True if it was built. If `fill` raises, the old state stays and nothing new is left behind.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _lock(folder.parent / f".{folder.name}.lock", progress):
        reason = "forced" if force else fault(folder, recipe, check_hashes=check_hashes)
        if reason is None:
            return False
        progress(f"building {folder.name} ({reason})")
        for left_by_a_crash in folder.parent.glob(f".{folder.name}~*"):  # we hold the lock: nobody builds there
            shutil.rmtree(left_by_a_crash)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}~", dir=folder.parent) as scratch:
            fresh = Path(scratch) / "new"
            fresh.mkdir()
            fill(fresh)
            _write_manifest(fresh, recipe)
            if folder.exists():
                folder.rename(Path(scratch) / "old")
            fresh.rename(folder)
        return True


def folder_size_bytes(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _write_manifest(folder: Path, recipe: str) -> None:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": sha256_of(path)} for path in paths
    }
    (folder / MANIFEST).write_text(json.dumps({"recipe": recipe, "files": files}, indent=1) + "\n")


@contextlib.contextmanager
def _lock(path: Path, progress: Progress) -> Iterator[None]:
    """Hold an exclusive lock on `path`; the kernel drops it when the process dies."""
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(f"another process is working on {path.name[1:-5]}; waiting for it")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
