"""`wisp-bench COMMAND`: imports only the module of the chosen command, so that help is instant.

Every module offers `add_arguments(parser) -> None` and `main(args) -> int`; its docstring is its help text.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from types import ModuleType

from wisp_plugin import __version__
from wisp_plugin.errors import ConfigError, WispError

COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("bench.demo", "one prompt end to end, with drafts and without, and a small table"),
    "lossless": ("bench.lossless", "generated ids equal those of the target alone, and its distribution"),
    "engine": ("bench.engine", "packed pass against the padded one, cost of choosing tokens"),
    "e2e": ("bench.e2e", "one device against plain decoding and assisted generation, cost of the path"),
    "link": ("bench.link", "free-running against round by round over a link with a delay, live"),
    "draft": ("bench.draft", "agreement, time per token and worth of the default model's drafts by precision"),
    "generate": ("bench.generate", "text by wisp_generate: drafting by prompt lookup, cost of the way through it"),
    "prefix": ("bench.prefix", "KV memory and prefill time of sessions with the same system prompt"),
    "classes": ("bench.two_classes", "a tight and a loose SLO class on one live server, under every policy"),
    "estimator": ("bench.estimator", "predicted against measured passes, what is learnt online, quantile, known costs"),
    "scheduler": ("bench.scheduler", "policies in virtual time: capacity, goodput, interference, time of a decision"),
    "plugin": ("bench.plugin", "the batching strategy in a Triton deployment of somebody else: late requests, speed"),
    "perf": ("bench.perf", "perf_analyzer, closed and open loop, against both verifiers; keeps the CSV"),
    "results": ("bench.results", "the tables of results, made from the documents that `make results` has kept"),
    "controller": ("bench.controller", "stop rules over recorded traces: speed, wasted drafting, acceptance model"),
    "traces": ("bench.traces", "record the default drafts along texts of the target"),
    "capacity": ("bench.capacity", "devices at 95 % attainment: WISP against every other system at its best"),
    "goodput": ("bench.goodput", "goodput over the number of devices, and its peak, of the same systems"),
    "matrix": ("bench.matrix", "WISP / best other over SLO x draft speed x RTT x draft; --full can be stopped"),
    "load": ("bench.load", "open-loop load by hundreds of emulated devices on a real tritonserver"),
    "validate": ("bench.validate", "the simulator against that server: goodput, time between commits, attainment"),
    "simulator": ("bench.simulator_speed", "seconds of one core for a minute of 50, 250 and 1,000 devices"),
    "plan": ("bench.planner", "capacity planner: how many devices, what attainment, what to change first"),
    "profile": ("bench.profile_shape", "profile of a model's shape on this device, by our verifier's real forward"),
    "gateway": ("bench.gateway", "the gateway against the same sessions without it: speed, first byte, fairness, fuzz"),
    "pass-cost": ("bench.pass_cost", "time of a target pass over sessions, new tokens and cached tokens"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one benchmark. Exit code: the benchmark's own, 2 on a WispError or bad usage, 130 on Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        name = _command_parser().parse_args(argv[:1]).command
        module = _load(name)
        parser = argparse.ArgumentParser(
            prog=f"wisp-bench {name}",
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(parser)
        args = parser.parse_args(argv[1:])
        from bench.report import commit  # has loaded NumPy, which help is too quick for

        commit()  # remembered: it is that of what has just been loaded
        return int(module.main(args))
    except WispError as error:
        print(f"wisp-bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("wisp-bench: interrupted", file=sys.stderr)
        return 130


def _command_parser() -> argparse.ArgumentParser:
    lines = [f"  {name:<10} {description}" for name, (_, description) in COMMANDS.items()]
    parser = argparse.ArgumentParser(
        prog="wisp-bench",
        usage="wisp-bench COMMAND [options]; wisp-bench COMMAND --help tells more",
        description="Benchmarks of WISP. Each prints a table and, as its last line, one JSON document.",
        epilog="\n".join(["commands:", *lines]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"wisp {__version__}")
    parser.add_argument("command", metavar="COMMAND", choices=list(COMMANDS), help="one of the list below")
    return parser


def _load(name: str) -> ModuleType:
    """Module of a command; ConfigError if a package that it needs is not installed."""
    module_name, _ = COMMANDS[name]
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("bench", "wisp_plugin", "triton_models", "edge_runtime"):
            raise  # our own module: a fault of this repository, not of the installation
        raise ConfigError(f"{name} needs the package {missing!r}; install the extras 'bench' and 'server'") from None


if __name__ == "__main__":
    sys.exit(main())
