"""The profile of a target on a device: what its passes cost, in a file that can be shipped.

Schema 1, one JSON object (UTF-8). C++ reads the same file and evaluates it alike; all keys are required, others are
refused:

    schema        1
    fingerprint   what was measured; a profile holds only for an equal one (see `Fingerprint`)
        model         str   folder name or Hugging Face id
        model_hash    str   hash over the configuration and the sizes of the weight files
        dtype         str   float32, bfloat16 or float16
        device        str   name of the CPU or GPU
        num_threads   int   of torch; 0 on a GPU
        versions      {str: str}   of the packages that decide about speed
    features      [str] the names of FEATURES, in the order of the prices
    costs
        memory        [float] seconds per unit of each feature, 0 to 1e9
        arithmetic    [float] likewise
        norm          float   1 to 32
    margin        float factor on the prediction that about 5 % of passes exceed
    noise         float usual relative difference of a pass to its prediction
    measured      how (see `Measurement`)
        num_passes, num_repeats   int   different passes, and the times each was run (median)
        repeat_noise              float mean relative difference of an equal pass to the median of its repeats;
                                        0 if none ran three times
        fit_error                 float mean |predicted / median - 1|
        seconds                   float that measuring took
        created                   str   UTC, ISO 8601
        wisp                      str   version and commit of WISP

With the features x of a pass (sums over its sessions; x[0] = 1 for the pass itself):

    memory = sum(costs.memory[i] * x[i]);  arithmetic = sum(costs.arithmetic[i] * x[i])
    seconds = (memory ** norm + arithmetic ** norm) ** (1 / norm);  exceeded by 5 % of passes: seconds * margin
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wisp_plugin.errors import ConfigError
from wisp_plugin.estimator import FEATURES, Costs, Estimator

SCHEMA = 1
MAX_PRICE_S = 1e9  # times of passes stay finite


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What decides about the time of a pass. Key by key as in the file."""

    model: str
    model_hash: str
    dtype: str
    device: str
    num_threads: int
    versions: Mapping[str, str]

    def difference(self, wanted: Fingerprint) -> str | None:
        """The first difference in a few words, None if there is none."""
        for name in ("model", "model_hash", "dtype", "device", "num_threads"):
            mine, theirs = getattr(self, name), getattr(wanted, name)
            if mine != theirs:
                return f"{name} is {mine!r}, wanted {theirs!r}"
        for name in sorted({*self.versions, *wanted.versions}):
            mine, theirs = self.versions.get(name), wanted.versions.get(name)
            if mine != theirs:
                return f"version of {name} is {mine or 'not told'}, wanted {theirs or 'none'}"
        return None


@dataclass(frozen=True, slots=True)
class Measurement:
    """How a profile was measured. Key by key as in the file."""

    num_passes: int
    num_repeats: int
    repeat_noise: float
    fit_error: float
    seconds: float
    created: str
    wisp: str


@dataclass(frozen=True, slots=True)
class Profile:
    """Costs, what they are of and how they came about."""

    fingerprint: Fingerprint
    costs: Costs
    margin: float
    noise: float
    measured: Measurement

    def __post_init__(self) -> None:
        """ValueError for a margin or a noise that is not a positive number."""
        if not (0.0 < self.margin < math.inf and 0.0 < self.noise < math.inf):
            raise ValueError(f"margin {self.margin} and noise {self.noise} have to be positive numbers")

    def estimator(self) -> Estimator:
        """A fresh estimator with the costs of this profile."""
        return Estimator(self.costs, self.margin, self.noise)


def save_profile(profile: Profile, path: Path) -> None:
    """Write the file; a reader sees all of it or what was there before. The folder is made.

    Raises:
        ConfigError: the folder or the file cannot be written.
    """
    document = {"schema": SCHEMA, "features": list(FEATURES), **dataclasses.asdict(profile)}
    text = json.dumps(document, indent=1, allow_nan=False) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_whole(path, text)
    except OSError as error:
        raise ConfigError(f"profile {path} cannot be written: {error.strerror}") from None


def _write_whole(path: Path, text: str) -> None:
    """Write beside `path` and rename."""
    descriptor, scratch = tempfile.mkstemp(prefix=f".{path.name}~", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        Path(scratch).chmod(0o644)
        Path(scratch).replace(path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise


def load_profile(path: Path, wanted: Fingerprint | None = None) -> Profile:
    """Read the file, and check that it is of `wanted`.

    Raises:
        ConfigError: it is missing, malformed, of another schema, or of something else; one line says what.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except OSError as error:
        raise ConfigError(f"profile {path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"profile {path} is not JSON: {error}") from None
    try:
        profile = _from_document(document)
    except (OverflowError, ValueError) as error:
        raise ConfigError(f"profile {path} is malformed: {error}") from None
    difference = profile.fingerprint.difference(wanted) if wanted is not None else None
    if difference:
        raise ConfigError(f"profile {path} is of something else: {difference}")
    return profile


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _from_document(document: object) -> Profile:
    """The profile in a JSON document. Raises ValueError with a few words on the first thing that is wrong."""
    if not isinstance(document, dict):
        raise ValueError("it is no JSON object")
    if document.get("schema") != SCHEMA:
        raise ValueError(f"schema {document.get('schema')!r}; this version of WISP reads {SCHEMA}")
    top = _checked(document, "", schema=int, features=list, fingerprint=dict, costs=dict, margin=float, noise=float,
                   measured=dict)  # fmt: skip
    if top["features"] != list(FEATURES):
        raise ValueError(f"features are {top['features']}; this version of WISP has {list(FEATURES)}")
    fingerprint = _checked(top["fingerprint"], "fingerprint.", model=str, model_hash=str, dtype=str, device=str,
                           num_threads=int, versions=dict)  # fmt: skip
    _checked(fingerprint["versions"], "fingerprint.versions.", **dict.fromkeys(fingerprint["versions"], str))
    costs = _checked(top["costs"], "costs.", memory=list, arithmetic=list, norm=float)
    lines = {}
    for name in ("memory", "arithmetic"):
        numbered = {str(i): price for i, price in enumerate(costs[name])}
        prices = _checked(numbered, f"costs.{name}.", **dict.fromkeys(numbered, float))
        if high := [at for at, price in prices.items() if price > MAX_PRICE_S]:
            raise ValueError(f"costs.{name}.{high[0]} is {prices[high[0]]:g} s; allowed: up to {MAX_PRICE_S:g}")
        lines[name] = tuple(prices.values())
    measured = _checked(top["measured"], "measured.", num_passes=int, num_repeats=int, repeat_noise=float,
                        fit_error=float, seconds=float, created=str, wisp=str)  # fmt: skip
    return Profile(
        Fingerprint(**fingerprint), Costs(**lines, norm=costs["norm"]), top["margin"], top["noise"],
        Measurement(**measured),
    )  # fmt: skip


def _checked(values: Mapping[str, Any], where: str, **kinds: type) -> dict[str, Any]:
    """`values` with exactly the keys of `kinds`, each of its kind (an integer may stand for a float)."""
    for name in (*kinds, *values):
        if name not in values or name not in kinds:
            raise ValueError(f"{where}{name} is {'missing' if name in kinds else 'unknown'}")
    checked = {}
    for name, kind in kinds.items():
        value = values[name]
        number = kind is float and isinstance(value, int | float) and not isinstance(value, bool)
        if not number and (not isinstance(value, kind) or isinstance(value, bool)):
            raise ValueError(f"{where}{name} must be {kind.__name__}, not {value!r}")
        checked[name] = float(value) if number else value
    return checked
