"""What a search finds of a system in a cell: its capacity and its peak of goodput."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

Figures = dict[str, float]
ATTAINMENT = 0.95  # of sessions that meet their SLO, up to which devices count as held


@dataclass(frozen=True, slots=True)
class Best:
    """A system in a cell: capacity and peak goodput, each with its setting, devices and all figures of that run.

    Without `has_peak` no peak was looked for, and what stands for it is the run at capacity.
    """

    system: str
    capacity: int
    capacity_setting: str
    capacity_figures: Figures
    peak_goodput: float
    peak_devices: int
    peak_setting: str
    peak_figures: Figures
    runs: list[tuple[str, int, float, float]]  # setting, devices, attainment, goodput: all that was tried
    has_peak: bool = True

    def __str__(self) -> str:
        peak = f", {self.peak_goodput:.0f} tok/s at {self.peak_devices} ({self.peak_setting})" if self.has_peak else ""
        return f"{self.system}: {self.capacity} devices ({self.capacity_setting}){peak}"

    def with_peak_of(self, other: Best) -> Best:
        """This capacity and the peak of `other`."""
        return replace(
            self, peak_goodput=other.peak_goodput, peak_devices=other.peak_devices, peak_setting=other.peak_setting,
            peak_figures=other.peak_figures,
        )  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def tight_interference_ms(figures: Figures) -> float | None:
    """Mean interference in the tightest class, of the figures of a run."""
    return next((value for name, value in figures.items() if name.startswith("interference_ms_")), None)
