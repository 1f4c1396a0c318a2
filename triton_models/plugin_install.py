"""`wisp-server install-plugin`: the batching strategy into a model directory, and the lines for its config.pbtxt."""

from __future__ import annotations

import contextlib
import filecmp
import hashlib
import itertools
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from triton_models.artifacts import Progress
from triton_models.plugin_config import BEGIN, PluginSettings, advice, parse, with_plugin
from wisp_plugin.errors import ConfigError
from wisp_plugin.home import wisp_home
from wisp_plugin.profile import load_profile

CONFIG = "config.pbtxt"
LIBRARY = "batchstrategy.so"  # Triton looks for it under this name in the version's or the model's directory
PROFILE = "wisp_profile.json"  # name that a profile gets in the model directory
FIRST_PROFILE = "first_profile.json"  # stands in until the model has measured its own
SOURCES = Path(__file__).resolve().parents[1] / "wisp_plugin" / "batch_strategy"
_BUILD_LIMIT_S = 300.0
_VERSION = re.compile("0|[1-9][0-9]*")  # names that Triton takes for versions


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

    Everything is checked before anything is written, and the library comes last: parameters without it do nothing,
    but with it and without them the model does not load. A config.pbtxt that is changed is kept (see `_backup`).

    Raises:
        ConfigError: no model directory, a configuration that cannot work, no compiler, or no right to write.
    """
    before = _read_config(options.model_dir)
    settings = options.settings
    if options.profile is not None:
        load_profile(options.profile)  # refuses what is none
        settings = replace(settings, profile=PROFILE)
    after, block = with_plugin(before, settings)
    target = _version_dir(options.model_dir, options.version) / LIBRARY
    library = build_library(progress)
    if options.profile is not None:
        _copy(options.profile, options.model_dir / PROFILE)
    config_path = options.model_dir / CONFIG
    if options.write and after != before:
        backup = _change(config_path, after)
        said = f"{config_path} now ends with these lines; what it was before is {backup.name}"
    else:
        said = _to_do(config_path, before, after)
    _copy(library, target)
    notes = "".join(f"\nnote: {hint}" for hint in advice(parse(after)))
    return f"installed {target}\n{said}:\n\n{block}{notes}\nReload the model for it to take effect."


def _to_do(config_path: Path, before: str, after: str) -> str:
    """What a person has to do with the lines that were not written."""
    if after == before:
        return f"{config_path} has these lines already"
    if BEGIN in before:
        return f"put these lines in place of those in {config_path}, or run this again with --write"
    return (
        f"the model will not load again until these lines are in its {CONFIG}: add them to {config_path}, or run this "
        "again with --write"
    )


def prepare(model_dir: Path, progress: Progress) -> None:
    """Put in place what a model directory of ours wants and git does not hold: the library and a first profile.

    Only where config.pbtxt has parameters of the strategy. Raises ConfigError as `install` does.
    """
    if "WISP_" not in _read_config(model_dir):
        return
    target, library = _version_dir(model_dir, None) / LIBRARY, build_library(progress)
    if not (model_dir / PROFILE).exists() and (model_dir / FIRST_PROFILE).exists():
        _copy(model_dir / FIRST_PROFILE, model_dir / PROFILE)
    _copy(library, target)


def _read_config(model_dir: Path) -> str:
    """config.pbtxt with its own line ends. Raises ConfigError."""
    path = model_dir / CONFIG
    try:
        return path.read_bytes().decode("utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{model_dir} is no model directory: it has no {CONFIG}") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} cannot be read: byte {error.start} is not UTF-8; allowed: UTF-8 text") from None


def _version_dir(model_dir: Path, version: int | None) -> Path:
    """The directory of `version`, None: the newest. ConfigError if there is none."""
    versions = sorted(int(path.name) for path in model_dir.iterdir() if _VERSION.fullmatch(path.name) and path.is_dir())
    if version is None and versions:
        version = versions[-1]
    if version not in versions:
        wanted = "no version" if version is None else f"no version {version}"
        allowed = ", ".join(map(str, versions)) or "none, the directory has no version"
        raise ConfigError(f"{model_dir} has {wanted}; allowed: {allowed}")
    return model_dir / str(version)


def _copy(source: Path, target: Path) -> None:
    """Copy unless it is there already: a server that has the library open keeps what it has mapped."""
    if not _is_copy(source, target):
        _put(target, lambda scratch: shutil.copyfile(source, scratch))


def _is_copy(source: Path, target: Path) -> bool:
    try:
        return target.is_file() and filecmp.cmp(source, target, shallow=False)
    except OSError as error:
        raise ConfigError(f"{error.filename} cannot be read: {error.strerror}") from None


def _put(target: Path, write: Callable[[Path], object]) -> None:
    """What `write` writes takes the place of `target` at once: nobody sees half of it. ConfigError if it cannot."""
    scratch = target.with_name(f".{target.name}~")
    try:
        write(scratch)
        scratch.replace(target)
    except OSError as error:
        with contextlib.suppress(OSError):
            scratch.unlink()
        raise ConfigError(f"{target} cannot be written: {error.strerror}") from None


def _change(config_path: Path, text: str) -> Path:
    """Replace the file, or what it is a link to; mode and owner stay. Returns the path of what it was before."""
    backup, target = _backup(config_path), config_path.resolve()

    def write(scratch: Path) -> None:
        scratch.write_bytes(text.encode())
        shutil.copymode(target, scratch)
        if os.geteuid() == 0:  # else the file would become root's, and perhaps unreadable for the server
            os.chown(scratch, target.stat().st_uid, target.stat().st_gid)

    _put(target, write)
    return backup


def _backup(config_path: Path) -> Path:
    """Copy to config.pbtxt.bak, .bak.1, ...: the first that is free, or holds the same already."""
    for number in itertools.count():
        backup = config_path.with_name(f"{CONFIG}.bak.{number}" if number else f"{CONFIG}.bak")
        if _is_copy(config_path, backup):
            return backup
        if not os.path.lexists(backup):
            _put(backup, lambda scratch: shutil.copy(config_path, scratch))
            return backup
    raise AssertionError("unreachable")
