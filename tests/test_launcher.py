"""The launcher: settings and ports checked before anything starts, and nothing left behind afterwards."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from triton_models import tritonserver
from triton_models.cli import main
from triton_models.launcher import (
    ServerFailed,
    ServerProcess,
    checked_settings,
    default_models,
    free_ports,
    make_server,
)
from triton_models.processes import SHM, Ports, check_ports_free, group_members
from triton_models.server_process import MODEL_REPOSITORY
from wisp_plugin.errors import ConfigError, ModelError

CONFIG = """
backend: "python"
max_batch_size: 0
input [{ name: "X" data_type: TYPE_INT32 dims: [-1] }]
output [{ name: "REPORT" data_type: TYPE_STRING dims: [1] }]
instance_group [{ kind: KIND_CPU }]
"""
MODEL = """
import json, os, sys
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        (values,) = [pb_utils.get_input_tensor_by_name(r, "X").as_numpy().tolist() for r in requests]
        settings = json.loads(os.environ["WISP_SERVER_CONFIG"])
        report = {"values": values, "settings": settings, "prefix": sys.prefix, "pid": os.getpid()}
        tensor = pb_utils.Tensor("REPORT", np.array([json.dumps(report)], dtype=object))
        return [pb_utils.InferenceResponse([tensor]) for _ in requests]
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A model repository with the model `report`, which tells about its process, and the broken model `broken`."""
    for name, source in (("report", MODEL), ("broken", "import no_such_module_anywhere")):
        (tmp_path / "repository" / name / "1").mkdir(parents=True)
        (tmp_path / "repository" / name / "config.pbtxt").write_text(f'name: "{name}"\n{CONFIG}')
        (tmp_path / "repository" / name / "1" / "model.py").write_text(source)
    return tmp_path / "repository"


@pytest.fixture
def new_server(repository: Path, tmp_path: Path) -> Iterator[Callable[..., ServerProcess]]:
    """Makes servers (not started) on the test's repository and kills what a test left running."""
    servers: list[ServerProcess] = []

    def make(models: tuple[str, ...] = ("report",), **settings: Any) -> ServerProcess:
        log = tmp_path / f"server-{len(servers)}.log"
        servers.append(make_server(repository, models, settings, log_path=log))
        return servers[-1]

    yield make
    for server in servers:
        if server.running:
            server.kill()


def _infer(server: ServerProcess) -> dict[str, Any]:
    body = {"inputs": [{"name": "X", "shape": [3], "datatype": "INT32", "data": [7, -1, 2]}]}
    request = urllib.request.Request(
        f"http://{server.http_url}/v2/models/report/infer", json.dumps(body).encode(), method="POST"
    )
    with urllib.request.urlopen(request, timeout=10) as response:
        report: dict[str, Any] = json.loads(json.load(response)["outputs"][0]["data"][0])
    return report


def _shm_of(pid: int) -> list[Path]:
    return list(SHM.glob(f"wisp_{pid}_*"))


def _eventually(condition: Callable[[], bool], timeout_s: float = 5.0) -> bool:
    deadline_s = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline_s:
        time.sleep(0.05)
    return condition()


# ---- checked before anything starts


def test_settings_get_their_types() -> None:
    settings = checked_settings({"kv_tokens": "4096", "linger_s": "1.5", "policy": "continuous", "target": "a/hub-id"})
    assert settings == {"kv_tokens": 4096, "linger_s": 1.5, "policy": "continuous", "target": "a/hub-id"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kv_token": 1}, r"unknown server setting 'kv_token'; allowed: .*kv_tokens"),
        ({"kv_tokens": "many"}, r"'kv_tokens' must be int, not 'many'"),
        ({"kv_tokens": 1}, r"'kv_tokens' is 1; allowed: 64 to"),
        ({"dtype": "int8"}, r"'dtype' is 'int8'; allowed: auto, float32"),
        ({"policy": "best"}, r"unknown policy 'best'; allowed: .*continuous"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        checked_settings(settings)


def test_target_folder_is_checked_and_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for missing in (str(tmp_path / "absent"), str(tmp_path)):
        with pytest.raises(ModelError, match=r"holds no config\.json"):
            checked_settings({"target": missing})
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert checked_settings({"target": "./here"}) == {"target": str(tmp_path / "here")}


@pytest.mark.parametrize("name", Ports._fields)
def test_taken_port_names_its_option(name: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"cannot listen on 127\.0\.0\.1:{port} .*--{name}-port"):
            check_ports_free("127.0.0.1", free_ports()._replace(**{name: port}))


def test_equal_and_impossible_ports_are_refused() -> None:
    with pytest.raises(ConfigError, match="must differ"):
        check_ports_free("127.0.0.1", Ports(8001, 8001, 8002))
    with pytest.raises(ConfigError, match="allowed: 1 to 65535"):
        check_ports_free("127.0.0.1", Ports(70000, 8000, 8002))


def test_missing_repository_or_model(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ports = [f"--{name}-port={port}" for name, port in free_ports()._asdict().items()]
    assert main(["up", *ports, "--model-repository", str(repository / "absent"), "--model", "report"]) == 2
    assert "is not a folder" in capsys.readouterr().err
    assert main(["up", *ports, "--model-repository", str(repository), "--model", "absent"]) == 2
    assert "model 'absent' is not in" in capsys.readouterr().err
    assert main(["up", *ports, "--set", "linger"]) == 2
    assert capsys.readouterr().err == "wisp-server: --set wants NAME=VALUE, not 'linger'\n"


def test_text_is_served_too_where_that_can_be(tmp_path: Path) -> None:
    both = ("wisp_verifier", "wisp_generate")
    assert default_models(MODEL_REPOSITORY, "default") == default_models(MODEL_REPOSITORY, "some/model") == both
    assert default_models(MODEL_REPOSITORY, "emulated:profile.json") == ("wisp_verifier",)
    assert default_models(tmp_path, "default") == ("wisp_verifier",)


def test_missing_libpython_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert tritonserver.find_libpython().name.startswith("libpython3.")
    monkeypatch.setattr(tritonserver.sysconfig, "get_config_var", lambda name: str(tmp_path))
    monkeypatch.setattr(tritonserver, "_multiarch", lambda: "none")
    monkeypatch.setattr(sys, "base_prefix", "/usr")
    monkeypatch.setattr(tritonserver.Path, "is_file", lambda self: False)
    monkeypatch.setattr(tritonserver.shutil, "which", lambda name: f"/usr/bin/{name}")
    with pytest.raises(ConfigError, match=r"apt-get install libpython3\.\d+$"):
        tritonserver.find_libpython()
    monkeypatch.setattr(sys, "base_prefix", "/opt/static")
    with pytest.raises(ConfigError, match=r"the Python in /opt/static does not have"):
        tritonserver.find_libpython()


def test_installed_tritonserver_comes_first_if_its_python_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    executable = tmp_path / "bin" / "tritonserver"
    stub = tmp_path / "backends" / "python" / "triton_python_backend_stub"
    for path in (executable, stub):
        path.parent.mkdir(parents=True)
        path.write_text("#!/bin/sh\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", str(executable.parent), prepend=os.pathsep)
    stub.write_bytes(b"\0libpython3.%d.so.1.0\0" % sys.version_info[1])
    install = tritonserver.find_tritonserver(pytest.fail)
    assert (install.executable, install.backend_dir) == (executable, None)
    stub.write_bytes(b"\0libpython3.9.so.1.0\0")
    with pytest.raises(ConfigError, match=r"runs Python 3\.9 models, but WISP is installed in Python 3\.\d+"):
        tritonserver.find_tritonserver(pytest.fail)


def test_numpy_2_is_refused_because_the_stub_would_read_zeros() -> None:
    tritonserver._check_numpy("1.26.4")
    with pytest.raises(ConfigError, match=r"numpy 2\.4\.6 does not work .* allowed: numpy 1\.26"):
        tritonserver._check_numpy("2.4.6")


# ---- with a real tritonserver


@pytest.mark.integration
def test_settings_reach_the_model_in_this_environment(new_server: Callable[..., ServerProcess]) -> None:
    with new_server(kv_tokens="4096", policy="continuous") as server:
        report = _infer(server)
        pid, shm = server.pid, server._shm_prefix
        assert report["settings"] == {"kv_tokens": 4096, "policy": "continuous"}
        assert report["values"] == [7, -1, 2]
        assert report["prefix"] == sys.prefix
        assert report["pid"] in group_members(pid)
        assert list(SHM.glob(f"{shm}*"))
        with urllib.request.urlopen(server.metrics_url, timeout=5) as page:
            assert b"nv_inference_count" in page.read()
    assert server.stop() == 0
    assert group_members(pid) == []
    assert not list(SHM.glob(f"{shm}*"))


@pytest.mark.integration
def test_two_servers_at_once_and_kill_dash_nine_of_one(new_server: Callable[..., ServerProcess]) -> None:
    with new_server() as other, new_server() as server:
        first_pid = server.pid
        os.kill(first_pid, signal.SIGKILL)
        assert server.wait() == -signal.SIGKILL
        assert group_members(first_pid) == []
        assert not list(SHM.glob(f"{server._shm_prefix}*"))
        assert _infer(other)["pid"]  # untouched
        grpc_url = server.grpc_url
        server.start()
        server.wait_ready()
        assert (server.grpc_url, server.pid != first_pid) == (grpc_url, True)
        assert _infer(server)["pid"]
        assert server.kill() == -signal.SIGKILL
        assert _infer(other)["pid"]


@pytest.mark.integration
def test_model_that_does_not_load_is_told_in_one_line(new_server: Callable[..., ServerProcess]) -> None:
    server = new_server(models=("broken",))
    with pytest.raises(ServerFailed, match=r"before it was ready: .*no_such_module_anywhere") as caught:
        server.__enter__()
    assert "\n" not in str(caught.value)
    assert not server.running


@pytest.mark.integration
def test_nothing_outlives_a_crash_of_the_parent(repository: Path, tmp_path: Path) -> None:
    script = textwrap.dedent(f"""
        import os, signal
        from pathlib import Path
        from triton_models.launcher import make_server
        server = make_server(Path({str(repository)!r}), ("report",), log_path=Path({str(tmp_path / "crash.log")!r}))
        server.start(); server.wait_ready()
        print(server.pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    root = str(Path(__file__).resolve().parent.parent)
    child = subprocess.Popen([sys.executable, "-c", script], cwd=root, stdout=subprocess.PIPE, text=True)
    output, _ = child.communicate(timeout=60)
    assert child.returncode == -signal.SIGKILL
    group = int(output)
    assert _eventually(lambda: not group_members(group)), "tritonserver or a stub outlived its launcher"
    assert _eventually(lambda: not _shm_of(child.pid)), "shared memory was left behind"


@pytest.mark.integration
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_up_until_a_signal(repository: Path, tmp_path: Path, number: signal.Signals) -> None:
    ports = free_ports()
    command = [sys.executable, "-m", "triton_models.cli", "up", f"--model-repository={repository}", "--model=report"]
    command += [f"--{name}-port={port}" for name, port in ports._asdict().items()]
    command += ["--set", "linger_s=2", "--log-file", str(tmp_path / "up.log"), "--", "--log-info=false"]
    root = str(Path(__file__).resolve().parent.parent)
    child = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    line = child.stdout.readline()
    assert line.startswith(f"ready: grpc 127.0.0.1:{ports.grpc} http 127.0.0.1:{ports.http} "), line
    assert "model report target default" in line
    child.send_signal(number)
    _, errors = child.communicate(timeout=30)
    assert child.returncode == 0, errors
    assert "Traceback" not in errors
    assert not _shm_of(child.pid)


@pytest.mark.integration
def test_up_shows_the_log_of_a_server_that_fails(
    repository: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    ports = [f"--{name}-port={port}" for name, port in free_ports()._asdict().items()]
    log = str(tmp_path / "up.log")
    code = main(["up", *ports, "--model-repository", str(repository), "--model", "broken", "--log-file", log])
    captured = capsys.readouterr()
    assert code not in (0, 2)
    assert captured.out == ""
    assert "no_such_module_anywhere" in captured.err.splitlines()[-1]
    assert len(captured.err.splitlines()) > 5
