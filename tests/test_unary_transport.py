"""Unary requests as a transport: the client's loop over a fake tritonclient with the real engine behind it."""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton

from edge_runtime import unary_transport
from edge_runtime.client import EdgeClient, Patience
from edge_runtime.unary_transport import UnaryTransport, answer_limit_s
from tests.factories import SESSION, make_draft, make_estimator, make_open
from tests.fakes import VOCAB_SIZE, FakeVerifier, draft_token, target_alone
from wisp_plugin.config import EngineConfig
from wisp_plugin.controller import SpeculationController
from wisp_plugin.edge_session import EdgeSession
from wisp_plugin.errors import InvalidRequest, RequestRefused, TransportError
from wisp_plugin.messages import Close, Mode, Open, Sampling, Slo, Status, Tokens
from wisp_plugin.stop_rules import Fixed
from wisp_plugin.unary_engine import UnaryEngine
from wisp_plugin.unary_wire import VerifyAnswer, VerifyRequest, decode_verify, encode_answer
from wisp_plugin.wire import WireLimits
from wisp_plugin.wire_values import named_slo

OPENED = make_open(max_new_tokens=12, mode=Mode.SYNC)
LIMITS = WireLimits(VOCAB_SIZE, 64, max_draft_ahead=16)


class Failure(triton.InferenceServerException):
    """An error as a unary call brings it."""

    def __init__(self, message: str, status: str = "StatusCode.INTERNAL") -> None:
        super().__init__(message, status)


class FakeTriton:
    """A server and its tritonclient in one: answers at once, unless it is told otherwise."""

    def __init__(self) -> None:
        self.requests: list[VerifyRequest] = []
        self.limits_s: list[float] = []
        self.slos_ms: list[float | None] = []
        self.failures: dict[int, Exception | VerifyAnswer | None] = {}  # by number of the request; None: no answer
        self.is_ready = True
        self.num_closed = 0
        self.restart()

    def restart(self) -> None:
        """All sessions are gone."""
        verifier = FakeVerifier()
        self.engine = UnaryEngine(verifier, verifier.pool, LIMITS, EngineConfig(), make_estimator())

    def async_infer(
        self, model: str, inputs: list[Any], callback: Callable[..., None], *, parameters: Any, **options: Any
    ) -> None:
        assert model == unary_transport.UNARY_MODEL
        self.limits_s.append(options["client_timeout"])
        slo_ms = parameters.get("wisp_slo_ms")
        self.slos_ms.append(None if slo_ms is None else float(slo_ms))
        tensors = {name: array for name, array in inputs}
        number, request = len(self.requests), decode_verify(parameters, tensors, LIMITS)
        self.requests.append(request)
        answer = self.failures.get(number, request)
        if answer is None:
            return
        if isinstance(answer, VerifyRequest):
            (answer,) = self.engine.serve([request])  # type: ignore[assignment]
        if isinstance(answer, InvalidRequest):
            answer = Failure(str(answer), "StatusCode.INVALID_ARGUMENT")
        if isinstance(answer, Exception):
            callback(None, answer)
            return
        outputs = encode_answer(answer)
        callback(types.SimpleNamespace(as_numpy=outputs.get), None)

    def close(self) -> None:
        self.num_closed += 1


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeTriton:
    server = FakeTriton()

    def check_ready(client: Any, address: str, model: str) -> None:
        if not server.is_ready:
            raise TransportError("not ready")

    monkeypatch.setattr(unary_transport, "connect", lambda *options: server)
    monkeypatch.setattr(unary_transport, "check_ready", check_ready)
    monkeypatch.setattr(unary_transport, "as_input", lambda name, array: (name, array))
    return server


class Drafter:
    """The fake draft model."""

    def advance(self, tokens: Tokens) -> int:
        return 0

    def draft_token_with_stats(self, tokens: Tokens, sampling: Sampling) -> tuple[int, None]:
        return draft_token(tokens), None


def run(opened: Open = OPENED, num_drafts: int = 3) -> EdgeClient:
    """A whole session."""
    session = EdgeSession(opened, SpeculationController(Fixed(num_drafts)))
    client = EdgeClient(
        opened, session, UnaryTransport("host:1"), Drafter(), Patience(first_retry_s=0.001), threaded=False
    )
    list(client.run())
    client.close()
    return client


def generated(client: EdgeClient) -> list[int]:
    return client.session.committed.tolist()


EXPECTED = target_alone(OPENED.tokens, OPENED.end)


@pytest.mark.parametrize("num_drafts", [0, 1, 3, 8])
def test_a_session_from_open_to_its_end(fake: FakeTriton, num_drafts: int) -> None:
    client = run(num_drafts=num_drafts)
    assert generated(client) == EXPECTED
    assert client.session.status is Status.LENGTH
    first, *others = fake.requests
    assert (first.prefix_len, len(first.draft)) == (0, 0), "the first request commits the first token"
    assert all(request.prefix_len and not len(request.tokens) and not request.parameters for request in others)
    assert (client.session.stats.num_accepted > 0) == (num_drafts > 0)
    assert fake.num_closed == 1


def test_origins(fake: FakeTriton) -> None:
    transport = UnaryTransport("host:1")
    transport.open(OPENED)
    commits = [transport.receive(0.0)]
    for right in ([], EXPECTED[4:6], [(EXPECTED[7] + 1) % VOCAB_SIZE]):
        at = commits[-1].end  # type: ignore[union-attr]
        transport.send(make_draft(at, *right))
        commits.append(transport.receive(0.0))
    origins = [commit.origin.tolist() for commit in commits if commit is not None]
    assert origins[:2] == [[0], [0]]
    assert origins[3] in ([2], [1, 3])
    transport.close()


def test_what_the_server_has_forgotten_is_sent_again(fake: FakeTriton) -> None:
    transport = UnaryTransport("host:1")
    transport.open(OPENED)
    assert transport.receive(0.0) is not None
    fake.restart()
    transport.send(make_draft(4, *EXPECTED[4:6]))
    commit = transport.receive(0.0)
    assert commit is not None
    assert (commit.start, commit.tokens.tolist()) == (4, EXPECTED[4:7])
    asked, again = fake.requests[1:]
    assert (asked.prefix_len, again.prefix_len, again.tokens.tolist()) == (4, 0, EXPECTED[:4])
    assert again.draft.tolist() == asked.draft.tolist()
    assert again.parameters["prompt_len"] == 3
    assert fake.limits_s == pytest.approx([30.15, 30.0, 30.2]), "tokens that are sent take time to compute"
    transport.close()


@pytest.mark.parametrize(
    "failure",
    [
        Failure("failed to connect", "StatusCode.UNAVAILABLE"),
        Failure("Deadline Exceeded", "StatusCode.DEADLINE_EXCEEDED"),
        Failure("unavailable: the verifier has failed: RuntimeError: x", "StatusCode.UNAVAILABLE"),
        VerifyAnswer(Status.NEED_PREFIX),
    ],
)
@pytest.mark.parametrize("at", [0, 2])
def test_a_lost_answer_is_asked_for_again(fake: FakeTriton, failure: Any, at: int) -> None:
    fake.failures[at] = failure
    client = run()
    assert generated(client) == EXPECTED
    is_noticed = at == 0 or not isinstance(failure, VerifyAnswer)
    assert client.session.stats.num_reopened == int(is_noticed)


@pytest.mark.parametrize(("num_tokens", "limit_s"), [(1, 30.05), (5_500, 305.0), (11_400, 600.0), (100_000, 600.0)])
def test_a_long_prompt_gets_its_time_within_bounds(num_tokens: int, limit_s: float) -> None:
    tokens = np.zeros(num_tokens, np.int32)
    assert answer_limit_s(VerifyRequest(SESSION, 0, tokens)) == pytest.approx(limit_s)
    assert answer_limit_s(VerifyRequest(SESSION, 7, tokens)) == 30.0


@pytest.mark.parametrize(
    ("slo", "is_told_first", "is_told_later"),
    [(Slo(1e6, 1e5), True, True), (Slo(1e6, math.inf), True, False), (Slo(math.inf, 1e5), False, False),
     (named_slo(), False, False)],
)  # fmt: skip
def test_the_batching_strategy_is_told_what_the_client_knows(
    fake: FakeTriton, slo: Slo, is_told_first: bool, is_told_later: bool
) -> None:
    run(make_open(max_new_tokens=12, mode=Mode.SYNC, slo=slo))
    first, *later = fake.slos_ms
    assert [first is not None, *(told is not None for told in later)] == [is_told_first, *[is_told_later] * len(later)]
    assert all(0 < told < 1e6 + 12 * 1e5 for told in fake.slos_ms if told is not None)
    assert later


def test_what_is_refused_is_not_repeated(fake: FakeTriton) -> None:
    fake.failures[1] = Failure("parameter 'seed' is 3; allowed: 4", "StatusCode.INVALID_ARGUMENT")
    with pytest.raises(RequestRefused, match="'seed' is 3"):
        run()
    assert len(fake.requests) == 2


def test_free_mode_is_refused(fake: FakeTriton) -> None:
    with pytest.raises(RequestRefused, match="no mode 'free'; allowed: 'sync'"):
        UnaryTransport("host:1").open(make_open())


def test_no_answer_is_no_commit(fake: FakeTriton) -> None:
    fake.failures[0] = None
    transport = UnaryTransport("host:1")
    transport.open(OPENED)
    assert transport.receive(0.01) is None
    transport.wake()
    assert transport.receive(5.0) is None
    transport.close()


def test_leaving_needs_no_answer(fake: FakeTriton) -> None:
    transport = UnaryTransport("host:1")
    with pytest.raises(TransportError, match="not open"):
        transport.send(Close(SESSION))
    transport.open(OPENED)
    transport.receive(0.0)
    transport.send(Close(SESSION))
    commit = transport.receive(0.0)
    assert commit is not None
    assert commit.status is Status.CLOSED
    transport.close()
    transport.close()
    assert (fake.num_closed, len(fake.requests)) == (1, 1)


def test_an_answer_that_comes_after_the_end_of_its_connection_is_dropped(fake: FakeTriton) -> None:
    late: list[Callable[..., None]] = []
    infer = fake.async_infer

    def keep(model: str, inputs: list[Any], callback: Callable[..., None], **options: Any) -> None:
        late.append(callback)

    fake.async_infer = keep  # type: ignore[method-assign]
    transport = UnaryTransport("host:1")
    transport.open(OPENED)
    fake.async_infer = infer  # type: ignore[method-assign]
    transport.open(OPENED)
    outputs = encode_answer(VerifyAnswer(Status.RUNNING, 0, np.array([6], np.int32)))
    late[0](types.SimpleNamespace(as_numpy=outputs.get), None)
    commit = transport.receive(0.0)
    assert commit is not None
    assert commit.tokens.tolist() == EXPECTED[3:4]
    assert transport.receive(0.0) is None
