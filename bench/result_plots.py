"""Pictures of the README, drawn from the kept documents: nobody has to run anything again to look at them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def draw(documents: Mapping[str, Mapping[str, Any]], folder: Path) -> list[Path]:
    """Draw what the README shows into `folder`; the paths."""
    from bench import matrix_plots, plots  # matplotlib is wanted for pictures alone
    from bench.matrix_state import result_of

    document = documents["goodput"]
    at = document["curve_columns"].index("goodput")
    lines = {name: [(point[0], point[at]) for point in line] for name, line in document["curves"].items()}
    cells = [result_of(cell) for cell in documents["matrix"]["results"]]
    return [
        plots.curves(folder / "goodput.png", lines, "devices", "goodput, tokens per second"),
        matrix_plots.heat_map(folder / "matrix-goodput.png", cells, "goodput"),
    ]
