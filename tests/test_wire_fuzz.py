"""Whatever arrives is a message or is refused in one line: random dtypes, shapes, types and values."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tests.factories import SESSION, ids, make_commit
from tests.test_wire import (
    CLASSES,
    DRAFT,
    DRAFT_TENSORS,
    LIMITS,
    OPEN,
    OPEN_TENSORS,
    VOCAB,
    WINDOW,
    refusal,
    session_tensor,
)
from wisp_plugin.errors import InvalidRequest
from wisp_plugin.messages import Draft, Open
from wisp_plugin.wire import WireLimits, decode_commit, decode_request, encode_commit

PARAMETERS = [
    "op", "protocol", "prompt_len", "max_new_tokens", "seed", "temperature", "top_k", "top_p", "repetition_penalty",
    "eos_token_ids", "ignore_eos", "slo", "ttft_ms", "tpot_ms", "mode", "logprobs", "vocab_hash", "nonsense",
    "two\nlines",
]  # fmt: skip
TENSORS = ["SESSION", "TOKENS", "START", "SEEN", "DRAFT", "SURVIVAL", "NEXT_US", "NONSENSE"]
DTYPES = [np.int32, np.int64, np.uint8, np.uint64, np.float16, np.float32, np.float64, np.bool_]

# What Triton's request parameters can be.
values = (
    st.integers(-(2**63), 2**64 - 1)
    | st.integers(-2, WINDOW + 1)
    | st.booleans()
    | st.floats()
    | st.text(max_size=40)
    | st.sampled_from(
        ["open", "draft", "close", "1", "free", "sync", "tight", "true", "1e400", "nan", "-0", "²", "1_0", "1,,2"]
    )
)
shapes = arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
texts = st.binary(max_size=40) | st.just(SESSION.encode()) | st.just(b"")
small_ids = st.lists(st.integers(-1, VOCAB), max_size=70).map(lambda chosen: ids(*chosen))
tensors = (
    st.sampled_from(DTYPES).flatmap(lambda dtype: arrays.arrays(dtype, shapes))
    | small_ids
    | st.lists(texts, max_size=2).map(lambda chosen: np.array(chosen, np.object_))
)
FUZZ_LIMITS = WireLimits(VOCAB, WINDOW, LIMITS.max_draft_ahead, slo_classes=CLASSES)
REQUESTS = [(OPEN, OPEN_TENSORS), (DRAFT, DRAFT_TENSORS), ({"op": "close"}, {"SESSION": session_tensor()}), ({}, {})]


@settings(max_examples=600, deadline=None)
@given(
    st.sampled_from(REQUESTS),
    st.dictionaries(st.sampled_from(PARAMETERS), values, max_size=4),
    st.dictionaries(st.sampled_from(TENSORS), tensors, max_size=4),
    st.sets(st.sampled_from(PARAMETERS + TENSORS), max_size=2),
)
def test_any_request_is_a_message_or_one_line(
    request_: tuple[dict[str, Any], dict[str, Any]],
    parameters: dict[str, Any],
    arrays_: dict[str, np.ndarray],
    dropped: set[str],
) -> None:
    given_parameters = {k: v for k, v in (request_[0] | parameters).items() if k not in dropped}
    given_tensors = {k: v for k, v in (request_[1] | arrays_).items() if k not in dropped}
    try:
        message = decode_request(given_parameters, given_tensors, FUZZ_LIMITS)
    except InvalidRequest as error:
        num_lines = len(str(error).splitlines())
        assert num_lines == 1
        return
    assert len(message.session) == 32
    if isinstance(message, Open):
        assert 0 < message.prompt_len <= len(message.tokens) <= message.end <= WINDOW
        assert message.tokens.dtype == np.int32
        assert all(0 <= token < VOCAB for token in message.tokens.tolist())
        assert all(0.001 <= number <= 1e7 for number in (message.slo.ttft_ms, message.slo.tpot_ms))
    elif isinstance(message, Draft):
        assert 0 < message.seen <= message.start <= WINDOW
        assert message.end - message.seen <= LIMITS.max_draft_ahead


def test_a_vocab_hash_of_several_lines_is_refused_in_one() -> None:
    refusal(OPEN | {"vocab_hash": "evil\nsecond line"}, OPEN_TENSORS)


@pytest.mark.parametrize("value", [None, [1], {"a": 1}, 10**400], ids=["null", "list", "object", "huge"])
def test_a_number_of_a_type_that_json_knows_and_triton_does_not(value: Any) -> None:
    refusal(OPEN | {"temperature": value}, OPEN_TENSORS)


@pytest.mark.parametrize("value", [None, [1], {"a": 1}, True, "two\nlines"], ids=str)
def test_an_slo_class_of_a_type_that_names_nothing(value: Any) -> None:
    assert "'slo' is" in refusal(OPEN | {"slo": value}, OPEN_TENSORS)


@pytest.mark.parametrize("element", [None, 1.5, "\ud800"], ids=["none", "float", "surrogate"])
def test_a_session_element_that_is_not_bytes(element: Any) -> None:
    refusal(OPEN, OPEN_TENSORS | {"SESSION": session_tensor(element)})


@pytest.mark.parametrize("name", ["mode", "temperature", "seed", "logprobs", "protocol", "op", "slo"])
def test_the_answer_to_a_long_value_is_short(name: str) -> None:
    assert len(refusal(OPEN | {name: "x" * 100_000}, OPEN_TENSORS)) < 1000


def test_next_us_out_of_range() -> None:
    assert "NEXT_US" in refusal(DRAFT, DRAFT_TENSORS | {"NEXT_US": ids(-2)})


BAD_COMMITS: list[Any] = [
    ("TOKENS", None, "'TOKENS' is missing"),
    ("TOKENS", ids(1), "unexpected form"),
    ("TOKENS", np.array([1, 2]), r"'TOKENS' is int64\[2\]; must be int32\[n\]"),
    ("ORIGIN", np.array([0, 4], np.uint8), "ORIGIN 4; allowed: 0 to 3"),
    ("ORIGIN", ids(0, 0), "'ORIGIN' is int32"),
    ("STATUS", ids(7), "unexpected form"),
    ("STATUS", ids(0, 0), "'STATUS' has 2 elements"),
    ("TIMING_US", np.zeros(3, np.int64), "unexpected form"),
    ("LOAD", np.zeros(1, np.float32), "unexpected form"),
    ("SESSION", session_tensor(b""), "32 lower-case hex digits"),
    ("RETRY_AFTER_MS", ids(), "'RETRY_AFTER_MS' has 0 elements"),
    pytest.param(
        *("LOGPROBS", np.zeros(3, np.float32), "unexpected form"),
    ),
]


@pytest.mark.parametrize(("name", "array", "says"), BAD_COMMITS)
def test_bad_commits(name: str, array: np.ndarray | None, says: str) -> None:
    broken = encode_commit(make_commit(4, 5, 6)) | {name: array}
    with pytest.raises(InvalidRequest, match=says):
        decode_commit({k: v for k, v in broken.items() if v is not None})
