"""The bearer token of `--token-file`: on every call, read anew, never without encryption, never shown."""

from __future__ import annotations

import argparse
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from tritonclient.grpc import service_pb2

from edge_runtime.gateway.app import _readiness
from edge_runtime.generate import tls_files
from edge_runtime.transport import GrpcStream, TlsFiles, read_token
from tests.factories import make_open
from wisp_plugin.errors import ConfigError, RequestRefused


class Gatekeeper(grpc.GenericRpcHandler):
    """Says that it is ready and refuses every stream; notes with which `authorization` each call came."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str | None]] = []

    def service(self, call: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        name = call.method.rpartition("/")[2]
        self.seen.append((name, dict(call.invocation_metadata).get("authorization")))
        if name == "ModelReady":
            ready = service_pb2.ModelReadyResponse(ready=True).SerializeToString()
            return grpc.unary_unary_rpc_method_handler(lambda request, context: ready)
        refusal = service_pb2.ModelStreamInferResponse(error_message="enough").SerializeToString()
        return grpc.stream_stream_rpc_method_handler(lambda requests, context: iter([refusal]))


def certificate(folder: Path) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1, and its key."""
    assert shutil.which("openssl"), "this test makes its certificate with openssl; install it"
    cert, key = folder / "cert.pem", folder / "key.pem"
    options = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=127.0.0.1 -addext subjectAltName=IP:127.0.0.1"
    subprocess.run(["openssl", *options.split(), "-out", cert, "-keyout", key], check=True, capture_output=True)
    return cert, key


def test_every_connection_carries_the_token_of_its_moment(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)
    token, gate = tmp_path / "token", Gatekeeper()
    token.write_text("first\n", encoding="ascii")
    server = grpc.server(ThreadPoolExecutor(2), handlers=(gate,))
    credentials = grpc.ssl_server_credentials([(key.read_bytes(), cert.read_bytes())])
    stream = GrpcStream(f"127.0.0.1:{server.add_secure_port('127.0.0.1:0', credentials)}", TlsFiles(cert, token=token))
    server.start()
    try:
        for text in ("first", "renewed"):
            token.write_text(f"{text}\n", encoding="ascii")
            stream.open(make_open())
            with pytest.raises(RequestRefused, match="enough"):
                stream.receive(10.0)
        stream.close()
    finally:
        server.stop(None).wait(5.0)
    calls = ("ModelReady", "ModelStreamInfer")
    assert gate.seen == [(call, f"Bearer {text}") for text in ("first", "renewed") for call in calls]


@pytest.mark.parametrize("text", ["", "\n", "two words", "two\nlines", "a\x07b", "clé"])
def test_what_is_no_token_is_refused_without_showing_it(text: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as refused:
        read_token(path)
    assert str(path) in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1
    assert not text.strip() or text.strip() not in str(refused.value)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        TlsFiles(token=tmp_path / "none")


def test_a_gateway_whose_token_has_gone_is_not_ready(tmp_path: Path) -> None:
    cert, _ = certificate(tmp_path)
    token = tmp_path / "token"
    token.write_text("first\n", encoding="ascii")
    is_ready = _readiness("127.0.0.1:1", TlsFiles(cert, token=token))
    token.unlink()
    assert not is_ready()


def test_no_token_without_encryption(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("secret\n", encoding="ascii")
    options = {"ca": None, "cert": None, "key": None, "token_file": str(path)}
    with pytest.raises(ConfigError, match="add --tls"):
        tls_files(argparse.Namespace(tls=False, **options))
    files = tls_files(argparse.Namespace(tls=True, **options))
    assert files is not None
    assert files.token == path
    assert "secret" not in repr(files)
