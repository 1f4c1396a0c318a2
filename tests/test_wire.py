"""The wire: what is encoded comes back, and whatever else arrives is refused in one line."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tests.factories import SESSION, ids, make_open, same
from wisp_plugin.controller import SpeculationController
from wisp_plugin.edge_session import EdgeSession
from wisp_plugin.errors import InvalidRequest
from wisp_plugin.messages import Close, Commit, Draft, Mode, Open, Origin, Sampling, Slo, Status, Timing
from wisp_plugin.stop_rules import Fixed
from wisp_plugin.wire import WireLimits, decode_commit, decode_request, encode_commit, encode_request
from wisp_plugin.wire_values import named_slo

VOCAB, WINDOW, HASH = 50, 64, "a" * 64
CLASSES = {"tight": Slo(500.0, 60.0, "tight"), "relaxed": Slo(3000.0, 250.0, "relaxed")}
LIMITS = WireLimits(VOCAB, WINDOW, max_draft_ahead=8, vocab_hash=HASH, eos_token_ids=(2,), slo_classes=CLASSES)
OPEN: dict[str, Any] = {"op": "open", "protocol": 1}
DRAFT: dict[str, Any] = {"op": "draft"}
MISSING = object()


def session_tensor(text: Any = SESSION) -> np.ndarray:
    return np.array([text], np.object_)


OPEN_TENSORS = {"SESSION": session_tensor(), "TOKENS": ids(1, 2, 3)}
DRAFT_TENSORS = {"SESSION": session_tensor(), "START": ids(4), "SEEN": ids(4), "DRAFT": ids(5, 6)}


def decode_open(limits: WireLimits = LIMITS, **parameters: Any) -> Open:
    message = decode_request(OPEN | parameters, OPEN_TENSORS, limits)
    assert isinstance(message, Open)
    return message


def refusal(parameters: dict[str, Any], tensors: dict[str, Any], limits: WireLimits = LIMITS) -> str:
    """The one line with which a request is refused."""
    with pytest.raises(InvalidRequest) as caught:
        decode_request(parameters, {k: v for k, v in tensors.items() if v is not MISSING}, limits)
    line = str(caught.value)
    assert line
    assert "\n" not in line
    return line


# -- there and back ---------------------------------------------------------------------------------------------

token = st.integers(0, VOCAB - 1)
tokens = st.lists(token, max_size=8).map(lambda values: ids(*values))
hex_id = st.text("0123456789abcdef", min_size=32, max_size=32)
int64 = st.integers(0, 2**62)
samplings = st.builds(
    Sampling,
    seed=st.integers(0, 2**63 - 1),
    temperature=st.just(0.0) | st.floats(1e-3, 100.0),
    top_k=st.integers(0, VOCAB),
    top_p=st.floats(1e-9, 1.0),
    repetition_penalty=st.floats(0.01, 100.0),
)
slos = st.builds(Slo, st.floats(0.001, 1e7), st.floats(0.001, 1e7)) | st.sampled_from(
    [LIMITS.default_slo, *CLASSES.values()]
)


@st.composite
def opens(draw: st.DrawFn) -> Open:
    prompt_len = draw(st.integers(1, WINDOW - 1))
    max_new_tokens = draw(st.integers(1, WINDOW - prompt_len))
    size = draw(st.integers(prompt_len, prompt_len + max_new_tokens))
    return Open(
        session=draw(hex_id),
        tokens=ids(*draw(st.lists(token, min_size=size, max_size=size))),
        prompt_len=prompt_len,
        max_new_tokens=max_new_tokens,
        sampling=draw(samplings),
        slo=draw(slos),
        mode=draw(st.sampled_from(Mode)),
        eos_token_ids=tuple(draw(st.lists(token, max_size=64))),
        logprobs=draw(st.booleans()),
    )


@st.composite
def drafts(draw: st.DrawFn) -> Draft:
    chain = draw(tokens)
    start = draw(st.integers(1, WINDOW))
    seen = draw(st.integers(max(1, start + len(chain) - LIMITS.max_draft_ahead), start))
    survival = draw(st.none() | arrays.arrays(np.uint8, len(chain)))
    return Draft(draw(hex_id), start, seen, chain, survival, draw(st.integers(-1, 2**31 - 1)))


@st.composite
def commits(draw: st.DrawFn) -> Commit:
    chosen = draw(tokens)
    return Commit(
        session=draw(hex_id),
        start=draw(st.integers(0, 2**31 - 1)),
        tokens=chosen,
        origin=draw(arrays.arrays(np.uint8, len(chosen), elements=st.integers(0, max(Origin)))),
        status=draw(st.sampled_from(sorted(set(Status) - {Status.NEED_PREFIX}))),
        timing=Timing(*draw(st.tuples(int64, int64, int64, int64))),
        logprobs=draw(st.none() | arrays.arrays(np.float32, len(chosen), elements=st.floats(-99, 0, width=32))),
        load_next_pass_s=draw(st.floats(0, 1e6, width=32)),
        load_price=draw(st.floats(0, 1e6, width=32)),
        retry_after_ms=draw(st.none() | st.integers(0, 2**31 - 1)),
    )


@given(opens() | drafts() | hex_id.map(Close))
def test_requests_come_back_as_they_were(message: Open | Draft | Close) -> None:
    assert same(decode_request(*encode_request(message, HASH), LIMITS), message)


@given(commits())
def test_commits_come_back_as_they_were(commit: Commit) -> None:
    assert same(decode_commit(encode_commit(commit), commit.session), commit)
    assert "SESSION" not in encode_commit(commit), "a client that drew its capability needs no reminder"
    assert same(decode_commit(encode_commit(commit, tell_session=True)), commit)


def test_defaults_of_open() -> None:
    opened = decode_open()
    assert same(
        opened, make_open(max_new_tokens=WINDOW - 3, eos_token_ids=(2,), slo=LIMITS.default_slo, sampling=Sampling())
    )
    assert decode_open(limits=dataclasses.replace(LIMITS, max_context_tokens=4096)).max_new_tokens == 256


def test_numbers_may_come_as_text() -> None:
    opened = decode_open(max_new_tokens="5", seed="9223372036854775807", temperature="0.5", logprobs="true", top_p=1)
    assert (opened.max_new_tokens, opened.logprobs) == (5, True)
    assert opened.sampling == Sampling(seed=2**63 - 1, temperature=0.5)


def over_the_wire(slo: Slo) -> Slo:
    """The SLO that a server reads from the open of a client with `slo`."""
    message = decode_request(*encode_request(make_open(slo=slo)), LIMITS)
    assert isinstance(message, Open)
    return message.slo


def test_a_client_names_a_class_and_the_server_knows_its_numbers() -> None:
    assert over_the_wire(named_slo("tight")) == Slo(500.0, 60.0, "tight")
    assert over_the_wire(named_slo("relaxed")) == Slo(3000.0, 250.0, "relaxed")


def test_a_client_that_asks_for_nothing_gets_the_servers_default() -> None:
    assert over_the_wire(named_slo()) == LIMITS.default_slo == Slo(2000.0, 200.0, "default")
    assert not {"slo", "ttft_ms", "tpot_ms"} & set(encode_request(make_open(slo=named_slo()))[0])


@pytest.mark.parametrize(
    ("sent", "read"),
    [
        (Slo(700.0, 70.0), Slo(700.0, 70.0)),
        (Slo(700.0, math.inf), Slo(700.0, 200.0)),
        (Slo(math.inf, 70.0), Slo(2000.0, 70.0)),
    ],
)
def test_of_numbers_that_a_client_leaves_out_the_servers_are_taken(sent: Slo, read: Slo) -> None:
    assert over_the_wire(sent) == read


@given(slos)
def test_a_session_is_resumed_under_the_slo_that_it_was_opened_with(slo: Slo) -> None:
    """What the server compares: the first open's SLO and that of the open that resumes."""
    session = EdgeSession(make_open(slo=slo), SpeculationController(Fixed(0)))
    first, again = (decode_request(*encode_request(session.reopen()), LIMITS) for _ in range(2))
    assert isinstance(first, Open)
    assert isinstance(again, Open)
    assert first.slo == again.slo == slo


@given(st.sampled_from([*CLASSES, "default", "custom", "missing"]))
def test_a_named_class_is_known_or_refused(name: str) -> None:
    message = encode_request(make_open(slo=named_slo(name)))
    if name in ("custom", "missing"):
        assert f"'slo' is '{name}'; allowed: tight, relaxed" in refusal(*message)
    else:
        assert decode_request(*message, LIMITS).slo.name == name  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("parameters", "eos"),
    [({}, (2,)), ({"eos_token_ids": "7, 8"}, (7, 8)), ({"eos_token_ids": 7}, (7,)), ({"ignore_eos": True}, ())],
)
def test_end_tokens(parameters: dict[str, Any], eos: tuple[int, ...]) -> None:
    assert decode_open(**parameters).eos_token_ids == eos


def test_the_server_draws_a_capability_for_an_open_without_one() -> None:
    drawn = {
        decode_request(OPEN, OPEN_TENSORS | {"SESSION": session_tensor(empty)}, LIMITS).session
        for empty in (b"", "", b"", "")
    }
    assert len(drawn) == 4
    assert all(len(bytes.fromhex(session)) == 16 for session in drawn)


def test_tritons_own_parameters_are_let_through() -> None:
    assert decode_request({"op": "close", "triton_final": True}, OPEN_TENSORS, LIMITS) == Close(SESSION)


def test_a_client_without_a_vocab_hash_is_trusted_and_a_server_without_one_checks_none() -> None:
    assert decode_open(vocab_hash="").prompt_len == 3
    assert decode_open(limits=dataclasses.replace(LIMITS, vocab_hash=""), vocab_hash="b").prompt_len == 3


# -- refused ----------------------------------------------------------------------------------------------------

BAD_OPENS: list[tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]] = [
    ({"op": "opne"}, {}, ("'op' is 'opne'", "'open', 'draft', 'close'")),
    ({"op": None}, {}, ("'op'", "'open', 'draft', 'close'")),
    ({"protocol": 2}, {}, ("'protocol' is 2", "protocol 1")),
    ({"protocol": None}, {}, ("'protocol' is None", "protocol 1")),
    ({"temprature": 1}, {}, ("unknown parameter 'temprature'", "temperature")),
    ({"evil\nname": 1}, {}, ("unknown parameter", "temperature")),
    ({"vocab_hash": "b" * 64}, {}, ("b" * 64, HASH)),
    ({"prompt_len": 4}, {}, ("'prompt_len' is 4", "1 to 3")),
    ({"prompt_len": 0}, {}, ("'prompt_len' is 0", "1 to 3")),
    ({"prompt_len": True}, {}, ("'prompt_len' is True", "whole number")),
    ({"prompt_len": 2.0}, {}, ("'prompt_len' is 2.0", "whole number")),
    ({"max_new_tokens": WINDOW - 2}, {}, ("'max_new_tokens' is 62", "1 to 61")),
    ({"max_new_tokens": "9" * 5000}, {}, ("'max_new_tokens'", "1 to 61")),
    ({"max_new_tokens": 1, "prompt_len": 1}, {}, ("'TOKENS' has 3 tokens", "max_new_tokens = 2")),
    ({"seed": 2**63}, {}, ("'seed'", "0 to 9223372036854775807")),
    ({"seed": -1}, {}, ("'seed' is -1", "from 0")),
    ({"temperature": -0.1}, {}, ("'temperature' is -0.1", "0 to 100")),
    ({"temperature": 1e-9}, {}, ("'temperature'", "0 (greedy)", "0.001 to 100")),
    ({"temperature": float("nan")}, {}, ("'temperature' is nan", "0 to 100")),
    ({"temperature": "hot\n"}, {}, ("'temperature' is 'hot\\n'", "0 to 100")),
    ({"temperature": True}, {}, ("'temperature' is True", "a number")),
    ({"top_k": VOCAB + 1}, {}, ("'top_k' is 51", "0 to 50")),
    ({"top_p": 0}, {}, ("'top_p' is 0", "to 1")),
    ({"top_p": 1.1}, {}, ("'top_p' is 1.1", "to 1")),
    ({"repetition_penalty": 0}, {}, ("'repetition_penalty' is 0", "0.01 to 100")),
    ({"ttft_ms": 0}, {}, ("'ttft_ms' is 0", "0.001 to 1e+07")),
    ({"tpot_ms": "inf"}, {}, ("'tpot_ms' is 'inf'", "0.001 to 1e+07")),
    ({"slo": "fast"}, {}, ("'slo' is 'fast'", "allowed: tight, relaxed")),
    ({"slo": "Tight"}, {}, ("'slo' is 'Tight'", "allowed: tight, relaxed")),
    ({"slo": "default"}, {}, ("'slo' is 'default'", "allowed: tight, relaxed")),
    ({"slo": ""}, {}, ("'slo' is ''", "allowed: tight, relaxed")),
    ({"slo": "tight", "ttft_ms": 500}, {}, ("'slo' and 'ttft_ms' exclude each other",)),
    ({"slo": "tight", "tpot_ms": 60}, {}, ("'slo' and 'tpot_ms' exclude each other",)),
    ({"slo": "tight", "tpot_ms": 60, "ttft_ms": 500}, {}, ("exclude each other",)),
    ({"mode": "fast"}, {}, ("'mode' is 'fast'", "'free', 'sync'")),
    ({"logprobs": 2}, {}, ("'logprobs' is 2", "true, false")),
    ({"ignore_eos": "maybe"}, {}, ("'ignore_eos' is 'maybe'", "true, false")),
    ({"eos_token_ids": "2,50"}, {}, ("'eos_token_ids' is '2,50'", "0 to 49")),
    ({"eos_token_ids": "two"}, {}, ("'eos_token_ids' is 'two'", "comma-separated")),
    ({"eos_token_ids": ",".join(["2"] * 65)}, {}, ("'eos_token_ids'", "up to 64")),
    ({}, {"SESSION": MISSING}, ("'SESSION'", "BYTES[1]")),
    ({}, {"SESSION": session_tensor(b"abc")}, ("'SESSION'", "32 lower-case hex digits")),
    ({}, {"SESSION": session_tensor(SESSION + "\n")}, ("'SESSION'", "32 lower-case hex digits")),
    ({}, {"SESSION": np.array([b"", b""], np.object_)}, ("'SESSION'", "BYTES[1]")),
    ({}, {"SESSION": ids(1)}, ("'SESSION'", "BYTES[1]")),
    ({}, {"TOKENS": MISSING}, ("'TOKENS' is missing",)),
    ({}, {"TOKENS": ids()}, ("'TOKENS' is empty", "at least one")),
    ({}, {"TOKENS": np.array([1, 2])}, ("'TOKENS' is int64[2]", "int32[n]")),
    ({}, {"TOKENS": ids(1, 2)[None]}, ("'TOKENS' is int32[1, 2]", "int32[n]")),
    ({}, {"TOKENS": ids(1, VOCAB)}, ("token id 50 at 1", "0 to 49")),
    ({}, {"TOKENS": ids(-1)}, ("token id -1 at 0", "0 to 49")),
    ({}, {"TOKENS": ids(*[1] * WINDOW)}, ("the prompt has 64 tokens", "window holds 64")),
]
BAD_DRAFTS: list[tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]] = [
    ({"seed": 1}, {}, ("unknown parameter 'seed' for 'draft'", "op, protocol")),
    ({"protocol": "2"}, {}, ("'protocol' is '2'", "protocol 1")),
    ({}, {"SESSION": session_tensor(b"")}, ("'SESSION'", "32 lower-case hex digits")),
    ({}, {"START": ids(4, 5)}, ("'START' has 2 elements", "must have 1")),
    ({}, {"SEEN": MISSING}, ("'SEEN' is missing",)),
    ({}, {"SEEN": ids(0)}, ("START 4, SEEN 0", "0 < SEEN <= START <= 64")),
    ({}, {"SEEN": ids(5)}, ("START 4, SEEN 5", "0 < SEEN <= START <= 64")),
    ({}, {"START": ids(65), "SEEN": ids(65)}, ("START 65, SEEN 65", "0 < SEEN <= START <= 64")),
    ({}, {"DRAFT": ids(*[5] * 9)}, ("9 tokens beyond SEEN", "allowed: 8")),
    ({}, {"START": ids(11)}, ("9 tokens beyond SEEN", "allowed: 8")),
    ({}, {"DRAFT": ids(5, VOCAB)}, ("'DRAFT' has token id 50 at 1", "0 to 49")),
    ({}, {"DRAFT": ids(5).astype(np.float32)}, ("'DRAFT' is float32[1]", "int32[n]")),
    ({}, {"SURVIVAL": np.zeros(3, np.uint8)}, ("'SURVIVAL' has 3 elements", "'DRAFT' has 2")),
    ({}, {"SURVIVAL": ids(1, 2)}, ("'SURVIVAL' is int32[2]", "uint8[n]")),
    ({}, {"NEXT_US": ids()}, ("'NEXT_US' has 0 elements", "must have 1")),
]


@pytest.mark.parametrize(("parameters", "tensors", "says"), BAD_OPENS)
def test_bad_opens(parameters: dict[str, Any], tensors: dict[str, Any], says: tuple[str, ...]) -> None:
    line = refusal(OPEN | parameters, OPEN_TENSORS | tensors)
    assert [text for text in says if text not in line] == []


@pytest.mark.parametrize(("parameters", "tensors", "says"), BAD_DRAFTS)
def test_bad_drafts(parameters: dict[str, Any], tensors: dict[str, Any], says: tuple[str, ...]) -> None:
    line = refusal(DRAFT | parameters, DRAFT_TENSORS | tensors)
    assert [text for text in says if text not in line] == []


def test_a_server_without_slo_classes_says_so() -> None:
    line = refusal(OPEN | {"slo": "tight"}, OPEN_TENSORS, dataclasses.replace(LIMITS, slo_classes={}))
    assert "'slo' is 'tight'; this server has no SLO classes" in line


def test_the_default_slo_of_a_server_goes_by_its_name() -> None:
    with pytest.raises(AssertionError):
        dataclasses.replace(LIMITS, default_slo=Slo(1.0, 1.0))
