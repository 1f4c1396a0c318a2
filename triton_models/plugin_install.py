"""`wisp-server install-plugin`: the batching strategy into a model directory, and the lines for its config.pbtxt."""

from __future__ import annotations

import filecmp
import hashlib
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

from triton_models.artifacts import Progress
from triton_models.plugin_config import PluginSettings, advice, parse, with_plugin
from wisp_plugin.errors import ConfigError
from wisp_plugin.home import wisp_home
from wisp_plugin.profile import load_profile

LIBRARY = "batchstrategy.so"  # Triton looks for it under this name in the version's or the model's directory
PROFILE = "wisp_profile.json"  # name that a profile gets in the model directory
FIRST_PROFILE = "first_profile.json"  # stands in until the model has measured its own
SOURCES = Path(__file__).resolve().parents[1] / "wisp_plugin" / "batch_strategy"
_BUILD_LIMIT_S = 300.0


@dataclass(frozen=True, slots=True)
class InstallOptions:
    """What the command was asked for. `profile` is a file of the user's; `settings.profile` names its copy."""

    model_dir: Path
    settings: PluginSettings
    profile: Path | None = None
    version: int | None = None  # the version directory that gets the library; None: the newest
    write: bool = False


def build_library(progress: Progress) -> Path:
    """`batchstrategy.so` of these sources; built at the first call, then found.

    Raises:
        ConfigError: there is no compiler, or it fails; with its first error.
    """
    digest = hashlib.sha256()
    for path in sorted((*SOURCES.glob("*.cc"), *SOURCES.glob("*.h"), SOURCES / "Makefile")):
        digest.update(path.name.encode() + path.read_bytes())
    build = wisp_home() / "plugin" / digest.hexdigest()[:16]
    library = build / LIBRARY
    if library.is_file():
        return library
    for tool in ("make", "g++"):
        if shutil.which(tool) is None:
            raise ConfigError(f"{tool} is missing; install it (Debian: apt-get install make g++)")
    progress(f"building {LIBRARY}")
    command = ["make", "-C", str(SOURCES), "-j2", f"BUILD={build}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_BUILD_LIMIT_S, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "rror" in line] or done.stderr.splitlines()
        raise ConfigError(f"{LIBRARY} cannot be built: {errors[0] if errors else 'make failed'}")
    return library


def install(options: InstallOptions, progress: Progress) -> str:
    """Put the library in place and say, or with `write` do, what config.pbtxt needs; the report for a person.

    Everything is checked before anything is written. A config.pbtxt that is changed is kept as `config.pbtxt.bak`.

    Raises:
        ConfigError: no model directory, a configuration that cannot work, no compiler, or no right to write.
    """
    config_path = options.model_dir / "config.pbtxt"
    if not config_path.is_file():
        raise ConfigError(f"{options.model_dir} is no model directory: it has no config.pbtxt")
    before = config_path.read_text(encoding="utf-8")
    settings = options.settings
    if options.profile is not None:
        load_profile(options.profile)  # refuses what is none
        settings = replace(settings, profile=PROFILE)
    after, block = with_plugin(before, settings)
    target = _version_dir(options.model_dir, options.version) / LIBRARY
    library = build_library(progress)
    try:
        _copy(library, target)
        if options.profile is not None:
            _copy(options.profile, options.model_dir / PROFILE)
        if options.write and after != before:
            _copy(config_path, config_path.with_suffix(".pbtxt.bak"))
            config_path.write_text(after, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{error.filename} cannot be written: {error.strerror}") from None
    return _report(options, target, block, advice(parse(after)))


def prepare(model_dir: Path, progress: Progress) -> None:
    """Put in place what a model directory of ours wants and git does not hold: the library and a first profile.

    Only where config.pbtxt has parameters of the strategy. Raises ConfigError as `install` does.
    """
    if "WISP_" not in (model_dir / "config.pbtxt").read_text(encoding="utf-8"):
        return
    target, library = _version_dir(model_dir, None) / LIBRARY, build_library(progress)
    try:
        _copy(library, target)
        if not (model_dir / PROFILE).exists() and (model_dir / FIRST_PROFILE).exists():
            _copy(model_dir / FIRST_PROFILE, model_dir / PROFILE)
    except OSError as error:
        raise ConfigError(f"{error.filename} cannot be written: {error.strerror}") from None


def _version_dir(model_dir: Path, version: int | None) -> Path:
    versions = sorted(int(path.name) for path in model_dir.iterdir() if path.is_dir() and path.name.isdigit())
    if version is None and versions:
        version = versions[-1]
    if version not in versions:
        allowed = ", ".join(map(str, versions)) or "none, the directory has no version"
        raise ConfigError(f"{model_dir} has no version {version or ''}; allowed: {allowed}".replace("  ", " "))
    return model_dir / str(version)


def _copy(source: Path, target: Path) -> None:
    """Copy unless it is there already: a server that has the library open keeps what it has mapped."""
    if target.is_file() and filecmp.cmp(source, target, shallow=False):
        return
    if target.exists() and source.samefile(target):
        return
    scratch = target.with_name(f".{target.name}~")
    shutil.copyfile(source, scratch)
    scratch.replace(target)


def _report(options: InstallOptions, target: Path, block: str, hints: list[str]) -> str:
    config_path = options.model_dir / "config.pbtxt"
    if options.write:
        said = f"{config_path} now ends with these lines; what it was before is {config_path.name}.bak"
    else:
        said = f"add these lines to {config_path}, or run this again with --write"
    notes = "".join(f"\nnote: {hint}" for hint in hints)
    return f"installed {target}\n{said}:\n\n{block}{notes}\nReload the model for it to take effect."
