"""`wisp-edge generate` and `wisp-edge chat`: text in, streamed text out."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.client import EdgeClient, TokenTimes
from edge_runtime.drafter import Drafter
from edge_runtime.tokenizer import Tokenizer
from edge_runtime.transport import GrpcStream, TlsFiles
from edge_runtime.unary_transport import UnaryTransport
from wisp_plugin.acceptance_model import AcceptanceModel, shipped_model
from wisp_plugin.config import check_slo_class
from wisp_plugin.controller import SpeculationController
from wisp_plugin.edge_session import EdgeSession, EdgeStats
from wisp_plugin.errors import ConfigError, InvalidRequest
from wisp_plugin.home import draft_folder
from wisp_plugin.messages import Mode, Open, Sampling, Slo, Tokens
from wisp_plugin.speculation import make_controller, no_drafts
from wisp_plugin.stop_rules import DEFAULT_ENERGY_PRICE
from wisp_plugin.text_stream import StopMatcher
from wisp_plugin.vocabulary import vocab_hash
from wisp_plugin.wire import new_session_id
from wisp_plugin.wire_values import named_slo, number
from wisp_plugin.wire_values import sampling as checked_sampling


@dataclass(slots=True)
class Device:
    """What the commands share between prompts: tokenizer, draft model, options."""

    args: argparse.Namespace
    slo: Slo
    folder: Path
    tokenizer: Tokenizer
    drafter: Drafter | None

    @classmethod
    def load(cls, args: argparse.Namespace) -> Device:
        """Load what `args` name. Raises ModelError or ConfigError."""
        slo = slo_of(args)
        _mode(args)  # refused before anything is loaded
        folder = draft_folder(args.draft)
        tokenizer = Tokenizer.load(folder)
        drafter = None if args.no_draft else Drafter.load(folder, num_threads=args.threads)
        return cls(args, slo, folder, tokenizer, drafter)

    def client(self, prompt: Tokens) -> EdgeClient:
        """A client for one session behind `prompt`."""
        args = self.args
        if not len(prompt):
            raise ConfigError("the prompt is empty; it must have at least one token")
        if not 0 < args.max_new_tokens <= 1_000_000:
            raise ConfigError(f"--max-new-tokens is {args.max_new_tokens}; allowed: 1 or more")
        opened = Open(
            session=new_session_id(),
            tokens=prompt,
            prompt_len=len(prompt),
            max_new_tokens=args.max_new_tokens,
            sampling=_sampling(args, self.tokenizer.vocab_size),
            slo=self.slo,
            mode=_mode(args),
            eos_token_ids=() if args.ignore_eos else self.tokenizer.eos_token_ids,
        )
        limit = self.drafter.max_context_tokens if self.drafter else None
        session = EdgeSession(opened, self._controller(opened.mode), max_context_tokens=limit)
        make_transport = UnaryTransport if args.transport == "unary" else GrpcStream
        transport = make_transport(args.server, tls_files(args), vocab_hash(self.folder))
        return EdgeClient(opened, session, transport, self.drafter)

    def _controller(self, mode: Mode) -> SpeculationController:
        """The speculation controller that the options ask for."""
        args = self.args
        if args.no_draft:
            return no_drafts()
        return make_controller(args.rule, mode, *beliefs_of(args))

    def stream(self, client: EdgeClient) -> Iterator[str]:
        """The text of the session as it becomes final, up to the first stop string."""
        text, stops = self.tokenizer.detokenizer(), StopMatcher(self.args.stop)
        try:
            for tokens in client.run():
                yield stops.push(text.push(tokens))
                if stops.stopped:
                    return
            yield stops.push(text.flush()) + stops.flush()
        finally:
            client.close()


def tls_files(args: argparse.Namespace) -> TlsFiles | None:
    """What the options say about encryption; None: there is none. Raises ConfigError."""
    paths = [Path(path) if path else None for path in (args.ca, args.cert, args.key, args.token_file)]
    if not args.tls and any(paths):
        raise ConfigError("--ca, --cert, --key and --token-file are for an encrypted connection; add --tls")
    return TlsFiles(*paths) if args.tls else None


def _sampling(args: argparse.Namespace, vocab_size: int) -> Sampling:
    values = {name: getattr(args, name) for name in ("seed", "temperature", "top_k", "top_p", "repetition_penalty")}
    try:
        return checked_sampling(values, vocab_size)
    except InvalidRequest as error:
        raise ConfigError(str(error)) from None


def _mode(args: argparse.Namespace) -> Mode:
    """The mode that the options ask for. ConfigError if the transport has another one."""
    if args.transport == "unary":
        if args.mode == "free":
            raise ConfigError("--mode free needs a stream; allowed with --transport unary: sync, its default")
        return Mode.SYNC
    return Mode(args.mode or "free")


def beliefs_of(args: argparse.Namespace) -> tuple[AcceptanceModel, float]:
    """The acceptance model and the energy price that the options ask for. Raises ModelError."""
    model = AcceptanceModel.load(Path(args.controller)) if args.controller else shipped_model(args.draft)
    return model, DEFAULT_ENERGY_PRICE if args.energy_price is None else args.energy_price


def slo_of(args: argparse.Namespace) -> Slo:
    """The SLO that the options ask for; numbers that only the server knows are infinite."""
    given = {name: getattr(args, name) for name in ("ttft_ms", "tpot_ms") if getattr(args, name) is not None}
    if args.slo is not None:
        if given:
            raise ConfigError(
                "--slo names a class of the server, --ttft-ms and --tpot-ms give numbers; use one or the other"
            )
        check_slo_class(args.slo)
        return named_slo(args.slo)
    try:
        checked = {name: number(given, name, math.inf, 0.001, 1e7) for name in given}
    except InvalidRequest as error:
        raise ConfigError(str(error)) from None
    return Slo(checked.get("ttft_ms", math.inf), checked.get("tpot_ms", math.inf)) if checked else named_slo()


def generate(args: argparse.Namespace) -> int:
    """One prompt, one text on standard output."""
    device = Device.load(args)
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    as_chat = [{"role": "user", "content": prompt}]
    client = device.client(device.tokenizer.encode_chat(as_chat) if args.chat else device.tokenizer.encode(prompt))
    _print_stream(device, client, args.stats)
    return 0


def chat(args: argparse.Namespace) -> int:
    """Lines from standard input, answers to standard output, until the end of input or /quit."""
    device = Device.load(args)
    messages = [{"role": "system", "content": args.system}] if args.system else []
    print("Type a message; /quit or Ctrl-D leaves.", file=sys.stderr)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return 0
        if line == "/quit":
            return 0
        if not line:
            continue
        messages.append({"role": "user", "content": line})
        client = device.client(device.tokenizer.encode_chat(messages))
        messages.append({"role": "assistant", "content": _print_stream(device, client, args.stats)})


def _print_stream(device: Device, client: EdgeClient, with_stats: bool) -> str:
    started_s = time.monotonic()
    parts = []
    for part in device.stream(client):
        print(part, end="", flush=True)
        parts.append(part)
    print(flush=True)
    if with_stats:
        _print_stats(client.session.stats, time.monotonic() - started_s)
        controller = client.session.controller
        if client.drafter is not None and isinstance(controller, SpeculationController):  # a thin one chooses nothing
            print(controller_report(controller), file=sys.stderr)
        print(slo_report(client.times, device.slo), file=sys.stderr)
    return "".join(parts)


def _print_stats(stats: EdgeStats, elapsed_s: float) -> None:
    resolved = stats.num_accepted + stats.num_corrections
    print(
        f"{stats.num_committed} tokens in {elapsed_s:.2f} s: {stats.num_committed / elapsed_s:.1f} tokens/s, "
        f"{stats.tokens_per_pass:.2f} tokens per pass; drafted {stats.num_drafted}, accepted {stats.num_accepted}, "
        f"rejected {stats.num_corrections} of {resolved} compared; WDT share {stats.wdt_share:.2f}"
        + (f"; opened again {stats.num_reopened} times" if stats.num_reopened else ""),
        file=sys.stderr,
    )


def controller_report(controller: SpeculationController) -> str:
    """One line: how often the controller chose not to draft, and what it has learnt about this session's drafts."""
    calibration = controller.calibration
    return (
        f"controller: chose not to draft {controller.num_abstained} of {controller.num_choices} times, "
        f"probed {controller.num_probes} times; recent acceptance {calibration.recent:.2f}"
    )


def slo_report(times: TokenTimes, slo: Slo) -> str:
    """One line: the times that an SLO is about, and whether it was met if the client knows its numbers."""
    measured = f"ttft {times.ttft_ms:.0f} ms, mean tpot {times.mean_tpot_ms:.1f} ms"
    limits = {"ttft": slo.ttft_ms, "tpot": slo.tpot_ms}
    known = ", ".join(f"{name} at most {limit:g} ms" for name, limit in limits.items() if limit < math.inf)
    if not known:
        return measured
    return f"{measured}; SLO {'met' if times.meet(slo) else 'missed'} ({known})"
