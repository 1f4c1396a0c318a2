"""The gateway with unmodified clients, on a real tritonserver with the real models."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import OverloadedError, ValidationError
from hypothesis import HealthCheck, Phase, given, settings

from bench.gateway_bodies import requests
from bench.gateway_clients import Address, StreamResult, request, stream
from bench.gateway_process import serving
from edge_runtime.tokenizer import Tokenizer
from tests.integration.support import GREEDY, QUESTIONS, Judge, wait_until
from triton_models.processes import free_ports
from triton_models.server_process import ServerProcess
from wisp_plugin.home import default_draft_dir
from wisp_plugin.messages import Sampling

pytestmark = pytest.mark.integration
ROOT = Path(__file__).resolve().parents[2]
PROMPT = "The capital of France is"
CHAT = [{"role": "user", "content": QUESTIONS[0]}]
NUM_TOKENS = 20
NUM_STREAMS, STREAM_TOKENS = 32, 40  # a lead is of some tokens, however long the text


@pytest.fixture(scope="module")
def gateway(shared_server: ServerProcess) -> Iterator[str]:
    with serving(shared_server.grpc_url) as url:
        yield url


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(default_draft_dir("int8"))


@pytest.fixture(scope="module")
def hub(gateway: str) -> InferenceClient:
    return InferenceClient(gateway, timeout=60.0)


@pytest.fixture(scope="module")
def client(gateway: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{gateway}/v1", api_key="none", timeout=60.0, max_retries=0)


@pytest.fixture
def num_running(server: ServerProcess) -> Any:
    def look() -> int:
        with urllib_open(server.metrics_url) as response:
            lines = response.read().decode().splitlines()
        (line,) = [line for line in lines if line.startswith("wisp_sessions{") and 'state="running"' in line]
        return int(float(line.rpartition(" ")[2]))

    return look


def urllib_open(url: str) -> Any:
    import urllib.request

    return urllib.request.urlopen(url, timeout=10.0)


def curl(*args: str) -> str:
    done = subprocess.run(["curl", "-sS", "--max-time", "60", *args], capture_output=True, text=True, check=True)
    return done.stdout


# -- huggingface_hub --------------------------------------------------------------------------------------------


def test_hub_text_generation(hub: InferenceClient, tokenizer: Tokenizer, judge: Judge) -> None:
    prompt = tokenizer.encode(PROMPT)
    text = hub.text_generation(PROMPT, max_new_tokens=NUM_TOKENS)
    whole = hub.text_generation(PROMPT, max_new_tokens=NUM_TOKENS, details=True)
    assert whole.generated_text == text
    assert whole.details is not None
    assert whole.details.generated_tokens == len(whole.details.tokens) <= NUM_TOKENS
    ids = np.array([token.id for token in whole.details.tokens], np.int32)
    judge.check(prompt, ids, GREEDY)
    np.testing.assert_allclose([t.logprob for t in whole.details.tokens], judge.logprobs(prompt, ids), atol=1e-3)
    pieces = list(hub.text_generation(PROMPT, max_new_tokens=NUM_TOKENS, stream=True))
    assert "".join(pieces) == text
    events = list(hub.text_generation(PROMPT, max_new_tokens=NUM_TOKENS, stream=True, details=True))
    assert [event.token.id for event in events] == ids.tolist()
    assert events[-1].generated_text == text
    assert events[-1].details is not None
    assert events[-1].details.finish_reason == whole.details.finish_reason


def test_hub_chat_completion(hub: InferenceClient) -> None:
    options: dict[str, Any] = {"max_tokens": NUM_TOKENS, "temperature": 0.8, "seed": 5}
    whole = hub.chat_completion(CHAT, **options)
    chunks = list(hub.chat_completion(CHAT, stream=True, **options))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert whole.choices[0].message.content == text
    assert len(text) > 10
    assert whole.usage.completion_tokens == NUM_TOKENS
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason == "length"


def test_hub_errors(hub: InferenceClient) -> None:
    with pytest.raises(ValidationError, match="grammar"):
        hub.text_generation(PROMPT, grammar={"type": "regex", "value": "a"})  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="max_new_tokens"):
        hub.text_generation(PROMPT, max_new_tokens=0)


# -- openai -----------------------------------------------------------------------------------------------------


def test_openai_completions(client: openai.OpenAI, hub: InferenceClient) -> None:
    (model,) = client.models.list()
    options: dict[str, Any] = {"model": model.id, "prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0}
    whole = client.completions.create(logprobs=0, **options)
    (choice,) = whole.choices
    assert choice.text == hub.text_generation(PROMPT, max_new_tokens=NUM_TOKENS)
    assert choice.logprobs is not None
    assert "".join(choice.logprobs.tokens or []) == choice.text
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == 5
    chunks = list(client.completions.create(stream=True, **options))
    assert "".join(chunk.choices[0].text for chunk in chunks) == choice.text


def test_openai_chat(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "any", "messages": CHAT, "max_completion_tokens": NUM_TOKENS, "seed": 11}
    whole = client.chat.completions.create(logprobs=True, **options)
    chunks = list(client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **options))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert whole.choices[0].message.content == text
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage == whole.usage
    assert whole.choices[0].logprobs is not None
    assert whole.choices[0].logprobs.content is not None
    assert len(whole.choices[0].logprobs.content) == NUM_TOKENS


def test_openai_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.UnprocessableEntityError, match="tools"):
        client.chat.completions.create(
            model="any", messages=CHAT, tools=[{"type": "function", "function": {"name": "f"}}]  # type: ignore[arg-type,list-item]
        )
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        client.models.retrieve("other")


# -- curl, and the page -----------------------------------------------------------------------------------------


def test_curl(gateway: str) -> None:
    body = json.dumps({"inputs": PROMPT, "parameters": {"max_new_tokens": 8, "details": True}})
    header = ("-H", "Content-Type: application/json")
    answer = json.loads(curl(f"{gateway}/generate", *header, "-d", body))
    lines = [line for line in curl("-N", f"{gateway}/generate_stream", *header, "-d", body).splitlines() if line]
    assert len(lines) == 8
    assert json.loads(lines[-1].removeprefix("data:"))["generated_text"] == answer["generated_text"]
    assert "200" in curl("-o", "/dev/null", "-w", "%{http_code}", f"{gateway}/health")
    assert json.loads(curl(f"{gateway}/info"))["draft_model"] == "int8"
    assert "tgi_request_count" in curl(f"{gateway}/metrics")
    page = {"messages": CHAT, "max_new_tokens": 40, "temperature": 0}
    lines = curl("-N", f"{gateway}/ui/stream", "-d", json.dumps(page)).splitlines()
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line]
    kinds = [event["type"] for event in events]
    assert kinds[0] == "open"
    assert kinds[-1] == "end"
    assert "draft" in kinds
    tokens = [token for event in events if event["type"] == "commit" for token in event["tokens"]]
    assert len(tokens) == events[-1]["generated_tokens"] == 40
    assert "accepted" in {token["origin"] for token in tokens}


# -- the same text everywhere -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampling", [GREEDY, Sampling(seed=3, temperature=0.9, top_k=200, top_p=0.95, repetition_penalty=1.2)]
)
def test_the_text_is_that_of_wisp_edge_and_of_the_target_alone(
    server: ServerProcess, gateway: str, tokenizer: Tokenizer, judge: Judge, sampling: Sampling
) -> None:
    values = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    values |= {"repetition_penalty": sampling.repetition_penalty, "seed": sampling.seed}
    given_values = {name: value for name, value in values.items() if value}
    prompt_text = tokenizer.chat_prompt(CHAT)
    wanted = {"inputs": prompt_text, "parameters": {"max_new_tokens": NUM_TOKENS, "details": True, **given_values}}
    status, body = asyncio.run(request(Address.of(gateway), "POST", "/generate", json.dumps(wanted).encode()))
    assert status == 200, body
    answer = json.loads(body)
    ids = np.array([token["id"] for token in answer["details"]["tokens"]], np.int32)
    judge.check(tokenizer.encode(prompt_text), ids, sampling)
    options = [part for name, value in given_values.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    command = ["generate", QUESTIONS[0], "--chat", "--max-new-tokens", str(NUM_TOKENS), "--server", server.grpc_url]
    command = [sys.executable, "-m", "edge_runtime.cli", *command, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60.0, check=True, cwd=ROOT)
    assert done.stdout.removesuffix("\n") == answer["generated_text"]


def test_stop_strings_over_token_borders_and_split_characters(hub: InferenceClient, tokenizer: Tokenizer) -> None:
    text = hub.text_generation(PROMPT, max_new_tokens=NUM_TOKENS)
    stop = text[8:14]  # wherever its tokens begin and end
    whole = hub.text_generation(PROMPT, max_new_tokens=NUM_TOKENS, stop=[stop], details=True)
    assert whole.generated_text == text[: text.index(stop)]
    assert whole.details is not None
    assert whole.details.finish_reason == "stop_sequence"
    pieces = hub.text_generation(PROMPT, max_new_tokens=NUM_TOKENS, stop=[stop], stream=True)
    assert "".join(pieces) == whole.generated_text
    emoji = "Repeat exactly: 🦜🦜🦜🦜🦜🦜🦜🦜 🦜🦜🦜🦜🦜🦜🦜🦜 🦜🦜🦜🦜🦜"
    assert len(tokenizer.encode("🦜", False)) > 1, "a character of several tokens is needed"
    events = list(hub.text_generation(emoji, max_new_tokens=NUM_TOKENS, stream=True, details=True))
    joined = "".join(event.token.text for event in events)
    assert joined == tokenizer.decode([event.token.id for event in events]) == events[-1].generated_text
    assert "🦜" in joined
    assert any(not event.token.text and not event.token.special for event in events)


# -- many at once, hang-ups, a server that is away, anything as a body ------------------------------------------


@pytest.mark.alone
def test_many_streams_share_the_device(gateway: str, tokenizer: Tokenizer) -> None:
    """No error, nothing lost or doubled, and nobody far ahead of the others when the first one ends."""
    where = Address.of(gateway)
    prompts = [tokenizer.chat_prompt([{"role": "user", "content": f"{QUESTIONS[i % 3]} ({i})"}]) for i in range(8)]
    counts = [0] * NUM_STREAMS
    at_first_end: list[int] = []

    def count(index: int) -> None:
        counts[index] += 1
        if counts[index] == STREAM_TOKENS and not at_first_end:
            at_first_end.extend(counts)

    async def many() -> list[StreamResult]:
        async def one(index: int) -> StreamResult:
            values = {"max_new_tokens": STREAM_TOKENS, "temperature": 0.7, "seed": index % 8}
            return await stream(where, prompts[index % 8], values, lambda: count(index))

        return await asyncio.gather(*(one(index) for index in range(NUM_STREAMS)))

    results = asyncio.run(many())
    assert {result.error for result in results} == {None}
    for index, result in enumerate(results):
        assert result.last is not None
        assert result.token_ids == results[index % 8].token_ids, "equal requests, equal tokens"
        assert result.text == result.last["generated_text"] == tokenizer.decode(result.token_ids)
    whole = [at for at, result in zip(at_first_end, results, strict=True) if len(result.token_ids) == STREAM_TOKENS]
    assert len(whole) > NUM_STREAMS / 2
    assert max(whole) / min(whole) < 1.5, sorted(whole)


@pytest.mark.alone
@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
def test_a_hang_up_frees_the_session(gateway: str, num_running: Any, path: str) -> None:
    body = json.dumps({"inputs": "Once upon a time", "parameters": {"max_new_tokens": 2000}})
    with subprocess.Popen(["curl", "-sN", "-o", "/dev/null", f"{gateway}{path}", "-d", body]) as process:
        wait_until(lambda: num_running() == 1, 10.0)
        process.kill()
    assert wait_until(lambda: num_running() == 0, 5.0) < 3.0


@pytest.mark.alone
def test_without_a_server(client: openai.OpenAI) -> None:
    nowhere = f"127.0.0.1:{free_ports().grpc}"
    with serving(nowhere, "--server-wait", "3", "--no-draft", "--max-requests", "1", "--max-sessions", "1") as url:
        where = Address.of(url)
        assert asyncio.run(request(where, "GET", "/health"))[0] == 503
        here = client.with_options(base_url=f"{url}/v1")
        began_s = time.monotonic()
        with pytest.raises(openai.InternalServerError, match="no server at") as caught:
            here.completions.create(model="any", prompt=PROMPT, max_tokens=2)
        assert caught.value.status_code == 503
        assert 2.0 < time.monotonic() - began_s < 12.0

        async def two() -> None:
            waiting = asyncio.ensure_future(request(where, "POST", "/generate", b'{"inputs": "a"}'))
            await asyncio.sleep(0.3)
            with pytest.raises(OverloadedError):
                await asyncio.to_thread(InferenceClient(url).text_generation, "a")
            with pytest.raises(openai.RateLimitError):
                await asyncio.to_thread(lambda: here.completions.create(model="any", prompt="a", max_tokens=2))
            assert (await waiting)[0] == 503

        asyncio.run(two())


@pytest.mark.alone
@settings(
    max_examples=60, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)
@given(wanted=requests())
def test_no_body_breaks_the_gateway(gateway: str, wanted: tuple[str, bytes]) -> None:
    path, body = wanted
    status, answer = asyncio.run(asyncio.wait_for(request(Address.of(gateway), "POST", path, body), 30.0))
    assert status in (200, 400, 422), (status, answer)


@pytest.mark.alone
def test_the_gateway_is_well_afterwards(gateway: str, num_running: Any) -> None:
    wait_until(lambda: num_running() == 0, 5.0)
    assert asyncio.run(request(Address.of(gateway), "GET", "/health"))[0] == 200
    metrics = asyncio.run(request(Address.of(gateway), "GET", "/metrics"))[1].decode()
    assert 'tgi_request_failure{err="internal"} 0\n' in metrics
    assert "tgi_batch_current_size 0\n" in metrics
