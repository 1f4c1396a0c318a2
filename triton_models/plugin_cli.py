"""`wisp-server install-plugin` and `wisp-server profile --model`: their options, from command line to call."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from triton_models.artifacts import Progress
from wisp_plugin.errors import ConfigError

INSTALL_HELP = """\
Put WISP's batching strategy into a model directory of an existing Triton deployment, and print what its config.pbtxt
needs. The strategy closes a dynamic batch when one more request would break the tightest deadline in it.

  wisp-server profile --model my_model --url localhost:8001 --tokens-input input_ids --output my_model.json
  wisp-server install-plugin models/my_model --profile my_model.json --tokens-input input_ids --slo-ms 200 --write
"""


def add_install(parser: argparse.ArgumentParser) -> None:
    """Options of `install-plugin`."""
    parser.description, parser.formatter_class = INSTALL_HELP, argparse.RawDescriptionHelpFormatter
    parser.add_argument("model_dir", type=Path, metavar="MODEL_DIR", help="directory with the model's config.pbtxt")
    costs = parser.add_argument_group("what a batch costs (a profile, or inline)")
    costs.add_argument("--profile", type=Path, metavar="FILE", help="profile of the model; it is copied beside it")
    costs.add_argument("--base-us", type=float, metavar="US", help="microseconds of a batch, whatever is in it")
    costs.add_argument("--per-token-us", type=float, metavar="US", help="microseconds per new token")
    costs.add_argument("--per-context-us", type=float, metavar="US", help="microseconds per token of context")
    _add_inputs(parser)
    parser.add_argument("--slo-ms", type=float, metavar="MS", help="time that a request without a deadline has")
    parser.add_argument(
        "--margin", type=float, metavar="X", help="factor on predictions (default: profile's, or 1)"
    )
    parser.add_argument("--version", type=int, metavar="N", help="version directory for the library (default: newest)")
    parser.add_argument("--write", action="store_true", help="add the lines to config.pbtxt; config.pbtxt.bak is kept")


def install(args: argparse.Namespace, progress: Progress) -> str:
    """Run `install-plugin`; the report."""
    from triton_models.plugin_config import PluginSettings
    from triton_models.plugin_install import PROFILE, InstallOptions
    from triton_models.plugin_install import install as run

    settings = PluginSettings(
        profile=PROFILE if args.profile is not None else None,
        base_us=args.base_us,
        per_token_us=args.per_token_us,
        per_context_us=args.per_context_us,
        tokens_input=args.tokens_input,
        context_input=args.context_input,
        slo_ms=args.slo_ms,
        margin=args.margin,
    )
    return run(InstallOptions(args.model_dir, settings, args.profile, args.version, args.write), progress)


def add_remote_profile(parser: argparse.ArgumentParser) -> None:
    """Options of `profile` that go with --model."""
    remote = parser.add_argument_group("a running model instead (for install-plugin; nothing else should use it)")
    remote.add_argument("--model", metavar="NAME", help="measure this model, whatever it is, on the server at --url")
    remote.add_argument("--url", default="localhost:8001", metavar="HOST:PORT", help="its gRPC port [%(default)s]")
    _add_inputs(remote)
    remote.add_argument("--max-tokens", type=int, metavar="N", help="largest request (default: up to 256)")
    remote.add_argument("--max-context", type=int, default=1024, metavar="N", help="largest context [%(default)s]")
    remote.add_argument(
        "--shape", action="append", default=[], metavar="NAME:D1,D2", help="of another input of open shape; repeatable"
    )


def remote_profile(args: argparse.Namespace, progress: Progress) -> str:
    """Run `profile --model`; the report."""
    from triton_models.remote_profile import RemoteOptions, run

    options = RemoteOptions(
        url=args.url,
        model=args.model,
        output=args.output or Path(f"{args.model}.json"),
        budget_s=args.seconds,
        tokens_input=args.tokens_input,
        context_input=args.context_input,
        max_tokens=args.max_tokens,
        max_context=args.max_context,
        shapes=_shapes(args.shape),
    )
    return run(options, progress)


def _add_inputs(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    parser.add_argument(
        "--tokens-input", metavar="NAME[,SECOND]",
        help="input whose length is the new tokens (SECOND: draft tokens); default: the batch dimension counts",
    )  # fmt: skip
    parser.add_argument(
        "--context-input", metavar="[value:]NAME", help="input whose length, or value, is the tokens of context"
    )


def _shapes(texts: Sequence[str]) -> dict[str, list[int]]:
    shapes: dict[str, list[int]] = {}
    for text in texts:
        name, _, dims = text.partition(":")
        try:
            shapes[name] = [int(dim) for dim in dims.split(",")]
        except ValueError:
            raise ConfigError(f"--shape is {text!r}; the form is NAME:D1,D2,...") from None
        if min(shapes[name]) < 1:
            raise ConfigError(f"--shape is {text!r}; allowed: dimensions of 1 or more")
    return shapes
