"""`wisp-server profile --model NAME`: what batches of any running Triton model cost, at a grid of sizes.

The profile is that of `wisp_plugin.profile`, so that the batching strategy works for models that are not ours. Nothing
else should use the server meanwhile: what others send is in Triton's statistics too.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from triton_models.artifacts import Progress
from triton_models.profile_fit import fit_repeats
from triton_models.remote_model import RemoteModel, RequestSize
from wisp_plugin.cost_fit import MIN_PASSES
from wisp_plugin.errors import ConfigError
from wisp_plugin.profile import Fingerprint, Profile, save_profile

_BURSTS = (1, 2, 4, 8, 16)  # requests at once
_DEFAULT_MOST_TOKENS = 256
_MAX_BUDGET_S = 86_400.0
_PROGRESS_S = 2.0
Repeats = dict[tuple[RequestSize, int], list[float]]  # seconds of batches, by size of the requests and their number


@dataclass(frozen=True, slots=True)
class RemoteOptions:
    """What the command was asked for. `max_tokens` None: what the model's inputs allow, up to 256."""

    url: str
    model: str
    output: Path
    budget_s: float = 60.0
    tokens_input: str | None = None
    context_input: str | None = None
    max_tokens: int | None = None
    max_context: int = 1024
    shapes: Mapping[str, Sequence[int]] | None = None


def run(options: RemoteOptions, progress: Progress) -> str:
    """Measure and write; the report for a person.

    Raises:
        ConfigError: a size or a time out of range, or a model whose requests cannot be made.
        ModelError: there is no such model, or it refuses a request.
    """
    if not 0 < options.budget_s <= _MAX_BUDGET_S:  # also refuses NaN
        raise ConfigError(f"--seconds is {options.budget_s}; allowed: above 0, up to {_MAX_BUDGET_S:g}")
    inputs = (options.tokens_input, options.context_input, options.shapes or {})
    model = RemoteModel(options.url, options.model, *inputs, progress)
    sizes = request_sizes(model, options.max_tokens, options.max_context)
    started_s = time.perf_counter()
    repeats = measure(model, sizes, options.budget_s, progress)
    if len(repeats) < MIN_PASSES:
        raise ConfigError(f"only {len(repeats)} different batches could be made; a profile needs {MIN_PASSES}")
    features = np.array([size.features(number) for size, number in repeats])
    config = model.config
    fingerprint = Fingerprint(
        model=options.model, model_hash="", dtype="any", device=options.url, num_threads=0,
        versions={"max_batch_size": str(config.max_batch_size)},
    )  # fmt: skip
    profile = fit_repeats(features, list(repeats.values()), time.perf_counter() - started_s, fingerprint)
    save_profile(profile, options.output)
    return f"{table(repeats, profile)}\n\n{summary(profile)}\nwritten to {options.output}"


def request_sizes(model: RemoteModel, max_tokens: int | None, max_context: int) -> list[RequestSize]:
    """Sizes of requests, powers of 4: new tokens alone, with drafts, and behind a context, as far as there are inputs.

    Raises ConfigError for a size out of range.
    """
    if max_tokens is not None and max_tokens < 1:
        raise ConfigError(f"--max-tokens is {max_tokens}; allowed: 1 or more")
    if max_context < 1:
        raise ConfigError(f"--max-context is {max_context}; allowed: 1 or more")
    fixed = model.max_tokens
    most = max_tokens or min(fixed or _DEFAULT_MOST_TOKENS, _DEFAULT_MOST_TOKENS)
    if fixed is not None and most > fixed:
        raise ConfigError(f"--max-tokens is {most}; the model takes up to {fixed}")
    steps = [4**power for power in range(math.ceil(math.log(most, 4) - 1e-9))] + [most]
    contexts = [0, max_context // 4, max_context] if model.has_context else [0]
    sizes = [RequestSize(tokens, 0, context) for context in contexts for tokens in steps]
    if model.has_second_input:
        sizes += [RequestSize(1, tokens - 1, context) for context in contexts for tokens in steps if 1 < tokens <= 64]
    return sizes


def measure(
    model: RemoteModel,
    sizes: Sequence[RequestSize],
    budget_s: float,
    progress: Progress,
    clock: Callable[[], float] = time.perf_counter,
) -> Repeats:
    """Bursts in rounds of random order until `budget_s` is over; every burst once, whatever that takes."""
    random = np.random.default_rng(0)
    bursts = [(size, number) for size in sizes for number in _BURSTS if number <= model.config.max_batch_size]
    for size in (sizes[-1], sizes[0]):
        model.burst(size, 1)  # warm-up
    repeats: Repeats = defaultdict(list)
    start_s = shown_s = clock()
    num_bursts = 0
    while num_bursts < len(bursts) or clock() - start_s < budget_s:
        for at in random.permutation(len(bursts)).tolist():
            size, number = bursts[at]
            for num_together, (_, seconds) in model.burst(size, number).items():
                repeats[size, num_together].append(seconds)
            num_bursts += 1
            now_s = clock()
            if now_s - shown_s >= _PROGRESS_S:
                shown_s = now_s
                progress(f"profile: {num_bursts} bursts, {now_s - start_s:.0f} of {budget_s:.0f} s")
            if num_bursts >= len(bursts) and now_s - start_s >= budget_s:
                break
    return dict(repeats)


def table(repeats: Repeats, profile: Profile) -> str:
    """Measured against predicted, a row per size of request and number of them in the batch."""
    lines = [f"{'requests':>8}  {'tokens each':>11}  {'drafts each':>11}  {'context':>7}  {'runs':>4}  "
             f"{'measured ms':>11}  {'predicted ms':>12}"]  # fmt: skip
    estimator = profile.estimator()
    for size, number in sorted(repeats, key=lambda key: (key[0].num_context, key[0].num_tokens, key[1])):
        times = repeats[size, number]
        predicted_s = float(estimator.predict(size.features(number)))
        lines.append(
            f"{number:8}  {size.num_tokens:11}  {size.num_drafts:11}  {size.num_context:7}  {len(times):4}  "
            f"{1e3 * float(np.median(times)):11.2f}  {1e3 * predicted_s:12.2f}"
        )
    return "\n".join(lines)


def summary(profile: Profile) -> str:
    """How well it fits, in one line."""
    how = profile.measured
    return (
        f"{profile.fingerprint.model} on {profile.fingerprint.device}: mean error {100 * how.fit_error:.1f} %, equal "
        f"batches differ by {100 * how.repeat_noise:.1f} %, norm {profile.costs.norm:g}, margin {profile.margin:.2f}"
    )
