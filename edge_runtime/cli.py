"""`wisp-edge`: generate and chat with a draft model here and a Triton server that verifies; export draft graphs.

Heavy imports happen inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from edge_runtime.cores import drafting_threads
from wisp_plugin.errors import ConfigError, WispError
from wisp_plugin.home import DEFAULT_DRAFT, DRAFT_NAMES

COMMANDS = {
    "generate": "generate a continuation of one prompt",
    "chat": "a small interactive chat, with the model's chat template",
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
    _add_session_arguments(generate)
    chat = commands.add_parser("chat", help=COMMANDS["chat"], description=_sentence("chat"))
    chat.add_argument("--system", help="system message")
    _add_session_arguments(chat)
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
    _add_threads(draft)
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


def _add_session_arguments(parser: argparse.ArgumentParser) -> None:
    where = parser.add_argument_group("server")
    where.add_argument("--server", default="127.0.0.1:8001", metavar="HOST:PORT", help="gRPC endpoint [%(default)s]")
    where.add_argument(
        "--transport",
        choices=["stream", "unary"],
        default="stream",
        help="stream: one gRPC stream per session, to wisp_verifier; unary: one request per draft, in mode sync, to "
        "wisp_verifier_batched [%(default)s]",
    )
    where.add_argument("--tls", action="store_true", help="encrypt the connection")
    where.add_argument("--ca", metavar="PEM", help="authority that signed the server's certificate")
    where.add_argument("--cert", metavar="PEM", help="client certificate, for mutual TLS")
    where.add_argument("--key", metavar="PEM", help="key of the client certificate")
    draft = parser.add_argument_group("drafting")
    draft.add_argument(
        "--draft",
        default=DEFAULT_DRAFT,
        metavar="NAME|DIR",
        help=f"draft graph: {', '.join(DRAFT_NAMES)} (of the default model), or a folder made by `wisp-edge export` "
        "[%(default)s]",
    )
    draft.add_argument("--no-draft", action="store_true", help="thin client: draft nothing, the server decodes alone")
    draft.add_argument(
        "--rule",
        default="auto",
        metavar="RULE",
        help="how far to draft: auto (price in free mode, ratio in sync), price, ratio, paper, svip, adaedl, "
        "fixed or fixed:N [%(default)s]",
    )
    draft.add_argument(
        "--energy-price",
        type=float,
        metavar="P",
        help="committed tokens that a draft token must be expected to win, for price and ratio: 0 drafts whenever it "
        "may help, 0.2 saves battery, 1 never drafts [0.06]",
    )
    draft.add_argument(
        "--controller",
        metavar="NPZ",
        help="weights of `wisp-edge train-controller` [those that are shipped for the draft]",
    )
    draft.add_argument(
        "--mode",
        choices=["free", "sync"],
        help="free: nobody waits; sync: one commit per draft [free; sync with --transport unary]",
    )
    _add_threads(draft)
    _add_slo_arguments(parser)
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="[%(default)s]")
    sampling.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy [%(default)s]")
    sampling.add_argument("--top-k", type=int, default=0, metavar="K", help="0: off [%(default)s]")
    sampling.add_argument("--top-p", type=float, default=1.0, metavar="P", help="1: off [%(default)s]")
    sampling.add_argument("--repetition-penalty", type=float, default=1.0, metavar="R", help="1: off [%(default)s]")
    sampling.add_argument("--seed", type=int, default=0, metavar="S", help="equal seeds give equal texts [%(default)s]")
    sampling.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before TEXT (repeatable)")
    sampling.add_argument("--ignore-eos", action="store_true", help="generate on behind the end-of-text token")
    parser.add_argument(
        "--stats", action="store_true", help="print figures to standard error at the end, and whether the SLO was met"
    )


def _add_threads(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--threads",
        type=int,
        default=drafting_threads(),
        metavar="N",
        help="threads of the draft model; 0: on every core [one core fewer than there are, here %(default)s: it "
        "receives what the server commits meanwhile]",
    )


def _add_slo_arguments(parser: argparse.ArgumentParser) -> None:
    slo = parser.add_argument_group(
        "service level objective (SLO)",
        "How soon you need the tokens; the server schedules by it. Loose numbers are kind to others, tight ones may be "
        "answered 'overloaded': then wisp-edge waits and tries again. Name a class or give numbers; without any the "
        "server's default holds.",
    )
    slo.add_argument(
        "--slo", metavar="CLASS", help="a class that the server's operator has set up, such as interactive"
    )
    slo.add_argument(
        "--ttft-ms", type=float, metavar="MS", help="time to the first token: the wait for an answer to begin"
    )
    slo.add_argument(
        "--tpot-ms",
        type=float,
        metavar="MS",
        help="mean time per further token; 200 is about the pace of reading",
    )


if __name__ == "__main__":
    sys.exit(main())
