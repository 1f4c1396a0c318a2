"""The container's command, run here without the container: options, settings, probes, metrics, the way it ends.

Only what the image brings is exchanged: its tritonserver and Python backend for those of this machine, its folders
and ports, and the target for an emulated one. As under `tini -g`, signals go to the whole group of processes.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import urllib.request
from pathlib import Path

import pytest

from tests.integration.support import http_status, wait_until
from tests.test_deploy import dockerfile, instructions, pod, resources, settings_texts
from triton_models.processes import free_ports, kill_group
from triton_models.server_process import MODEL_REPOSITORY
from triton_models.tritonserver import find_tritonserver
from wisp_plugin.config import SETTINGS_VARIABLE

pytestmark = pytest.mark.integration
ROOT = Path(__file__).resolve().parents[2]
PROFILE = ROOT / "bench" / "profiles" / "a100-qwen3-32b.json"


def test_the_containers_command(tmp_path: Path) -> None:
    install, ports = find_tritonserver(print), free_ports()
    (command,) = [json.loads(value) for value in instructions("CMD")]
    command = [option for option in command if "wisp_generate" not in option]  # an emulated target has no tokenizer
    command[0] = str(install.executable)
    command[command.index("--model-repository=/opt/wisp/model_repository")] = f"--model-repository={MODEL_REPOSITORY}"
    for name, port in (("grpc", ports.grpc), ("http", ports.http), ("metrics", ports.metrics)):
        command += [f"--{name}-address=127.0.0.1", f"--{name}-port={port}"]
    if install.backend_dir is not None:
        command.append(f"--backend-directory={install.backend_dir}")
    command.append(f"--backend-config=python,shm-region-prefix-name=wisp_{os.getpid()}_deploy_")
    settings = json.loads(settings_texts()["kubernetes"]) | {"target": f"emulated:{PROFILE}", "device": "cpu"}
    variables = {name: dockerfile().envs[name] for name in ("OMP_WAIT_POLICY", "PYTHONUNBUFFERED")}
    env = {**install.environment(), **variables, SETTINGS_VARIABLE: json.dumps(settings)}
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        check_what_kubernetes_asks(server, f"http://127.0.0.1:{ports.http}", tmp_path / "log")
        metrics_url = f"http://127.0.0.1:{ports.metrics}/metrics"
        wait_until(lambda: http_status(metrics_url) == 200, 10.0)  # Triton listens there only after it is ready
        with urllib.request.urlopen(metrics_url, timeout=5.0) as response:
            check_metrics(response.read().decode())
        os.killpg(server.pid, signal.SIGTERM)
        assert server.wait(pod()["terminationGracePeriodSeconds"]) == 0
    finally:
        kill_group(server.pid)
        server.wait()


def check_what_kubernetes_asks(server: subprocess.Popen[bytes], address: str, log: Path) -> None:
    """Every probe says yes when the server is ready."""
    (container,) = pod()["containers"]
    probes = [container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")]
    ready = lambda: server.poll() is not None or http_status(address + probes[0]) == 200  # noqa: E731
    wait_until(ready, 60.0)
    assert server.poll() is None, log.read_text(errors="replace")[-3000:]
    assert [http_status(address + path) for path in probes] == [200, 200, 200]


def check_metrics(text: str) -> None:
    """What the autoscaler asks for is there, under the names that the adapter's rules start from."""
    series = {line.partition("{")[0].partition(" ")[0] for line in text.splitlines() if not line.startswith("#")}
    for metric in resources()["HorizontalPodAutoscaler"]["spec"]["metrics"]:
        name = re.sub("_per_second$", "_total", metric["pods"]["metric"]["name"])
        assert name in series
