"""One tritonserver as a child process: start, wait until ready, stop, kill. Nothing of it stays behind.

tritonserver leads a process group of its own with the Python stubs in it. A guard (a shell that reads a pipe from
us) kills that group and removes its shared memory if this process dies without doing so, by SIGKILL for example.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import secrets
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from triton_models.processes import (
    SHM,
    Ports,
    check_ports_free,
    dismiss_guard,
    free_ports,
    group_members,
    kill_group,
    start_guard,
)
from triton_models.tritonserver import TritonInstall
from wisp_plugin.config import SETTINGS_VARIABLE
from wisp_plugin.errors import ModelError, WispError
from wisp_plugin.home import wisp_home

MODEL_REPOSITORY = Path(__file__).resolve().parent.parent / "model_repository"
EXIT_TIMEOUT_S = 5
TRITON_OPTIONS = (
    "--model-control-mode=explicit",
    "--disable-auto-complete-config",  # our configurations are complete; saves one start of the stub
    f"--exit-timeout-secs={EXIT_TIMEOUT_S}",
    # A phone that lost its network is noticed after 15 s instead of two hours. Idle devices are not woken.
    "--grpc-keepalive-time=10000",
    "--grpc-keepalive-timeout=5000",
    "--grpc-keepalive-permit-without-calls=0",
    "--grpc-http2-max-pings-without-data=0",
    # Edges may ping as often as every 5 s without being cut off for it.
    "--grpc-http2-min-recv-ping-interval-without-data=5000",
)
# Threads of torch that wait for each other must not spin: with two threads on two busy cores, passes take 15 to 25
# times as long when they do (measured), and no longer than with one when they do not. The caller's own setting wins.
OPENMP = {"OMP_WAIT_POLICY": "PASSIVE"}
_POLL_S = 0.05
_GROUP_DEATH_S = 2.0  # a stub notices that its server is gone within a second


class ServerFailed(WispError):
    """tritonserver ended or did not become ready; the message ends with its most telling log line."""


class ServerProcess:
    """A tritonserver on `model_repository` with the named models loaded. A context manager: starts, waits, stops.

    `settings` are values of VerifierConfig and EngineConfig by name; they reach the model in `WISP_SERVER_CONFIG`.
    Without `ports` free ones are chosen, once: a second `start()` after `stop()` or `kill()` uses the same.
    """

    def __init__(
        self,
        install: TritonInstall,
        model_repository: Path = MODEL_REPOSITORY,
        models: Sequence[str] = ("wisp_verifier",),
        settings: Mapping[str, Any] | None = None,
        *,
        host: str = "127.0.0.1",
        ports: Ports | None = None,
        log_path: Path | None = None,
        extra_args: Sequence[str] = (),
        ready_timeout_s: float = 120.0,
    ) -> None:
        check_repository(model_repository, models)
        self.ports = ports or free_ports(host)
        self.log_path = log_path or wisp_home() / "logs" / f"tritonserver-{self.ports.grpc}.log"
        self._install = install
        self._repository = model_repository
        self._models = tuple(models)
        self._settings = dict(settings or {})
        self._host = host
        self._extra_args = tuple(extra_args)
        self._ready_timeout_s = ready_timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self._shm_prefix = f"wisp_{os.getpid()}_{secrets.token_hex(4)}_"
        self._log_mode = "wb"

    @property
    def grpc_url(self) -> str:
        """`host:port`, as tritonclient wants it."""
        return f"{self._reachable_host}:{self.ports.grpc}"

    @property
    def http_url(self) -> str:
        """`host:port`, without a scheme."""
        return f"{self._reachable_host}:{self.ports.http}"

    @property
    def metrics_url(self) -> str:
        """Full address of the Prometheus page."""
        return f"http://{self._reachable_host}:{self.ports.metrics}/metrics"

    @property
    def pid(self) -> int:
        """Of tritonserver; also the id of its process group."""
        return self._started().pid

    @property
    def running(self) -> bool:
        """True from `start()` until tritonserver has ended."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the processes and return at once."""
        if self.running:
            raise RuntimeError("this server is already running")
        check_ports_free(self._host, self.ports)
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        env = {**OPENMP, **self._install.environment(), SETTINGS_VARIABLE: json.dumps(self._settings)}
        with self.log_path.open(self._log_mode) as log:
            self._process = subprocess.Popen(
                self._command(), env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self._log_mode = "ab"  # a restart adds to the log
        self._guard = start_guard(self._process.pid, self._shm_prefix)

    def wait_ready(self, timeout_s: float | None = None) -> float:
        """Wait until server and models are ready; returns the seconds waited.

        Raises:
            ServerFailed: tritonserver ended, or the time is over (it still runs then).
        """
        begin_s = time.monotonic()
        timeout_s = self._ready_timeout_s if timeout_s is None else timeout_s
        while not self.is_ready():
            code = self._started().poll()
            if code is not None:
                self._clean_up()
                raise ServerFailed(f"tritonserver ended with exit code {code} before it was ready: {self._hint()}")
            if time.monotonic() - begin_s > timeout_s:
                raise ServerFailed(f"tritonserver is not ready after {timeout_s:g} s: {self._hint()}")
            time.sleep(_POLL_S)
        return time.monotonic() - begin_s

    def is_ready(self) -> bool:
        """What `/v2/health/ready` says; False if nobody answers."""
        connection = http.client.HTTPConnection(self._reachable_host, self.ports.http, timeout=2.0)
        try:
            connection.request("GET", "/v2/health/ready")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def send_signal(self, number: int) -> None:
        """A signal for tritonserver and its stubs, which end their open streams at it (see termination.py)."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._started().pid, number)

    def wait(self) -> int:
        """Wait until tritonserver ends by itself or by a signal, then clean up; returns its exit code."""
        code = self._started().wait()
        self._clean_up()
        return code

    def stop(self, timeout_s: float = EXIT_TIMEOUT_S + 5.0) -> int:
        """End it gracefully, after `timeout_s` by force; returns the exit code (negative: killed by that signal)."""
        process = self._started()
        if process.poll() is None:
            self.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return self.kill()
        self._clean_up()
        return process.returncode

    def kill(self) -> int:
        """SIGKILL for server and stubs, as if the machine had crashed; returns the exit code."""
        process = self._started()
        kill_group(process.pid)
        process.wait()
        self._clean_up()
        return process.returncode

    def log_tail(self, num_lines: int = 40) -> str:
        """The last lines of the log."""
        try:
            return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-num_lines:])
        except FileNotFoundError:
            return "(no log)"

    def __enter__(self) -> Self:
        try:
            self.start()
            self.wait_ready()
        except BaseException:
            if self._process is not None:
                self.kill()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def _reachable_host(self) -> str:
        return "127.0.0.1" if self._host == "0.0.0.0" else self._host

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise RuntimeError("start() was not called")
        return self._process

    def _command(self) -> list[str]:
        addresses = [
            option
            for name, port in self.ports._asdict().items()
            for option in (f"--{name}-address={self._host}", f"--{name}-port={port}")
        ]
        backends = [] if self._install.backend_dir is None else [f"--backend-directory={self._install.backend_dir}"]
        return [
            str(self._install.executable),
            f"--model-repository={self._repository}",
            *(f"--load-model={model}" for model in self._models),
            *backends,
            *addresses,
            f"--backend-config=python,shm-region-prefix-name={self._shm_prefix}",
            *TRITON_OPTIONS,
            *self._extra_args,
        ]

    def _hint(self) -> str:
        lines = self.log_path.read_text(errors="replace").splitlines()
        errors = [line for line in lines if line[:1] == "E"]
        telling = [line for line in errors if "failed to load" in line] or errors or lines or ["no output"]
        # E1122 11:15:23.5 15940 file.cc:642] "text\\n\\nAt:\\n traceback", with backslashes, becomes: text
        text = (telling[-1].partition('] "')[2] or telling[-1]).partition("\\n")[0].strip()
        return f"{text} (log: {self.log_path})"

    def _clean_up(self) -> None:
        """After tritonserver has ended: no stub, no shared memory, no guard."""
        group = self._started().pid
        deadline_s = time.monotonic() + _GROUP_DEATH_S
        kill_group(group)
        while group_members(group) and time.monotonic() < deadline_s:
            time.sleep(_POLL_S)
        for region in SHM.glob(f"{self._shm_prefix}*"):
            region.unlink(missing_ok=True)
        if self._guard is not None:
            dismiss_guard(self._guard)
            self._guard = None


def check_repository(model_repository: Path, models: Sequence[str]) -> None:
    """Raise ModelError if the folder or one of the models is not there."""
    if not model_repository.is_dir():
        raise ModelError(f"model repository {model_repository} is not a folder")
    there = sorted(path.parent.name for path in model_repository.glob("*/config.pbtxt"))
    for model in models:
        if model not in there:
            raise ModelError(f"model {model!r} is not in {model_repository}; there is: {', '.join(there) or 'none'}")
