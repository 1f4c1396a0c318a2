"""Emulated devices on a real tritonserver with an emulated target."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import pytest

from bench import load
from bench.load import run_on_own_server
from bench.load_options import Load
from tests.integration.conftest import ServerFactory
from triton_models.server_process import ServerFailed

pytestmark = [pytest.mark.integration, pytest.mark.alone]


def make_load(num_devices: int, *words: str) -> Load:
    parser = argparse.ArgumentParser()
    load.add_arguments(parser)
    return Load.of(parser.parse_args(["--no-timed", *words]), num_devices)


def test_every_text_of_eight_devices_is_the_trace() -> None:
    """A server without torch, 8 devices for some seconds: all that was committed is what the trace says."""
    started_s = time.monotonic()
    run, _ = run_on_own_server(make_load(8, "--duration", "6", "--warm-up", "1", "--stagger", "1"), num_processes=1)
    assert run.num_mismatches == 0
    tokens = [session.num_tokens for session in run.result.sessions]
    assert len(tokens) >= 8
    assert sum(tokens) > 400
    assert run.accepted > 0
    assert any(session.num_tokens == session.spec.num_output_tokens for session in run.result.sessions)
    assert time.monotonic() - started_s < 20.0


def test_a_configuration_that_cannot_work_fails_the_load(make_own_server: ServerFactory, tmp_path: Path) -> None:
    server = make_own_server({"target": f"emulated:{tmp_path / 'no.json'}"}, ready_timeout_s=30.0)
    server.start()
    with pytest.raises(ServerFailed, match=r"profile .*no\.json cannot be read: No such file"):
        server.wait_ready()
