"""`wisp-server up`: from a command line to a ready tritonserver, and back to its exit code."""

from __future__ import annotations

import dataclasses
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from triton_models.artifacts import Progress
from triton_models.default_models import ensure_default_target
from triton_models.emulated_verifier import is_emulated
from triton_models.plugin_install import prepare
from triton_models.processes import DEFAULT_PORTS, Ports, check_ports_free, free_ports
from triton_models.server_process import EXIT_TIMEOUT_S, MODEL_REPOSITORY, ServerFailed, ServerProcess
from triton_models.tritonserver import find_tritonserver
from wisp_plugin.config import EngineConfig, VerifierConfig, from_mapping
from wisp_plugin.errors import ConfigError, ModelError
from wisp_plugin.scheduler import POLICIES

TEXT_MODEL = "wisp_generate"
EXIT_LIMIT_S = EXIT_TIMEOUT_S + 5  # after the first signal; then tritonserver is killed

__all__ = [
    "LaunchOptions", "ServerFailed", "ServerProcess", "checked_settings", "default_models", "free_ports", "launch",
    "make_server",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class LaunchOptions:
    """Everything that `wisp-server up` can be told."""

    settings: Mapping[str, Any]
    model_repository: Path = MODEL_REPOSITORY
    models: Sequence[str] = ("wisp_verifier",)
    host: str = "127.0.0.1"
    ports: Ports = DEFAULT_PORTS
    log_path: Path | None = None
    extra_args: Sequence[str] = ()
    ready_timeout_s: float = 600.0


def checked_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` (fields of VerifierConfig and EngineConfig, perhaps as strings) with their right types.

    Raises:
        ConfigError: unknown name, wrong type, out of range, unknown policy, or a target folder without a model.
    """
    kinds = (VerifierConfig, EngineConfig)
    names = {kind: {field.name for field in dataclasses.fields(kind)} for kind in kinds}
    unknown = sorted(set(values) - set().union(*names.values()))
    if unknown:
        allowed = ", ".join(sorted(set().union(*names.values())))
        raise ConfigError(f"unknown server setting {unknown[0]!r}; allowed: {allowed}")
    checked: dict[str, Any] = {}
    for kind in kinds:
        mine = {name: value for name, value in values.items() if name in names[kind]}
        config = from_mapping(kind, mine)
        checked |= {name: getattr(config, name) for name in mine}
    if checked.get("policy", "continuous") not in POLICIES:
        raise ConfigError(f"unknown policy {checked['policy']!r}; allowed: {', '.join(sorted(POLICIES))}")
    if "target" in checked:
        checked["target"] = _checked_target(checked["target"])
    return checked


def default_models(model_repository: Path, target: str) -> tuple[str, ...]:
    """What is served unless models are named: the verifier, and text for clients without a draft model.

    An emulated target has no tokenizer, so it serves no text; a repository of the user's own need not have that model.
    """
    has_text = (model_repository / TEXT_MODEL / "config.pbtxt").is_file() and not is_emulated(target)
    return ("wisp_verifier", TEXT_MODEL) if has_text else ("wisp_verifier",)


def make_server(
    model_repository: Path = MODEL_REPOSITORY,
    models: Sequence[str] = ("wisp_verifier",),
    settings: Mapping[str, Any] | None = None,
    *,
    progress: Progress | None = None,
    **options: Any,
) -> ServerProcess:
    """A server that is not started yet: settings checked, tritonserver found, default target built if needed.

    `options` are the keyword arguments of ServerProcess (host, ports, log_path, extra_args, ready_timeout_s).
    """
    report = progress or _report
    checked = checked_settings(settings or {})
    if checked.get("target", "default") == "default" and _serves_target(models):
        ensure_default_target(report, check_hashes=False)
    server = ServerProcess(find_tritonserver(report), model_repository, models, checked, **options)
    for name in models:
        prepare(model_repository / name, report)
    return server


def launch(options: LaunchOptions) -> int:
    """Run a server in the foreground until it ends or SIGINT / SIGTERM comes; returns the exit code for the shell.

    The first signal is forwarded and lets tritonserver finish; a second one kills it.
    """
    check_ports_free(options.host, options.ports)
    server = make_server(
        options.model_repository,
        options.models,
        options.settings,
        host=options.host,
        ports=options.ports,
        log_path=options.log_path,
        extra_args=options.extra_args,
        ready_timeout_s=options.ready_timeout_s,
    )
    signals: list[int] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        signals.append(number)
        server.send_signal(number if len(signals) == 1 else signal.SIGKILL)
        signal.alarm(EXIT_LIMIT_S)  # comes back here as the second signal

    _report(f"starting tritonserver; its log: {server.log_path}")
    server.start()
    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}
    try:
        code = _serve(server, options, signals)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.alarm(0)
        if server.running:
            server.kill()
    return code if code >= 0 else 128 - code


def _serve(server: ServerProcess, options: LaunchOptions, signals: Sequence[int]) -> int:
    try:
        waited_s = server.wait_ready()
    except ServerFailed as error:
        if signals:
            return server.wait()
        code = server.stop() if server.running else 1
        print(server.log_tail(), file=sys.stderr)
        _report(str(error))
        return code or 1
    target = options.settings.get("target", "default")
    print(
        f"ready: grpc {server.grpc_url} http {server.http_url} metrics {server.metrics_url} "
        f"model {','.join(options.models)} target {target} ({waited_s:.1f} s)",
        flush=True,
    )
    code = server.wait()
    if code != 0 and not signals:
        print(server.log_tail(), file=sys.stderr)
        _report(f"tritonserver ended with exit code {code}; its log: {server.log_path}")
    return code


def _serves_target(models: Sequence[str]) -> bool:
    return any(model.startswith("wisp_verifier") for model in models)


def _checked_target(target: str) -> str:
    """A folder's absolute path, checked for a model; `default` and hub ids as they are."""
    folder = Path(target).expanduser()
    if target == "default" or not (folder.is_dir() or target.startswith(("/", ".", "~"))):
        return target
    if not (folder / "config.json").is_file():
        raise ModelError(f"target folder {folder} holds no config.json; wanted: a Hugging Face folder, id or 'default'")
    return str(folder.absolute())


def _report(line: str) -> None:
    print(f"wisp-server: {line}", file=sys.stderr, flush=True)
