"""Pictures of the README, drawn from the kept documents: nobody has to run anything again to look at them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.matrix_parts import CellResult
from bench.matrix_state import result_of

Documents = Mapping[str, Mapping[str, Any]]


def draw(documents: Documents, folder: Path) -> list[Path]:
    """Draw what the README shows into `folder`; the paths."""
    from bench import matrix_plots, plots  # matplotlib is wanted for pictures alone

    return [
        plots.curves(folder / "goodput.png", _lines(documents["goodput"]), "devices", "goodput, tokens per second"),
        matrix_plots.heat_map(folder / "matrix-goodput.png", _cells(documents["matrix"]), "goodput"),
    ]


def check_drawable(documents: Documents) -> None:
    """Raises a TypeError, ValueError, LookupError or AttributeError if a picture cannot be drawn from its document;
    those that are not there are not missed."""
    if "goodput" in documents and not all(map(len, _lines(documents["goodput"]).values())):
        raise ValueError("a system has no curve")
    if "matrix" in documents and not _cells(documents["matrix"]):
        raise ValueError("no cells")


def _lines(document: Mapping[str, Any]) -> dict[str, list[tuple[float, float]]]:
    at = document["curve_columns"].index("goodput")
    return {name: [(float(p[0]), float(p[at])) for p in line] for name, line in document["curves"].items()}


def _cells(document: Mapping[str, Any]) -> list[CellResult]:
    return [result_of(cell) for cell in document["results"]]
