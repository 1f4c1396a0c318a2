"""`wisp-server profile`: measure, write the profile, show measured against predicted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triton_models.artifacts import Progress
from triton_models.profile_origin import fingerprint_of, profile_path
from triton_models.profiling import Sweep, fit_profile, measure_sweep
from triton_models.torch_verifier import load_verifier
from wisp_plugin.config import EngineConfig, VerifierConfig, from_mapping
from wisp_plugin.errors import ConfigError
from wisp_plugin.profile import Profile, save_profile

_MAX_BUDGET_S = 86_400.0
_COLUMNS = ("sessions", "new tokens", "choices", "context", "runs", "measured ms", "predicted ms", "error %")


@dataclass(frozen=True, slots=True)
class ProfileOptions:
    """What the command was asked for. `settings` are fields of VerifierConfig, `output` None is the usual place."""

    settings: Mapping[str, Any]
    budget_s: float
    output: Path | None = None


def run(options: ProfileOptions, progress: Progress) -> str:
    """Measure and write; the report for a person, a table and two lines.

    Raises:
        ConfigError: no time to measure, the device does not exist, or KV memory is too small.
        ModelError: the target is missing, damaged or of an unsupported kind.
    """
    if not 0 < options.budget_s <= _MAX_BUDGET_S:  # also refuses NaN
        raise ConfigError(f"--seconds is {options.budget_s}; allowed: above 0, up to {_MAX_BUDGET_S:g}")
    verifier = load_verifier(from_mapping(VerifierConfig, options.settings))
    sweep = measure_sweep(verifier, EngineConfig(), options.budget_s, progress)
    profile = fit_profile(sweep, fingerprint_of(verifier))
    path = options.output or profile_path(profile.fingerprint)
    save_profile(profile, path)
    return f"{table(sweep, profile)}\n\n{summary(profile)}\nwritten to {path}"


def table(sweep: Sweep, profile: Profile) -> str:
    """Measured against predicted, a row per pass, by new tokens."""
    predicted_s = profile.estimator().predict(sweep.features)
    rows = []
    for features, times, measured_s, expected_s in zip(
        sweep.features, sweep.repeats_s, sweep.medians_s, predicted_s, strict=True
    ):
        _, sessions, new_tokens, choices, _, context = features.astype(int).tolist()
        ms = [f"{1e3 * value:.1f}" for value in (measured_s, expected_s)]
        error = f"{100 * (expected_s / measured_s - 1):+.1f}"
        rows.append((new_tokens, sessions, (sessions, new_tokens, choices, context, len(times), *ms, error)))
    cells = [_COLUMNS, *(tuple(map(str, row)) for *_, row in sorted(rows))]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) for row in cells)


def summary(profile: Profile) -> str:
    """What was measured and how well it fits, in one line."""
    of, how = profile.fingerprint, profile.measured
    threads = f", {of.num_threads} threads" if of.num_threads else ""
    return (
        f"{of.model}, {of.dtype} on {of.device}{threads}: mean error {100 * how.fit_error:.1f} %, "
        f"equal passes differ by {100 * how.repeat_noise:.1f} %, "
        f"norm {profile.costs.norm:g}, margin {profile.margin:.2f}"
    )
