"""Checked options of command lines: types for argparse, and folders and files that a long run writes to at its end.

A type is given as `type=` and raises `argparse.ArgumentTypeError`, which argparse makes one line and exit code 2 of.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from bench.workload import Workload
from wisp_plugin.errors import ConfigError

PROMPTS, OUTPUTS = Workload().prompt_range, Workload().output_range  # tokens that sessions may have
LEAST_KV_TOKENS = PROMPTS[1] + OUTPUTS[1] + 72  # the longest session with drafts behind it: whole blocks
MOST_KV_TOKENS = 100_000_000
MOST_S = 86_400.0  # of any time in a run, in the GPU's time
MOST_SPEED, MOST_RTT_MS = 1e6, 6e4  # of a device, draft tokens per second, and of its link


def whole_number(low: int, high: int | None = None) -> Callable[[str], int]:
    """A type: whole numbers from `low`, to `high` if there is one."""
    above = "above 0" if low == 1 else f"from {low:,}"
    allowed = above if high is None else f"from {low:,} to {high:,}"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {allowed}")
        return value

    return parse


def number(low: float, high: float = math.inf, above: bool = False) -> Callable[[str], float]:
    """A type: finite numbers from `low` (`above`: greater than it), to `high`."""
    allowed = f"{'above' if above else 'from'} {low:g}" + (f" to {high:g}" if high < math.inf else "")

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (low < value if above else low <= value) or value > high or not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not a finite number {allowed}")
        return value

    return parse


positive_int, not_negative_int = whole_number(1), whole_number(0)
num_seeds, num_processes = whole_number(1, 1000), whole_number(1, 1024)
share, num_kv_tokens = number(0.0, 1.0), whole_number(LEAST_KV_TOKENS, MOST_KV_TOKENS)


def host_and_port(text: str) -> str:
    """A type: HOST:PORT as gRPC takes it."""
    host, _, port = text.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65_536:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT with a port from 1 to 65535")
    return text


def report_folder(text: str) -> Path:
    """A type: a folder, with a name."""
    if not text:
        raise argparse.ArgumentTypeError("a folder is needed, not an empty name")
    return Path(text)


def check_range(option: str, values: Sequence[float]) -> None:
    """The two numbers of an option are the lowest and the highest. Raises ConfigError if they are not in this order."""
    low, high = values
    if low > high:
        raise ConfigError(f"{option} has the lowest number first, then the highest; {low:g} {high:g} was given")


def make_report_folder(folder: Path | None) -> None:
    """Make the folder of `--report` before a run of hours, not behind it; nothing to do for None.

    Raises:
        ConfigError: it cannot be made or written to, or there is nothing to draw with.
    """
    if folder is None:
        return
    _make(folder, "--report")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"--report {folder}: nothing can be written there; a folder that can be written to is needed")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--report needs the package 'matplotlib'; install the extra 'bench'")


@contextmanager
def report_in(folder: Path) -> Iterator[None]:
    """Around the writing of a report, behind the document: what a run of hours has found is not lost by a full disk.

    Raises:
        ConfigError: something could not be written.
    """
    try:
        yield
    except OSError as error:
        raise ConfigError(f"--report {folder}: the report cannot be written: {error}") from None


def check_appendable(option: str, path: Path) -> None:
    """Make sure that lines can be added to the file `path`; it and its folder are made if they are not there.

    Raises:
        ConfigError: it is a folder, or cannot be made, read and written to.
    """
    _make(path.parent, option)
    try:
        path.open("a+b").close()
    except OSError as error:
        raise ConfigError(f"{option} {path}: {error.strerror}; a file that can be written to is needed") from None


def check_writable(option: str, path: Path) -> None:
    """Make sure that the file `path` can be written later; its folder is made, the file is not.

    Raises:
        ConfigError: it is a folder, or its folder cannot be made or written to.
    """
    _make(path.parent, option)
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"{option} {path}: a file that can be written to is needed")


def _make(folder: Path, option: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = "it is a file" if folder.is_file() else error.strerror
        raise ConfigError(f"{option}: the folder {folder} cannot be made: {why}") from None
