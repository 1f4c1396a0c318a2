"""The way between the models: a real socket, the real engine on a fake target, and everything that can break."""

from __future__ import annotations

import itertools
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from tests.factories import ids
from tests.fakes import VOCAB_SIZE, FakeVerifier, make_engine, target_alone
from triton_models import local_link, local_server
from triton_models.local_client import LocalCalls
from triton_models.local_server import LocalServer
from wisp_plugin.config import EngineConfig
from wisp_plugin.errors import RequestRefused, TransportError
from wisp_plugin.messages import Status
from wisp_plugin.wire import WireLimits, new_session_id

LIMITS = WireLimits(VOCAB_SIZE, 256, max_draft_ahead=64)
PROMPT = ids(1, 2, 3)
LIMIT_S = 5.0
_NUMBERS = itertools.count()


class Side:
    """A verifier's process: engine and local server at an address of the test's own."""

    def __init__(self, at: str, verifier: FakeVerifier | None = None) -> None:
        config = EngineConfig(cancel_poll_s=0.01)
        self.engine = make_engine(verifier or FakeVerifier(num_blocks=256), time.monotonic, config)  # type: ignore[arg-type]
        self.server = LocalServer(self.engine.submit, LIMITS, at)
        self.engine.start()
        self.server.start()

    def stop(self) -> None:
        self.engine.stop()
        self.server.stop()

    @property
    def num_sessions(self) -> int:
        return self.engine._table.num_attached


@pytest.fixture
def at() -> str:
    """An address that nobody else uses."""
    return f"\0wisp-test-{os.getpid()}-{next(_NUMBERS)}"


@pytest.fixture
def side(at: str) -> Iterator[Side]:
    side = Side(at)
    yield side
    side.stop()


@pytest.fixture
def calls(at: str) -> Iterator[LocalCalls]:
    calls = LocalCalls(LIMIT_S, at)
    yield calls
    calls.stop()


def begin(calls: LocalCalls, num_tokens: int = 20, lookup: str = "auto", **parameters: Any) -> tuple[str, Any]:
    """A session of its own, and its commits."""
    session = new_session_id()
    wanted = {"op": "open", "protocol": 1, "max_new_tokens": num_tokens, "ignore_eos": True} | parameters
    return session, calls.open(session, wanted, PROMPT, lookup)


def wait_until(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end_s, "it does not come about"
        time.sleep(0.002)


@pytest.mark.parametrize("lookup", ["auto", "off"])
def test_a_session_gives_the_targets_tokens(side: Side, calls: LocalCalls, lookup: str) -> None:
    commits = list(begin(calls, 100, lookup)[1])
    tokens = [int(t) for commit in commits for t in commit.tokens]
    assert tokens == target_alone(PROMPT, 103)[3:]
    assert [commit.status for commit in commits] == [Status.RUNNING] * (len(commits) - 1) + [Status.LENGTH]
    assert all(np.diff([commit.start for commit in commits]) > 0)


def test_many_sessions_share_the_connection(side: Side, calls: LocalCalls) -> None:
    found: list[list[int]] = []

    def run() -> None:
        for _ in range(5):
            found.append([int(t) for commit in begin(calls, 30)[1] for t in commit.tokens])

    threads = [threading.Thread(target=run) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30.0)
    assert found == [target_alone(PROMPT, 33)[3:]] * 80
    wait_until(lambda: side.num_sessions == 0)


def test_a_close_ends_the_commits(side: Side, calls: LocalCalls) -> None:
    session, commits = begin(calls, 200)
    next(commits)
    calls.close(session)
    assert list(commits)[-1].status in (Status.CLOSED, Status.LENGTH)
    calls.close(session)  # it has ended: no harm
    calls.close("f" * 32)
    assert next(begin(calls)[1]).status is Status.RUNNING


def test_what_the_verifier_refuses(side: Side, calls: LocalCalls) -> None:
    for parameters, message in (
        ({"top_k": -4}, "parameter 'top_k' is -4; allowed"),
        ({"beams": 1}, "unknown parameter 'beams' for 'open'; "),
        ({"max_new_tokens": 999}, "parameter 'max_new_tokens' is 999; "),
    ):
        with pytest.raises(RequestRefused, match=message):
            next(begin(calls, **parameters)[1])
    assert next(begin(calls)[1]).status is Status.RUNNING


def test_nobody_there_is_one_line(calls: LocalCalls) -> None:
    with pytest.raises(TransportError, match=r"^unavailable: model 'wisp_verifier' cannot be reached, it has"):
        begin(calls)
    calls.close("f" * 32)


def test_a_verifier_that_vanishes_and_comes_back(at: str, calls: LocalCalls) -> None:
    stuck = threading.Event()
    side = Side(at, FakeVerifier(num_blocks=256, on_run=lambda: stuck.wait(LIMIT_S) and None))
    _, commits = begin(calls)
    wait_until(lambda: side.num_sessions == 1 and side.server._peers)  # who is read from may not be among them yet
    for peer in side.server._peers:
        peer.close()
    with pytest.raises(TransportError, match="unavailable: the verifier has gone"):
        next(commits)
    stuck.set()
    side.stop()
    with pytest.raises(TransportError, match="cannot be reached"):
        begin(calls)
    side = Side(at)
    assert len(list(begin(calls)[1])) > 0
    side.stop()


def _reaches(calls: LocalCalls) -> bool:
    try:
        next(begin(calls)[1])
    except TransportError:
        return False
    return True


def test_an_engine_that_stops_tells_so(at: str, calls: LocalCalls) -> None:
    go_on = threading.Semaphore(3)
    side = Side(at, FakeVerifier(num_blocks=256, on_run=lambda: go_on.acquire(timeout=0.2) and None))
    _, commits = begin(calls, 200)
    next(commits)
    side.stop()
    assert list(commits)[-1].status is Status.CLOSED
    with pytest.raises(TransportError):
        list(begin(calls)[1])


def test_a_client_that_vanishes_frees_its_sessions(at: str) -> None:
    side = Side(at, FakeVerifier(num_blocks=256, on_run=lambda: time.sleep(0.01)))
    calls = LocalCalls(LIMIT_S, at)
    for _ in range(3):
        next(begin(calls, 200)[1])
    calls.stop()
    wait_until(lambda: side.num_sessions == 0)
    side.stop()


def test_silence_has_a_limit(at: str) -> None:
    go_on = threading.Event()
    side = Side(at, FakeVerifier(num_blocks=256, on_run=lambda: go_on.wait(LIMIT_S) and None))
    calls = LocalCalls(0.05, at)
    with pytest.raises(TransportError, match=r"^unavailable: nothing has come from the verifier for 0\.05 s$"):
        list(begin(calls)[1])
    go_on.set()
    calls.stop()
    side.stop()


def test_a_client_that_does_not_read_is_given_up(at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine never waits for it."""
    monkeypatch.setattr(local_server, "MAX_QUEUED_LINES", 4)
    side = Side(at)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    connection.connect(at)
    parameters = {"op": "open", "protocol": 1, "max_new_tokens": 200, "ignore_eos": True}
    for number in range(2000):
        line = {"id": number, "session": new_session_id(), "parameters": parameters, "tokens": [1], "lookup": "off"}
        try:
            connection.sendall(local_link.encode(line | {"tokens": [1, 999]}))  # each is refused
        except OSError:
            break
    wait_until(lambda: all(peer.is_closed for peer in side.server._peers))
    side.stop()
    connection.close()


def test_two_servers_at_one_address_take_turns(at: str, calls: LocalCalls) -> None:
    """As when Triton loads a model anew: the new one comes before the old one goes."""
    old = Side(at)
    assert _reaches(calls)
    new = Side(at)
    old.stop()
    wait_until(lambda: _reaches(calls))
    assert len(list(begin(calls)[1])) > 0
    new.stop()


def test_only_our_user_is_talked_to(side: Side, calls: LocalCalls, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _reaches(calls)
    calls.stop()
    monkeypatch.setattr(local_link.os, "getuid", lambda: os.geteuid() + 1)
    with pytest.raises(TransportError, match="it runs as another user"):
        begin(calls)


def test_the_address_is_that_of_the_servers_process() -> None:
    assert local_link.address().startswith("\0wisp-verifier-")
    assert local_link.address().endswith(f"-{os.getppid()}")
