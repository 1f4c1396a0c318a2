"""`wisp-edge`: generate and chat with a draft model here and a Triton server that verifies; export draft graphs.

Heavy imports happen inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from edge_runtime.options import add_serve_arguments, add_session_arguments, add_threads
from wisp_plugin.errors import ConfigError, WispError

COMMANDS = {
    "generate": "generate a continuation of one prompt",
    "chat": "a small interactive chat, with the model's chat template",
    "serve": "serve the interfaces of TGI and of OpenAI on this device, and a page",
    "export": "make a draft graph from a Hugging Face model",
    "trace": "record what a draft model proposes along texts of the target",
    "train-controller": "train the speculation controller's weights on traces",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Errors that a user can mend are one line on stderr and exit code 2."""
    args = _parser().parse_args(argv)
    try:
        if getattr(args, "threads", 0) < 0:
            raise ConfigError(f"--threads is {args.threads}; allowed: 0 (every core) or more")
        if args.command == "export":
            from edge_runtime import export

            return export.main(args)
        if args.command == "trace":
            from edge_runtime import trace

            return trace.main(args)
        if args.command == "train-controller":
            from edge_runtime import train_controller

            return train_controller.main(args)
        if args.command == "serve":
            return _gateway().main(args)
        from edge_runtime import generate

        return generate.chat(args) if args.command == "chat" else generate.generate(args)
    except WispError as error:
        print(f"wisp-edge: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _gateway() -> ModuleType:
    try:
        from edge_runtime.gateway import app
    except ModuleNotFoundError as error:
        if error.name not in ("starlette", "uvicorn"):
            raise
        raise ConfigError(f"serve needs the package {error.name!r}; install the extra 'gateway'") from None
    return app


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="wisp-edge",
        description="Draft tokens on this device, let a Triton server verify them. The text is exactly the "
        "server's large model's, whatever drafts here.",
        epilog="Start a server with `wisp-server up`; make the default models with `wisp-server models`.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    generate = commands.add_parser("generate", help=COMMANDS["generate"], description=_sentence("generate"))
    generate.add_argument("prompt", help="the prompt; '-' reads it from standard input")
    generate.add_argument("--chat", action="store_true", help="wrap the prompt in the model's chat template")
    add_session_arguments(generate)
    chat = commands.add_parser("chat", help=COMMANDS["chat"], description=_sentence("chat"))
    chat.add_argument("--system", help="system message")
    add_session_arguments(chat)
    add_serve_arguments(commands.add_parser("serve", help=COMMANDS["serve"], description=_sentence("serve")))
    export = commands.add_parser("export", help=COMMANDS["export"], description=_sentence("export"))
    from edge_runtime.export import add_arguments

    add_arguments(export)
    _add_training_commands(commands)
    return parser


def _sentence(command: str) -> str:
    """What a command does, as a sentence begins; the rest stays as it is, for names."""
    return COMMANDS[command][:1].upper() + COMMANDS[command][1:]


def _add_training_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Options stand here, not beside the code: that imports ONNX Runtime, and help is to be instant."""
    trace = commands.add_parser("trace", help=COMMANDS["trace"], description=_sentence("trace"))
    trace.add_argument("out", metavar="OUT.npz", type=Path, help="file for the trace")
    texts = trace.add_argument_group("texts of the target (--prompts or --texts)")
    texts.add_argument(
        "--prompts", type=Path, metavar="JSONL", help='a JSON object per line: {"prompt": "...", "chat": true}'
    )
    texts.add_argument("--texts", type=Path, metavar="NPZ", help="a trace recorded before: its texts are used again")
    texts.add_argument("--server", default="127.0.0.1:8001", metavar="HOST:PORT", help="gRPC endpoint [%(default)s]")
    texts.add_argument("--max-new-tokens", type=int, default=96, metavar="N", help="per prompt [%(default)s]")
    texts.add_argument("--concurrency", type=int, default=8, metavar="N", help="sessions at once [%(default)s]")
    draft = trace.add_argument_group("drafting")
    draft.add_argument("--draft", default="int8", metavar="NAME|DIR", help="draft graph, as of generate [%(default)s]")
    add_threads(draft)
    draft.add_argument(
        "--chain-length",
        type=int,
        default=24,
        metavar="N",
        help="tokens recorded behind a rejection; 0 is enough for training [%(default)s]",
    )
    draft.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy [%(default)s]")
    draft.add_argument("--seed", type=int, default=0, metavar="S", help="[%(default)s]")
    train = commands.add_parser(
        "train-controller", help=COMMANDS["train-controller"], description=_sentence("train-controller")
    )
    train.add_argument("traces", nargs="+", type=Path, metavar="TRACE.npz", help="files of `wisp-edge trace`")
    train.add_argument("--out", type=Path, required=True, metavar="OUT.npz", help="file for the weights")
    train.add_argument(
        "--evaluate",
        type=Path,
        metavar="TRACE.npz",
        help="a trace of other prompts, for the figures [a seventh of the prompts, which is held out]",
    )
    train.add_argument(
        "--false-alarm-cost",
        type=float,
        default=1.0,
        metavar="C",
        help="wasted draft tokens that a stop in front of a good one is as bad as [%(default)s]",
    )
    train.add_argument("--epochs", type=int, default=60, metavar="N", help="[%(default)s]")
    train.add_argument("--seed", type=int, default=0, metavar="S", help="[%(default)s]")


if __name__ == "__main__":
    sys.exit(main())
