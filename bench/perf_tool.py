"""Triton's perf_analyzer: the one on PATH, else one that runs on this system, fetched into `$WISP_HOME`.

The package `perf-analyzer` needs glibc 2.38. On older systems the binary in the wheel of tritonclient 2.49.0 runs, with
two libraries that the wheel of tritonserver carries under other names.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from triton_models.artifacts import Progress, ensure
from triton_models.tritonserver import fetch_tritonserver
from triton_models.wheels import unpack_from_wheel
from wisp_plugin.errors import ConfigError, ModelError
from wisp_plugin.home import wisp_home

NEW_PACKAGE = "perf-analyzer==2.60.0"
OLD_PACKAGE = "tritonclient==2.49.0"
_NEEDED_GLIBC = (2, 38)
_BORROWED = {"libb64.so.0d": "libb64-*.so.0d", "libcudart.so.12": "libcudart-*.so.12*"}
_TRY_S = 30.0


@dataclass(frozen=True, slots=True)
class PerfAnalyzer:
    """A perf_analyzer that starts."""

    executable: Path
    library_dir: Path | None

    def environment(self) -> dict[str, str]:
        """The caller's, with the libraries that were borrowed."""
        if self.library_dir is None:
            return dict(os.environ)
        before = os.environ.get("LD_LIBRARY_PATH")
        return os.environ | {"LD_LIBRARY_PATH": f"{self.library_dir}:{before}" if before else str(self.library_dir)}

    def version(self) -> str:
        """What it says about itself.

        Raises:
            ModelError: it does not start; with what the loader says.
        """
        done = subprocess.run(
            [self.executable, "--version"], capture_output=True, text=True, timeout=_TRY_S, check=False,
            env=self.environment(),
        )  # fmt: skip
        lines = (done.stdout + done.stderr).strip().splitlines()
        if done.returncode or not lines:
            raise ModelError(f"{self.executable} does not start: {lines[-1] if lines else 'no message'}")
        return lines[0]


def find_perf_analyzer(progress: Progress) -> PerfAnalyzer:
    """See the top of this file.

    Raises:
        ConfigError: there is none for this machine.
        ModelError: the download failed, or what came does not start.
    """
    on_path = shutil.which("perf_analyzer")
    found = PerfAnalyzer(Path(on_path), None) if on_path else _fetched(progress)
    found.version()
    return found


def _fetched(progress: Progress) -> PerfAnalyzer:
    if platform.machine() != "x86_64":
        raise ConfigError(f"no perf_analyzer on PATH, and there is none to fetch for {platform.machine()}")
    glibc = tuple(int(part) for part in platform.libc_ver()[1].split(".")[:2])
    package = NEW_PACKAGE if glibc >= _NEEDED_GLIBC else OLD_PACKAGE
    folder = wisp_home() / "perf_analyzer" / package.replace("==", "-")

    def fill(out: Path) -> None:
        unpack_from_wheel(package, out, _wanted, progress)
        (out / "perf_analyzer").chmod(0o755)
        libraries = fetch_tritonserver(progress, check_hashes=False) / "nvidia_pytriton.libs"
        for name, pattern in _BORROWED.items():
            shutil.copyfile(next(libraries.glob(pattern)), out / name)

    ensure(folder, f"perf-analyzer-1 {package}", fill, progress, check_hashes=False)
    return PerfAnalyzer(folder / "perf_analyzer", folder)


def _wanted(member: str) -> str | None:
    """The binary, wherever the wheel keeps it."""
    return "perf_analyzer" if Path(member).name == "perf_analyzer" and member.split("/")[-2] == "bin" else None
