"""Options of `wisp-edge`'s commands. They stand here, not beside the code: help is instant without ONNX Runtime."""

from __future__ import annotations

import argparse

from edge_runtime.cores import drafting_threads
from wisp_plugin.home import DEFAULT_DRAFT, DRAFT_NAMES


def add_session_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `generate` and `chat`."""
    where = parser.add_argument_group("server")
    where.add_argument(
        "--transport",
        choices=["stream", "unary"],
        default="stream",
        help="stream: one gRPC stream per session, to wisp_verifier; unary: one request per draft, in mode sync, to "
        "wisp_verifier_batched [%(default)s]",
    )
    _add_server_arguments(where)
    draft = parser.add_argument_group("drafting")
    draft.add_argument(
        "--mode",
        choices=["free", "sync"],
        help="free: nobody waits; sync: one commit per draft [free; sync with --transport unary]",
    )
    _add_draft_arguments(draft)
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


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `serve`."""
    here = parser.add_argument_group("here")
    here.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: every one [%(default)s]")
    here.add_argument("--port", type=int, default=8080, metavar="N", help="0: any that is free [%(default)s]")
    here.add_argument("--model-id", metavar="NAME", help="the model's name for clients [that of the draft's model]")
    here.add_argument(
        "--max-total-tokens", type=int, default=8192, metavar="N", help="prompt and text of a request [%(default)s]"
    )
    here.add_argument(
        "--max-sessions", type=int, default=64, metavar="N", help="requests that run at once [%(default)s]"
    )
    here.add_argument(
        "--max-requests",
        type=int,
        default=128,
        metavar="N",
        help="requests that run or wait; one more is answered 429 [%(default)s]",
    )
    here.add_argument(
        "--server-wait",
        type=float,
        default=30.0,
        metavar="S",
        help="seconds that a request waits for a server that is away (then 503), or for its turn (429) [%(default)s]",
    )
    where = parser.add_argument_group("server")
    _add_server_arguments(where)
    draft = parser.add_argument_group("drafting")
    draft.add_argument(
        "--drafters",
        type=int,
        default=4,
        metavar="N",
        help="sessions that draft at once, each with a KV in memory; more than that take turns [%(default)s]",
    )
    _add_draft_arguments(draft)
    _add_slo_arguments(parser)


def _add_server_arguments(where: argparse._ArgumentGroup) -> None:
    where.add_argument("--server", default="127.0.0.1:8001", metavar="HOST:PORT", help="gRPC endpoint [%(default)s]")
    where.add_argument("--tls", action="store_true", help="encrypt the connection")
    where.add_argument("--ca", metavar="PEM", help="authority that signed the server's certificate")
    where.add_argument("--cert", metavar="PEM", help="client certificate, for mutual TLS")
    where.add_argument("--key", metavar="PEM", help="key of the client certificate")
    where.add_argument(
        "--token-file", metavar="FILE", help="bearer token for a proxy in front of the server, read at every connection"
    )


def _add_draft_arguments(draft: argparse._ArgumentGroup) -> None:
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
    add_threads(draft)


def add_threads(group: argparse._ArgumentGroup) -> None:
    """Option `--threads`."""
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
