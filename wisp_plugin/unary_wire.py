"""The wire of `wisp_verifier_batched` (DESIGN.md section 9): one verification per infer request, over gRPC or HTTP.

    SESSION     BYTES[1]   capability, 32 hex digits drawn by the client; absent or empty: the request stands alone
    PREFIX_LEN  INT32[1]   committed tokens that the server is taken to hold, prompt included; absent: 0
    TOKENS      INT32[-1]  committed tokens behind them; empty only behind a prefix
    DRAFT       INT32[-1]  draft tokens behind those; may be empty or absent

    NUM_ACCEPTED  INT32[1]   draft tokens that are the target's own
    NEXT_TOKENS   INT32[-1]  committed behind TOKENS: the accepted draft tokens, then one of the target's own (none
                             behind an accepted end-of-text token or at the length limit)
    STATUS        INT32[1]   0 running, 1 eos, 2 length, 7 need_prefix (send all tokens again with PREFIX_LEN 0)
    LOGPROBS      FP32[-1]   of NEXT_TOKENS, when asked for

Every tensor has Triton's batch dimension in front, `[1, n]`: it is put on and taken off here and nowhere else. Request
parameters are those of `open` but for `op` and `mode`. They come with every request that has PREFIX_LEN 0: what it
does not give has its default (`prompt_len`: all of TOKENS), whatever the server holds, and the session goes on with
them. Behind a prefix they are the session's; repeated there they must be the same. `wisp_slo_ms` and `wisp_deadline_us`
may come with every request: they are for the batching strategy (`batch_strategy`) and mean nothing to the model. What a
request is answered follows from tokens, parameters and seed alone, so it may be repeated; what the server still holds
only decides how long that takes, and whether a prefix has to be sent again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from wisp_plugin import wire_values as values
from wisp_plugin.errors import InvalidRequest
from wisp_plugin.messages import PROTOCOL_VERSION, Open, Status, Tokens
from wisp_plugin.wire import (
    OPEN_PARAMETERS,
    SLO_PARAMETERS,
    WireLimits,
    check_protocol,
    decode_open,
    open_parameters,
)
from wisp_plugin.wire_values import Array, Parameter

PARAMETERS = OPEN_PARAMETERS - {"op", "mode"}
DEADLINE_PARAMETERS = ("wisp_slo_ms", "wisp_deadline_us")  # of the batching strategy, which reads them before us
_STATUSES = frozenset({Status.RUNNING, Status.EOS, Status.LENGTH, Status.NEED_PREFIX})
_NOTHING = np.empty(0, np.int32)


@dataclass(frozen=True, slots=True)
class VerifyRequest:
    """One request: `draft` is to be verified behind `num_committed` committed tokens, the last of which are `tokens`.

    An empty `session` stands alone. `parameters` are as the client gave them; see `decode_first` and `check_repeated`.
    """

    session: str
    prefix_len: int
    tokens: Tokens
    draft: Tokens = field(default_factory=lambda: _NOTHING)
    parameters: Mapping[str, Parameter] = field(default_factory=dict)

    @property
    def num_committed(self) -> int:
        """Committed tokens in front of the draft."""
        return self.prefix_len + len(self.tokens)


@dataclass(frozen=True, slots=True)
class VerifyAnswer:
    """What one verification commits behind the tokens of its request."""

    status: Status
    num_accepted: int = 0
    tokens: Tokens = field(default_factory=lambda: _NOTHING)
    logprobs: npt.NDArray[np.float32] | None = None


NEED_PREFIX = VerifyAnswer(Status.NEED_PREFIX)


# -- requests ---------------------------------------------------------------------------------------------------


def decode_verify(
    parameters: Mapping[str, Parameter], tensors: Mapping[str, Array], limits: WireLimits
) -> VerifyRequest:
    """One request from outside; values of parameters are looked at by `decode_first` or `check_repeated`.

    Raises:
        InvalidRequest: anything about it that the protocol does not allow.
    """
    given = {
        name: value
        for name, value in parameters.items()
        if not name.startswith("triton_") and name not in DEADLINE_PARAMETERS
    }
    unknown = sorted(given.keys() - PARAMETERS)
    if unknown:
        raise InvalidRequest(f"unknown parameter {values.shown(unknown[0])}; allowed: {', '.join(sorted(PARAMETERS))}")
    check_protocol(given.pop("protocol", PROTOCOL_VERSION))
    values.check_vocab_hash(given, limits.vocab_hash)
    given.pop("vocab_hash", None)
    rows = {name: _row(name, array) for name, array in tensors.items()}
    anonymous = "SESSION" not in rows or values.is_anonymous(rows)
    session = "" if anonymous else values.session(rows, may_be_empty=False)
    prefix_len = values.scalar(rows, "PREFIX_LEN", np.int32) if "PREFIX_LEN" in rows else 0
    tokens = values.token_ids(rows, "TOKENS", limits.vocab_size)
    draft = values.token_ids(rows, "DRAFT", limits.vocab_size) if "DRAFT" in rows else _NOTHING
    request = VerifyRequest(session, prefix_len, tokens, draft, given)
    _check_lengths(request, limits)
    return request


def _row(name: str, array: Array) -> Array:
    """A tensor without its batch dimension."""
    if array.ndim != 2 or len(array) != 1:
        raise InvalidRequest(f"tensor {name!r} has shape {list(array.shape)}; allowed: [1, n], one session per request")
    row: Array = array[0]
    return row


def _check_lengths(request: VerifyRequest, limits: WireLimits) -> None:
    longest = limits.max_context_tokens
    if not 0 <= request.prefix_len <= longest:
        raise InvalidRequest(f"PREFIX_LEN is {request.prefix_len}; allowed: 0 to {longest}")
    if request.prefix_len and not request.session:
        raise InvalidRequest(f"PREFIX_LEN is {request.prefix_len} without SESSION; allowed: 0 and all tokens in TOKENS")
    if not request.num_committed:
        raise InvalidRequest("tensor 'TOKENS' is empty; with PREFIX_LEN 0 it needs at least one prompt token")
    if request.num_committed > longest:
        raise InvalidRequest(f"PREFIX_LEN and TOKENS make {request.num_committed} tokens; allowed: {longest}")
    if len(request.draft) > limits.max_draft_ahead:
        raise InvalidRequest(f"tensor 'DRAFT' has {len(request.draft)} tokens; allowed: {limits.max_draft_ahead}")


def decode_first(request: VerifyRequest, session: str, limits: WireLimits) -> Open:
    """The session that a request with all its tokens starts, under the name `session`.

    Raises:
        InvalidRequest: a parameter's value is not allowed.
    """
    return decode_open(session, {**request.parameters, "mode": "sync"}, request.tokens, limits)


def check_repeated(request: VerifyRequest, opened: Open, limits: WireLimits) -> None:
    """Refuse a request whose parameters contradict those that its session has.

    Raises:
        InvalidRequest: the name of the first one that differs, and both values.
    """
    given = request.parameters
    if not given:
        return
    ours = open_parameters(opened)
    replaced = SLO_PARAMETERS if SLO_PARAMETERS & given.keys() else frozenset[str]()
    if "eos_token_ids" in given:
        replaced |= {"ignore_eos"}
    merged = {name: value for name, value in ours.items() if name not in replaced} | dict(given) | {"mode": "sync"}
    theirs = open_parameters(decode_open(opened.session, merged, opened.tokens[: opened.prompt_len], limits))
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            told = [str(side.get(name, "the default"))[:80] for side in (theirs, ours)]
            raise InvalidRequest(f"parameter {name!r} is {told[0]}; allowed: {told[1]}, as in the first request")


def first_parameters(opened: Open, vocab_hash: str = "") -> dict[str, Parameter]:
    """Parameters for the first request of `opened`, and for every one that sends all tokens: the client's side."""
    return open_parameters(opened) | ({"vocab_hash": vocab_hash} if vocab_hash else {})


def encode_verify(request: VerifyRequest, slo_ms: float | None = None) -> tuple[dict[str, Parameter], dict[str, Array]]:
    """Parameters and tensors of a request: the client's side of `decode_verify`.

    `slo_ms`: time that the answer may take, for the batching strategy. All four tensors are there: Triton only puts
    requests with the same inputs into one batch.
    """
    deadline = {} if slo_ms is None else {"wisp_slo_ms": str(round(slo_ms, 3))}
    return dict(request.parameters) | deadline, {
        "SESSION": np.array([[request.session.encode()]], dtype=np.object_),
        "PREFIX_LEN": np.array([[request.prefix_len]], np.int32),
        "TOKENS": np.asarray(request.tokens, np.int32)[None],
        "DRAFT": np.asarray(request.draft, np.int32)[None],
    }


# -- answers ----------------------------------------------------------------------------------------------------


def encode_answer(answer: VerifyAnswer) -> dict[str, Array]:
    """Tensors of an answer."""
    tensors: dict[str, Array] = {
        "NUM_ACCEPTED": np.array([[answer.num_accepted]], np.int32),
        "NEXT_TOKENS": np.asarray(answer.tokens, np.int32)[None],
        "STATUS": np.array([[answer.status]], np.int32),
    }
    if answer.logprobs is not None:
        tensors["LOGPROBS"] = np.asarray(answer.logprobs, np.float32)[None]
    return tensors


def decode_answer(tensors: Mapping[str, Array]) -> VerifyAnswer:
    """An answer from a server.

    Raises:
        InvalidRequest: the response is not an answer of this protocol.
    """
    rows = {name: _row(name, array) for name, array in tensors.items()}
    tokens = values.vector(rows, "NEXT_TOKENS", np.int32)
    num_accepted, status = (values.scalar(rows, name, np.int32) for name in ("NUM_ACCEPTED", "STATUS"))
    logprobs = values.vector(rows, "LOGPROBS", np.float32) if "LOGPROBS" in rows else None
    fits = logprobs is None or len(logprobs) == len(tokens)
    if status not in _STATUSES or not fits or not 0 <= len(tokens) - num_accepted <= 1 or num_accepted < 0:
        raise InvalidRequest("an answer of unexpected form; is the server of another protocol version?")
    return VerifyAnswer(Status(status), num_accepted, tokens, logprobs)
