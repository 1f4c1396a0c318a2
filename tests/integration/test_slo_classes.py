"""SLO classes and admission control over the real wire: classes by name, `overloaded`, and getting through later."""

from __future__ import annotations

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from bench.live import Drafting, run_session
from tests.integration.conftest import ServerFactory
from tests.integration.support import (
    CLASSES,
    GREEDY,
    Judge,
    RawStream,
    Session,
    prompts,
    raw_stream,
    running,
    thin_open,
    wait_until,
)
from triton_models.server_process import ServerProcess
from wisp_plugin.admission import LEAST_RETRY_S
from wisp_plugin.errors import RequestRefused
from wisp_plugin.messages import Commit, Open, Slo, Status
from wisp_plugin.wire import encode_request
from wisp_plugin.wire_values import named_slo

pytestmark = [pytest.mark.integration, pytest.mark.alone]
NUM_TOKENS = 8


def open_of_class(name: str, num_tokens: int = NUM_TOKENS) -> Open:
    """An open that asks for the class `name`."""
    return dataclasses.replace(thin_open(prompts()[0], num_tokens), slo=named_slo(name))


def send_open(stream: RawStream, opened: Open) -> None:
    """Send an open as our client encodes it, without our client's patience."""
    parameters, tensors = encode_request(opened)
    stream.send(tensors, **parameters)


def test_a_class_is_asked_for_by_name(server: ServerProcess, judge: Judge) -> None:
    for name in ("tight", "default"):
        result = run_session(server.grpc_url, open_of_class(name), Drafting())
        assert len(result.tokens) == NUM_TOKENS
        judge.check(prompts()[0], result.tokens, GREEDY)
    with pytest.raises(RequestRefused, match=r"parameter 'slo' is 'tihgt'; allowed: tight, loose$"):
        run_session(server.grpc_url, open_of_class("tihgt"), Drafting())
    both = {"tpot_ms": "100"}
    with raw_stream(server.grpc_url) as stream:
        parameters, tensors = encode_request(open_of_class("tight"))
        stream.send(tensors, **parameters | both)
        assert "'slo' and 'tpot_ms' exclude each other" in stream.error()
    # Resuming means the same SLO: a class is no more and no less than its numbers under its name.
    first = Session.make(server.grpc_url, open_of_class("tight", 200))
    first.run(4)
    other = dataclasses.replace(first.opened, slo=Slo(60_000.0, 10_000.0))
    with pytest.raises(RequestRefused, match="with other parameters"):
        run_session(server.grpc_url, other, Drafting())
    first.client.close()


def test_an_overloaded_server_says_when_to_come_again_and_then_serves(
    make_own_server: ServerFactory, judge: Judge
) -> None:
    long = open_of_class("tight", 2_000)
    with running(make_own_server({"slo_classes": CLASSES, "policy": "wisp", "max_load": 0.0001})) as server:
        first = Session.make(server.grpc_url, long)
        goes_on = threading.Event()
        goes_on.set()

        def keep_busy() -> None:
            """The session that is the load, until it is told to leave."""
            for _ in first.client.run():
                if not goes_on.is_set():
                    break
            first.client.close()

        with ThreadPoolExecutor(2) as pool:
            busy = pool.submit(keep_busy)
            wait_until(lambda: len(first.state.generated) > 2, 20.0)
            refusal = refused_open(server.grpc_url)
            assert refusal.status is Status.OVERLOADED
            assert len(refusal.tokens) == 0
            assert refusal.retry_after_ms is not None
            assert 100 <= refusal.retry_after_ms <= 10_000
            # Our client waits as told, tries again and gets through: here when the load has gone.
            late = Session.make(server.grpc_url, open_of_class("loose"))
            waiting = pool.submit(late.run)
            wait_until(lambda: late.client._lost_since_s is not None, 20.0)
            assert not len(late.state.generated)
            goes_on.clear()
            tokens = waiting.result(timeout=40.0)
            busy.result(timeout=10.0)
        late.client.close()
        assert late.state.stats.num_reopened >= 1
        assert late.client.times.ttft_ms >= 1e3 * LEAST_RETRY_S  # waiting for an overloaded server counts
        judge.check(prompts()[0], tokens, GREEDY)


def refused_open(server: str) -> Commit:
    """The only answer to an open that is refused."""
    with raw_stream(server) as stream:
        send_open(stream, open_of_class("loose"))
        return stream.commit()
