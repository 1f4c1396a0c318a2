"""`VerifyTransport` over unary requests to `wisp_verifier_batched`: one infer per round, for sessions in mode `sync`.

The answers become the commits that a stream would have brought, so the session on the device is the same. What the
server has forgotten (it restarted, or had to make room) is sent again from here: the session does not notice.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tritonclient.grpc as triton

from edge_runtime.commit_inbox import CommitInbox
from edge_runtime.transport import PASSING, TlsFiles, as_input, check_ready, connect, one_line
from wisp_plugin.errors import RequestRefused, TransportError, WispError
from wisp_plugin.messages import Close, Commit, Draft, Mode, Open, Origin, Origins, Status, Tokens
from wisp_plugin.unary_wire import VerifyAnswer, VerifyRequest, decode_answer, encode_verify, first_parameters
from wisp_plugin.wire_values import Parameter

UNARY_MODEL = "wisp_verifier_batched"
LEAST_SLO_MS = 1.0  # asked for by a session that is late already
ANSWER_S = 30.0  # limit of waiting for one answer; then the connection counts as lost
ANSWER_PER_TOKEN_S = 0.05  # beyond that, for each token of a prompt that is sent: a slow server computes it as fast
MAX_ANSWER_S = 600.0
_NO_DRAFT = np.empty(0, np.int32)
_OUTPUTS = ("NUM_ACCEPTED", "NEXT_TOKENS", "STATUS", "LOGPROBS")
_REFUSED = "StatusCode.INVALID_ARGUMENT"  # how gRPC tells that a request itself is wrong


@dataclass(slots=True)
class _Connection:
    """What belongs to one opening. One request at a time is on its way, so its fields have one writer at a time."""

    opened: Open
    client: triton.InferenceServerClient
    parameters: dict[str, Parameter]
    tokens: Tokens  # committed, as far as this side knows
    num_known: int = 0  # of them, those that the server is taken to hold
    inbox: CommitInbox = field(default_factory=CommitInbox)
    is_closed: bool = False


class UnaryTransport:
    """A session's requests to `wisp_verifier_batched` on a Triton server, one after the other."""

    def __init__(
        self, server: str, tls: TlsFiles | None = None, vocab_hash: str = "", keepalive_s: float = 20.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        """`server` is HOST:PORT of Triton's gRPC endpoint."""
        self._server = server
        self._clock = clock
        self._started: tuple[str, float] | None = None  # session, and when it was first opened
        self._tls = tls
        self._vocab_hash = vocab_hash
        self._keepalive_s = keepalive_s
        self._connection: _Connection | None = None

    def open(self, message: Open) -> None:
        """See `VerifyTransport.open`. Without generated tokens it asks for the first one; else the next draft will.

        Raises:
            RequestRefused: the session is not in mode `sync`.
        """
        self.close()
        if message.mode is not Mode.SYNC:
            raise RequestRefused(f"unary verification has no mode {message.mode.value!r}; allowed: 'sync'")
        client = connect(self._server, self._tls, self._keepalive_s)
        check_ready(client, self._server, UNARY_MODEL)
        parameters = first_parameters(message, self._vocab_hash)
        if self._started is None or self._started[0] != message.session:
            self._started = message.session, self._clock()
        here = self._connection = _Connection(message, client, parameters, message.tokens.copy())
        if len(message.tokens) == message.prompt_len:
            self._ask(here, _NO_DRAFT)

    def send(self, message: Draft | Close) -> None:
        """See `VerifyTransport.send`. A close is no request: the server forgets a session by itself."""
        here = self._connection
        if here is None:
            raise TransportError("the session is not open")
        if isinstance(message, Close):
            nothing = np.empty(0, np.uint8)
            here.inbox.put(Commit(message.session, len(here.tokens), _NO_DRAFT, nothing, Status.CLOSED))
            return
        if not message.start == message.seen == len(here.tokens):
            raise TransportError(f"a draft for position {message.start}; in sync mode {len(here.tokens)} is due")
        self._ask(here, message.tokens)

    def _ask(self, here: _Connection, draft: Tokens) -> None:
        """Send one request; its answer goes into the inbox of the connection."""
        prefix_len = here.num_known
        request = VerifyRequest(
            here.opened.session,
            prefix_len,
            here.tokens[prefix_len:],
            draft,
            {} if prefix_len else here.parameters,
        )
        parameters, tensors = encode_verify(request, self._slo_ms(here))
        try:
            here.client.async_infer(
                UNARY_MODEL,
                [as_input(name, array) for name, array in tensors.items()],
                lambda result, error: self._on_answer(here, request, result, error),
                request_id=here.opened.session[:8],
                client_timeout=answer_limit_s(request),
                parameters=parameters,
            )
        except (triton.InferenceServerException, ValueError) as error:  # ValueError: the channel is closed
            raise TransportError(f"the connection to {self._server} is lost: {one_line(error)}") from None

    def _slo_ms(self, here: _Connection) -> float | None:
        """Time until the session's next token is due (DESIGN.md section 2); the way to the server is not in it. None if
        only the server knows (`named_slo`)."""
        slo, num_generated = here.opened.slo, len(here.tokens) - here.opened.prompt_len
        assert self._started is not None, "an open comes first"
        late_ms = 1e3 * (self._clock() - self._started[1])
        due_ms = slo.ttft_ms + (num_generated * slo.tpot_ms if num_generated else 0.0)
        return max(due_ms - late_ms, LEAST_SLO_MS) if math.isfinite(due_ms) else None

    def _on_answer(
        self, here: _Connection, request: VerifyRequest, result: triton.InferResult | None, error: Exception | None
    ) -> None:
        """In a thread of gRPC: one answer, or why there is none."""
        if here.is_closed:
            return
        try:
            answer = _decode(result, error)
            if answer.status is Status.NEED_PREFIX and request.prefix_len:
                here.num_known = 0
                self._ask(here, request.draft)
                return
            here.inbox.put(_take(here, request, answer))
        except WispError as failure:
            here.inbox.put(failure)

    def receive(self, timeout_s: float) -> Commit | None:
        """See `VerifyTransport.receive`."""
        here = self._connection
        if here is None:
            raise TransportError("the session is not open")
        return here.inbox.take(timeout_s)

    def wake(self) -> None:
        """See `VerifyTransport.wake`."""
        here = self._connection
        if here is not None:
            here.inbox.wake()

    def close(self) -> None:
        """See `VerifyTransport.close`. An answer that is still on its way comes to nothing."""
        here, self._connection = self._connection, None
        if here is None:
            return
        here.is_closed = True
        here.client.close()


def answer_limit_s(request: VerifyRequest) -> float:
    """Seconds to wait for an answer: more for a request with all tokens, which the server may have to compute."""
    num_tokens = 0 if request.prefix_len else len(request.tokens)
    return min(ANSWER_S + ANSWER_PER_TOKEN_S * num_tokens, MAX_ANSWER_S)


def _decode(result: triton.InferResult | None, error: Exception | None) -> VerifyAnswer:
    """The answer; raises the error that `receive` is to raise."""
    if error is not None:
        text = one_line(error)
        status = str(getattr(error, "status", lambda: None)())
        refused = status == _REFUSED and not any(phrase in text for phrase in PASSING)
        raise RequestRefused(text) if refused else TransportError(text)
    assert result is not None
    try:
        arrays: dict[str, Any] = {name: result.as_numpy(name) for name in _OUTPUTS}
        return decode_answer({name: array for name, array in arrays.items() if array is not None})
    except (WispError, ValueError) as failure:
        raise TransportError(f"the server sent something that is no answer: {failure}") from None


def _take(here: _Connection, request: VerifyRequest, answer: VerifyAnswer) -> Commit:
    """Apply an answer: its tokens are committed, here as on the server."""
    if answer.status is Status.NEED_PREFIX:
        raise TransportError("the server asks for a prefix that it was sent")
    start = len(here.tokens)
    here.tokens = np.concatenate([here.tokens, answer.tokens])
    here.num_known = len(here.tokens)
    origin = _origins(answer, len(request.draft))
    return Commit(here.opened.session, start, answer.tokens, origin, answer.status, logprobs=answer.logprobs)


def _origins(answer: VerifyAnswer, num_drafts: int) -> Origins:
    """Where the tokens of an answer to a draft of `num_drafts` came from."""
    own = Origin.DECODED if not num_drafts else Origin.BONUS if answer.num_accepted == num_drafts else Origin.CORRECTION
    origin = np.full(len(answer.tokens), Origin.ACCEPTED, np.uint8)
    origin[answer.num_accepted :] = own
    return origin
