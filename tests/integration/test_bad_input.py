"""Whatever a client sends: one line or a status for it, and nothing for anybody else.

Everything here goes over gRPC by a bare tritonclient, while another session runs on the same server.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from bench.live import Drafting, run_session
from tests.integration.support import (
    SAMPLED,
    Judge,
    RawStream,
    ints,
    prompts,
    raw_stream,
    session_tensor,
    thin_open,
    wait_until,
)
from triton_models.server_process import ServerProcess
from wisp_plugin.home import default_target_dir
from wisp_plugin.messages import Status, Tokens
from wisp_plugin.vocabulary import vocab_hash
from wisp_plugin.wire import new_session_id
from wisp_plugin.wire_values import Array, Parameter

pytestmark = pytest.mark.integration
VOCAB_SIZE = 49_152
CONTEXT_TOKENS = 8_192
BEYOND = "0123456789abcdef" * 2  # a capability that was never opened
OPEN: dict[str, Parameter] = {"op": "open", "protocol": 1, "ignore_eos": True, "max_new_tokens": 8}


class Traffic:
    """A healthy session, again and again, while others misbehave."""

    def __init__(self, server: str) -> None:
        self.num_tokens = 0
        self.texts: list[Tokens] = []
        self.failure: BaseException | None = None
        self._server = server
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="traffic")
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._stopping:
                opened = thin_open(prompts()[0], 12, SAMPLED)
                self.texts.append(run_session(self._server, opened, Drafting(), on_tokens=self._count).tokens)
        except BaseException as failure:
            self.failure = failure

    def _count(self, tokens: Tokens) -> None:
        self.num_tokens += len(tokens)

    def goes_on(self) -> None:
        """Fail unless tokens keep coming."""
        seen = self.num_tokens
        wait_until(lambda: self.failure is not None or self.num_tokens > seen + 1, 10.0)
        assert self.failure is None, f"the healthy session failed: {self.failure!r}"

    def stop(self) -> None:
        """End after the running session."""
        self._stopping = True
        self._thread.join(30.0)


@pytest.fixture(scope="module")
def traffic(shared_server: ServerProcess, judge: Judge) -> Iterator[Traffic]:
    """Traffic during all tests of this module; its texts are judged at the end."""
    traffic = Traffic(shared_server.grpc_url)
    yield traffic
    traffic.stop()
    assert traffic.failure is None
    for text in {tuple(text.tolist()): text for text in traffic.texts}.values():
        assert len(text) == 12
        judge.check(prompts()[0], text, SAMPLED)


@pytest.fixture
def stream(server: ServerProcess, traffic: Traffic) -> Iterator[RawStream]:
    """A bare stream to a busy server; afterwards the others are still served."""
    traffic.goes_on()
    with raw_stream(server.grpc_url) as stream:
        yield stream
        traffic.goes_on()
    assert server.is_ready()


def tokens_of(prompt: Any = None) -> dict[str, Array]:
    """SESSION (fresh) and TOKENS."""
    return session_tensor(new_session_id()) | {"TOKENS": np.asarray(prompts()[0] if prompt is None else prompt)}


def opened(stream: RawStream, num_tokens: int = 200, **parameters: Parameter) -> tuple[dict[str, Array], int]:
    """A running session on `stream`: its SESSION tensor and the length of its prompt."""
    tensors = tokens_of()
    stream.send(tensors, **(OPEN | {"max_new_tokens": num_tokens} | parameters))
    return {"SESSION": tensors["SESSION"]}, len(tensors["TOKENS"])


ENVELOPES = {
    "no op": ({"op": None}, "'op' is None; allowed: 'open', 'draft', 'close'"),
    "unknown op": ({"op": "reopen"}, "'op' is 'reopen'; allowed: 'open', 'draft', 'close'"),
    "other protocol": ({"protocol": 2}, "this server speaks protocol 1"),
    "no protocol": ({"protocol": None}, "this server speaks protocol 1"),
    "unknown parameter": ({"temprature": "0.5"}, "unknown parameter 'temprature' for 'open'; allowed: "),
    "temperature": ({"temperature": "-1"}, "'temperature' is '-1'; allowed: a number from 0 to 100"),
    "nan": ({"temperature": "nan"}, "'temperature' is 'nan'; allowed: "),
    "top_p": ({"top_p": "1.5"}, "'top_p' is '1.5'; allowed: "),
    "top_k": ({"top_k": -1}, f"'top_k' is -1; allowed: a whole number from 0 to {VOCAB_SIZE}"),
    "seed": ({"seed": -1}, "'seed' is -1; allowed: "),
    "penalty": ({"repetition_penalty": "0"}, "'repetition_penalty' is '0'; allowed: "),
    "mode": ({"mode": "eager"}, "'mode' is 'eager'; allowed: 'free', 'sync'"),
    "length": ({"max_new_tokens": 0}, "'max_new_tokens' is 0; allowed: "),
    "beyond window": ({"max_new_tokens": CONTEXT_TOKENS}, f"'max_new_tokens' is {CONTEXT_TOKENS}; allowed: "),
    "prompt_len": ({"prompt_len": 100_000}, "'prompt_len' is 100000; allowed: "),
    "slo": ({"tpot_ms": "0"}, "'tpot_ms' is '0'; allowed: "),
    "eos": ({"eos_token_ids": str(VOCAB_SIZE)}, f"'eos_token_ids' is '{VOCAB_SIZE}'; allowed: "),
    "number as text": ({"seed": "many"}, "'seed' is 'many'; allowed: a whole number"),
}


@pytest.mark.parametrize(("changes", "message"), ENVELOPES.values(), ids=ENVELOPES)
def test_an_open_with_wrong_parameters_is_refused(
    stream: RawStream, changes: dict[str, Parameter | None], message: str
) -> None:
    parameters = {name: value for name, value in (OPEN | changes).items() if value is not None}
    stream.send(tokens_of(), **parameters)
    assert message in stream.error()


OPEN_TENSORS: dict[str, tuple[Callable[[], dict[str, Array]], str]] = {
    "wrong dtype": (lambda: tokens_of(np.array([1.0], np.float32)), "TOKENS"),
    "two dimensions": (lambda: tokens_of(np.ones((1, 3), np.int32)), "TOKENS"),
    "no tokens": (lambda: session_tensor(new_session_id()), "tensor 'TOKENS' is missing"),
    "no session": (lambda: {"TOKENS": ints(1, 2)}, "SESSION"),
    "unknown tensor": (lambda: tokens_of() | {"TOKEN": ints(1)}, "TOKEN"),
    "short capability": (lambda: session_tensor("abc") | {"TOKENS": ints(1)}, "32 lower-case hex digits"),
    "empty prompt": (lambda: tokens_of(np.empty(0, np.int32)), "tensor 'TOKENS' is empty"),
    "id too large": (lambda: tokens_of(ints(1, VOCAB_SIZE)), f"token id {VOCAB_SIZE} at 1; allowed: 0 to"),
    "negative id": (lambda: tokens_of(ints(-1)), "token id -1 at 0; allowed: 0 to"),
    "beyond the window": (
        lambda: tokens_of(np.ones(CONTEXT_TOKENS, np.int32)),
        f"the prompt has {CONTEXT_TOKENS} tokens; the context window holds {CONTEXT_TOKENS}",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("tensors", "message"), OPEN_TENSORS.values(), ids=OPEN_TENSORS)
def test_an_open_with_wrong_tensors_is_refused(
    stream: RawStream, tensors: Callable[[], dict[str, Array]], message: str
) -> None:
    stream.send(tensors(), **OPEN)
    assert message in stream.error()


def test_another_tokenizer_is_refused_with_both_fingerprints(stream: RawStream) -> None:
    stream.send(tokens_of(), **OPEN, vocab_hash="ab" * 32)
    message = stream.error()
    assert "ab" * 32 in message
    assert vocab_hash(default_target_dir()) in message


def test_the_same_tokenizer_is_accepted(stream: RawStream) -> None:
    stream.send(tokens_of(), **(OPEN | {"max_new_tokens": 1}), vocab_hash=vocab_hash(default_target_dir()))
    assert stream.commit().status is Status.LENGTH


DRAFTS: dict[str, tuple[Callable[[int], dict[str, Array]], str]] = {
    "wrong dtype": (lambda n: draft(n, n, np.array([1.0], np.float32)), "DRAFT"),
    "no draft": (lambda n: {"START": ints(n), "SEEN": ints(n)}, "tensor 'DRAFT' is missing"),
    "no start": (lambda n: {"SEEN": ints(n), "DRAFT": ints(1)}, "tensor 'START' is missing"),
    "two starts": (lambda n: draft(n, n, ints(1)) | {"START": ints(n, n)}, "START"),
    "id too large": (lambda n: draft(n, n, ints(VOCAB_SIZE)), f"token id {VOCAB_SIZE} at 0; allowed: 0 to"),
    "too long": (lambda n: draft(n, n, np.ones(65, np.int32)), "reaches 65 tokens beyond SEEN; allowed: 64"),
    "far ahead": (lambda n: draft(n + 64, n, ints(1)), "reaches 65 tokens beyond SEEN; allowed: 64"),
    "seen what is not": (lambda n: draft(n + 5_000, n + 5_000, ints(1)), "SEEN is {}; allowed for this session: "),
    "seen behind start": (lambda n: draft(n - 1, n, ints(1)), "allowed is 0 < SEEN <= START"),
    "seen in prompt": (lambda n: draft(n - 1, n - 1, ints(1)), "allowed for this session: "),
    "survival": (lambda n: draft(n, n, ints(1)) | {"SURVIVAL": np.ones(2, np.uint8)}, "'SURVIVAL' has 2 elements"),
}  # fmt: skip


def draft(start: int, seen: int, tokens: Array) -> dict[str, Array]:
    """The tensors of a draft besides SESSION."""
    return {"START": ints(start), "SEEN": ints(seen), "DRAFT": tokens}


@pytest.mark.parametrize(("tensors", "message"), DRAFTS.values(), ids=DRAFTS)
def test_a_wrong_draft_is_refused_and_its_session_goes_on(
    stream: RawStream, server: ServerProcess, tensors: Callable[[int], dict[str, Array]], message: str
) -> None:
    session, prompt_len = opened(stream)
    stream.commit()
    with raw_stream(server.grpc_url) as other:  # errors on a stream of their own, commits stay on the first
        other.send(session | tensors(prompt_len), op="draft")
        assert message.partition("{}")[0] in other.error()
    end = stream.commit().end
    while stream.commit().end <= end + 2:
        pass
    stream.send(session, op="close")


@pytest.mark.parametrize("op", ["draft", "close"])
def test_an_unknown_session_is_refused(stream: RawStream, op: str) -> None:
    stream.send(session_tensor(BEYOND) | (draft(1, 1, ints(1)) if op == "draft" else {}), op=op)
    assert f"session {BEYOND[:8]}... is not known here; open it first" in stream.error()


CHANGES = {"seed": {"seed": 1}, "length": {"max_new_tokens": 201}, "slo": {"ttft_ms": "1"}, "mode": {"mode": "sync"}}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_resumption_with_other_parameters_is_a_conflict_and_the_first_goes_on(
    stream: RawStream, server: ServerProcess, change: dict[str, Parameter]
) -> None:
    session, _ = opened(stream)
    end = stream.commit().end
    with raw_stream(server.grpc_url) as other:
        other.send(session | {"TOKENS": prompts()[0]}, **(OPEN | {"max_new_tokens": 200} | change))
        assert other.commit().status is Status.CONFLICT
    while (commit := stream.commit()).end <= end + 3:
        assert commit.status is Status.RUNNING
    stream.send(session, op="close")


def test_resumption_with_other_tokens_is_a_conflict(stream: RawStream, server: ServerProcess) -> None:
    session, prompt_len = opened(stream)
    stream.commit()
    changed = prompts()[0].copy()
    changed[0] += 1
    with raw_stream(server.grpc_url) as other:
        other.send(session | {"TOKENS": changed}, **(OPEN | {"max_new_tokens": 200, "prompt_len": prompt_len}))
        assert other.commit().status is Status.CONFLICT
    stream.send(session, op="close")


def test_a_second_open_supersedes_the_first(stream: RawStream, server: ServerProcess, judge: Judge) -> None:
    session, _ = opened(stream, 24)
    stream.commit()
    with raw_stream(server.grpc_url) as other:
        other.send(session | {"TOKENS": prompts()[0]}, **(OPEN | {"max_new_tokens": 24}))
        while (status := stream.commit().status) is Status.RUNNING:
            pass
        assert status is Status.SUPERSEDED
        parts = [other.commit()]
        while parts[-1].status is Status.RUNNING:
            parts.append(other.commit())
    assert parts[-1].status is Status.LENGTH
    tokens = np.concatenate([part.tokens for part in parts])
    assert len(tokens) == 24
    judge.check(prompts()[0], tokens, dataclasses.replace(SAMPLED, temperature=0.0))
