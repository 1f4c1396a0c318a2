"""`wisp-edge trace`: record what a draft model proposes along texts of the target.

The texts come from a running server (thin sessions, several at once), or from a trace recorded before, so that
several drafts are recorded along the same texts. The output trains the controller (`wisp-edge train-controller`) and
drives simulations.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from edge_runtime.client import EdgeClient
from edge_runtime.drafter import Drafter
from edge_runtime.tokenizer import Tokenizer
from edge_runtime.transport import GrpcStream
from wisp_plugin.controller import SpeculationController
from wisp_plugin.draft_stats import NUM_STATS
from wisp_plugin.draft_trace import DraftTrace, Stats, TextTrace
from wisp_plugin.edge_session import EdgeSession
from wisp_plugin.errors import ConfigError, InvalidRequest
from wisp_plugin.home import draft_folder
from wisp_plugin.messages import Mode, Open, Sampling, Tokens
from wisp_plugin.npz_file import cannot_write, check_out_file
from wisp_plugin.stop_rules import Fixed
from wisp_plugin.vocabulary import vocab_hash
from wisp_plugin.wire import new_session_id
from wisp_plugin.wire_values import named_slo
from wisp_plugin.wire_values import sampling as checked_sampling

T = TypeVar("T")
Report = Callable[[str], None]
CHAIN_LENGTH = 24  # recorded behind a rejection: more than a device drafts before it hears of one
_REPORT_S = 2.0


@dataclass(frozen=True, slots=True)
class Text:
    """A text of the target: `tokens` int32, the prompt included."""

    tokens: Tokens
    prompt_len: int


def generate_texts(
    server: str,
    prompts: Sequence[Tokens],
    max_new_tokens: int,
    sampling: Sampling,
    tokenizer: Tokenizer,
    concurrency: int,
    report: Report,
) -> list[Text]:
    """The target's texts behind `prompts`, by thin sessions on the server at HOST:PORT; raises as `EdgeClient.run`."""
    vocabulary = vocab_hash(tokenizer.folder)

    def generate(prompt: Tokens) -> Text:
        opened = Open(
            session=new_session_id(), tokens=prompt, prompt_len=len(prompt), max_new_tokens=max_new_tokens,
            sampling=sampling, slo=named_slo(), mode=Mode.FREE, eos_token_ids=tokenizer.eos_token_ids,
        )  # fmt: skip
        session = EdgeSession(opened, SpeculationController(Fixed(0)))
        client = EdgeClient(opened, session, GrpcStream(server, vocab_hash=vocabulary))
        try:
            for _ in client.run():
                pass
        finally:
            client.close()
        return Text(session.committed.copy(), len(prompt))

    with ThreadPoolExecutor(concurrency) as pool:
        return list(_reported(pool.map(generate, prompts), len(prompts), "texts of the target", report))


def record(
    texts: Sequence[Text], drafter: Drafter, sampling: Sampling, chain_length: int, report: Report
) -> tuple[list[TextTrace], float]:
    """The trace of each text, and the median seconds of a draft step. Texts that do not fit the draft are refused."""
    times_s: list[float] = []
    recorder = _Recorder(drafter, sampling, chain_length, times_s)
    traces = list(_reported(map(recorder.trace, texts), len(texts), "texts drafted", report))
    return traces, statistics.median(times_s)


@dataclass(frozen=True, slots=True)
class _Recorder:
    drafter: Drafter
    sampling: Sampling
    chain_length: int
    times_s: list[float]

    def trace(self, text: Text) -> TextTrace:
        tokens, num_generated = text.tokens, len(text.tokens) - text.prompt_len
        drafted = np.empty(num_generated, np.int32)
        stats = np.empty((num_generated, NUM_STATS), np.float32)
        behind: list[Stats] = []
        behind_tokens: list[Tokens] = []
        while self.drafter.advance(tokens[: text.prompt_len]):
            pass
        for i in range(num_generated):
            position = text.prompt_len + i
            started_s = time.perf_counter()
            drafted[i], stats[i] = self.drafter.draft_token_with_stats(tokens[:position], self.sampling)
            self.times_s.append(time.perf_counter() - started_s)
            if self.chain_length and drafted[i] != tokens[position]:
                chain, its_stats = self._behind(np.append(tokens[:position], drafted[i]))
                behind.append(its_stats)
                behind_tokens.append(chain)
        shape = (len(behind), self.chain_length)
        return TextTrace(
            tokens, text.prompt_len, drafted, stats, np.array(behind, np.float32).reshape(*shape, NUM_STATS),
            np.array(behind_tokens, np.int32).reshape(shape),
        )  # fmt: skip

    def _behind(self, context: Tokens) -> tuple[Tokens, Stats]:
        """The chain behind a wrong draft token, which `context` ends with, and its statistics."""
        stats = np.empty((self.chain_length, NUM_STATS), np.float32)
        for k in range(self.chain_length):
            token, stats[k] = self.drafter.draft_token_with_stats(context, self.sampling)
            context = np.append(context, np.int32(token))
        return context[-self.chain_length :], stats


def _reported(items: Iterable[T], total: int, label: str, report: Report) -> Iterator[T]:
    """`items` as they come, with a line now and then."""
    shown_s = time.monotonic()
    for number, item in enumerate(items, 1):
        yield item
        if time.monotonic() - shown_s > _REPORT_S:
            shown_s = time.monotonic()
            report(f"{label}: {number}/{total}")


def main(args: argparse.Namespace) -> int:
    """Run `wisp-edge trace`; the exit code. Raises WispError with one line."""
    if (args.prompts is None) == (args.texts is None):
        raise ConfigError("give --prompts (a server generates their texts) or --texts (a trace that has them)")
    for name, least, most in (("max_new_tokens", 1, 100_000), ("concurrency", 1, 64), ("chain_length", 0, 64)):
        if not least <= getattr(args, name) <= most:
            option = name.replace("_", "-")
            raise ConfigError(f"--{option} is {getattr(args, name)}; allowed: {least} to {most}")
    check_out_file(args.out)
    folder = draft_folder(args.draft)
    tokenizer = Tokenizer.load(folder)
    try:
        sampling = checked_sampling({"seed": args.seed, "temperature": args.temperature}, tokenizer.vocab_size)
    except InvalidRequest as error:
        raise ConfigError(str(error)) from None
    if args.texts is not None:
        texts = [Text(text.tokens, text.prompt_len) for text in DraftTrace.load(args.texts).texts]
    else:
        prompts = read_prompts(args.prompts, tokenizer)
        texts = generate_texts(
            args.server, prompts, args.max_new_tokens, sampling, tokenizer, args.concurrency, _to_stderr
        )
    drafter = Drafter.load(folder, num_threads=args.threads)
    traces, draft_s = record(texts, drafter, sampling, args.chain_length, _to_stderr)
    about = {"draft": args.draft, "draft_s": draft_s, "temperature": args.temperature, "seed": args.seed}
    trace = DraftTrace(traces, about)
    try:
        trace.save(args.out)
    except OSError as error:
        raise cannot_write(args.out, error) from None
    _to_stderr(
        f"wrote {args.out}: {len(texts)} texts, {sum(len(t.drafted) for t in traces)} positions, "
        f"{trace.acceptance:.1%} of them as the target says, {1e3 * draft_s:.1f} ms per draft token"
    )
    return 0


def read_prompts(path: Path, tokenizer: Tokenizer) -> list[Tokens]:
    """Token ids of the prompts in a JSON-lines file. Raises ConfigError naming the line that is wrong."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    prompts = []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            prompt, is_chat = entry["prompt"], entry.get("chat", True)
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ConfigError(f'line {number} of {path} must be like {{"prompt": "...", "chat": true}}') from None
        if not isinstance(prompt, str) or not prompt or not isinstance(is_chat, bool):
            raise ConfigError(f"line {number} of {path}: `prompt` must be a text, `chat` true or false")
        as_chat = [{"role": "user", "content": prompt}]
        prompts.append(tokenizer.encode_chat(as_chat) if is_chat else tokenizer.encode(prompt))
    if not prompts:
        raise ConfigError(f"{path} holds no prompts")
    return prompts


def _to_stderr(line: str) -> None:
    print(f"wisp-edge trace: {line}", file=sys.stderr, flush=True)
