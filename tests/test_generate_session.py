"""Sessions of `wisp_generate` on a verifier that plays a script: text, stop strings, ends, failures, hang-ups."""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests import tiny_model
from tests.factories import make_commit
from triton_models.generate_request import GenerateRequest
from triton_models.generate_service import GenerateService
from triton_models.generate_session import Ending, Failure, GenerateSession
from triton_models.generate_settings import GenerateConfig
from triton_models.text_tokenizer import TextTokenizer
from wisp_plugin.errors import ModelError, RequestRefused, TransportError
from wisp_plugin.messages import Commit, Sampling, Status
from wisp_plugin.wire_values import named_slo

END = object()  # in a script: the stream ends
LIMIT_S = 5.0
EOS = 1


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_model.write_tokenizer(folder)
    return TextTokenizer(folder)


def make_request(text: str = "the", **values: Any) -> GenerateRequest:
    """A request for a stream."""
    request = GenerateRequest(
        text=text, stream=True, sampling=Sampling(seed=5), max_tokens=40, stop=(), ignore_eos=False,
        slo=named_slo(), full_text=False, chat=False, lookup="auto",
    )  # fmt: skip
    return dataclasses.replace(request, **values)


class FakeCalls:
    """A verifier that plays a script; `feed` goes on with it. A close ends the session as the engine does."""

    def __init__(self, *script: Any) -> None:
        self.script: queue.Queue[Any] = queue.Queue()
        self.opened: list[tuple[str, dict[str, Any], np.ndarray, str]] = []
        self.closed: list[str] = []
        self.feed(*script)

    def feed(self, *script: Any) -> None:
        for entry in script:
            self.script.put(entry)

    def open(self, session: str, parameters: Any, tokens: Any, lookup: str) -> Iterator[Commit]:
        self.opened.append((session, dict(parameters), tokens, lookup))
        return self._play()

    def close(self, session: str) -> None:
        self.closed.append(session)
        self.feed(make_commit(0, status=Status.CLOSED), END)

    def _play(self) -> Iterator[Commit]:
        while (entry := self.script.get(timeout=LIMIT_S)) is not END:
            if isinstance(entry, Exception):
                raise entry
            yield entry


class FakeReply:
    """Records an answer and holds its contract: pieces, then exactly one end."""

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.end: Ending | Failure | None = None
        self.cancelled = False

    def send(self, text: str) -> None:
        assert self.end is None, "a piece after the end"
        self.pieces.append(text)

    def finish(self, ending: Ending) -> None:
        assert self.end is None, "a second end"
        self.end = ending

    def fail(self, failure: Failure) -> None:
        assert self.end is None, "a second end"
        assert "\n" not in failure.message
        self.end = failure

    def is_cancelled(self) -> bool:
        return self.cancelled


def commits_of(tokenizer: TextTokenizer, text: str, status: Status = Status.LENGTH) -> list[Any]:
    """The text token by token, then the end."""
    tokens = tokenizer.encode(text).tolist()
    return [*[make_commit(9, t) for t in tokens[:-1]], make_commit(9, tokens[-1], status=status), END]


def run(tokenizer: TextTokenizer, request: GenerateRequest, *script: Any) -> tuple[FakeReply, FakeCalls]:
    """A session over a whole script."""
    reply, calls = FakeReply(), FakeCalls(make_commit(1), *script)
    GenerateSession(request, reply, calls, tokenizer, "abc").run()
    return reply, calls


def test_what_the_verifier_is_asked(tokenizer: TextTokenizer) -> None:
    sampling = Sampling(7, 0.8, 40, 0.95, 1.1)
    request = make_request("the fox", sampling=sampling, ignore_eos=True, lookup="off")
    _, calls = run(tokenizer, request, *commits_of(tokenizer, "x"))
    ((session, parameters, tokens, lookup),) = calls.opened
    assert parameters == {
        "op": "open", "protocol": 1, "seed": 7, "temperature": "0.8", "top_k": 40, "top_p": "0.95",
        "repetition_penalty": "1.1", "max_new_tokens": 40, "ignore_eos": True, "vocab_hash": "abc",
    }  # fmt: skip
    assert tokens.tolist() == tokenizer.encode("the fox").tolist()
    assert tokens.dtype == np.int32
    assert len(session) == 32
    assert lookup == "off"
    _, calls = run(tokenizer, make_request(max_tokens=None), *commits_of(tokenizer, "x"))
    assert "max_new_tokens" not in calls.opened[0][1]


def test_a_stream_brings_whole_characters(tokenizer: TextTokenizer) -> None:
    reply, calls = run(tokenizer, make_request("the fox"), *commits_of(tokenizer, "a🙂é!"))
    num_input, num_output = len(tokenizer.encode("the fox")), len(tokenizer.encode("a🙂é!"))
    assert num_output > 4
    assert reply.pieces == ["a", "🙂", "é"]
    assert reply.end == Ending("!", "length", num_input, num_output, 5)
    assert calls.closed == []


def test_without_a_stream_there_is_one_answer(tokenizer: TextTokenizer) -> None:
    script = commits_of(tokenizer, "a🙂é!")
    reply, _ = run(tokenizer, make_request(stream=False), *script)
    assert reply.pieces == []
    assert isinstance(reply.end, Ending)
    assert reply.end.text == "a🙂é!"
    reply, _ = run(tokenizer, make_request("the", stream=False, full_text=True), *script)
    assert isinstance(reply.end, Ending)
    assert reply.end.text == "thea🙂é!"


def test_an_eos_is_no_text(tokenizer: TextTokenizer) -> None:
    reply, _ = run(tokenizer, make_request(), make_commit(1, *tokenizer.encode("ab"), EOS, status=Status.EOS), END)
    assert reply.end == Ending("ab", "stop", 1, len(tokenizer.encode("ab")) + 1, 5)


def test_a_stop_string_ends_the_session(tokenizer: TextTokenizer) -> None:
    script = [make_commit(1, t) for t in tokenizer.encode("one##two")]
    reply, calls = run(tokenizer, make_request(stop=("##t",)), *script)
    assert "".join(reply.pieces) + reply.end.text == "one"  # type: ignore[union-attr]
    assert isinstance(reply.end, Ending)
    assert reply.end.reason == "stop"
    assert reply.end.num_output_tokens == len(tokenizer.encode("one##t"))
    assert calls.closed == [calls.opened[0][0]]


def test_what_may_be_a_stop_string_comes_with_the_end(tokenizer: TextTokenizer) -> None:
    reply, calls = run(tokenizer, make_request(stop=("##t",)), *commits_of(tokenizer, "one##"))
    assert reply.end == Ending("##", "length", 1, len(tokenizer.encode("one##")), 5)
    assert calls.closed == []


def test_a_chat_goes_through_the_template(tokenizer: TextTokenizer) -> None:
    _, calls = run(tokenizer, make_request("hi", chat=True), *commits_of(tokenizer, "x"))
    expected = tokenizer.encode("<s>[user]hi</s>[assistant]", add_special_tokens=False)
    assert calls.opened[0][2].tolist() == expected.tolist()
    assert expected[0] == 0


FAILURES: dict[str, tuple[Any, str, bool]] = {
    "refused": (RequestRefused("'top_k' is 5"), "'top_k' is 5", False),
    "not there": (TransportError("unavailable: x"), "unavailable: x", True),
    "silent": (TransportError("no commit for 60 s"), "unavailable: no commit for 60 s", True),
    "defect": (ZeroDivisionError("a\nb"), "unavailable: wisp_generate has failed: ZeroDivisionError: a b", True),
    "shutting down": (make_commit(1, status=Status.CLOSED), "the server is shutting down", True),
    "conflict": (make_commit(1, status=Status.CONFLICT), "ended the session: conflict", True),
    "no status": (END, "without a status", True),
    "overloaded": (
        dataclasses.replace(make_commit(1, status=Status.OVERLOADED), retry_after_ms=70), "try again in 70 ms", True,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("entry", "message", "is_ours"), FAILURES.values(), ids=FAILURES)
def test_failures_are_one_line(tokenizer: TextTokenizer, entry: Any, message: str, is_ours: bool) -> None:
    reply, _ = run(tokenizer, make_request(), make_commit(1, 50), entry, END)
    assert isinstance(reply.end, Failure)
    assert message in reply.end.message
    assert reply.end.is_ours is is_ours


def test_an_empty_prompt_is_refused(tokenizer: TextTokenizer) -> None:
    reply, calls = run(tokenizer, make_request(""))
    assert reply.end == Failure("tensor 'text_input' is empty; a prompt needs at least one token", False)
    assert calls.opened == []


def test_what_the_chat_template_refuses_is_the_fault_of_the_request(
    tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(text: str) -> Any:
        raise ModelError("the chat template refuses the messages")

    monkeypatch.setattr(tokenizer, "encode_chat", refuse)
    reply, calls = run(tokenizer, make_request("hi", chat=True))
    assert reply.end == Failure("the chat template refuses the messages", False)
    assert calls.opened == []


# -- in threads -------------------------------------------------------------------------------------------------


def wait_until(condition: Any) -> None:
    end_s = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end_s, "it does not come about"
        time.sleep(0.002)


def make_service(tokenizer: TextTokenizer, calls: FakeCalls, **config: Any) -> GenerateService:
    return GenerateService(GenerateConfig(**config), tokenizer, "", calls)


def test_a_client_that_hangs_up_frees_its_session(tokenizer: TextTokenizer) -> None:
    calls, reply = FakeCalls(make_commit(1), make_commit(1, 50)), FakeReply()
    service = make_service(tokenizer, calls)
    service.submit(make_request(), reply)
    wait_until(lambda: reply.pieces)
    service.look_after()
    assert calls.closed == []
    reply.cancelled = True
    service.look_after()
    service.look_after()
    wait_until(lambda: service.num_running == 0)
    assert len(calls.closed) == 1
    assert isinstance(reply.end, Failure)  # the request has to end, though nobody hears it


def test_a_client_that_hangs_up_before_its_session_is_open(tokenizer: TextTokenizer) -> None:
    entered, go_on = threading.Event(), threading.Event()

    class SlowCalls(FakeCalls):
        def open(self, *what: Any) -> Iterator[Commit]:
            entered.set()
            assert go_on.wait(LIMIT_S)
            return super().open(*what)

    calls, reply = SlowCalls(make_commit(1)), FakeReply()
    service = make_service(tokenizer, calls)
    service.submit(make_request(), reply)
    assert entered.wait(LIMIT_S)
    reply.cancelled = True
    service.look_after()
    assert calls.closed == []
    go_on.set()
    wait_until(lambda: service.num_running == 0)
    assert len(calls.closed) == 1


def test_one_request_too_many_is_refused_at_once(tokenizer: TextTokenizer) -> None:
    calls = FakeCalls(make_commit(1), make_commit(1))
    service = make_service(tokenizer, calls, max_sessions=2)
    replies = [FakeReply() for _ in range(3)]
    for reply in replies:
        service.submit(make_request(), reply)
    assert replies[2].end == Failure("unavailable: overloaded, 2 requests run already, try again in 1000 ms", True)
    wait_until(lambda: len(calls.opened) == 2)
    calls.feed(*commits_of(tokenizer, "x"), *commits_of(tokenizer, "x"))
    wait_until(lambda: service.num_running == 0)
    assert all(isinstance(reply.end, Ending) for reply in replies[:2])


def test_a_thread_that_cannot_start_takes_no_place(
    tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    service, reply = make_service(tokenizer, FakeCalls()), FakeReply()
    with monkeypatch.context() as context:
        context.setattr(threading.Thread, "start", cannot)
        service.submit(make_request(), reply)
    assert reply.end == Failure("unavailable: no thread can be started: can't start new thread", True)
    assert service.num_running == 0
    service.stop(LIMIT_S)


def test_a_service_that_stops_lets_sessions_end(tokenizer: TextTokenizer) -> None:
    calls, reply, late = FakeCalls(make_commit(1)), FakeReply(), FakeReply()
    service = make_service(tokenizer, calls)
    service.submit(make_request(), reply)
    service.drain()
    service.submit(make_request(), late)
    assert late.end == Failure("unavailable: the server is shutting down", True)
    calls.feed(*commits_of(tokenizer, "x"))
    service.stop(LIMIT_S)
    assert isinstance(reply.end, Ending)
    assert service.num_running == 0
