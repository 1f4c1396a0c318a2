"""`wisp-server`: run the server, prepare models and tritonserver, measure what passes cost, install the plug-in."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from triton_models import plugin_cli
from triton_models.artifacts import folder_size_bytes
from triton_models.default_models import ensure_default_models, ensure_default_target
from triton_models.launcher import LaunchOptions, checked_settings, default_models, launch
from triton_models.processes import DEFAULT_PORTS, Ports
from triton_models.server_process import MODEL_REPOSITORY, OPENMP
from triton_models.tritonserver import find_tritonserver
from wisp_plugin import __version__
from wisp_plugin.errors import ConfigError, WispError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Exit code: tritonserver's own for `up`, 2 on a WispError or bad usage, 130 on Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    extra_args: list[str] = []
    if "--" in arguments:
        split = arguments.index("--")
        arguments, extra_args = arguments[:split], arguments[split + 1 :]
    parser = _parser()
    args = parser.parse_args(arguments)
    if extra_args and args.command != "up":
        parser.error(f"{args.command} takes no arguments after --")
    try:
        if args.command == "up":
            return launch(_launch_options(args, extra_args))
        if args.command == "profile":
            return _profile(args)
        if args.command == "install-plugin":
            print(plugin_cli.install(args, _progress))
            return 0
        return _models(args.force) if args.command == "models" else _triton(args.force)
    except WispError as error:
        _progress(str(error))
        return 2
    except KeyboardInterrupt:
        _progress("interrupted")
        return 130


def _models(force: bool) -> int:
    states = ensure_default_models(_progress, force=force)
    for state in states:
        size_mb = folder_size_bytes(state.folder) / 1e6
        print(f"{state.role:<12} {'built' if state.built else 'intact':<7} {size_mb:6.0f} MB  {state.folder}")
    return 0


def _triton(force: bool) -> int:
    print(find_tritonserver(_progress, check_hashes=True, force=force).executable)
    return 0


def _profile(args: argparse.Namespace) -> int:
    if args.model is not None:
        print(plugin_cli.remote_profile(args, _progress))
        return 0
    for name, value in OPENMP.items():  # as for the server's passes; read when torch is loaded
        os.environ.setdefault(name, value)
    # torch and transformers take seconds to import; no other command needs them.
    from triton_models.profile_command import ProfileOptions, run

    named = {name: getattr(args, name) for name in ("target", "dtype", "device", "num_threads")}
    settings = checked_settings({name: value for name, value in named.items() if value is not None})
    if settings.get("target", "default") == "default":
        ensure_default_target(_progress, check_hashes=False)
    print(run(ProfileOptions(settings, args.seconds, args.output), _progress))
    return 0


def _launch_options(args: argparse.Namespace, extra_args: Sequence[str]) -> LaunchOptions:
    settings: dict[str, Any] = {}
    for assignment in args.set:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise ConfigError(f"--set wants NAME=VALUE, not {assignment!r}")
        settings[name] = value
    named = {"target": args.target, "dtype": args.dtype, "device": args.device}
    named |= {"kv_tokens": args.kv_tokens, "policy": args.policy}
    settings |= {name: value for name, value in named.items() if value is not None}
    repository = args.model_repository.expanduser().absolute()
    return LaunchOptions(
        settings=settings,
        model_repository=repository,
        models=tuple(args.model or default_models(repository, settings.get("target", "default"))),
        host=args.host,
        ports=Ports(args.grpc_port, args.http_port, args.metrics_port),
        log_path=args.log_file,
        extra_args=(*(["--log-verbose=1"] if args.verbose else []), *extra_args),
        ready_timeout_s=args.ready_timeout_s,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="wisp-server", description=__doc__)
    parser.add_argument("--version", action="version", version=f"wisp {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    models = commands.add_parser("models", help="build the default target and draft models, or check their hashes")
    models.add_argument("--force", action="store_true", help="build them again even if they are intact")
    triton = commands.add_parser("triton", help="find tritonserver, or fetch it; prints its path")
    triton.add_argument("--force", action="store_true", help="fetch it again even if it is intact")
    _add_profile(commands.add_parser("profile", help="measure what passes cost here, and keep it for the next start"))
    plugin_cli.add_install(commands.add_parser("install-plugin", help="the batching strategy into a model of yours"))
    _add_up(commands.add_parser("up", help="run the server in the foreground"))
    return parser


def _add_profile(profile: argparse.ArgumentParser) -> None:
    profile.add_argument("--target", metavar="HF_ID_OR_DIR", help="target model (default: the embedded one)")
    profile.add_argument("--dtype", help="auto, float32, bfloat16 or float16")
    profile.add_argument("--device", help="auto, cpu, cuda or cuda:N")
    profile.add_argument("--num-threads", metavar="N", help="of torch (default: one per core)")
    profile.add_argument("--seconds", type=float, default=60.0, metavar="S", help="time to measure (default: 60)")
    profile.add_argument(
        "--output", type=Path, metavar="FILE", help="default: where `up` looks for it; with --model: NAME.json"
    )
    plugin_cli.add_remote_profile(profile)


def _add_up(up: argparse.ArgumentParser) -> None:
    up.usage = "wisp-server up [options] [-- options of tritonserver]"
    up.add_argument("--target", metavar="HF_ID_OR_DIR", help="target model (default: the embedded one)")
    up.add_argument("--dtype", help="auto, float32, bfloat16 or float16")
    up.add_argument("--device", help="auto, cpu, cuda or cuda:N")
    up.add_argument("--kv-tokens", metavar="N", help="tokens whose KV is held, over all sessions")
    up.add_argument("--policy", metavar="NAME", help="scheduling policy")
    up.add_argument("--set", metavar="NAME=VALUE", action="append", default=[], help="any server setting; repeatable")
    up.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    for name, port in DEFAULT_PORTS._asdict().items():
        up.add_argument(f"--{name}-port", type=int, default=port, metavar="PORT", help="default: %(default)s")
    up.add_argument("--model-repository", type=Path, default=MODEL_REPOSITORY, metavar="DIR")
    up.add_argument(
        "--model", action="append", metavar="NAME", help="to load, repeatable (default: wisp_verifier, wisp_generate)"
    )
    up.add_argument("--log-file", type=Path, metavar="FILE", help="default: under $WISP_HOME/logs")
    up.add_argument("--ready-timeout-s", type=float, default=600.0, metavar="S", help="default: %(default)s")
    up.add_argument("--verbose", action="store_true", help="tritonserver logs every request")


def _progress(line: str) -> None:
    print(f"wisp-server: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
