"""The gateway when something is short or breaks: places, servers, clients that hang up or read nothing."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import numpy as np
import pytest

from edge_runtime.gateway.errors import Refusal
from edge_runtime.gateway.generation import Times
from edge_runtime.gateway.parameters import GenerationRequest
from edge_runtime.gateway.workers import Workers
from edge_runtime.tokenizer import Tokenizer
from tests import tiny_model
from tests.gateway_fakes import (
    CHAT,
    LOST,
    TEXT,
    FakeServer,
    FakeTransport,
    House,
    Reply,
    generate,
    post,
    run,
)
from wisp_plugin.errors import RequestRefused
from wisp_plugin.messages import Sampling, Status


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_model.write_tokenizer(folder)
    return Tokenizer.load(folder)


@pytest.fixture
def server(tokenizer: Tokenizer) -> FakeServer:
    return FakeServer(tokenizer, TEXT)


# -- limits -----------------------------------------------------------------------------------------------------


def test_one_request_too_many_is_overloaded(tokenizer: Tokenizer, server: FakeServer) -> None:
    server.holds = True

    async def use(house: House) -> list[Reply]:
        first = [asyncio.ensure_future(house.post("/generate", {"inputs": "hello"})) for _ in range(3)]
        await house.until(lambda: len(server.opens) == 2)
        assert house.sessions.num_waiting == 1
        bodies = {"/generate": {"inputs": "a"}, "/v1/completions": {"prompt": "a"}}
        refused = [await house.post(path, body) for path, body in bodies.items()]
        server.release()
        await house.until(lambda: len(server.opens) == 3)
        server.release()
        return [*refused, *await asyncio.gather(*first)]

    tgi, openai, *served = run(tokenizer, server, use, max_sessions=2, max_requests=3, server_wait_s=10.0)
    assert tgi.status == openai.status == 429
    assert tgi.json["error_type"] == "overloaded"
    assert tgi.headers["retry-after"]
    assert openai.json["error"]["type"] == "rate_limit_error"
    assert [reply.json["generated_text"] for reply in served] == [TEXT] * 3


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
def test_who_has_been_answered_is_not_in_the_way(
    tokenizer: Tokenizer, server: FakeServer, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    close, may_close = FakeTransport.close, threading.Event()

    def held_close(self: FakeTransport) -> None:
        assert may_close.wait(5.0)
        close(self)

    monkeypatch.setattr(FakeTransport, "close", held_close)

    async def use(house: House) -> list[Reply]:
        first = await house.post(path, {"inputs": "hello"})
        second = asyncio.ensure_future(house.post(path, {"inputs": "hello"}))
        await house.until(lambda: house.sessions.num_waiting == 1)
        may_close.set()
        return [first, await second]

    replies = run(tokenizer, server, use, max_sessions=1, max_requests=1, server_wait_s=5.0)
    assert [reply.status for reply in replies] == [200] * 2


def test_who_waits_too_long_for_a_session_is_told(tokenizer: Tokenizer, server: FakeServer) -> None:
    server.holds = True

    async def use(house: House) -> Reply:
        first = asyncio.ensure_future(house.post("/generate", {"inputs": "hello"}))
        await house.until(lambda: len(server.opens) == 1)
        late = await house.post("/generate", {"inputs": "hello"})
        server.release()
        await first
        return late

    late = run(tokenizer, server, use, max_sessions=1)
    assert late.status == 429
    assert "no session became free" in late.json["error"]


# -- servers ----------------------------------------------------------------------------------------------------


def test_a_device_without_room_for_a_thread_is_overloaded(
    tokenizer: Tokenizer, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_thread(self: Workers, work: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(Workers, "run", no_thread)
    reply = generate(tokenizer, server)  # `run` looks that nothing of the request is left
    assert (reply.status, reply.json["error_type"]) == (429, "overloaded")


def test_a_server_that_is_away_is_waited_for(tokenizer: Tokenizer, server: FakeServer) -> None:
    server.error = LOST

    async def use(house: House) -> Reply:
        request = asyncio.ensure_future(house.post("/generate", {"inputs": "hello"}))
        await house.until(lambda: len(server.opens) == 2)
        server.error = None
        return await request

    assert run(tokenizer, server, use, server_wait_s=10.0).json["generated_text"] == TEXT


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/v1/chat/completions"])
def test_a_server_that_stays_away_is_503(tokenizer: Tokenizer, server: FakeServer, path: str) -> None:
    server.error = LOST
    body = {"messages": CHAT, "stream": True} if "chat" in path else {"inputs": "hello"}
    reply = post(tokenizer, server, path, body)
    assert reply.status == 503
    assert "no server at HERE" in reply.body.decode()
    assert len(server.opens) > 1


def test_refusals_of_the_server(tokenizer: Tokenizer, server: FakeServer) -> None:
    server.error = RequestRefused("the prompt has 9 tokens; the context window holds 4 with the output")
    assert generate(tokenizer, server).status == 422
    server.error = RequestRefused("the client's tokenizer differs: its vocab_hash is 1, the server's 2")
    reply = generate(tokenizer, server)
    assert reply.status == 424
    assert reply.json["error_type"] == "generation"
    server.error, server.status = None, Status.OVERLOADED
    assert generate(tokenizer, server).status == 429


def test_an_error_in_the_middle_of_a_stream_is_an_event(tokenizer: Tokenizer, server: FakeServer) -> None:
    server.holds = True

    async def use(house: House) -> Reply:
        request = asyncio.ensure_future(house.post("/generate_stream", {"inputs": "hello"}))
        await house.until(lambda: bool(server.opens))
        server.release(1)
        await asyncio.sleep(0.05)
        server.transports[0].inbox.put(RequestRefused("the engine has stopped"))
        return await request

    reply = run(tokenizer, server, use)
    assert reply.status == 200
    assert len(reply.events) == server.size + 1
    assert reply.events[-1]["error_type"] == "generation"
    assert "the engine has stopped" in reply.events[-1]["error"]


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
def test_a_defect_is_no_traceback(tokenizer: Tokenizer, server: FakeServer, path: str) -> None:
    server.error = ZeroDivisionError("secret")
    reply = generate(tokenizer, server, path)
    assert reply.status == 500
    assert reply.json["error_type"] == "internal"
    assert "secret" not in reply.body.decode()


# -- hang-ups ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/ui/stream"])
def test_a_client_that_hangs_up_frees_its_session(tokenizer: Tokenizer, server: FakeServer, path: str) -> None:
    server.holds = True
    body = {"messages": CHAT} if "ui" in path else {"inputs": "hello"}

    async def use(house: House) -> None:
        is_gone = False
        request = asyncio.ensure_future(house.post(path, body, leaves=lambda reply: is_gone))
        await house.until(lambda: bool(server.opens))
        server.release(1)
        await asyncio.sleep(0.05)
        assert len(house.sessions.running) == 1
        is_gone = True
        await house.until(lambda: len(server.closes) == 1)
        await request
        await house.until(lambda: not house.sessions.running)
        assert house.gateway.metrics.failures.values()[-1] == 1

    run(tokenizer, server, use, max_sessions=1)


def test_who_hangs_up_while_waiting_leaves_the_queue(tokenizer: Tokenizer, server: FakeServer) -> None:
    server.holds = True

    async def use(house: House) -> None:
        first = asyncio.ensure_future(house.post("/generate", {"inputs": "hello"}))
        await house.until(lambda: bool(server.opens))
        await house.post("/generate", {"inputs": "hello"}, leaves=lambda reply: house.sessions.num_waiting == 1)
        assert house.sessions.num_requests == 1
        server.release()
        await first

    run(tokenizer, server, use, max_sessions=1, server_wait_s=10.0)


def test_a_client_that_reads_nothing_is_dropped(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_runtime.gateway.generation.SLOW_CLIENT_S", 0.05)
    monkeypatch.setattr("edge_runtime.gateway.generation.MAX_BATCHES", 2)
    server = FakeServer(tokenizer, TEXT, 1)

    async def use(house: House) -> None:
        wanted = GenerationRequest(np.array([5, 6], np.int32), "", 100, Sampling())
        generation = await house.sessions.start(wanted, Times(0.0))
        await house.until(lambda: not house.sessions.running)
        with pytest.raises(Refusal, match="has read nothing"):  # who reads on is not left waiting
            async for _ in generation:
                pass

    run(tokenizer, server, use)
    assert len(server.closes) == 1
