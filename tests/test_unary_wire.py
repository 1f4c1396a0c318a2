"""The unary wire: what goes in comes out; what is malformed is one line: what was wrong and what is allowed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tests.factories import SESSION, ids, make_open, same
from tests.test_wire import LIMITS, VOCAB, WINDOW
from tests.test_wire_fuzz import FUZZ_LIMITS, PARAMETERS, tensors, values
from wisp_plugin.errors import InvalidRequest
from wisp_plugin.messages import Mode, Sampling, Slo, Status
from wisp_plugin.unary_wire import (
    NEED_PREFIX,
    VerifyAnswer,
    VerifyRequest,
    check_repeated,
    decode_answer,
    decode_first,
    decode_verify,
    encode_answer,
    encode_verify,
    first_parameters,
)

token_lists = st.lists(st.integers(0, VOCAB - 1), max_size=8).map(lambda tokens: ids(*tokens))


def tensor(*numbers: int, dtype: Any = np.int32) -> np.ndarray:
    return np.array([numbers], dtype)


@given(
    st.builds(
        VerifyRequest,
        session=st.sampled_from([SESSION]),
        prefix_len=st.integers(1, WINDOW - 8),
        tokens=token_lists,
        draft=token_lists,
        parameters=st.sampled_from([{}, {"seed": 3}]),
    )
)
def test_requests_come_back_as_they_were(request: VerifyRequest) -> None:
    assert same(decode_verify(*encode_verify(request), LIMITS), request)


@given(st.sampled_from([Status.RUNNING, Status.EOS, Status.LENGTH]), token_lists, st.booleans(), st.booleans())
def test_answers_come_back_as_they_were(status: Status, tokens: np.ndarray, bonus: bool, logprobs: bool) -> None:
    num_accepted = max(0, len(tokens) - bonus)
    answer = VerifyAnswer(status, num_accepted, tokens, -tokens.astype(np.float32) if logprobs else None)
    assert same(decode_answer(encode_answer(answer)), answer)
    assert same(decode_answer(encode_answer(NEED_PREFIX)), NEED_PREFIX)


def test_the_least_request() -> None:
    request = decode_verify({}, {"TOKENS": tensor(1, 2)}, LIMITS)
    assert (request.session, request.prefix_len, request.tokens.tolist(), len(request.draft)) == ("", 0, [1, 2], 0)
    empty = {"TOKENS": tensor(1), "SESSION": np.array([[b""]], np.object_)}
    assert decode_verify({"protocol": "1", "triton_x": 1}, empty, LIMITS).session == ""


TWO_ROWS = np.ones((2, 3), np.int32)
NAMED = {"SESSION": np.array([[SESSION.encode()]], np.object_), "TOKENS": tensor(1)}


@pytest.mark.parametrize(
    ("parameters", "tensors", "line"),
    [
        ({}, {}, "tensor 'TOKENS' is missing"),
        ({}, {"TOKENS": tensor()}, "'TOKENS' is empty; with PREFIX_LEN 0 it needs at least one prompt token"),
        ({}, {"TOKENS": TWO_ROWS}, "'TOKENS' has shape [2, 3]; allowed: [1, n], one session per request"),
        ({}, {"TOKENS": ids(1)}, "'TOKENS' has shape [1]; allowed: [1, n]"),
        ({}, {"TOKENS": tensor(1, dtype=np.int64)}, "'TOKENS' is int64[1]; must be int32[n]"),
        ({}, {"TOKENS": tensor(-1)}, "'TOKENS' has token id -1 at 0; allowed: 0 to"),
        ({}, {"TOKENS": tensor(1), "DRAFT": tensor(VOCAB)}, f"'DRAFT' has token id {VOCAB} at 0; allowed: 0 to"),
        ({}, {"TOKENS": tensor(1), "DRAFT": tensor(*[1] * 999)}, "'DRAFT' has 999 tokens; allowed: "),
        ({}, {"TOKENS": tensor(*[1] * (WINDOW + 1))}, f"PREFIX_LEN and TOKENS make {WINDOW + 1} tokens; allowed: "),
        ({}, NAMED | {"PREFIX_LEN": tensor(-1)}, "PREFIX_LEN is -1; allowed: 0 to"),
        ({}, NAMED | {"PREFIX_LEN": tensor(1, 2)}, "'PREFIX_LEN' has 2 elements; must have 1"),
        ({}, {"TOKENS": tensor(1), "PREFIX_LEN": tensor(4)}, "PREFIX_LEN is 4 without SESSION; allowed: 0"),
        ({}, NAMED | {"SESSION": np.array([[b"me"]], np.object_)}, "'SESSION' must hold 32 lower-case hex digits"),
        ({"seeds": 1}, NAMED, "unknown parameter 'seeds'; allowed: eos_token_ids, ignore_eos"),
        ({"mode": "sync"}, NAMED, "unknown parameter 'mode'"),
        ({"op": "open"}, NAMED, "unknown parameter 'op'"),
        ({"protocol": 2}, NAMED, "parameter 'protocol' is 2; this server speaks protocol 1"),
    ],
)
def test_what_is_refused(parameters: dict[str, Any], tensors: dict[str, Any], line: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        decode_verify(parameters, tensors, LIMITS)
    assert line in str(refused.value)


def test_the_first_request_says_what_an_open_says() -> None:
    opened = make_open(
        max_new_tokens=5,
        mode=Mode.SYNC,
        sampling=Sampling(seed=4, temperature=0.7, top_k=3, top_p=0.9, repetition_penalty=1.1),
        slo=Slo(500.0, 50.0),
        eos_token_ids=(2, 3),
        logprobs=True,
    )
    request = VerifyRequest(SESSION, 0, opened.tokens, parameters=first_parameters(opened))
    decoded = decode_verify(*encode_verify(request), LIMITS)
    assert same(decode_first(decoded, SESSION, LIMITS), opened)
    check_repeated(decoded, opened, LIMITS)


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        ({"STATUS": tensor(3)}, "an answer of unexpected form"),
        ({"NUM_ACCEPTED": tensor(3)}, "an answer of unexpected form"),
        ({"NUM_ACCEPTED": tensor(-1)}, "an answer of unexpected form"),
        ({"LOGPROBS": tensor(1, 2, dtype=np.float32)}, "an answer of unexpected form"),
        ({"NEXT_TOKENS": ids(1)}, "has shape"),
    ],
)
def test_an_answer_that_is_none(answer: dict[str, Any], line: str) -> None:
    right = encode_answer(VerifyAnswer(Status.RUNNING, 1, ids(4)))
    with pytest.raises(InvalidRequest, match=line):
        decode_answer(right | answer)


batched = tensors | arrays.arrays(
    np.int32, st.tuples(st.just(1), st.integers(0, 4)), elements=st.integers(0, VOCAB - 1)
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the first text takes long
@given(
    parameters=st.dictionaries(st.sampled_from(PARAMETERS), values, max_size=4),
    found=st.dictionaries(st.sampled_from(["SESSION", "PREFIX_LEN", "TOKENS", "DRAFT", "NONSENSE"]), batched),
)
def test_anything_is_a_request_or_one_line(parameters: dict[str, Any], found: dict[str, Any]) -> None:
    try:
        request = decode_verify(parameters, found, FUZZ_LIMITS)
        opened = decode_first(request, SESSION, FUZZ_LIMITS)
        check_repeated(request, opened, FUZZ_LIMITS)
    except InvalidRequest as error:
        line = str(error)
        assert line
        assert "\n" not in line
        assert len(line) < 600
