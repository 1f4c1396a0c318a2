"""An encrypted connection: the options of `wisp-edge` reach gRPC, and a server that is not trusted is refused."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from edge_runtime.transport import GrpcStream, TlsFiles
from tests.integration.conftest import ServerFactory
from tests.integration.support import prompts, running, thin_open
from tests.tiny_model import hf_folder
from wisp_plugin.errors import TransportError

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1 and its key."""
    assert shutil.which("openssl"), "this test makes its certificate with openssl; install it"
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    options = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=127.0.0.1 -addext subjectAltName=IP:127.0.0.1"
    subprocess.run(["openssl", *options.split(), "-out", cert, "-keyout", key], check=True, capture_output=True)
    return cert, key


def test_a_session_over_tls(make_own_server: ServerFactory, certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    tls = ("--grpc-use-ssl=true", f"--grpc-server-cert={cert}", f"--grpc-server-key={key}")
    opened = thin_open(prompts()[0][:4] % 300, 6)
    with running(make_own_server({"target": str(hf_folder())}, extra_args=tls)) as server:
        stream = GrpcStream(server.grpc_url, TlsFiles(ca=cert))
        stream.open(opened)
        commit = stream.receive(30.0)
        assert commit is not None
        assert len(commit.tokens) == 1
        stream.close()
        for untrusting in (GrpcStream(server.grpc_url), GrpcStream(server.grpc_url, TlsFiles())):
            with pytest.raises(TransportError, match=server.grpc_url):
                untrusting.open(opened)
