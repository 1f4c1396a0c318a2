"""Start-up sweep: the profile of a target on this device, measured, fitted and kept under `$WISP_HOME/profiles`.

The passes of `profile_passes` run in rounds, each round in a new random order: then a drift of a shared machine hits
all sizes alike and does not look like structure, and the median of a pass's repeats is over the whole time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from triton_models.artifacts import Progress
from triton_models.profile_fit import fit_repeats
from triton_models.profile_origin import fingerprint_of, profile_path
from triton_models.profile_passes import Cell, cell_features, num_new_tokens, sweep_cells, time_pass
from triton_models.torch_verifier import TorchVerifier
from wisp_plugin.config import EngineConfig
from wisp_plugin.cost_fit import MIN_PASSES
from wisp_plugin.errors import ConfigError
from wisp_plugin.estimator import Floats
from wisp_plugin.profile import Fingerprint, Profile, load_profile, save_profile

START_BUDGET_S = 20.0  # of the sweep that a first start makes by itself
_PROGRESS_S = 2.0


@dataclass(frozen=True, slots=True)
class Sweep:
    """Passes, and the seconds of each of their repeats; every pass has at least one."""

    cells: Sequence[Cell]
    repeats_s: Sequence[Sequence[float]]
    seconds: float

    @property
    def medians_s(self) -> Floats:
        """Median seconds of each pass, `[N]`."""
        return np.array([np.median(repeats) for repeats in self.repeats_s])

    @property
    def features(self) -> Floats:
        """Features of each pass, `[N, F]`."""
        return np.array([cell_features(cell) for cell in self.cells])


def ensure_profile(verifier: TorchVerifier, config: EngineConfig, progress: Progress) -> Profile:
    """The profile that `config.profile` names, or with `auto` the one kept for this target and device.

    With `auto` a missing or unfitting one is measured (START_BUDGET_S) and written. KV memory must be unused.

    Raises:
        ConfigError: the named file is missing, malformed or of something else.
    """
    wanted = fingerprint_of(verifier)
    if config.profile != "auto":
        return load_profile(profile_path(config.profile), wanted)
    path = profile_path(wanted)
    try:
        return load_profile(path, wanted)
    except ConfigError as error:
        progress(f"{error}" if path.exists() else f"there is no profile of {wanted.model} on this device yet")
    progress(f"measuring what passes cost, about {START_BUDGET_S:.0f} s")
    sweep = measure_sweep(verifier, config, START_BUDGET_S, progress)
    profile = fit_profile(sweep, wanted)
    save_profile(profile, path)
    progress(f"profile written to {path}; mean error {100 * profile.measured.fit_error:.1f} %")
    return profile


def measure_sweep(
    verifier: TorchVerifier,
    config: EngineConfig,
    budget_s: float,
    progress: Progress,
    clock: Callable[[], float] = time.perf_counter,
) -> Sweep:
    """Run passes until `budget_s` is over; at least as many as a fit needs are measured, whatever that takes.

    Raises:
        ConfigError: the free KV memory is too small for enough different passes.
    """
    cells = sweep_cells(verifier, config)
    if len(cells) < MIN_PASSES:
        raise ConfigError(f"free KV memory allows {len(cells)} different passes; a profile needs {MIN_PASSES}")
    random = np.random.default_rng(0)
    for cell in (max(cells, key=num_new_tokens), min(cells, key=num_new_tokens)):
        time_pass(verifier, cell, random, clock)  # warm-up
    start_s = shown_s = clock()
    repeats: list[list[float]] = [[] for _ in cells]
    num_passes = 0
    while num_passes < MIN_PASSES or clock() - start_s < budget_s:
        for at in random.permutation(len(cells)).tolist():
            repeats[at].append(time_pass(verifier, cells[at], random, clock))
            num_passes += 1
            now_s = clock()
            if now_s - shown_s >= _PROGRESS_S:
                shown_s = now_s
                progress(f"profile: {num_passes} passes, {now_s - start_s:.0f} of {budget_s:.0f} s")
            if num_passes >= MIN_PASSES and now_s - start_s >= budget_s:
                break
    measured = [at for at, times in enumerate(repeats) if times]
    return Sweep([cells[at] for at in measured], [repeats[at] for at in measured], clock() - start_s)


def fit_profile(sweep: Sweep, fingerprint: Fingerprint) -> Profile:
    """`fit_repeats` of a sweep."""
    return fit_repeats(sweep.features, sweep.repeats_s, sweep.seconds, fingerprint)
