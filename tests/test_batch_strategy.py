"""The C++ batching strategy: its own harness under sanitizers, and its predictions against the estimator's."""

from __future__ import annotations

import copy
import fcntl
import json
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wisp_plugin.errors import ConfigError
from wisp_plugin.estimator import EMPTY_PASS, NUM_FEATURES, Costs, item_features
from wisp_plugin.profile import Fingerprint, Measurement, Profile, load_profile, save_profile

FOLDER = Path(__file__).resolve().parents[1] / "wisp_plugin" / "batch_strategy"
NUM_FUZZED = 10_000  # `make check` there has 100,000
NUM_LOADS = {"plain": 40, "asan": 10, "tsan": 10}  # simulated; it has 400. All builds decide alike
OPTIMIZE = {"plain": "-O1", "asan": "-O0", "tsan": "-O1"}  # with the least time for compilation and run together
DECISION_TARGET_US = 2.0
ENTRY_POINTS = {
    "TRITONBACKEND_ModelBatchFinalize",
    "TRITONBACKEND_ModelBatchIncludeRequest",
    "TRITONBACKEND_ModelBatchInitialize",
    "TRITONBACKEND_ModelBatcherFinalize",
    "TRITONBACKEND_ModelBatcherInitialize",
}


def make(build: Path, *targets: str) -> str:
    """Run `make` for the strategy with its products in `build`; returns what it printed."""
    for program in ("make", "g++", "nm"):
        if shutil.which(program) is None:
            pytest.fail(f"{program} is missing; the batching strategy is C++ (Debian: apt install build-essential)")
    command = ["make", "-C", str(FOLDER), f"-j{os.cpu_count() or 1}", f"BUILD={build}", *targets]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, f"make {' '.join(targets)}:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the library and the program that predicts; one for all workers of a run."""
    run = tmp_path_factory.getbasetemp()
    folder = (run.parent if "PYTEST_XDIST_WORKER" in os.environ else run) / "batch_strategy"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # whoever comes second finds everything made
        make(folder, "all", "predict")
    return folder


def test_the_library_shows_its_entry_points_and_nothing_else(build: Path) -> None:
    listing = subprocess.run(
        ["nm", "-D", "--defined-only", build / "batchstrategy.so"], capture_output=True, text=True, check=True
    )
    assert {line.split()[-1] for line in listing.stdout.splitlines()} == ENTRY_POINTS


@pytest.mark.parametrize("kind", ["plain", "asan", "tsan"])
def test_harness(build: Path, kind: str) -> None:
    options = (f"FUZZ={NUM_FUZZED}", f"LOADS={NUM_LOADS[kind]}", f"CHECK_OPTIMIZE={OPTIMIZE[kind]}")
    assert f"all checks passed; {NUM_FUZZED} random requests" in make(build, *options, f"check-{kind}")


def test_decisions_are_fast(build: Path) -> None:
    line = next(line for line in make(build, "bench").splitlines() if line.startswith("{"))
    document = json.loads(line)
    assert document["decision_us"] <= DECISION_TARGET_US, document


def test_cmake_builds_what_make_builds() -> None:
    text = (FOLDER / "CMakeLists.txt").read_text()
    named = {word for word in text.replace(")", " ").split() if word.endswith(".cc")}
    assert named == {path.name for path in FOLDER.glob("*.cc")}


# -- predictions ------------------------------------------------------------------------------------------------


def a_profile(costs: Costs, margin: float = 1.2) -> Profile:
    """A profile with these costs."""
    fingerprint = Fingerprint("model", "hash", "float32", "CPU", 1, {"torch": "2"})
    return Profile(fingerprint, costs, margin, 0.05, Measurement(10, 3, 0.01, 0.02, 60.0, "2026-01-01", "0.1"))


def predictions(build: Path, jobs: list[str]) -> list[str]:
    """What the C++ program answers to each job."""
    done = subprocess.run(
        [build / "wisp_predict"], input="\n".join(jobs) + "\n", capture_output=True, text=True, check=True, timeout=60
    )
    return done.stdout.splitlines()


def random_costs(rng: random.Random) -> Costs:
    """Prices over ten orders of magnitude, some of them 0."""

    def line() -> tuple[float, ...]:
        return tuple(rng.choice([0.0, 10 ** rng.uniform(-10, 0)]) for _ in range(NUM_FEATURES))

    norm = rng.choice([1, 2, 4, 16, 32, rng.uniform(1, 32)])
    return Costs((10 ** rng.uniform(-6, 0), *line()[1:]), line(), float(norm))


def test_predictions_equal_the_estimators(build: Path, tmp_path: Path) -> None:
    rng = random.Random(7)
    jobs, expected = [], []
    for number in range(200):
        profile = a_profile(random_costs(rng), rng.uniform(0.5, 3.0))
        path = tmp_path / f"{number}.json"
        save_profile(profile, path)
        for _ in range(5):
            sizes = [
                (rng.randint(0, 100_000), rng.randint(0, 5_000), rng.randint(0, 100)) for _ in range(rng.randint(1, 40))
            ]
            cached, new, choices = np.array(sizes, np.float64).T
            features = EMPTY_PASS + item_features(cached, new, choices).sum(axis=0)
            expected.append((float(profile.estimator().predict(features)), profile.margin))
            jobs.append(" ".join([str(path), *(str(number) for size in sizes for number in size)]))
    answers = [tuple(map(float, line.split())) for line in predictions(build, jobs)]
    np.testing.assert_allclose(answers, expected, rtol=1e-12)


def changed_documents(document: Any) -> Iterator[Any]:
    """`document` with one value at a time removed, or replaced by something else, or with one key too many."""
    for key in document if isinstance(document, dict) else range(len(document)):
        smaller = copy.deepcopy(document)
        del smaller[key]
        yield smaller
        for other in (None, True, -1, 0, 1, 2.5, "text", [], {}, 33, 10**18):
            yield {**document, key: other} if isinstance(document, dict) else [
                *document[:key], other, *document[key + 1 :]
            ]  # fmt: skip
        if isinstance(document[key], dict | list):
            for inner in changed_documents(document[key]):
                replaced = copy.deepcopy(document)
                replaced[key] = inner
                yield replaced
    if isinstance(document, dict):
        yield {**document, "more": "text"}


def test_the_same_profiles_are_refused(build: Path, tmp_path: Path) -> None:
    path = tmp_path / "good.json"
    save_profile(a_profile(Costs((0.03, 0.0, 0.0, 0.0, 0.0, 1e-6), (0.0, 0.0, 3e-4, 0.0, 0.0, 0.0))), path)
    documents = [json.loads(path.read_text()), *changed_documents(json.loads(path.read_text()))]
    texts = [json.dumps(document) for document in documents] + ["", "[]", "{", path.read_text() + "x"]
    accepted = []
    for number, text in enumerate(texts):
        changed = tmp_path / f"{number}.json"
        changed.write_text(text)
        try:
            load_profile(changed)
            accepted.append(True)
        except ConfigError:
            accepted.append(False)
    answers = predictions(build, [f"{tmp_path / f'{number}.json'} 10 3 2" for number in range(len(texts))])
    wrong = [text for text, ours, line in zip(texts, accepted, answers, strict=True) if ours == ("error" in line)]
    assert 0 < sum(accepted) < len(accepted)
    assert wrong == []
