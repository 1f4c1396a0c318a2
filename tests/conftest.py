"""What holds for all tests: how torch uses the cores, and where the tiny model of a run is."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from tests.tiny_model import FOLDER_VARIABLE

IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
FOLDER = pytest.StashKey[tempfile.TemporaryDirectory[str]]()

# Threads of torch that wait for each other must not spin (see server_process.py): a server or another worker uses the
# same cores. For this process and those that tests start; workers of pytest have one thread each.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if IS_WORKER:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config: pytest.Config) -> None:
    _refuse_old_extensions()
    if not IS_WORKER:  # the workers inherit the variable
        config.stash[FOLDER] = tempfile.TemporaryDirectory(prefix="wisp-tiny-")
        os.environ[FOLDER_VARIABLE] = config.stash[FOLDER].name


def _refuse_old_extensions() -> None:
    """What `make compiled` left stands in front of the sources, also of newer ones."""
    for extension in Path("wisp_plugin").glob("*.cpython-*.so"):
        source = extension.with_name(extension.name.split(".")[0] + ".py")
        if source.is_file() and source.stat().st_mtime > extension.stat().st_mtime:  # one of them has no source
            pytest.exit(f"{extension} is older than {source}: `make compiled` or `make interpreted`", 2)


def pytest_unconfigure(config: pytest.Config) -> None:
    if not IS_WORKER:
        config.stash[FOLDER].cleanup()
