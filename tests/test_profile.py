"""The profile file: round trip, refusals in one line, atomic writing."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wisp_plugin.errors import ConfigError
from wisp_plugin.estimator import EMPTY_PASS, FEATURES, Costs, item_features
from wisp_plugin.profile import SCHEMA, Fingerprint, Measurement, Profile, load_profile, save_profile

OF = Fingerprint("tiny", "0123456789abcdef", "float32", "Some CPU", 2, {"torch": "2.13.0", "wisp": "0.2.0"})
MEASURED = Measurement(40, 3, 0.02, 0.05, 20.5, "2026-01-02T03:04:05+00:00", "0.2.0 abcdef1")
COSTS = Costs((0.03, 0.004, 0.0, 0.0, 0.0, 2e-5), (0.015, 0.0, 0.003, 0.001, 1e-6, 0.0), 2.0)
PROFILE = Profile(OF, COSTS, 1.15, 0.06, MEASURED)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "profiles" / "tiny.json"


@pytest.fixture
def document(path: Path) -> dict[str, Any]:
    save_profile(PROFILE, path)
    return dict(json.loads(path.read_text()))


def refusal(path: Path, document: object, wanted: Fingerprint | None = None) -> str:
    """The one line with which the document is refused."""
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    with pytest.raises(ConfigError) as caught:
        load_profile(path, wanted)
    line = str(caught.value)
    assert str(path) in line
    assert "\n" not in line
    return line


def test_round_trip(path: Path) -> None:
    save_profile(PROFILE, path)
    assert load_profile(path) == PROFILE
    assert load_profile(path, OF) == PROFILE


@given(
    st.lists(st.floats(0, 1e6), min_size=6, max_size=6),
    st.lists(st.floats(1e-12, 1e6), min_size=6, max_size=6),
    st.floats(1, 32),
)
def test_costs_survive_to_the_last_bit(memory: list[float], arithmetic: list[float], norm: float) -> None:
    profile = dataclasses.replace(PROFILE, costs=Costs(tuple(memory), tuple(arithmetic), norm))
    with tempfile.TemporaryDirectory() as folder:
        save_profile(profile, Path(folder) / "p.json")
        assert load_profile(Path(folder) / "p.json").costs == profile.costs


def test_the_documented_formula_is_what_python_evaluates(document: dict[str, Any]) -> None:
    """What the C++ library will do with the file, by hand."""
    assert document["schema"] == SCHEMA
    assert document["features"] == list(FEATURES)
    x = EMPTY_PASS + item_features(np.array([100.0, 7.0]), np.array([3.0, 1.0]), np.array([3.0, 0.0])).sum(axis=0)
    lines = [sum(p * v for p, v in zip(document["costs"][name], x, strict=True)) for name in ("memory", "arithmetic")]
    norm = document["costs"]["norm"]
    seconds = (lines[0] ** norm + lines[1] ** norm) ** (1 / norm)
    estimator = PROFILE.estimator()
    assert float(estimator.predict(x)) == pytest.approx(seconds, rel=1e-12)
    assert float(estimator.predict_quantile(x)) == pytest.approx(seconds * document["margin"], rel=1e-12)
    assert estimator.noise == document["noise"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "other"}, "model is 'tiny', wanted 'other'"),
        ({"model_hash": "ff"}, "model_hash is '0123456789abcdef', wanted 'ff'"),
        ({"dtype": "bfloat16"}, "dtype is 'float32', wanted 'bfloat16'"),
        ({"device": "Other CPU"}, "device is 'Some CPU', wanted 'Other CPU'"),
        ({"num_threads": 1}, "num_threads is 2, wanted 1"),
        ({"versions": {"torch": "3.0", "wisp": "0.2.0"}}, "version of torch is 2.13.0, wanted 3.0"),
        ({"versions": {"torch": "2.13.0"}}, "version of wisp is 0.2.0, wanted none"),
        ({"versions": {"torch": "2.13.0", "wisp": "0.2.0", "x": "1"}}, "version of x is not told, wanted 1"),
    ],
)
def test_a_profile_of_something_else_is_refused(
    path: Path, document: dict[str, Any], change: dict[str, Any], words: str
) -> None:
    assert words in refusal(path, document, dataclasses.replace(OF, **change))


@pytest.mark.parametrize("schema", [0, 2, "1", 1.0, None, True])
def test_another_schema_is_refused(path: Path, document: dict[str, Any], schema: object) -> None:
    if schema in (1.0, True):  # equal to 1 in Python, but not what the schema says
        assert "schema" in refusal(path, {**document, "schema": schema})
    else:
        assert f"schema {schema!r}; this version of WISP reads 1" in refusal(path, {**document, "schema": schema})


def leaves(value: object, where: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Path of every key and list element of a document."""
    if isinstance(value, dict):
        return [(*where, key) for key in value] + [leaf for key in value for leaf in leaves(value[key], (*where, key))]
    return [(*where, i) for i in range(len(value))] if isinstance(value, list) else []


def changed(document: dict[str, Any], where: tuple[Any, ...], value: object) -> dict[str, Any]:
    """A copy with another value at `where`; `...` removes it."""
    copied = copy.deepcopy(document)
    holder: Any = copied
    for key in where[:-1]:
        holder = holder[key]
    if value is ...:
        del holder[where[-1]]
    else:
        holder[where[-1]] = value
    return copied


def test_every_key_is_needed_and_typed(path: Path, document: dict[str, Any]) -> None:
    for where in leaves(document):
        if where[:2] != ("fingerprint", "versions") or len(where) == 2:
            refusal(path, changed(document, where, ...))
        for wrong in (None, [[]], True):
            refusal(path, changed(document, where, wrong))


def test_unknown_keys_are_refused(path: Path, document: dict[str, Any]) -> None:
    assert "extra is unknown" in refusal(path, {**document, "extra": 1})
    assert "costs.bias is unknown" in refusal(path, changed(document, ("costs", "bias"), 1.0))


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("costs", "memory"), [0.1] * 5),
        (("costs", "memory", 0), -0.1),
        (("costs", "arithmetic", 4), 1e300),
        pytest.param(("costs", "memory", 0), 10**400, id="too large for a float"),
        (("costs", "norm"), 0.5),
        (("margin",), 0.0),
        (("noise",), -1),
        (("features",), list(reversed(FEATURES))),
    ],
)
def test_impossible_values_are_refused(
    path: Path, document: dict[str, Any], where: tuple[Any, ...], value: object
) -> None:
    assert "malformed" in refusal(path, changed(document, where, value))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "7", '{"schema": 1}', "\udcff"])
def test_what_is_no_profile_is_refused(path: Path, text: str) -> None:
    path.parent.mkdir()
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError, match=r"^profile .*tiny\.json is (not JSON|malformed): [^\n]+$"):
        load_profile(path)


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_not_a_number_is_refused_everywhere(path: Path, document: dict[str, Any], constant: str) -> None:
    text = json.dumps(changed(document, ("measured", "seconds"), 12345.5)).replace("12345.5", constant)
    assert "no number" in refusal(path, text)


def test_a_missing_file_is_named(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tiny\.json cannot be read: No such file"):
        load_profile(path)


def test_a_failed_write_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_profile(PROFILE, path)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(ConfigError, match=r"tiny\.json cannot be written: No space left"):
        save_profile(dataclasses.replace(PROFILE, margin=2.0), path)
    assert load_profile(path) == PROFILE
    assert os.listdir(path.parent) == ["tiny.json"]
