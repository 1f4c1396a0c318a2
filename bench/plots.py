"""Plots of the comparison as PNG files. matplotlib without a display; one look for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import matplotlib.ticker
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from bench.systems import LABELS

_SIZE, _DPI = (9.0, 4.5), 110
_STYLES = {
    "wisp": ("#c0392b", "-"), "centralized": ("#2c3e50", "-"), "sled": ("#7f8c8d", "--"),
    "published": ("#2980b9", "--"), "slo-central": ("#16a085", "-"), "colocated": ("#8e44ad", "-."),
    "fixed-edf": ("#d68910", "--"), "wisp-edge-only": ("#ec7063", ":"), "wisp-no-devices": ("#e59866", "-."),
    "wisp-no-controller": ("#6e2c00", ":"), "wisp-no-scheduler": ("#ba4a00", ":"), "wisp-no-holding": ("#edbb99", ":"),
}  # fmt: skip  # variants of WISP are reddish
_OTHER = "#b2babb", ":"
Points = Sequence[tuple[float, float]]


def curves(path: Path, series: Mapping[str, Points], x_label: str, y_label: str, line_at: float | None = None) -> Path:
    """Lines over a logarithmic number of devices, one per system, named in the order of their highest points;
    `line_at` draws a threshold."""
    figure, axes = plt.subplots(figsize=_SIZE)
    for name in sorted(series, key=lambda name: -max(y for _, y in series[name])):
        color, style = _STYLES.get(name, _OTHER)
        xs, ys = zip(*sorted(series[name]), strict=True)
        is_ours = name == "wisp"
        axes.plot(xs, ys, style, color=color, marker="o", markersize=3, label=LABELS.get(name, name),
                  linewidth=2.5 if is_ours else 1.3, zorder=3 if is_ours else 2)  # fmt: skip
    if line_at is not None:
        axes.axhline(line_at, color="black", linewidth=0.7)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return _save(figure, path)


def bars(
    path: Path, values: Mapping[str, float], errors: Mapping[str, tuple[float, float]], y_label: str
) -> Path:
    """A bar per system; `errors`: how far the interval reaches below and above."""
    figure, axes = plt.subplots(figsize=_SIZE)
    colors = [_STYLES.get(name, _OTHER)[0] for name in values]
    spans = [[errors.get(name, (0.0, 0.0))[side] for name in values] for side in (0, 1)]
    # The value below its bar: at the end of the interval it would be read as that height.
    names = [f"{LABELS.get(name, name)}\n{value:.3g}" for name, value in values.items()]
    axes.bar(names, list(values.values()), yerr=spans, color=colors, capsize=3)
    axes.set_ylabel(y_label)
    axes.tick_params(axis="x", rotation=30, labelsize=8)
    axes.grid(axis="y", alpha=0.3)
    return _save(figure, path)


def heat_map(
    path: Path, values: Sequence[Sequence[float | None]], rows: Sequence[str], columns: Sequence[str], title: str
) -> Path:
    """Ratios around 1 as colours and numbers; None stays empty."""
    figure, axes = plt.subplots(figsize=(1.6 + 0.85 * len(columns), 1.6 + 0.42 * len(rows)))
    numbers = [[float("nan") if v is None else v for v in row] for row in values]
    known = [v for row in values for v in row if v is not None]
    reach = max([0.05, *(abs(v - 1.0) for v in known)])
    norm = TwoSlopeNorm(1.0, 1.0 - reach, 1.0 + reach)
    axes.imshow(numbers, cmap="RdYlGn", norm=norm, aspect="auto")
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            axes.text(x, y, "-" if value is None else f"{value:.2f}", ha="center", va="center", fontsize=8)
    axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right", fontsize=8)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.set_title(title, fontsize=10)
    return _save(figure, path)


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=_DPI)
    plt.close(figure)
    return path
