"""The wire of DESIGN.md section 6: names, dtypes, shapes and ranges. The only place where shapes are unwrapped.

A request or response is a mapping of tensor names to numpy arrays plus, for requests, a mapping of
parameter names to int, float, bool or str. Transports only move these two mappings. Numbers may come as
strings (JSON numbers lose digits on some paths; our own client sends floats as `repr`).

Everything that a client sends is checked here, once. `InvalidRequest` carries the one line it gets back.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from wisp_plugin import wire_values as values
from wisp_plugin.config import DEFAULT_SLO_CLASS
from wisp_plugin.errors import InvalidRequest
from wisp_plugin.messages import PROTOCOL_VERSION, Close, Commit, Draft, Open, Origin, Slo, Status, Timing, Tokens
from wisp_plugin.wire_values import Array, Parameter

Request = Open | Draft | Close

UNAVAILABLE = "unavailable: "  # begins errors that are about the server's state: opening again later may help

_SAMPLING_PARAMETERS = {"seed", "temperature", "top_k", "top_p", "repetition_penalty"}
_SESSION_PARAMETERS = {"prompt_len", "max_new_tokens", "eos_token_ids", "ignore_eos", "mode", "logprobs", "vocab_hash"}
SLO_PARAMETERS = {"slo", "ttft_ms", "tpot_ms"}
OPEN_PARAMETERS = frozenset({"op", "protocol"} | SLO_PARAMETERS | _SAMPLING_PARAMETERS | _SESSION_PARAMETERS)
_OTHER_PARAMETERS = frozenset({"op", "protocol"})
_COMMIT_STATUSES = frozenset(Status) - {Status.NEED_PREFIX}


@dataclass(frozen=True, slots=True)
class WireLimits:
    """What a server accepts: properties of its model and of its configuration."""

    vocab_size: int
    max_context_tokens: int
    max_draft_ahead: int
    vocab_hash: str = ""
    eos_token_ids: tuple[int, ...] = ()
    default_slo: Slo = field(default_factory=lambda: Slo(ttft_ms=2_000.0, tpot_ms=200.0, name=DEFAULT_SLO_CLASS))
    slo_classes: Mapping[str, Slo] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.default_slo.name == DEFAULT_SLO_CLASS, "the default SLO goes by its name"


def new_session_id() -> str:
    """A fresh session capability: 32 hex digits."""
    return secrets.token_hex(16)


# -- requests ---------------------------------------------------------------------------------------------------


def decode_request(parameters: Mapping[str, Parameter], tensors: Mapping[str, Array], limits: WireLimits) -> Request:
    """One request from outside as a message.

    Raises:
        InvalidRequest: anything about it that the protocol does not allow.
    """
    op = parameters.get("op")
    protocol = parameters.get("protocol", PROTOCOL_VERSION if op != "open" else None)
    if op not in ("open", "draft", "close"):
        raise InvalidRequest(f"parameter 'op' is {values.shown(op)}; allowed: 'open', 'draft', 'close'")
    check_protocol(protocol)
    allowed = OPEN_PARAMETERS if op == "open" else _OTHER_PARAMETERS
    unknown = sorted(name for name in parameters if name not in allowed and not name.startswith("triton_"))
    if unknown:
        name = values.shown(unknown[0])
        raise InvalidRequest(f"unknown parameter {name} for '{op}'; allowed: {', '.join(sorted(allowed))}")
    session = values.session(tensors, may_be_empty=op == "open")
    if op == "open":
        values.check_vocab_hash(parameters, limits.vocab_hash)
        tokens = values.token_ids(tensors, "TOKENS", limits.vocab_size)
        return decode_open(session or new_session_id(), parameters, tokens, limits)
    if op == "draft":
        return _decode_draft(session, tensors, limits)
    return Close(session)


def check_protocol(protocol: Parameter | None) -> None:
    """Refuse a client that speaks another protocol."""
    if str(protocol) != str(PROTOCOL_VERSION):
        raise InvalidRequest(
            f"parameter 'protocol' is {values.shown(protocol)}; this server speaks protocol {PROTOCOL_VERSION}"
        )


def decode_open(session: str, parameters: Mapping[str, Parameter], tokens: Tokens, limits: WireLimits) -> Open:
    """The open that `parameters` and `tokens` (inside the vocabulary) describe; unknown names were refused before.

    Raises:
        InvalidRequest: a value out of range, or values that contradict each other.
    """
    if len(tokens) == 0:
        raise InvalidRequest("tensor 'TOKENS' is empty; a session needs at least one prompt token")
    prompt_len = values.integer(parameters, "prompt_len", len(tokens), 1, len(tokens))
    window = limits.max_context_tokens
    if prompt_len >= window:
        raise InvalidRequest(f"the prompt has {prompt_len} tokens; the context window holds {window} with the output")
    max_new_tokens = values.integer(parameters, "max_new_tokens", min(256, window - prompt_len), 1, window - prompt_len)
    if len(tokens) > prompt_len + max_new_tokens:
        raise InvalidRequest(
            f"tensor 'TOKENS' has {len(tokens)} tokens; allowed: prompt_len + max_new_tokens = "
            f"{prompt_len + max_new_tokens}"
        )
    eos = limits.eos_token_ids
    if "eos_token_ids" in parameters:
        eos = values.id_list(parameters, "eos_token_ids", limits.vocab_size)
    return Open(
        session=session,
        tokens=tokens,
        prompt_len=prompt_len,
        max_new_tokens=max_new_tokens,
        sampling=values.sampling(parameters, limits.vocab_size),
        slo=values.slo(parameters, limits.default_slo, limits.slo_classes),
        mode=values.mode(parameters),
        eos_token_ids=() if values.boolean(parameters, "ignore_eos") else eos,
        logprobs=values.boolean(parameters, "logprobs"),
    )


def _decode_draft(session: str, tensors: Mapping[str, Array], limits: WireLimits) -> Draft:
    tokens = values.token_ids(tensors, "DRAFT", limits.vocab_size)
    start, seen = values.scalar(tensors, "START", np.int32), values.scalar(tensors, "SEEN", np.int32)
    if not 0 < seen <= start <= limits.max_context_tokens:
        raise InvalidRequest(f"START {start}, SEEN {seen}: allowed is 0 < SEEN <= START <= {limits.max_context_tokens}")
    if start + len(tokens) - seen > limits.max_draft_ahead:
        raise InvalidRequest(
            f"the draft reaches {start + len(tokens) - seen} tokens beyond SEEN; allowed: {limits.max_draft_ahead}"
        )
    survival = None
    if "SURVIVAL" in tensors:
        survival = values.vector(tensors, "SURVIVAL", np.uint8)
        if len(survival) != len(tokens):
            raise InvalidRequest(f"tensor 'SURVIVAL' has {len(survival)} elements; 'DRAFT' has {len(tokens)}")
    next_us = values.scalar(tensors, "NEXT_US", np.int32) if "NEXT_US" in tensors else -1
    if next_us < -1:
        raise InvalidRequest(f"NEXT_US is {next_us}; allowed: -1 (none before a commit) or more")
    return Draft(session, start, seen, tokens, survival, next_us)


def encode_request(request: Request, vocab_hash: str = "") -> tuple[dict[str, Parameter], dict[str, Array]]:
    """Parameters and tensors of a message: the client's side of `decode_request`."""
    session: dict[str, Array] = {"SESSION": np.array([request.session.encode()], dtype=np.object_)}
    if isinstance(request, Close):
        return {"op": "close"}, session
    if isinstance(request, Draft):
        tensors = session | {
            "START": np.array([request.start], np.int32),
            "SEEN": np.array([request.seen], np.int32),
            "DRAFT": np.asarray(request.tokens, np.int32),
            "NEXT_US": np.array([request.next_us], np.int32),
        }
        if request.survival is not None:
            tensors["SURVIVAL"] = np.asarray(request.survival, np.uint8)
        return {"op": "draft"}, tensors
    parameters: dict[str, Parameter] = {"op": "open", **open_parameters(request), "mode": request.mode.value}
    if vocab_hash:
        parameters["vocab_hash"] = vocab_hash
    return parameters, session | {"TOKENS": np.asarray(request.tokens, np.int32)}


def open_parameters(opened: Open) -> dict[str, Parameter]:
    """The request parameters that say what `opened` does, but for `op` and `mode`: the client's side of `decode_open`.

    Raises:
        InvalidRequest: banned tokens, for which the protocol has no parameter.
    """
    sampling = opened.sampling
    if sampling.banned_token_ids:
        raise InvalidRequest("banned tokens cannot be sent: the protocol has no parameter for them")
    parameters: dict[str, Parameter] = {
        "protocol": PROTOCOL_VERSION,
        "prompt_len": opened.prompt_len,
        "max_new_tokens": opened.max_new_tokens,
        "seed": sampling.seed,
        "temperature": repr(sampling.temperature),
        "top_k": sampling.top_k,
        "top_p": repr(sampling.top_p),
        "repetition_penalty": repr(sampling.repetition_penalty),
        "logprobs": opened.logprobs,
        **values.slo_parameters(opened.slo),
    }
    if opened.eos_token_ids:
        parameters["eos_token_ids"] = ",".join(str(i) for i in opened.eos_token_ids)
    else:
        parameters["ignore_eos"] = True
    return parameters


# -- commits ----------------------------------------------------------------------------------------------------


def encode_commit(commit: Commit, tell_session: bool = False) -> dict[str, Array]:
    """Tensors of a commit; `tell_session` for a client that left the choice of its capability to the server."""
    timing = commit.timing
    tensors: dict[str, Array] = {
        "START": np.array([commit.start], np.int32),
        "TOKENS": np.asarray(commit.tokens, np.int32),
        "ORIGIN": np.asarray(commit.origin, np.uint8),
        "TIMING_US": np.array(
            [timing.waited_us, timing.predicted_us, timing.measured_us, timing.num_sessions], np.int64
        ),
        "LOAD": np.array([commit.load_next_pass_s, commit.load_price], np.float32),
        "STATUS": np.array([commit.status], np.int32),
    }
    if tell_session:
        tensors["SESSION"] = np.array([commit.session.encode()], dtype=np.object_)
    if commit.logprobs is not None:
        tensors["LOGPROBS"] = np.asarray(commit.logprobs, np.float32)
    if commit.retry_after_ms is not None:
        tensors["RETRY_AFTER_MS"] = np.array([commit.retry_after_ms], np.int32)
    return tensors


def decode_commit(tensors: Mapping[str, Array], session: str = "") -> Commit:
    """A commit from a server for `session`, unless the server tells which.

    Raises:
        InvalidRequest: the response is not a commit of this protocol.
    """
    tokens, origin = values.vector(tensors, "TOKENS", np.int32), values.vector(tensors, "ORIGIN", np.uint8)
    timing, load = values.vector(tensors, "TIMING_US", np.int64), values.vector(tensors, "LOAD", np.float32)
    status = values.scalar(tensors, "STATUS", np.int32)
    if len(tokens) != len(origin) or len(timing) != 4 or len(load) != 2 or status not in _COMMIT_STATUSES:
        raise InvalidRequest("a commit of unexpected form; is the server of another protocol version?")
    if "LOGPROBS" in tensors and len(tensors["LOGPROBS"]) != len(tokens):
        raise InvalidRequest("a commit of unexpected form; is the server of another protocol version?")
    if len(origin) and int(origin.max()) > max(Origin):
        raise InvalidRequest(f"a commit with ORIGIN {int(origin.max())}; allowed: 0 to {int(max(Origin))}")
    return Commit(
        session=values.session(tensors, may_be_empty=False) if "SESSION" in tensors else session,
        start=values.scalar(tensors, "START", np.int32),
        tokens=tokens,
        origin=origin,
        status=Status(status),
        timing=Timing(*(int(x) for x in timing)),
        logprobs=values.vector(tensors, "LOGPROBS", np.float32) if "LOGPROBS" in tensors else None,
        load_next_pass_s=float(load[0]),
        load_price=float(load[1]),
        retry_after_ms=values.scalar(tensors, "RETRY_AFTER_MS", np.int32) if "RETRY_AFTER_MS" in tensors else None,
    )
