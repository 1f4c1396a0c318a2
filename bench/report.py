"""What every benchmark shares: a table, progress, fair repetition, and one JSON document as the last line.

The document (nanochat's `infer_bench.py` does the same) makes a figure worth something later: it carries
configuration, seed, commit, hardware, versions and its time beside the figures, which stand at its top level.
"""

from __future__ import annotations

import dataclasses
import datetime
import enum
import functools
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO, TypeVar

import numpy as np

import wisp_plugin
from edge_runtime.cores import usable_cores

K = TypeVar("K")
T = TypeVar("T")
RESERVED_KEYS = ("benchmark", "config", "seed", "commit", "hardware", "versions", "wisp_version", "date", "took_s")
_PACKAGES = ("numpy", "torch", "transformers", "onnxruntime", "onnxruntime-genai", "tokenizers", "tritonclient")
_ROOT = Path(__file__).resolve().parents[1]
_STARTED_S = time.monotonic()
_TARGET = re.compile(r"(>=|<=)\s*(-?[0-9.]+(?:e-?[0-9]+)?)")


def format_cell(value: object) -> str:
    """Text of a table cell: floats with about four significant digits, None as `-`."""
    if value is None:
        return "-"
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, float | np.floating):
        number = float(value)
        if not math.isfinite(number) or number == 0 or abs(number) < 0.001:
            return f"{number:.3g}"
        return f"{number:.{max(0, min(4, 3 - math.floor(math.log10(abs(number)))))}f}"
    return str(value)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print `rows` under `columns` to stdout, numbers right-aligned. Raises ValueError on a ragged row."""
    cells = [list(row) for row in rows]
    if any(len(row) != len(columns) for row in cells):
        raise ValueError(f"table {title!r}: every row needs {len(columns)} cells")
    texts = [[format_cell(cell) for cell in row] for row in cells]
    widths = [max(map(len, column)) for column in zip(columns, *texts, strict=True)]
    right = [all(_is_number(row[i]) for row in cells) for i in range(len(columns))]

    def line(row: Sequence[str]) -> str:
        padded = (text.rjust(w) if r else text.ljust(w) for text, w, r in zip(row, widths, right, strict=True))
        return "  ".join(padded).rstrip()

    print("\n".join(["", title, line(columns), line(["-" * w for w in widths]), *map(line, texts)]), flush=True)


def _is_number(value: object) -> bool:
    return value is None or isinstance(value, int | float | np.number)


def finish(name: str, figures: Mapping[str, Any], config: Mapping[str, Any], seed: int | None) -> dict[str, Any]:
    """Print the JSON document of benchmark `name` as one line and return it as JSON sees it. Call it last.

    Raises:
        ValueError: a figure has the name of another key of the document, or is NaN or infinite
            (give None for what was not measured).
    """
    taken = sorted(set(figures) & set(RESERVED_KEYS))
    if taken:
        raise ValueError(f"a figure may not be called {taken[0]!r}: the report uses that key itself")
    document = {
        "benchmark": name,
        **figures,
        # Where a page was written says nothing about the figures, and names a folder of this machine.
        "config": {option: value for option, value in config.items() if option != "report"},
        "seed": seed,
        "commit": commit(),
        "hardware": hardware(),
        "versions": versions(),
        "wisp_version": wisp_plugin.__version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "took_s": round(time.monotonic() - _STARTED_S),
    }
    text = json.dumps(document, default=_jsonable, allow_nan=False)
    print(text, flush=True)
    return dict(json.loads(text))


def _jsonable(value: object) -> object:
    """What `json` cannot write itself: numpy values, paths, enums, dataclasses."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, enum.Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Path):  # of this checkout as others have it as well
        return str(value.relative_to(_ROOT) if value.is_relative_to(_ROOT) else value)
    raise TypeError(f"a report cannot hold {type(value).__name__}: {value!r}")


@functools.cache  # of the code that was loaded: the tree may change while a benchmark runs for hours
def commit() -> str:
    """Short hash of this checkout, with `-dirty` if the tree is changed; `unknown` outside git."""
    top = _output("git", "-C", str(_ROOT), "rev-parse", "--show-toplevel")
    head = _output("git", "-C", str(_ROOT), "rev-parse", "--short", "HEAD")
    # An installed package may lie in a virtual environment inside somebody else's checkout.
    if not head or not top or Path(top).resolve() != _ROOT:
        return "unknown"
    return head + ("-dirty" if _output("git", "-C", str(_ROOT), "status", "--porcelain") else "")


def hardware() -> dict[str, Any]:
    """CPU model, cores this process may use, memory in GiB, GPUs (None without), operating system."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    gpus = _output("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    return {
        "cpu": _cpu_model(),
        "cores": usable_cores(),
        "memory_gib": round(memory_bytes / 2**30, 1),
        "gpu": gpus.splitlines() if gpus else None,
        "os": platform.platform(),
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that decide about speed and results, without importing them; and
    in which form our own runs (see `make compiled`)."""
    engine = getattr(importlib.util.find_spec("wisp_plugin.engine"), "origin", None) or ""
    form = "interpreted" if engine.endswith(".py") else "compiled"
    found = {"python": platform.python_version(), "wisp_plugin": form}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match.group(1).strip() if match else platform.processor() or platform.machine()


def _output(*command: str) -> str | None:
    """What `command` prints, or None if it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


class Progress:
    """Progress of `total` steps on stderr: one line that rewrites itself on a terminal, else a line every 5 s."""

    def __init__(
        self,
        total: int,
        label: str,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._label, self._clock = total, label, clock
        self._stream = sys.stderr if stream is None else stream
        self._tty = self._stream.isatty()
        self._done = 0
        self._start_s = self._shown_s = clock()
        self._written = 0  # width of the line on the terminal

    def step(self, num_steps: int = 1, note: str = "") -> None:
        """`num_steps` more are done."""
        self._done += num_steps
        now_s = self._clock()
        if now_s - self._shown_s >= (0.1 if self._tty else 5.0):
            self._shown_s = now_s
            self._write(note)

    def reach(self, num_done: int) -> None:
        """So many steps are done in all."""
        self.step(num_done - self._done)

    def close(self) -> None:
        """Show the final state and end the line."""
        self._write("")
        if self._tty:
            print(file=self._stream, flush=True)

    def _write(self, note: str) -> None:
        elapsed_s = self._clock() - self._start_s
        text = f"{self._label}: {self._done}/{self._total}, {elapsed_s:.0f} s" + (f", {note}" if note else "")
        if self._tty:
            print("\r" + text.ljust(self._written), end="", file=self._stream, flush=True)
            self._written = len(text)
        else:
            print(text, file=self._stream, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def median(values: Iterable[float]) -> float:
    """Median; ValueError without values."""
    return float(statistics.median(values))


def percentile(values: Iterable[float], percent: float) -> float:
    """Percentile with linear interpolation, `percent` in 0 to 100; ValueError without values."""
    array = np.asarray(list(values), dtype=np.float64)
    if not array.size:
        raise ValueError("a percentile needs values")
    return float(np.percentile(array, percent))


def alternate(fns: Mapping[K, Callable[[], T]], rounds: int) -> dict[K, list[T]]:
    """Call the functions in turn (A B A B ...), `rounds` times each; results by name, in order.

    On a machine with noisy neighbours two things measured one behind the other are not comparable; measured
    in turn, drift hits both.
    """
    results: dict[K, list[T]] = {name: [] for name in fns}
    for _ in range(rounds):
        for name, fn in fns.items():
            results[name].append(fn())
    return results


def check_targets(figures: Mapping[str, Any], targets: Mapping[str, str]) -> list[str]:
    """Print asked / measured / ok for `targets`, like {"packed_speedup": ">= 1.3"}; one line per target that is missed.

    A figure that is absent or None counts as missed. Raises ValueError for a target that is not `>=` or `<=` a number.
    """
    rows: list[tuple[object, ...]] = []
    missed = []
    for name, asked in targets.items():
        match = _TARGET.fullmatch(asked.strip())
        if not match:
            raise ValueError(f"target {name!r} is {asked!r}; allowed: '>= number' or '<= number'")
        measured, bound = figures.get(name), float(match.group(2))
        met = measured is not None and (measured >= bound if match.group(1) == ">=" else measured <= bound)
        rows.append((name, asked, measured, "ok" if met else "MISSED"))
        if not met:
            missed.append(f"{name}: asked {asked}, measured {format_cell(measured)}")
    print_table("Targets", ("figure", "asked", "measured", "result"), rows)
    return missed
