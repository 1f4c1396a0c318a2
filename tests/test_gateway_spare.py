"""The connection that a gateway makes ahead: used once, by the next session, and never in the way."""

from __future__ import annotations

import pytest

from edge_runtime.gateway.spare import Spare
from edge_runtime.transport import READY_HOLDS_S, GrpcStream
from tests.factories import make_open
from wisp_plugin.errors import TransportError


class Stream:
    def __init__(self, fails: bool = False) -> None:
        self.fails, self.is_prepared, self.is_closed = fails, False, False

    def prepare(self) -> None:
        if self.fails:
            raise TransportError("no server")
        self.is_prepared = True

    def close(self) -> None:
        self.is_closed = True


def test_the_next_session_takes_what_was_prepared() -> None:
    made: list[Stream] = []
    spare = Spare(lambda: made.append(Stream()) or made[-1])  # type: ignore[func-returns-value]
    assert not spare.take().is_prepared
    spare.prepare()
    spare.prepare()  # one is enough
    assert len(made) == 2
    assert spare.take() is made[1]
    assert made[1].is_prepared
    assert spare.take() is not made[1]


def test_a_server_that_is_away_is_no_failure() -> None:
    spare = Spare(lambda: Stream(fails=True))
    spare.prepare()
    assert not spare.take().is_prepared


def test_nothing_is_left_behind_close() -> None:
    made: list[Stream] = []
    spare = Spare(lambda: made.append(Stream()) or made[-1])  # type: ignore[func-returns-value]
    spare.prepare()
    spare.close()
    assert made[0].is_closed
    spare.prepare()
    assert len(made) == 1


class Client:
    def __init__(self) -> None:
        self.asked = self.closed = 0

    def is_model_ready(self, name: str, client_timeout: float) -> bool:
        self.asked += 1
        return True

    def start_stream(self, callback: object) -> None:
        pass

    def async_stream_infer(self, *args: object, **options: object) -> None:
        pass

    def stop_stream(self, cancel_requests: bool = False) -> None:
        pass

    def close(self) -> None:
        self.closed += 1


def test_a_prepared_stream_asks_again_only_when_its_answer_is_old(monkeypatch: pytest.MonkeyPatch) -> None:
    clients: list[Client] = []
    monkeypatch.setattr("edge_runtime.transport.connect", lambda *args: clients.append(Client()) or clients[-1])
    now_s = 100.0
    monkeypatch.setattr("edge_runtime.transport.time.monotonic", lambda: now_s)
    stream = GrpcStream("HERE")
    stream.prepare()
    stream.open(make_open())
    assert [client.asked for client in clients] == [1]
    stream.open(make_open())  # a lost connection: anew, from the beginning
    assert [(client.asked, client.closed) for client in clients] == [(1, 1), (1, 0)]
    stream.close()
    stream.prepare()
    now_s += READY_HOLDS_S + 1.0
    stream.open(make_open())
    assert [client.asked for client in clients] == [1, 1, 2]
    stream.prepare()
    stream.close()
    assert all(client.closed for client in clients)
