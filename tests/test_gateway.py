"""The gateway's routes over a fake server: shapes, ends of texts, drafts, the page."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_runtime.gateway.device import Speculation
from edge_runtime.gateway.drafting import DraftDealer
from edge_runtime.tokenizer import Tokenizer
from tests import tiny_model
from tests.edge_fakes import SleepingDrafter, drafting_threads
from tests.gateway_fakes import (
    CHAT,
    LOST,
    MAX_TOTAL_TOKENS,
    TEXT,
    FakeServer,
    House,
    Reply,
    generate,
    post,
    run,
)
from wisp_plugin.acceptance_model import shipped_model
from wisp_plugin.messages import Commit, Open, Status


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_model.write_tokenizer(folder)
    return Tokenizer.load(folder)


@pytest.fixture
def server(tokenizer: Tokenizer) -> FakeServer:
    return FakeServer(tokenizer, TEXT)


# -- TGI --------------------------------------------------------------------------------------------------------


def test_generate_gives_text_details_and_headers(tokenizer: Tokenizer, server: FakeServer) -> None:
    reply = generate(tokenizer, server, details=True)
    assert reply.status == 200
    assert reply.json["generated_text"] == TEXT
    details = reply.json["details"]
    assert details["finish_reason"] == "eos_token"
    assert details["generated_tokens"] == len(details["tokens"]) == len(server.tokens)
    assert details["seed"] is None
    assert details["prefill"] == []
    assert [token["id"] for token in details["tokens"]] == server.tokens
    assert "".join(token["text"] for token in details["tokens"]) == TEXT
    assert details["tokens"][-1] == {"id": 1, "text": "", "logprob": -0.5, "special": True}
    assert int(reply.headers["x-generated-tokens"]) == len(server.tokens)
    assert int(reply.headers["x-prompt-tokens"]) == len(tokenizer.encode("hello"))
    assert reply.headers["x-compute-characters"] == "5"
    times = ("x-compute-time", "x-total-time", "x-validation-time", "x-queue-time", "x-inference-time")
    assert all(float(reply.headers[name]) >= 0 for name in (*times, "x-time-per-token"))


def test_defaults_are_those_of_tgi(tokenizer: Tokenizer, server: FakeServer) -> None:
    generate(tokenizer, server)
    (opened,) = server.opens
    assert opened.max_new_tokens == 100
    assert opened.sampling.greedy
    assert not opened.logprobs
    assert opened.eos_token_ids == tokenizer.eos_token_ids


@pytest.mark.parametrize(
    ("parameters", "temperature"),
    [
        ({"do_sample": True}, 1.0),
        ({"temperature": 0.5}, 0.5),
        ({"top_k": 5}, 1.0),
        ({"top_p": 0.9}, 1.0),
        ({"top_p": 1.0}, 0.0),
        ({"temperature": 1.0}, 0.0),
        ({"do_sample": False, "temperature": 0.5}, 0.0),
    ],
)
def test_when_tgi_samples(
    tokenizer: Tokenizer, server: FakeServer, parameters: dict[str, Any], temperature: float
) -> None:
    reply = generate(tokenizer, server, details=True, **parameters)
    (opened,) = server.opens
    assert opened.sampling.temperature == temperature
    assert reply.json["details"]["seed"] == (opened.sampling.seed if temperature else None)


def test_a_drawn_seed_is_told_and_differs(tokenizer: Tokenizer, server: FakeServer) -> None:
    seeds = {generate(tokenizer, server, details=True, do_sample=True).json["details"]["seed"] for _ in range(3)}
    assert len(seeds) == 3
    assert all(0 <= seed < 2**53 for seed in seeds)
    assert generate(tokenizer, server, details=True, do_sample=True, seed=7).json["details"]["seed"] == 7


def test_the_stream_has_one_event_per_token(tokenizer: Tokenizer, server: FakeServer) -> None:
    reply = generate(tokenizer, server, "/generate_stream")
    assert reply.headers["content-type"] == "text/event-stream"
    events = reply.events
    assert [event["index"] for event in events] == list(range(1, len(server.tokens) + 1))
    assert [event["token"]["id"] for event in events] == server.tokens
    assert "".join(event["token"]["text"] for event in events) == events[-1]["generated_text"] == TEXT
    assert all(event["details"] is None and event["generated_text"] is None for event in events[:-1])
    assert events[-1]["details"]["generated_tokens"] == len(server.tokens)
    assert events[-1]["details"]["finish_reason"] == "eos_token"


def test_the_root_streams_if_the_body_says_so(tokenizer: Tokenizer, server: FakeServer) -> None:
    (answer,) = post(tokenizer, server, "/", {"inputs": "hello"}).json
    assert answer == {"generated_text": TEXT}
    streamed = post(tokenizer, server, "/", {"inputs": "hello", "stream": True})
    assert streamed.events[-1]["generated_text"] == TEXT
    assert post(tokenizer, server, "/generate", {"inputs": "hello", "stream": True}).status == 422


def test_length_truncation_and_full_text(tokenizer: Tokenizer, server: FakeServer) -> None:
    reply = generate(tokenizer, server, max_new_tokens=3, truncate=2, return_full_text=True, details=True)
    assert reply.json["details"]["finish_reason"] == "length"
    assert reply.json["generated_text"] == "hello" + tokenizer.decode(server.tokens[:3])
    (opened,) = server.opens
    assert opened.tokens.tolist() == tokenizer.encode("hello")[-2:].tolist()


@pytest.mark.parametrize("size", [1, 3, 50])
@pytest.mark.parametrize("stop", ["quick b", "brown", "🙂", "e q"])
def test_the_text_ends_before_a_stop_string(tokenizer: Tokenizer, stop: str, size: int) -> None:
    server = FakeServer(tokenizer, TEXT, size)
    reply = generate(tokenizer, server, "/generate_stream", stop=[stop, "not there"])
    last = reply.events[-1]
    assert last["generated_text"] == TEXT[: TEXT.index(stop)]
    assert "".join(event["token"]["text"] for event in reply.events) == last["generated_text"]
    assert last["details"]["finish_reason"] == "stop_sequence"
    assert len(reply.events) == last["details"]["generated_tokens"] < len(server.tokens)
    if size < 50:
        assert len(server.closes) == 1  # the server would have gone on


def test_what_may_begin_a_stop_string_comes_at_the_end(tokenizer: Tokenizer) -> None:
    server = FakeServer(tokenizer, "abc", 1)
    assert generate(tokenizer, server, stop=["bcd"]).json["generated_text"] == "abc"
    streamed = generate(tokenizer, server, "/generate_stream", stop=["bcd"], max_new_tokens=3)
    assert [event["token"]["text"] for event in streamed.events] == ["a", "", "bc"]


def test_half_a_character_at_the_end(tokenizer: Tokenizer) -> None:
    server = FakeServer(tokenizer, "a🙂", 1)
    num_tokens = len(server.tokens) - 2  # without its last byte and the end
    reply = generate(tokenizer, server, "/generate_stream", max_new_tokens=num_tokens)
    assert reply.events[-1]["generated_text"].startswith("a\ufffd")
    assert "".join(event["token"]["text"] for event in reply.events) == reply.events[-1]["generated_text"]


def test_text_that_is_held_back_to_the_end_is_no_token_of_the_page(tokenizer: Tokenizer) -> None:
    class EndsAlone(FakeServer):
        """The end comes with a commit of its own, without tokens."""

        def commits(self, opened: Open) -> list[Commit]:
            *first, last = super().commits(opened)
            nothing = np.zeros(0, np.int32)
            end = Commit(opened.session, last.end, nothing, nothing.astype(np.uint8), last.status)
            return [*first, replace(last, status=Status.RUNNING), end]

    server = EndsAlone(tokenizer, "a🙂", 1)
    num_tokens = len(server.tokens) - 2  # without its last byte and the end
    *_, last, end = post(tokenizer, server, "/ui/stream", {"messages": CHAT, "max_new_tokens": num_tokens}).events
    assert last["tokens"] == []
    assert last["tail"].startswith("\ufffd")
    assert (last["start"], end["generated_tokens"]) == (num_tokens, num_tokens)


def test_tokenize(tokenizer: Tokenizer, server: FakeServer) -> None:
    tokens = post(tokenizer, server, "/tokenize", {"inputs": TEXT}).json
    assert [token["id"] for token in tokens] == tokenizer.encode(TEXT).tolist()
    assert all(TEXT[t["start"] : t["stop"]] == t["text"] for t in tokens)


def test_info_health_metrics_and_what_is_not_there(tokenizer: Tokenizer, server: FakeServer) -> None:
    async def use(house: House) -> list[Reply]:
        await house.post("/generate", {"inputs": "hello"})
        await house.post("/generate", {"inputs": ""})
        healthy = await house.get("/health")
        server.error = LOST
        house.gateway._health = (-10.0, True)
        return [healthy, *[await house.get(path) for path in ("/health", "/info", "/metrics", "/no", "/v1/no")]]

    healthy, ill, info, metrics, nowhere, nowhere_v1 = run(tokenizer, server, use)
    assert healthy.status == 200
    assert ill.status == 503
    assert ill.json["error_type"] == "unhealthy"
    assert info.json["model_id"] == "tiny"
    assert info.json["max_total_tokens"] == MAX_TOTAL_TOKENS
    text = metrics.body.decode()
    assert 'tgi_request_success{reason="eos_token"} 1\n' in text
    assert 'tgi_request_failure{err="validation"} 1\n' in text
    assert "tgi_request_count 2\n" in text
    assert f"wisp_edge_committed_tokens_total {len(server.tokens)}\n" in text
    assert "# TYPE tgi_request_duration histogram\n" in text
    assert 'tgi_request_duration_bucket{le="+Inf"} 1\n' in text
    assert nowhere.status == nowhere_v1.status == 404
    assert nowhere.json["error_type"] == "not_found"
    assert nowhere_v1.json["error"]["code"] == "not_found"


# -- OpenAI -----------------------------------------------------------------------------------------------------


def test_chat_completion(tokenizer: Tokenizer, server: FakeServer) -> None:
    body = {"model": "any", "messages": CHAT, "temperature": 0, "logprobs": True, "stop": "fox"}
    reply = post(tokenizer, server, "/v1/chat/completions", body).json
    (choice,) = reply["choices"]
    assert choice["message"] == {"role": "assistant", "content": TEXT.removesuffix("fox")}
    assert choice["finish_reason"] == "stop"
    assert "".join(t["token"] for t in choice["logprobs"]["content"]) == TEXT.removesuffix("fox")
    num_prompt = len(tokenizer.encode_chat(CHAT))
    assert reply["usage"]["prompt_tokens"] == num_prompt
    assert reply["usage"]["total_tokens"] == num_prompt + len(choice["logprobs"]["content"])
    assert reply["object"] == "chat.completion"
    (opened,) = server.opens
    assert opened.tokens.tolist() == tokenizer.encode_chat(CHAT).tolist()
    assert opened.max_new_tokens == MAX_TOTAL_TOKENS - num_prompt


def test_chat_stream(tokenizer: Tokenizer, server: FakeServer) -> None:
    body = {"messages": CHAT, "stream": True, "stream_options": {"include_usage": True}, "max_tokens": 4}
    reply = post(tokenizer, server, "/v1/chat/completions", body)
    assert reply.body.endswith(b"data: [DONE]\n\n")
    *chunks, end, usage = reply.events
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta["content"] for delta in deltas) == tokenizer.decode(server.tokens[:4])
    assert end["choices"][0] == {"index": 0, "finish_reason": "length", "logprobs": None, "delta": {}}
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 4
    assert len({event["id"] for event in reply.events}) == 1
    (opened,) = server.opens
    assert opened.sampling.temperature == 1.0  # OpenAI's default


def test_completion_of_text_and_of_tokens(tokenizer: Tokenizer, server: FakeServer) -> None:
    ids = tokenizer.encode("hello").tolist()
    for prompt in ("hello", ["hello"], ids):
        reply = post(tokenizer, server, "/v1/completions", {"prompt": prompt, "temperature": 0, "logprobs": 0}).json
        assert reply["choices"][0]["text"] == TEXT
        assert reply["choices"][0]["logprobs"]["text_offset"][:2] == [0, len(tokenizer.decode(server.tokens[:1]))]
    assert [opened.tokens.tolist() for opened in server.opens] == [ids] * 3
    streamed = post(tokenizer, server, "/v1/completions", {"prompt": "hello", "stream": True})
    assert "".join(event["choices"][0]["text"] for event in streamed.events) == TEXT


def test_models(tokenizer: Tokenizer, server: FakeServer) -> None:
    paths = ("/v1/models", "/v1/models/tiny", "/v1/models/other")

    async def use(house: House) -> list[Reply]:
        return [await house.get(path) for path in paths]

    listed, one, other = run(tokenizer, server, use)
    assert listed.json["data"] == [one.json]
    assert one.json["id"] == "tiny"
    assert other.status == 404


# -- drafts -----------------------------------------------------------------------------------------------------


def test_drafts_change_no_text_and_reach_the_page(tokenizer: Tokenizer) -> None:
    server = FakeServer(tokenizer, TEXT, 1)
    server.holds = True
    drafter = SleepingDrafter(0.002, lambda tokens: 5)
    speculation = Speculation(DraftDealer(lambda: drafter, 1), shipped_model("int4"), 200, "tiny", "fixed:3")

    async def use(house: House) -> Reply:
        request = asyncio.ensure_future(house.post("/ui/stream", {"messages": CHAT, "max_new_tokens": 6}))
        for _ in range(8):
            await asyncio.sleep(0.12)
            server.release(1)
        return await request

    reply = run(tokenizer, server, use, speculation=speculation)
    opening, *events, end = reply.events
    assert opening == {
        "type": "open", "prompt_tokens": len(tokenizer.encode_chat(CHAT)), "draft_model": "tiny", "rule": "fixed:3",
    }  # fmt: skip
    assert end == {"type": "end", "finish_reason": "length", "generated_tokens": 6}
    drafts = [event for event in events if event["type"] == "draft" and event["texts"]]
    assert drafts
    assert all(len(d["texts"]) == len(d["survival"]) <= 3 for d in drafts)
    assert "".join(drafts[0]["texts"]) == tokenizer.decode([5] * len(drafts[0]["texts"]))
    position, struck = 0, 0
    for event in events:  # every draft stands behind what the page has been told
        assert event["start"] == position
        if event["type"] == "commit":
            position += len(event["tokens"])
            struck += event["struck"]
            assert set(event["stats"]) == {"tokens_per_s", "acceptance_rate", "wdt_share", "round_trip_ms", "choice"}
    assert struck > 0
    assert len(server.drafts) > 0
    text = "".join(token["text"] for event in events if event["type"] == "commit" for token in event["tokens"])
    assert text == tokenizer.decode(server.tokens[:6])
    assert not drafting_threads()


def test_the_page_without_drafts(tokenizer: Tokenizer, server: FakeServer) -> None:
    reply = post(tokenizer, server, "/ui/stream", {"messages": CHAT, "draft": False, "temperature": 0.5, "seed": None})
    assert reply.events[0]["draft_model"] == "none"
    commits = [event for event in reply.events if event["type"] == "commit"]
    assert {token["origin"] for commit in commits for token in commit["tokens"]} == {"decoded"}
    server.error = LOST
    assert post(tokenizer, server, "/ui/stream", {"messages": CHAT}).events[-1]["type"] == "error"
    assert post(tokenizer, server, "/ui/stream", {"messages": []}).status == 422


def test_the_page_is_served(
    tokenizer: Tokenizer, server: FakeServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    page = tmp_path / "index.html"

    async def use(house: House) -> tuple[Reply, Reply]:
        monkeypatch.setattr("edge_runtime.gateway.ui_routes.PAGE", page)
        missing = await house.get("/ui")
        page.write_text("<!doctype html>")
        return missing, await house.get("/ui")

    missing, found = run(tokenizer, server, use)
    assert missing.status == 404
    assert found.body == b"<!doctype html>"
    assert found.headers["content-type"].startswith("text/html")
