"""The start-up sweep on a tiny target: which passes, how they are timed, and when a profile is made again."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from tests import tiny_model
from tests.factories import make_config
from tests.fakes import FakeClock
from triton_models import cli, profile_fit, profiling
from triton_models.profile_fit import repeat_noise
from triton_models.profile_origin import fingerprint_of, model_hash, profile_path
from triton_models.profile_passes import Cell, Member, cell_features, make_items, num_new_tokens, sweep_cells, time_pass
from triton_models.profiling import Sweep, ensure_profile, fit_profile, measure_sweep
from triton_models.torch_verifier import TorchVerifier, load_verifier
from wisp_plugin.config import VerifierConfig
from wisp_plugin.cost_fit import MIN_PASSES
from wisp_plugin.errors import ConfigError
from wisp_plugin.estimator import FEATURES, Costs, Estimator
from wisp_plugin.profile import load_profile, save_profile

TRUE = Costs((0.03, 0.004, 0.0, 0.0, 0.0, 2e-5), (0.015, 0.0, 0.003, 0.001, 1e-6, 0.0), 2.0)


@pytest.fixture(scope="module")
def verifier() -> TorchVerifier:
    config = VerifierConfig(target=str(tiny_model.hf_folder()), device="cpu", dtype="float32", num_threads=1)
    return load_verifier(dataclasses.replace(config, kv_tokens=8192, kv_block_tokens=16))


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WISP_HOME", str(tmp_path))
    return tmp_path


def known_costs(monkeypatch: pytest.MonkeyPatch, clock: FakeClock, factor: float = 1.0) -> list[Cell]:
    """Passes take what TRUE says, on `clock`; returns the list of those that ran."""
    ran: list[Cell] = []

    def timed(_verifier: object, cell: Cell, *_: object) -> float:
        ran.append(cell)
        time_s = factor * float(Estimator(TRUE).predict(cell_features(cell)))
        clock.now_s += time_s
        return time_s

    monkeypatch.setattr(profiling, "time_pass", timed)
    return ran


# -- which passes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limits", [{}, {"max_pass_tokens": 64}, {"max_pass_sessions": 2}, {"max_pass_tokens": 1}])
def test_passes_stay_within_the_limits(verifier: TorchVerifier, limits: dict[str, int]) -> None:
    config = make_config(**limits)
    cells = sweep_cells(verifier, config)
    assert cells == sweep_cells(verifier, config)
    assert len(set(cells)) == len(cells) > 0
    for cell in cells:
        blocks = sum(verifier.pool.num_blocks_for(member.num_cached + member.num_new) for member in cell)
        assert blocks <= verifier.pool.num_free
        assert num_new_tokens(cell) <= config.max_pass_tokens
        assert len(cell) <= max(5, config.max_pass_sessions)
        assert max(member.num_cached + member.num_new for member in cell) <= verifier.max_context_tokens


def test_passes_tell_the_prices_apart(verifier: TorchVerifier) -> None:
    features = np.array([cell_features(cell) for cell in sweep_cells(verifier, make_config())])
    assert np.linalg.matrix_rank(features / features.max(axis=0)) == len(FEATURES)


def test_a_small_memory_gives_smaller_passes(verifier: TorchVerifier) -> None:
    verifier.pool.extend("other", 7900)
    try:
        cells = sweep_cells(verifier, make_config())
        assert MIN_PASSES <= len(cells) < len(Member.__slots__) * 40
        for cell in cells:
            time_pass(verifier, cell, np.random.default_rng(0))
    finally:
        verifier.release("other")


def test_no_memory_is_an_error(verifier: TorchVerifier, lines: list[str]) -> None:
    verifier.pool.extend("other", 8192)
    try:
        with pytest.raises(ConfigError, match=r"KV memory allows \d different passes; a profile needs"):
            measure_sweep(verifier, make_config(), 1.0, lines.append)
    finally:
        verifier.release("other")


def test_items_have_the_features_of_their_pass(verifier: TorchVerifier) -> None:
    cell = (Member(10, 3, 3), Member(0, 20, 0), Member(7, 1, 1))
    items = make_items(cell, verifier.vocab_size, np.random.default_rng(0))
    assert [(i.num_cached, i.num_new_tokens, i.num_choices) for i in items] == [(10, 3, 3), (0, 20, 0), (7, 1, 1)]
    assert [i.is_prefill_chunk for i in items] == [False, True, False]
    assert cell_features(cell)[:4].tolist() == [1, 3, 24, 4]


# -- timing -----------------------------------------------------------------------------------------------------------


def test_a_timed_pass_leaves_no_kv_and_no_prefix(verifier: TorchVerifier) -> None:
    free = verifier.pool.num_free
    cell = (Member(100, 5, 5), Member(0, 64, 0))
    assert time_pass(verifier, cell, np.random.default_rng(3)) > 0
    assert verifier.pool.num_free == free
    assert verifier.pool.sessions() == ()
    # The KV of its cached tokens was never computed: nobody may find it as a known prefix.
    for item in make_items(cell, verifier.vocab_size, np.random.default_rng(3)):
        assert verifier.pool.adopt("reader", np.append(item.tokens, 1).astype(np.int32)) == 0


def test_a_failed_pass_leaves_no_kv(verifier: TorchVerifier, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(verifier, "choose", fail)
    with pytest.raises(RuntimeError, match="broken"):
        time_pass(verifier, (Member(100, 5, 5),), np.random.default_rng(0))
    assert verifier.pool.sessions() == ()


def test_a_real_sweep_of_the_tiny_target(verifier: TorchVerifier, lines: list[str]) -> None:
    sweep = measure_sweep(verifier, make_config(), 0.3, lines.append)
    profile = fit_profile(sweep, fingerprint_of(verifier))
    assert profile.measured.num_passes == len(sweep.cells) >= MIN_PASSES
    assert (profile.estimator().predict(sweep.features) > 0).all()
    assert profile.fingerprint.dtype == "float32"


def test_rounds_cover_all_passes_in_changing_order(
    verifier: TorchVerifier, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = FakeClock()
    ran = known_costs(monkeypatch, clock)
    sweep = measure_sweep(verifier, make_config(), 60.0, lines.append, clock)
    size = len(sweep.cells)
    rounds = [ran[2 + i * size : 2 + (i + 1) * size] for i in range(3)]  # behind two passes of warm-up
    assert set(rounds[0]) == set(rounds[1]) == set(rounds[2])
    assert rounds[0] != rounds[1] != rounds[2]
    assert 60.0 <= sweep.seconds < 63.0
    assert lines[0].startswith("profile: ")
    assert 20 <= len(lines) <= 30  # a line every two seconds


def test_a_slow_target_still_gets_a_profile(
    verifier: TorchVerifier, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = FakeClock()
    known_costs(monkeypatch, clock, factor=100.0)
    sweep = measure_sweep(verifier, make_config(), 1.0, lines.append, clock)
    assert sum(map(len, sweep.repeats_s)) == MIN_PASSES
    fit_profile(sweep, fingerprint_of(verifier))


def test_profile_of_known_costs(verifier: TorchVerifier) -> None:
    cells, random = sweep_cells(verifier, make_config()), np.random.default_rng(0)
    times_s = Estimator(TRUE).predict(np.array([cell_features(cell) for cell in cells]))
    repeats_s = [(time_s * np.exp(random.normal(0, 0.05, 5))).tolist() for time_s in times_s]
    profile = fit_profile(Sweep(cells, repeats_s, 12.0), fingerprint_of(verifier))
    predicted = profile.estimator().predict(np.array([cell_features(cell) for cell in cells]))
    assert np.abs(predicted / times_s - 1).mean() < 0.03
    assert 1.06 < profile.margin < 1.11  # the 95th percentile of 5 % noise is 1.086
    assert 0.04 < profile.noise < 0.06
    assert profile.measured.repeat_noise == pytest.approx(0.035, abs=0.01)


def test_a_disturbed_sweep_does_not_start_with_a_wide_margin(verifier: TorchVerifier) -> None:
    cells, random = sweep_cells(verifier, make_config()), np.random.default_rng(0)
    times_s = Estimator(TRUE).predict(np.array([cell_features(cell) for cell in cells]))
    times_s *= np.exp(random.normal(0, 0.03, len(cells)))
    times_s[::8] *= 3
    profile = fit_profile(Sweep(cells, [[time_s] for time_s in times_s.tolist()], 12.0), fingerprint_of(verifier))
    assert profile.margin < 1.15
    assert profile.noise < 0.08


def test_repeat_noise_needs_three_repeats() -> None:
    assert repeat_noise([[1.0, 2.0], [5.0]]) == 0.0
    assert repeat_noise([[1.0, 2.0, 3.0], [5.0]]) == pytest.approx(1 / 3)


# -- reuse ------------------------------------------------------------------------------------------------------------


def test_a_profile_is_measured_once(
    verifier: TorchVerifier, home: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = known_costs(monkeypatch, FakeClock())
    monkeypatch.setattr(profiling, "START_BUDGET_S", 0.0)
    first = ensure_profile(verifier, make_config(), lines.append)
    assert lines[0].startswith("there is no profile of ")
    assert load_profile(profile_path(first.fingerprint)) == first
    assert profile_path(first.fingerprint).parent == home / "profiles"
    num_ran, num_lines = len(ran), len(lines)
    assert ensure_profile(verifier, make_config(), lines.append) == first
    assert (len(ran), len(lines)) == (num_ran, num_lines)


def test_an_unfitting_profile_is_measured_again_with_the_reason(
    verifier: TorchVerifier, home: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    known_costs(monkeypatch, FakeClock())
    monkeypatch.setattr(profiling, "START_BUDGET_S", 0.0)
    first = ensure_profile(verifier, make_config(), lines.append)
    path = profile_path(first.fingerprint)
    other = dataclasses.replace(first.fingerprint, versions={**first.fingerprint.versions, "torch": "1.0"})
    save_profile(dataclasses.replace(first, fingerprint=other), path)
    lines.clear()
    assert ensure_profile(verifier, make_config(), lines.append).fingerprint == first.fingerprint
    assert "version of torch is 1.0, wanted" in lines[0]
    assert load_profile(path).fingerprint == first.fingerprint


def test_a_named_profile_is_taken_or_refused_but_never_replaced(
    verifier: TorchVerifier, tmp_path: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = known_costs(monkeypatch, FakeClock())
    path = tmp_path / "mine.json"
    with pytest.raises(ConfigError, match=r"mine\.json cannot be read"):
        ensure_profile(verifier, make_config(profile=str(path)), lines.append)
    profile = fit_profile(measure_sweep(verifier, make_config(), 0.0, lines.append), fingerprint_of(verifier))
    save_profile(profile, path)
    num_ran = len(ran)
    assert ensure_profile(verifier, make_config(profile=str(path)), lines.append) == profile
    other = dataclasses.replace(profile.fingerprint, dtype="bfloat16")
    save_profile(dataclasses.replace(profile, fingerprint=other), path)
    with pytest.raises(ConfigError, match="dtype is 'bfloat16', wanted 'float32'"):
        ensure_profile(verifier, make_config(profile=str(path)), lines.append)
    assert len(ran) == num_ran


def test_the_hash_tells_models_of_another_shape_apart(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"1234")
    first = model_hash(str(tmp_path))
    assert first == model_hash(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"12345")
    second = model_hash(str(tmp_path))
    (tmp_path / "config.json").write_text('{"hidden_size": 1}')
    assert len({first, second, model_hash(str(tmp_path))}) == 3


def test_origin_names_this_wisp() -> None:
    assert profile_fit.origin()["wisp"].startswith(profile_fit.__version__)


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command_writes_a_profile_and_shows_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    known_costs(monkeypatch, FakeClock())
    output = tmp_path / "out.json"
    arguments = ["--target", str(tiny_model.hf_folder()), "--device", "cpu", "--num-threads", "1", "--seconds", "0.01"]
    assert cli.main(["profile", *arguments, "--output", str(output)]) == 0
    profile = load_profile(output)
    assert profile.fingerprint.num_threads == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["sessions", "new"]
    assert len(lines) == 1 + profile.measured.num_passes + 3
    assert lines[-1] == f"written to {output}"


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf"])
def test_the_command_refuses_a_senseless_time(capsys: pytest.CaptureFixture[str], seconds: str) -> None:
    assert cli.main(["profile", "--target", str(tiny_model.hf_folder()), "--seconds", seconds]) == 2
    assert "--seconds is" in capsys.readouterr().err
