"""Every package that a device needs is there as a wheel for 64-bit Arm: nothing has to be compiled on it.

pip itself resolves the extras `edge` and `gateway`, with the versions of constraints.txt, as it would on such a machine
with glibc 2.31 (Debian 11, Ubuntu 20.04 and newer; Raspberry Pi OS, JetPack, Termux with a proot distribution).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GLIBC_MINORS = range(17, 32)  # manylinux_2_17, the oldest tag for aarch64, to 2.31
TIMEOUT_S = 240.0


def device_requirements() -> list[str]:
    """Requirements of the package and of its extras `edge` and `gateway`, without those on itself."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["edge"], *extras["gateway"]]
    return [requirement for requirement in wanted if not requirement.startswith(project["name"])]


def resolve(python: str, target: Path, *requirements: str) -> subprocess.CompletedProcess[str]:
    """pip's answer, a report in JSON, to what would be installed on such a device; nothing is."""
    platforms = [option for minor in GLIBC_MINORS for option in ("--platform", f"manylinux_2_{minor}_aarch64")]
    options = ("--dry-run", "--ignore-installed", "--quiet", "--only-binary=:all:", "--report", "-")
    where = ("--target", str(target), "--python-version", python, "--implementation", "cp", *platforms)
    command = [sys.executable, "-m", "pip", "install", *options, *where, "-c", "constraints.txt", *requirements]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_every_package_of_a_device_has_a_wheel(python: str, tmp_path: Path) -> None:
    result = resolve(python, tmp_path / "target", *device_requirements())
    assert result.returncode == 0, result.stderr[-2000:]
    found = [entry["download_info"]["url"].rpartition("/")[2] for entry in json.loads(result.stdout)["install"]]
    assert all(name.endswith(".whl") for name in found), found
    names = {name.split("-")[0].lower() for name in found}
    native = {name.split("-")[0].lower() for name in found if "aarch64" in name}
    assert {"onnxruntime", "tokenizers", "numpy", "grpcio"} <= native
    assert not any("x86_64" in name for name in found)
    assert {"starlette", "uvicorn", "jinja2", "tritonclient"} <= names
    assert not {"torch", "transformers"} & names, "a device needs neither"
