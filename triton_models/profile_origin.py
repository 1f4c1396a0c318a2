"""What a profile is of, and where it is kept: target, device, threads, versions."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import re
from pathlib import Path

import torch
from transformers.utils.hub import cached_file

from triton_models.torch_verifier import TorchVerifier
from wisp_plugin import __version__
from wisp_plugin.home import profile_dir
from wisp_plugin.profile import Fingerprint

_PACKAGES = ("torch", "transformers")  # they decide about the time of a forward
_WEIGHTS = (".safetensors", ".bin", ".pt")


def fingerprint_of(verifier: TorchVerifier) -> Fingerprint:
    """What a profile must be of to hold for `verifier`."""
    source = verifier.target_dir
    model = Path(source).name if Path(source).is_dir() else source
    return fingerprint(model, model_hash(source), verifier.dtype_name, verifier.device_name)


def fingerprint(model: str, model_hash: str, dtype: str, device: str) -> Fingerprint:
    """Of a model on `device` (cpu, cuda or cuda:N), with this machine's threads and versions."""
    on_cpu = device == "cpu"
    return Fingerprint(
        model=model,
        model_hash=model_hash,
        dtype=dtype,
        device=cpu_name() if on_cpu else torch.cuda.get_device_name(device),
        num_threads=torch.get_num_threads() if on_cpu else 0,
        versions={"wisp": __version__} | {name: importlib.metadata.version(name) for name in _PACKAGES},
    )


def model_hash(source: str) -> str:
    """16 hex digits over the configuration and the names and sizes of the weight files: shape, not values."""
    found = cached_file(source, "config.json")
    assert found is not None, "it raises what is missing"
    config = Path(found)
    digest = hashlib.sha256(config.read_bytes())
    for path in sorted(config.parent.iterdir()):
        if path.suffix in _WEIGHTS:
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
    return digest.hexdigest()[:16]


def cpu_name() -> str:
    """Model name of the CPU as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match.group(1).strip() if match else platform.processor() or platform.machine()


def profile_path(of: Fingerprint | str) -> Path:
    """File of a profile: a user's own path, or where that of a fingerprint is kept."""
    if isinstance(of, str):
        return Path(of).expanduser().absolute()
    parts = [of.model, of.dtype, of.device, *([f"{of.num_threads}-threads"] if of.num_threads else [])]
    return profile_dir() / (re.sub(r"[^a-z0-9.]+", "-", " ".join(parts).lower()).strip("-.") + ".json")
