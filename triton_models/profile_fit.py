"""From measured seconds to a profile: costs, margin and noise, and when and by which WISP it was made.

Without torch, so that `wisp-server profile --model` starts at once: whose passes were measured is not known here.
"""

from __future__ import annotations

import datetime
import math
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np

from wisp_plugin import __version__
from wisp_plugin.cost_fit import fit_costs
from wisp_plugin.estimator import Estimator, Floats
from wisp_plugin.profile import Fingerprint, Measurement, Profile

# Of a normal distribution: deviations that 5 % exceed, and deviations per median of absolute values.
_LATE_DEVIATIONS, _MEDIAN_TO_DEVIATION = 1.645, 1.4826
_LEAST_DEVIATION = 1e-3


class Origin(TypedDict):
    """Part of `Measurement`: when, and by which WISP."""

    created: str
    wisp: str


def fit_repeats(
    features: Floats, repeats_s: Sequence[Sequence[float]], seconds: float, fingerprint: Fingerprint
) -> Profile:
    """Costs from the medians of repeats; margin and noise from how far single passes lie from their prediction.

    `features` `[N, F]` of N different passes, the seconds of each of their repeats, and how long measuring took.
    """
    fit = fit_costs(features, np.array([np.median(times) for times in repeats_s]))
    predicted_s = Estimator(fit.costs).predict(features)
    logs = [np.log(np.asarray(times) / p) for times, p in zip(repeats_s, predicted_s, strict=True)]
    # From the median and not from the tail: a sweep is short, and a margin that starts too high is unlearnt slowly,
    # one that starts too low within a few late passes.
    deviation = max(_LEAST_DEVIATION, _MEDIAN_TO_DEVIATION * float(np.median(np.abs(np.concatenate(logs)))))
    measured = Measurement(
        num_passes=len(repeats_s),
        num_repeats=min(map(len, repeats_s)),
        repeat_noise=repeat_noise(repeats_s),
        fit_error=fit.error,
        seconds=seconds,
        **origin(),
    )
    margin = math.exp(_LATE_DEVIATIONS * deviation)
    return Profile(fingerprint, fit.costs, margin, deviation, measured)


def repeat_noise(repeats_s: Sequence[Sequence[float]]) -> float:
    """Mean relative difference of a pass to the median of its repeats, over passes that ran three times or more.

    0 without any: unknown.
    """
    several = [np.asarray(times) for times in repeats_s if len(times) >= 3]
    return float(np.mean(np.concatenate([np.abs(t / np.median(t) - 1) for t in several]))) if several else 0.0


def origin() -> Origin:
    """Now and this WISP."""
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return Origin(created=created, wisp=f"{__version__} {_commit()}")


def _commit() -> str:
    """Short hash of the checkout that this file lies in, `no checkout` elsewhere."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return "no checkout"  # an installed package, perhaps inside somebody else's checkout
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
