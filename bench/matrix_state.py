"""Finished parts of a matrix in a file, one JSON line each: a run of hours can be stopped and goes on where it was.

A part's line holds what was asked (cell, and a key of length of runs, seeds, settings of the system) and its best. A
line that was asked otherwise is left alone and not used, so that after a change of one system only that one runs again.
A half line without its end is what a stopped run was writing, and is dropped; a whole line that is no finished part is
an error, wherever it stands.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.cells import DRAFTS, SPEEDS, Cell
from bench.matrix_parts import CellResult, Part, Parts
from bench.report import commit
from wisp_plugin.errors import ConfigError


def load_parts(path: Path, keys: Mapping[str, str], warn: Callable[[str], None] = lambda line: None) -> Parts:
    """Finished parts in the file with the keys of these systems, the newest of each; none without a file.

    `warn` is told, in a line, if some of them were made by another commit than this one.

    Raises:
        ConfigError: the file cannot be read, or a line that has an end is malformed.
    """
    parts: Parts = {}
    systems = {key: system for system, key in keys.items()}
    for number, text in enumerate(_whole_lines(path), 1):
        try:
            document = json.loads(text)
            if document["key"] in systems:
                part = _part_of(document, systems[document["key"]])
                parts.pop((part.cell, part.system), None)  # `same_to` has to find the newest last
                parts[part.cell, part.system] = part
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise ConfigError(
                f"{path}, line {number}: no finished part ({reason}); remove the line, or take another file"
            ) from None
    if line := _other_commits(path, [part.made_by for part in parts.values()]):
        warn(line)
    return parts


def _whole_lines(path: Path) -> list[bytes]:
    """Lines of the file, but not what is behind the last end of a line: a run was stopped while it wrote that."""
    try:
        return path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}; a file of finished parts is needed") from None


def _other_commits(path: Path, makers: Sequence[str]) -> str | None:
    now = commit() if makers else ""
    others = [maker for maker in makers if maker != now or now.endswith("-dirty")]  # who knows which changes
    if not others:
        return None
    return (f"{len(others)} of {len(makers)} finished parts in {path} were made by another commit "
            f"({', '.join(sorted(set(others)))}; this is {now}); --fresh runs them again")  # fmt: skip


def append_part(path: Path, key: str, part: Part) -> None:
    """Add a line, on disk when this returns. A half line that a stopped run left is ended first.

    Raises:
        ConfigError: it cannot be written, say on a full disk.
    """
    line = json.dumps({"key": key, **asdict(part)})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    _drop_half_line(file)
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ConfigError(f"{path}: a finished part cannot be written: {error.strerror}; all before it are there, and "
                          "the same command goes on behind them") from None  # fmt: skip


def _drop_half_line(file: Any) -> None:
    file.seek(0)
    file.truncate(file.read().rfind(b"\n") + 1)


def result_of(document: Mapping[str, Any]) -> CellResult:
    """A result from its JSON."""
    settings = {name: (own[0], own[1]) for name, own in document["settings"].items()}
    return CellResult(_cell_of(document["cell"]), document["capacity"], document["goodput"], settings)


def _part_of(document: Mapping[str, Any], system: str) -> Part:
    """A part of `system` from its line. Raises ValueError, KeyError, IndexError or TypeError if it is none."""
    if document["system"] != system:
        raise ValueError(f"this is the key of {system}, not of {document['system']}")
    for figure in ("capacity", "goodput"):
        values = document[figure]
        if not isinstance(values, list) or not values or not all(_is_amount(value) for value in values):
            raise ValueError(f"{figure} is not a list of numbers from 0")
    if len(document["capacity"]) != len(document["goodput"]):
        raise ValueError("capacity and goodput are of different numbers of seeds")
    settings = (str(document["settings"][0]), str(document["settings"][1]))
    cell, made_by = _cell_of(document["cell"]), str(document["made_by"])
    noted = {name: document.get(name) for name in ("peak_devices", "wdt_share", "interference_ms")}  # not in old lines
    if strange := [name for name, value in noted.items() if value is not None and not _is_number(value)]:
        raise ValueError(f"{strange[0]} is not a number")
    if noted["peak_devices"] is not None and noted["peak_devices"] != abs(int(noted["peak_devices"])):
        raise ValueError("peak_devices is not a whole number from 0")
    return Part(cell, system, document["capacity"], document["goodput"], settings, made_by, **noted)


def _cell_of(cell: Mapping[str, Any]) -> Cell:
    tpot_passes, (low_ms, high_ms) = cell["tpot_passes"], cell["rtt_ms"]
    if not all(map(_is_amount, (tpot_passes, low_ms, high_ms))):
        raise ValueError("tpot_passes and the two rtt_ms of a cell are numbers from 0")
    if cell["speeds"] not in SPEEDS or cell["draft"] not in DRAFTS:
        raise ValueError(f"a cell has speeds of {', '.join(SPEEDS)}, and a draft of {', '.join(DRAFTS)}")
    return Cell(tpot_passes, cell["speeds"], (low_ms, high_ms), cell["draft"], str(cell["profile"]))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_amount(value: Any) -> bool:
    return _is_number(value) and value >= 0
