"""Which `tritonserver` to run, and with what environment.

1. `tritonserver` on PATH, as in the NGC container: its own backends are used.
2. Else the one inside the wheel `nvidia-pytriton`, unpacked into `$WISP_HOME/triton`. Only files of the wheel are
   taken (its requirements clash with ours). The wheel's paths are kept, because its binaries find their
   libraries relative to themselves; the Python stub of the running interpreter is put beside the backend.

The stub is a program that embeds Python: it needs `libpython3.x.so` and finds its virtual environment through
the first `python3` on PATH. It ignores PYTHONPATH, so this package must be installed there (`pip install -e .`).

The wheel's stub was built with a pybind11 that knows only numpy 1: with numpy 2 every tensor arrives as zeros
and leaves empty, without an error. So numpy 2 is refused here.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from triton_models.artifacts import Progress, ensure
from triton_models.wheels import unpack_from_wheel
from wisp_plugin.errors import ConfigError
from wisp_plugin.home import triton_dir

REQUIREMENT = "nvidia-pytriton==0.7.0"  # tritonserver 2.51.0
WHEEL_SHA256 = {
    "x86_64": "21f063ff93bb426d0c06b7a55e7eb9efcfe62c0dddd9a908e9877e18710128df",
    "aarch64": "f99e07ee56fe065337453956afba17d2673e02ec6a632c3de26ce6e7b32a0898",
}
STUB_PYTHONS = ((3, 11), (3, 12))  # of those in the wheel, the ones that WISP supports
_LIBS = "nvidia_pytriton.libs/"
_ROOT = "pytriton/tritonserver/"
_STUB = "triton_python_backend_stub"


@dataclass(frozen=True, slots=True)
class TritonInstall:
    """A tritonserver that can be started. `backend_dir` None: it has its own."""

    executable: Path
    backend_dir: Path | None
    library_dirs: tuple[Path, ...] = ()

    def environment(self) -> dict[str, str]:
        """The caller's environment, with what server and stub need to find this Python."""
        env = dict(os.environ)
        _prepend(env, "PATH", str(Path(sys.executable).parent))
        for folder in self.library_dirs:
            _prepend(env, "LD_LIBRARY_PATH", str(folder))
        env["PYTHONUNBUFFERED"] = "1"  # models' prints reach the log at once
        return env


def find_tritonserver(progress: Progress, *, check_hashes: bool = False, force: bool = False) -> TritonInstall:
    """The installed tritonserver, else the wheel's, downloaded at the first call (or again, with `force`).

    Raises:
        ConfigError: this machine or this Python cannot run it; the message says what to do.
        ModelError: the download failed.
    """
    on_path = shutil.which("tritonserver")
    if on_path is not None:
        executable = Path(on_path).resolve()
        _check_stub_of(executable)
        return TritonInstall(executable, None)
    _check_numpy(importlib.metadata.version("numpy"))
    library = find_libpython()
    root = fetch_tritonserver(progress, force=force, check_hashes=check_hashes)
    system_dirs = {Path("/usr/lib"), Path("/lib"), *(Path(f"{d}/{_multiarch()}") for d in ("/usr/lib", "/lib"))}
    # Not for the system's own libpython: LD_LIBRARY_PATH would put every system library before those of wheels.
    library_dirs = () if library.parent in system_dirs else (library.parent,)
    return TritonInstall(root / _ROOT / "bin" / "tritonserver", root / _ROOT / "backends", library_dirs)


def fetch_tritonserver(progress: Progress, *, force: bool = False, check_hashes: bool = True) -> Path:
    """Unpack the wheel's tritonserver for the running Python; returns the folder that mirrors the wheel."""
    python = sys.version_info[:2]
    machine = platform.machine()
    if sys.platform != "linux" or machine not in WHEEL_SHA256:
        raise ConfigError(
            f"no tritonserver on PATH, and {REQUIREMENT} has none for {sys.platform} {machine}; "
            f"allowed: linux on {', '.join(WHEEL_SHA256)}"
        )
    if python not in STUB_PYTHONS:
        allowed = ", ".join(f"{major}.{minor}" for major, minor in STUB_PYTHONS)
        raise ConfigError(f"tritonserver's Python backend runs with Python {allowed}, not {python[0]}.{python[1]}")
    version = f"{python[0]}.{python[1]}"
    folder = triton_dir() / f"{REQUIREMENT.replace('==', '-')}-py{version}"
    recipe = f"triton-1 {REQUIREMENT} python {version} {machine}"

    def fill(out: Path) -> None:
        unpack_from_wheel(REQUIREMENT, out, _members_for(version), progress, WHEEL_SHA256[machine])
        for name in ("bin/tritonserver", f"backends/python/{_STUB}"):
            (out / _ROOT / name).chmod(0o755)

    ensure(folder, recipe, fill, progress, force=force, check_hashes=check_hashes)
    return folder


def find_libpython() -> Path:
    """The shared library of the running Python, which the stub is linked to.

    Raises:
        ConfigError: this Python was built or packaged without it.
    """
    name = f"libpython{sys.version_info[0]}.{sys.version_info[1]}.so.1.0"
    libdir = Path(sysconfig.get_config_var("LIBDIR") or "/usr/lib")
    candidates = (libdir, Path(sys.base_prefix, "lib"), libdir / _multiarch(), Path("/usr/lib", _multiarch()))
    for folder in candidates:
        if (folder / name).is_file():
            return folder / name
    raise ConfigError(_no_libpython(name))


def _no_libpython(name: str) -> str:
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if Path(sys.base_prefix) == Path("/usr") and shutil.which("apt-get"):
        return f"tritonserver's Python backend needs {name}, not installed here: apt-get install libpython{version}"
    return (
        f"tritonserver's Python backend needs {name}, which the Python in {sys.base_prefix} does not have; "
        "use one that was built with --enable-shared"
    )


def _members_for(version: str) -> Callable[[str], str | None]:
    """Members of the wheel to unpack: server, its libraries, Python backend and the stub of `version`."""

    def path_for(member: str) -> str | None:
        if member.startswith(_LIBS):
            # Not its libpython3.13: 32 MB for the stub of that version alone.
            return None if Path(member).name.startswith("libpython") else member
        if member == f"{_ROOT}python_backend_stubs/{version}/{_STUB}":
            return f"{_ROOT}backends/python/{_STUB}"
        if member.startswith((f"{_ROOT}bin/", f"{_ROOT}backends/python/")):
            return member
        return None

    return path_for


def _check_stub_of(executable: Path) -> None:
    """Refuse an installed tritonserver whose stub embeds another Python than the running one."""
    stub = executable.parent.parent / "backends" / "python" / _STUB
    if not stub.is_file():
        return  # unusual layout: Triton itself will say what is missing
    found = {int(minor) for minor in re.findall(rb"libpython3\.(\d+)\.so", stub.read_bytes())}
    if found and sys.version_info[1] not in found:
        raise ConfigError(
            f"{executable} runs Python 3.{min(found)} models, but WISP is installed in Python 3.{sys.version_info[1]}; "
            f"install WISP with Python 3.{min(found)}"
        )


def _check_numpy(version: str) -> None:
    if int(version.split(".")[0]) >= 2:
        raise ConfigError(
            f"numpy {version} does not work with the Python backend of {REQUIREMENT}: tensors would arrive as zeros; "
            "allowed: numpy 1.26 (pip install -c constraints.txt numpy)"
        )


def _multiarch() -> str:
    return str(sysconfig.get_config_var("MULTIARCH") or f"{platform.machine()}-linux-gnu")


def _prepend(env: dict[str, str], name: str, value: str) -> None:
    env[name] = value + os.pathsep + env[name] if env.get(name) else value
