"""A server that cannot work says why in one line; one whose engine fails answers everybody and goes."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from edge_runtime.transport import GrpcStream
from tests.integration.conftest import ServerFactory
from tests.integration.support import (
    Session,
    http_status,
    ints,
    model_is_ready,
    prompts,
    raw_stream,
    session_tensor,
    thin_open,
    wait_until,
)
from tests.tiny_model import hf_folder
from triton_models.processes import Ports, free_ports, group_members
from triton_models.server_process import MODEL_REPOSITORY, ServerFailed
from wisp_plugin.errors import ModelError
from wisp_plugin.messages import Status
from wisp_plugin.wire_values import Array

pytestmark = pytest.mark.integration

FAULTY_MODEL = '''
"""The verifier, but its third pass fails: a defect of ours that nobody foresaw."""
import itertools
from triton_models import verifier_model
from triton_models.verifier_model import TritonPythonModel

load = verifier_model.load_verifier

def load_faulty(config):
    verifier, passes = load(config), itertools.count(1)
    run = verifier.run
    def run_or_fail(items):
        if next(passes) >= 3:
            raise RuntimeError("injected fault\\nof two lines")
        return run(items)
    verifier.run = run_or_fail
    return verifier

verifier_model.load_verifier = load_faulty
'''


def copied_repository(tmp_path: Path) -> Path:
    """A copy of the model repository to spoil."""
    return Path(shutil.copytree(MODEL_REPOSITORY, tmp_path / "models", ignore=shutil.ignore_patterns("__pycache__")))


def wisp_server(*args: str) -> subprocess.CompletedProcess[str]:
    """`wisp-server` with `args`, to its end."""
    command = [sys.executable, "-m", "triton_models.cli", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=90.0, check=False)


def test_a_failing_engine_fails_every_request_and_the_model(make_own_server: ServerFactory, tmp_path: Path) -> None:
    repository = copied_repository(tmp_path)
    (repository / "wisp_verifier" / "1" / "model.py").write_text(FAULTY_MODEL)
    server = make_own_server({"target": str(hf_folder())}, model_repository=repository)
    server.start()
    server.wait_ready()
    assert model_is_ready(server.http_url)
    with raw_stream(server.grpc_url) as first, raw_stream(server.grpc_url) as second:
        for stream in (first, second):
            tokens = session_tensor("") | {"TOKENS": prompts()[0][:4] % 300}
            stream.send(tokens, op="open", protocol=1, mode="sync", max_new_tokens=50, ignore_eos=True)
            session = stream.commit().session
            # sync: after its first token each session waits for its client, so both are open when the third pass fails
        second.send(session_tensor(session) | empty_draft(4 + 1), op="draft")
        begin_s = time.monotonic()
        for stream in (first, second):
            assert "the engine has failed: RuntimeError: injected fault" in stream.error(5.0)
        wait_until(lambda: not model_is_ready(server.http_url), 2.0)
        assert http_status(f"http://{server.http_url}/v2/health/live") == 200, "tritonserver itself is alive"
        with raw_stream(server.grpc_url) as third:  # whoever comes now is not kept waiting either
            third.send(session_tensor("") | {"TOKENS": prompts()[0][:4] % 300}, op="open", protocol=1)
            third.error(5.0)
        assert time.monotonic() - begin_s < 10.0
        time.sleep(2.0)
        assert not model_is_ready(server.http_url), "it came back without its sessions, as if nothing had happened"
    begin_s = time.monotonic()
    server.stop(20.0)
    assert time.monotonic() - begin_s < 8.0


def empty_draft(position: int) -> dict[str, Array]:
    """A round of `sync` without a draft."""
    return {"START": ints(position), "SEEN": ints(position), "DRAFT": ints()}


def test_a_server_with_open_sessions_stops_within_its_limit(make_own_server: ServerFactory) -> None:
    """SIGTERM in mid-generation: sessions end as closed, clients end their streams, Triton has nothing to wait for."""
    with make_own_server({"target": str(hf_folder())}) as server:
        stream = GrpcStream(server.grpc_url)
        stream.open(thin_open(prompts()[0][:4] % 300, 2_000))
        assert stream.receive(30.0) is not None
        ends: list[Status] = []

        def read_to_the_end() -> None:
            while not ends:
                commit = stream.receive(30.0)
                assert commit is not None
                if commit.status is not Status.RUNNING:
                    ends.append(commit.status)
            stream.close()

        reader = threading.Thread(target=read_to_the_end)
        reader.start()
        begin_s = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - begin_s < 8.0
        reader.join(10.0)
        assert ends == [Status.CLOSED]
        assert not group_members(server.pid)


def test_a_client_that_keeps_its_stream_open_cannot_keep_the_server_up(
    make_own_server: ServerFactory,
) -> None:
    with make_own_server({"target": str(hf_folder())}) as server:
        session = Session.make(server.grpc_url, thin_open(prompts()[0][:4] % 300, 2_000))
        session.run(4)
        begin_s = time.monotonic()
        server.stop()
        assert time.monotonic() - begin_s < 12.0
        assert not group_members(server.pid)
        session.vanish()


def test_two_instances_are_refused(make_own_server: ServerFactory, tmp_path: Path) -> None:
    repository = copied_repository(tmp_path)
    config = repository / "wisp_verifier" / "config.pbtxt"
    text = config.read_text()
    assert "count: 1" in text
    config.write_text(text.replace("count: 1", "count: 2"))
    server = make_own_server({"target": str(hf_folder())}, model_repository=repository)
    server.start()
    with pytest.raises(ServerFailed, match="instance_group has 2 instances; allowed: 1") as failed:
        server.wait_ready()
    assert "\n" not in str(failed.value)


def test_a_damaged_target_is_one_line(make_own_server: ServerFactory, tmp_path: Path) -> None:
    target = Path(shutil.copytree(hf_folder(), tmp_path / "target"))
    weights = target / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    server = make_own_server({"target": str(target)})
    server.start()
    with pytest.raises(ServerFailed, match=f"cannot load the target model {target}") as failed:
        server.wait_ready()
    assert "\n" not in str(failed.value)
    assert "Traceback" not in str(failed.value)


def test_a_missing_target_is_one_line(make_own_server: ServerFactory, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        make_own_server({"target": str(tmp_path / "nothing")})
    result = wisp_server("up", "--target", str(tmp_path / "nothing"), *port_options(free_ports()))
    assert result.returncode == 2
    assert one_line(result.stderr).startswith("wisp-server: target folder")


def test_a_taken_port_is_one_line() -> None:
    ports = free_ports()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", ports.grpc))
        taken.listen()
        result = wisp_server("up", *port_options(ports))
    assert result.returncode == 2
    assert f"cannot listen on 127.0.0.1:{ports.grpc}" in one_line(result.stderr)


def port_options(ports: Ports) -> list[str]:
    """Options of `wisp-server up`."""
    return [f"--{name}-port={port}" for name, port in ports._asdict().items()]


def one_line(text: str) -> str:
    """The only line of `text`."""
    (line,) = text.splitlines()
    return line
