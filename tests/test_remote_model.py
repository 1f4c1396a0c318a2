"""A model on a server that does not answer, refuses or is not there: what the person at the command reads."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc

from tests.test_plugin_config import CONFIG
from triton_models import cli, remote_model
from triton_models.remote_model import RemoteModel, RequestSize
from wisp_plugin.errors import ModelError

ROOT = Path(__file__).resolve().parents[1]
SIZE = RequestSize(256, 0, 7)


class Server(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Tells a model's configuration, and answers no request before it is released, or refuses all."""

    def __init__(self) -> None:
        self.is_released = threading.Event()
        self.refusal: str | None = None
        self.has_statistics = True

    def ModelConfig(self, request: Any, context: grpc.ServicerContext) -> Any:
        """Of one model, whatever it is called."""
        config = text_format.Parse(CONFIG, model_config_pb2.ModelConfig())
        return service_pb2.ModelConfigResponse(config=config)

    def ModelStatistics(self, request: Any, context: grpc.ServicerContext) -> Any:
        """None so far."""
        if not self.has_statistics:
            context.abort(grpc.StatusCode.NOT_FOUND, "the model\nis gone")
        return service_pb2.ModelStatisticsResponse(model_stats=[service_pb2.ModelStatistics(name="mine")])

    def ModelInfer(self, request: Any, context: grpc.ServicerContext) -> Any:
        """An empty answer."""
        if self.refusal is not None:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, self.refusal)
        self.is_released.wait(30)
        return service_pb2.ModelInferResponse(model_name="mine")


@pytest.fixture
def server() -> Iterator[Server]:
    service = Server()
    server = grpc.server(ThreadPoolExecutor(4))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(service, server)
    service.url = f"localhost:{server.add_insecure_port('localhost:0')}"  # type: ignore[attr-defined]
    server.start()
    yield service
    service.is_released.set()
    server.stop(None).wait()


def a_model(server: Any, lines: list[str]) -> RemoteModel:
    return RemoteModel(server.url, "mine", "IDS", "value:PAST", {}, lines.append)


def test_a_model_that_does_not_answer_is_told_of_while_waiting_and_at_the_end(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    model = a_model(server, lines)
    monkeypatch.setattr(remote_model, "_REQUEST_LIMIT_S", 1.0)
    monkeypatch.setattr(remote_model, "_SHOWN_EVERY_S", 0.2)
    with pytest.raises(ModelError) as raised:
        model.burst(SIZE, 2)
    assert str(raised.value) == (
        f"model 'mine' on {server.url} did not answer a request of 256 new tokens, 7 context tokens (2 at once) within "
        "1 s; requests get smaller by --max-tokens and --max-context"
    )
    assert len(lines) >= 2
    assert lines[0].startswith("profile: no answer to a request of 256 new tokens, 7 context tokens (2 at once) for 0 ")


def test_a_late_answer_is_an_answer(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(remote_model, "_SHOWN_EVERY_S", 0.05)
    threading.Timer(0.3, server.is_released.set).start()
    assert a_model(server, lines).burst(SIZE, 1) == {}  # the server's statistics tell of no batch
    assert lines


def test_a_refusal_describes_the_request_in_words(server: Any) -> None:
    server.refusal = "too\nlong"
    with pytest.raises(ModelError) as raised:
        a_model(server, []).burst(SIZE, 1)
    expected = "refuses a request of 256 new tokens, 7 context tokens: [StatusCode.INVALID_ARGUMENT] too long"
    assert str(raised.value) == f"model 'mine' on {server.url} {expected}"


def test_statistics_that_cannot_be_had_are_an_error_in_a_line(server: Any) -> None:
    model = a_model(server, [])
    server.has_statistics = False
    with pytest.raises(ModelError, match=r"^model 'mine' on \S+: \[StatusCode.NOT_FOUND\] the model is gone$"):
        model.burst(SIZE, 1)


@pytest.mark.parametrize(
    ("size", "words"),
    [(RequestSize(1), "1 new token"), (RequestSize(1, 15, 1), "1 new token, 15 draft tokens, 1 context token")],
)
def test_sizes_in_words(size: RequestSize, words: str) -> None:
    assert size.in_words() == words


def test_the_command_imports_no_torch() -> None:
    """It takes seconds to import, and nothing of it is needed to measure somebody else's model."""
    program = (
        "import sys; from triton_models import cli\n"
        "code = cli.main(['profile', '--model', 'mine', '--url', 'localhost:1', '--output', 'never'])\n"
        "print(code, [name in sys.modules for name in ('triton_models.remote_profile', 'torch', 'transformers')])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "2 [True, False, False]\n", done.stderr
    assert "model 'mine' on localhost:1" in done.stderr


def test_the_command_names_the_request_that_was_refused(server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    server.refusal = "no"
    assert cli.main(["profile", "--model", "mine", "--url", server.url, "--tokens-input", "IDS"]) == 2
    assert "refuses a request of 256 new tokens: " in capsys.readouterr().err
