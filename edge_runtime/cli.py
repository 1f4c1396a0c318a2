"""`wisp-edge`: generate and chat with a draft model here and a Triton server that verifies; export draft graphs.

Heavy imports happen inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from wisp_plugin.errors import WispError

COMMANDS = {
    "generate": "generate a continuation of one prompt",
    "chat": "a small interactive chat, with the model's chat template",
    "export": "make a draft graph from a Hugging Face model",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Errors that a user can mend are one line on stderr and exit code 2."""
    args = _parser().parse_args(argv)
    try:
        if args.command == "export":
            from edge_runtime import export

            return export.main(args)
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
    generate = commands.add_parser("generate", help=COMMANDS["generate"], description=COMMANDS["generate"].capitalize())
    generate.add_argument("prompt", help="the prompt; '-' reads it from standard input")
    generate.add_argument("--chat", action="store_true", help="wrap the prompt in the model's chat template")
    _add_session_arguments(generate)
    chat = commands.add_parser("chat", help=COMMANDS["chat"], description=COMMANDS["chat"].capitalize())
    chat.add_argument("--system", help="system message")
    _add_session_arguments(chat)
    export = commands.add_parser("export", help=COMMANDS["export"], description=COMMANDS["export"].capitalize())
    from edge_runtime.export import add_arguments

    add_arguments(export)
    return parser


def _add_session_arguments(parser: argparse.ArgumentParser) -> None:
    where = parser.add_argument_group("server")
    where.add_argument("--server", default="127.0.0.1:8001", metavar="HOST:PORT", help="gRPC endpoint [%(default)s]")
    where.add_argument("--tls", action="store_true", help="encrypt the connection")
    where.add_argument("--ca", metavar="PEM", help="authority that signed the server's certificate")
    where.add_argument("--cert", metavar="PEM", help="client certificate, for mutual TLS")
    where.add_argument("--key", metavar="PEM", help="key of the client certificate")
    draft = parser.add_argument_group("drafting")
    draft.add_argument(
        "--draft",
        default="int8",
        metavar="NAME|DIR",
        help="draft graph: int8 or int4 (of the default model), or a folder made by `wisp-edge export` [%(default)s]",
    )
    draft.add_argument("--no-draft", action="store_true", help="thin client: draft nothing, the server decodes alone")
    draft.add_argument(
        "--draft-length",
        type=int,
        default=8,
        metavar="N",
        help="at most N tokens ahead of the last commit [%(default)s]",
    )
    draft.add_argument(
        "--mode", choices=["free", "sync"], default="free", help="free: nobody waits; sync: one commit per draft [free]"
    )
    draft.add_argument("--threads", type=int, default=0, metavar="N", help="threads of the draft model [all cores]")
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
