"""From a model that is not ours to one with the batching strategy, by the two commands that a user has."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.foreign_models import Cost, Variant, write_model
from bench.open_loop import Kind, Schedule, run_load
from tests.integration.conftest import ServerFactory
from triton_models import cli
from triton_models.remote_model import RequestSize
from wisp_plugin.profile import load_profile

pytestmark = pytest.mark.integration
COST = Cost(base_s=0.004, token_s=0.0002, unit_s=1e-5)
PLAIN = Variant("policy", delay_us=2_000, has_plugin=False)


def test_profile_then_install_then_serve(
    make_own_server: ServerFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repository, profile = tmp_path / "models", tmp_path / "mine.json"
    write_model(repository, PLAIN, COST, None)
    with make_own_server(model_repository=repository, models=(PLAIN.name,)) as server:
        arguments = ["--url", server.grpc_url, "--tokens-input", "IDS", "--max-tokens", "64", "--seconds", "2"]
        assert cli.main(["profile", "--model", PLAIN.name, *arguments, "--output", str(profile)]) == 0
        costs = load_profile(profile).estimator()
        assert costs.predict(RequestSize(64).features(16)) > 4 * costs.predict(RequestSize(16).features(1))
        assert cli.main(["profile", "--model", "nothing", "--url", server.grpc_url]) == 2
        assert "model 'nothing'" in capsys.readouterr().err

    arguments = ["--profile", str(profile), "--tokens-input", "IDS", "--write"]
    assert cli.main(["install-plugin", str(repository / PLAIN.name), *arguments]) == 0
    kinds = (Kind("short", 4, 0.05, 1, 1.0), Kind("long", 64, 5.0, 2, 1.0))
    with make_own_server(model_repository=repository, models=(PLAIN.name,)) as server:
        result = run_load(server.grpc_url, PLAIN.name, Schedule.poisson(kinds, 60.0, 2.0, seed=0), False)
        assert len(result.latency_s) > 80  # answered, all of them: anything else raises
