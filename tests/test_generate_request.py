"""What clients of `wisp_generate` may ask for, in all the ways they may."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from triton_models.generate_request import MAX_STOPS, Defaults, GenerateRequest, decode_generate
from wisp_plugin.errors import InvalidRequest
from wisp_plugin.messages import Sampling, Slo
from wisp_plugin.wire_values import named_slo

DEFAULTS = Defaults(vocab_size=100, max_text_bytes=50)


def texts(*values: str) -> np.ndarray:
    """A BYTES tensor, as the Python backend gives it."""
    return np.array([value.encode() for value in values], dtype=np.object_)


def decode(tensors: dict[str, Any] | None = None, **parameters: Any) -> GenerateRequest:
    """The request of a client that sends the text "Hi" and this."""
    return decode_generate(parameters, {"text_input": texts("Hi")} | (tensors or {}), DEFAULTS)


def refusal(tensors: dict[str, Any] | None = None, **parameters: Any) -> str:
    """Why a request is refused, in one line."""
    with pytest.raises(InvalidRequest) as caught:
        decode(tensors, **parameters)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_text_alone_is_a_request() -> None:
    request = decode()
    seed = request.sampling.seed
    assert request == GenerateRequest(
        text="Hi", stream=False, sampling=Sampling(seed=seed), max_tokens=None, stop=(), ignore_eos=False,
        slo=named_slo(), full_text=True, chat=False, lookup="auto",
    )  # fmt: skip
    assert 0 <= seed < 2**53, "JSON numbers of every language hold it"
    assert decode().sampling.seed != seed


TENSORS = {
    "max_tokens": np.array([7], np.int32),
    "temperature": np.array([0.8], np.float32),
    "top_k": np.array([40], np.int32),
    "top_p": np.array([0.95], np.float32),
    "repetition_penalty": np.array([1.1], np.float32),
    "seed": np.array([3], np.int64),
    "stop": texts("a", "b"),
}
VALUES = {
    "max_tokens": 7, "temperature": 0.8, "top_k": 40, "top_p": 0.95, "repetition_penalty": 1.1, "seed": 3,
    "stop": ["a", "b"],
}  # fmt: skip


def test_one_thing_in_three_places_is_the_same() -> None:
    """An FP32 tensor means the number that was written, so that a seed gives one text everywhere."""
    asked = decode(TENSORS)
    assert asked.sampling == Sampling(3, 0.8, 40, 0.95, 1.1)
    assert (asked.max_tokens, asked.stop) == (7, ("a", "b"))
    assert asked == decode({"sampling_parameters": texts(json.dumps(VALUES))})
    assert asked == decode(sampling_parameters=json.dumps(VALUES))
    written = {name: str(value) for name, value in VALUES.items() if name != "stop"}
    assert asked == decode({"stop": TENSORS["stop"]}, **written)


def test_names_of_other_backends() -> None:
    request = decode(max_new_tokens=7, random_seed=3, stop_words="a")
    assert (request.max_tokens, request.sampling.seed, request.stop) == (7, 3, ("a",))
    assert decode(top_k=-1).sampling.top_k == 0
    assert decode(triton_enable_empty_final_response=True).stream is False


def test_the_prompt_in_the_text() -> None:
    stream = {"stream": np.array([True])}
    assert not decode(stream).full_text
    assert not decode(chat=True).full_text
    assert not decode(exclude_input_in_output=True).full_text
    assert not decode({"exclude_input_in_output": np.array([True])}).full_text
    assert not decode(return_full_text=False).full_text
    assert decode(return_full_text=True).full_text
    assert not decode(stream, return_full_text=False).full_text
    for asked in ({"return_full_text": True}, {"exclude_input_in_output": False}):
        assert "the prompt cannot be a part" in refusal(stream, **asked)
        assert "the prompt cannot be a part" in refusal(chat=True, **asked)
    assert "are opposites" in refusal(exclude_input_in_output=True, return_full_text=False)


def test_the_pace() -> None:
    assert decode(slo="interactive").slo == named_slo("interactive")
    assert decode(ttft_ms=500).slo == Slo(500.0, np.inf)
    assert decode(tpot_ms="60.5", ttft_ms=1).slo == Slo(1.0, 60.5)
    assert "'slo' and 'tpot_ms' exclude each other" in refusal(slo="a", ttft_ms=5, tpot_ms=3)
    assert "parameter 'slo'" in refusal(slo="Not a name")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"beams": 4}, "unknown parameter 'beams'; allowed: chat, exclude_input_in_output, "),
    "twice by alias": ({"max_tokens": 1, "max_new_tokens": 1}, "parameter 'max_tokens' is given twice"),
    "twice in JSON": ({"seed": 1, "sampling_parameters": '{"seed": 1}'}, "parameter 'seed' is given twice"),
    "unknown in JSON": ({"sampling_parameters": '{"presence_penalty": 1}'}, "unknown parameter 'presence_penalty'; "),
    "text in JSON": ({"sampling_parameters": '{"text_input": "x"}'}, "unknown parameter 'text_input'; "),
    "no JSON": ({"sampling_parameters": "{"}, "allowed: a JSON object as text"),
    "no object": ({"sampling_parameters": "[1]"}, "allowed: a JSON object as text"),
    "deep JSON": ({"sampling_parameters": "[" * 100_000}, "allowed: a JSON object as text"),
    "no tokens": ({"max_tokens": 0}, "parameter 'max_tokens' is 0; allowed: a whole number from 1 to 2147483647"),
    "half a token": ({"max_tokens": 1.5}, "parameter 'max_tokens' is 1.5; "),
    "null": ({"sampling_parameters": '{"seed": null}'}, "parameter 'seed' is None; "),
    "seed": ({"seed": -1}, "parameter 'seed' is -1; "),
    "temperature": ({"temperature": -0.5}, "parameter 'temperature' is -0.5; "),
    "not a number": ({"temperature": "nan"}, "parameter 'temperature' is 'nan'; "),
    "top_k": ({"top_k": 101}, "parameter 'top_k' is 101; allowed: a whole number from 0 to 100"),
    "empty stop": ({"stop": ""}, "parameter 'stop' is ['']; allowed: up to 16 texts"),
    "stop of a number": ({"sampling_parameters": '{"stop": 5}'}, "parameter 'stop' is 5; "),
    "stop of numbers": ({"sampling_parameters": '{"stop": [5]}'}, "parameter 'stop' is [5]; "),
    "stream": ({"stream": "perhaps"}, "parameter 'stream' is 'perhaps'; allowed: true, false"),
    "lookup": ({"lookup": "on"}, "parameter 'lookup' is 'on'; allowed: 'auto', 'off'"),
}


@pytest.mark.parametrize(("parameters", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(parameters: dict[str, Any], message: str) -> None:
    assert message in refusal(**parameters)


def test_tensors_that_are_refused() -> None:
    assert "tensor 'seed' has 2 elements; must have 1" in refusal({"seed": np.array([1, 2], np.int64)})
    assert "tensor 'stop' is not UTF-8" in refusal({"stop": np.array([b"\xff"], np.object_)})
    assert "parameter 'stop' is " in refusal({"stop": texts(*["x"] * (MAX_STOPS + 1))})
    assert "parameter 'temperature' is nan" in refusal({"temperature": np.array([np.nan], np.float32)})
    assert "'text_input' has 52 bytes; allowed: 50" in refusal({"text_input": texts("é" * 26)})
    with pytest.raises(InvalidRequest, match="'text_input' is missing"):
        decode_generate({}, {}, DEFAULTS)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)
NAMES = (*VALUES, "stream", "chat", "ignore_eos", "lookup", "slo", "ttft_ms", "tpot_ms", "return_full_text", "other")


PLAIN = st.booleans() | st.integers() | st.floats() | st.text()


@given(
    parameters=st.dictionaries(st.sampled_from(NAMES), PLAIN, max_size=4),
    inside=st.none() | st.text() | st.dictionaries(st.sampled_from(NAMES), ANYTHING, max_size=4),
)
def test_whatever_comes_is_a_request_or_refused_in_one_line(parameters: dict[str, Any], inside: Any) -> None:
    tensors = {"text_input": texts("Hi")}
    if inside is not None:
        tensors["sampling_parameters"] = texts(inside if isinstance(inside, str) else json.dumps(inside))
    refused = ""
    try:
        request = decode_generate(parameters, tensors, DEFAULTS)
    except InvalidRequest as error:
        refused = str(error)
    if refused:
        assert len(refused.splitlines()) == 1
        assert len(refused) < 600
    else:
        assert 0 <= request.sampling.temperature <= 100
        assert request.max_tokens is None or request.max_tokens > 0
        assert all(request.stop)
        assert request.lookup in ("auto", "off")
