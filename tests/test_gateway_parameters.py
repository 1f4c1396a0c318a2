"""Bodies that are refused: what is wrong is named, in one line, whatever it is."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from bench.gateway_bodies import requests
from edge_runtime.gateway.errors import Refusal
from edge_runtime.gateway.http import MAX_BODY_BYTES
from edge_runtime.gateway.parameters import Limits, json_object
from edge_runtime.gateway.tgi import parse
from edge_runtime.tokenizer import Tokenizer
from tests import tiny_model
from tests.gateway_fakes import MAX_TOTAL_TOKENS, FakeServer, House, Reply, run

USER = {"role": "user", "content": "hi"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    tiny_model.write_tokenizer(folder)
    return Tokenizer.load(folder)


def post(tokenizer: Tokenizer, path: str, body: Any) -> Reply:
    return run(tokenizer, FakeServer(tokenizer), lambda house: house.post(path, body))


UNSUPPORTED = {
    "best_of": 2, "decoder_input_details": True, "frequency_penalty": 0.5, "typical_p": 0.9, "top_n_tokens": 3,
    "watermark": True, "grammar": {"type": "json", "value": {}}, "adapter_id": "lora",
}  # fmt: skip
WRONG = {
    "max_new_tokens": [0, -1, 10**9, 2.5, "7", True, float("nan")],
    "temperature": [0, -1, 101, "hot", True, 1e-5, float("inf")],
    "top_k": [0, -1, 10**6, 1.5],
    "top_p": [0, 1.01, -0.1, "x"],
    "repetition_penalty": [0, -1, 1e9],
    "seed": [-1, 2**63, 0.5, "1"],
    "truncate": [0, MAX_TOTAL_TOKENS],
    "stop": ["text", [""], [1], ["a"] * 5, ["x" * 300], ["\ud800"]],
    "do_sample": [1, "yes"],
    "details": ["true"],
    "no_such_parameter": [1, None],
}


@pytest.mark.parametrize("name", [*UNSUPPORTED, *WRONG])
def test_what_is_wrong_or_not_supported_is_named(tokenizer: Tokenizer, name: str) -> None:
    for value in WRONG.get(name, [UNSUPPORTED.get(name)]):
        with pytest.raises(Refusal, match=rf"`(parameters\.)?{name}") as caught:
            parse({"inputs": "hi", "parameters": {name: value}}, tokenizer, Limits(320, MAX_TOTAL_TOKENS), False)
        assert caught.value.status == 422
        assert caught.value.error_type == "validation"
        assert "\n" not in str(caught.value)
        assert caught.value.param == name


@pytest.mark.parametrize(
    "parameters",
    [
        dict.fromkeys(UNSUPPORTED),
        {"best_of": 1, "watermark": False, "typical_p": 1.0, "top_n_tokens": 0, "frequency_penalty": 0},
        {"max_new_tokens": 5.0},
    ],
)
def test_what_asks_for_nothing_is_taken(tokenizer: Tokenizer, parameters: dict[str, Any]) -> None:
    assert parse({"inputs": "hi", "parameters": parameters}, tokenizer, Limits(320, MAX_TOTAL_TOKENS), False)


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"", 400, "no JSON"),
        (b"\xff\xfe", 400, "no JSON"),
        (b"[" * 100_000, 400, "nested too deeply"),
        (b"9" * 5_000, 400, "no JSON"),
        (b"[1]", 400, "JSON object"),
        ({}, 422, "`inputs` is None; allowed: a text"),
        ({"inputs": 5}, 422, "`inputs` is 5; allowed: a text"),
        ({"inputs": ""}, 422, "`inputs` cannot be empty"),
        ({"inputs": "\ud800"}, 422, "surrogate"),
        ({"inputs": "hi", "parameters": []}, 422, "allowed: an object"),
        ({"inputs": "hi", "more": 1}, 422, "unknown field `more`"),
        ({"inputs": "x " * MAX_TOTAL_TOKENS}, 422, f"less than {MAX_TOTAL_TOKENS} tokens"),
        ({"inputs": "hi", "parameters": {"max_new_tokens": MAX_TOTAL_TOKENS}}, 422, f"<= {MAX_TOTAL_TOKENS}. Given: 2"),
        (b"x" * (MAX_BODY_BYTES + 1), 413, "too long"),
    ],
)
def test_bodies_of_generate(tokenizer: Tokenizer, body: Any, status: int, words: str) -> None:
    reply = post(tokenizer, "/generate", body)
    assert reply.status == status
    assert words in reply.json["error"]
    assert reply.json["error_type"] in ("validation", "bad_request")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("completions", {}, "prompt"),
        ("completions", {"prompt": ""}, "prompt"),
        ("completions", {"prompt": "a", "\ud800": 1}, "\\ud800"),
        ("chat/completions", {"messages": [USER | {"\udfff": 1}]}, "\\udfff"),
        ("completions", {"prompt": ["a", "b"]}, "prompt"),
        ("completions", {"prompt": [1, 320]}, "prompt"),
        ("completions", {"prompt": "a", "logprobs": 3}, "logprobs"),
        ("completions", {"prompt": "a", "echo": True}, "echo"),
        ("completions", {"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ("chat/completions", {}, "messages"),
        ("chat/completions", {"messages": [{"role": "tool", "content": "x"}]}, "role"),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "content"),
        ("chat/completions", {"messages": [USER], "tools": [{"type": "function"}]}, "tools"),
        ("chat/completions", {"messages": [USER], "response_format": {"type": "json_object"}}, "response_format"),
        ("chat/completions", {"messages": [USER], "n": 2}, "n"),
        ("chat/completions", {"messages": [USER], "logit_bias": {"5": 1}}, "logit_bias"),
        ("chat/completions", {"messages": [USER], "top_logprobs": 2}, "top_logprobs"),
        ("chat/completions", {"messages": [USER], "stream_options": {"include_usage": True}}, "stream_options"),
        ("chat/completions", {"messages": [USER], "max_completion_tokens": 10**7}, "max_completion_tokens"),
        ("chat/completions", {"messages": [USER], "temperature": -1}, "temperature"),
    ],
)
def test_bodies_of_openai(tokenizer: Tokenizer, path: str, body: dict[str, Any], param: str) -> None:
    reply = post(tokenizer, f"/v1/{path}", body)
    assert reply.status == 422
    error = reply.json["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert param in error["message"]


def test_content_in_parts_and_developers(tokenizer: Tokenizer) -> None:
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    server = FakeServer(tokenizer)
    for message in (USER, {"role": "user", "content": parts}, {"role": "developer", "content": "hi"}):
        reply = run(tokenizer, server, lambda house, m=message: house.post("/v1/chat/completions", {"messages": [m]}))
        assert reply.status == 200
    first, second, third = (opened.tokens.tolist() for opened in server.opens)
    assert first == second
    assert third == tokenizer.encode_chat([{"role": "system", "content": "hi"}]).tolist()


def test_special_tokens_as_text_are_tokens_as_in_transformers(tokenizer: Tokenizer) -> None:
    server = FakeServer(tokenizer)
    run(tokenizer, server, lambda house: house.post("/generate", {"inputs": "<s>hi</s>"}))
    assert server.opens[0].tokens.tolist() == [0, *tokenizer.encode("hi").tolist(), 1]


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(request=requests())
def test_no_body_is_an_internal_error(tokenizer: Tokenizer, request: tuple[str, bytes]) -> None:
    async def use(house: House) -> Reply:
        return await house.post(*request)

    reply = run(tokenizer, FakeServer(tokenizer), use)
    assert reply.status in (200, 400, 422), (reply.status, reply.body)
    if reply.status == 200 and reply.headers["content-type"] == "text/event-stream":
        assert reply.events
        assert not any("error" in event for event in reply.events)
    else:
        json.loads(reply.body)


@pytest.mark.parametrize("body", [{"inputs": "a", "\ud800": 1}, {"inputs": "a", "parameters": {"\ud800": 1}}])
def test_a_field_name_that_utf8_cannot_hold_is_named_all_the_same(tokenizer: Tokenizer, body: Any) -> None:
    for path in ("/generate", "/generate_stream"):
        reply = post(tokenizer, path, body)
        assert reply.status == 422
        assert "\\ud800" in reply.json["error"]


def test_long_bodies_are_checked_beside_the_event_loop(tokenizer: Tokenizer) -> None:
    async def use(house: House) -> list[Reply]:
        long = {"inputs": "a b " * 20_000}
        return await asyncio.gather(house.post("/tokenize", long), house.post("/generate", long))

    tokens, refused = run(tokenizer, FakeServer(tokenizer), use)
    assert len(tokens.json) == 80_000
    assert refused.status == 422


def test_a_json_object_is_needed() -> None:
    assert json_object(b'{"a": 1}') == {"a": 1}
    with pytest.raises(Refusal):
        json_object(b"null")
