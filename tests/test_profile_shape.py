"""`wisp-bench profile`: a random model of a shape, measured by the real verifier, gives a profile that all can load."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import cli, profile_shape
from bench.gpu_profile import NORMS, find_profile, is_derived
from bench.scenario import Scenario
from bench.simulator import simulate
from bench.workload import Workload
from wisp_plugin.profile import load_profile

TINY = ["profile", "--shape", "tiny", "--device", "cpu", "--kv-tokens", "4096", "--seconds", "0.2"]


def test_a_tiny_shape_gives_a_profile_that_the_simulator_runs_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tiny.json"
    assert cli.main([*TINY, "--layers", "2", "--output", str(path)]) == 0
    profile = load_profile(path)
    assert profile.fingerprint.model == "tiny, random weights, 2 of 4 layers"
    assert profile.fingerprint.dtype == "float32"
    assert not is_derived(profile)
    assert profile.measured.num_passes >= 10
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["unloaded_pass_ms"] > 0
    costs = find_profile(str(path)).costs
    assert simulate(Scenario(Workload(num_devices=2), costs=costs, duration_s=1.0, warm_up_s=0.2)).throughput > 0


@pytest.mark.parametrize(
    ("options", "complaint"),
    [(["--layers", "5"], "1 to 4"), (["--seconds", "0"], "above 0"), (["--device", "tpu"], "auto, cpu, cuda")],
)
def test_what_cannot_be_measured_is_refused(
    options: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*TINY, *options]) == 2
    assert complaint in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_told_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("WISP_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(profile_shape, "random_target", None)
    assert cli.main(TINY) == 2
    assert "profiles in $WISP_HOME: the folder" in capsys.readouterr().err


def test_a_shape_that_does_not_fit_is_refused_before_it_is_built(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(profile_shape, "free_bytes", lambda device: 16 << 30)
    assert cli.main(["profile", "--device", "cpu", "--seconds", "1"]) == 2
    assert "GiB" in capsys.readouterr().err


def test_deriving_writes_all_forms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(profile_shape, "FOLDER", tmp_path)
    assert cli.main(["profile", "--derive"]) == 0
    assert len(list(tmp_path.glob("*.json"))) == len(NORMS)
    assert "nothing measured" in capsys.readouterr().out
