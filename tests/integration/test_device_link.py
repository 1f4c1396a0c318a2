"""What docs/devices.md promises: a small device (one core, little memory), and the way in through a proxy."""

from __future__ import annotations

import os
import re
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from edge_runtime.transport import GrpcStream, TlsFiles
from tests.integration.support import prompts, thin_open, wait_until
from triton_models.processes import free_ports
from triton_models.server_process import ServerProcess
from wisp_plugin.errors import TransportError
from wisp_plugin.messages import Commit

pytestmark = [pytest.mark.integration, pytest.mark.alone]
ROOT = Path(__file__).resolve().parents[2]
TOKEN = "a-token-of-this-device"
DATA_LIMIT_MB = 512  # private memory; docs/devices.md names this figure
NUM_TOKENS = "16"


def generate(server: str, *args: str, prepare: Callable[[], None] | None = None) -> subprocess.CompletedProcess[str]:
    """`wisp-edge generate` of a short text."""
    options = ("--chat", "--max-new-tokens", NUM_TOKENS, "--server", server, *args)
    command = [sys.executable, "-m", "edge_runtime.cli", "generate", "Name three colours.", *options]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60.0, check=False, cwd=ROOT, preexec_fn=prepare
    )


@pytest.fixture(scope="module")
def text(shared_server: ServerProcess) -> str:
    """What the server gives without drafts, directly."""
    result = generate(shared_server.grpc_url, "--no-draft")
    assert result.returncode == 0, result.stderr
    return result.stdout


def one_small_core() -> None:
    """In the child: one core, and a limit of private memory as on a board that does other things as well."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    resource.setrlimit(resource.RLIMIT_DATA, (DATA_LIMIT_MB << 20, DATA_LIMIT_MB << 20))


def test_one_core_and_little_memory(server: ServerProcess, text: str) -> None:
    result = generate(server.grpc_url, "--threads", "1", "--stats", prepare=one_small_core)
    assert result.returncode == 0, result.stderr
    assert result.stdout == text
    accepted = re.search(r"accepted (\d+)", result.stderr)
    assert accepted is not None
    assert int(accepted[1]) > 0, "it drafted, and was of use"


# -- through a proxy --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Proxy:
    """nginx with deploy/nginx.conf: its address, and the folder with certificates and tokens."""

    address: str
    folder: Path

    @property
    def ca(self) -> Path:
        return self.folder / "server.pem"

    def token(self, token: str) -> Path:
        """A file with `token`."""
        path = self.folder / f"token-{token}"
        path.write_text(f"{token}\n", encoding="ascii")
        return path


def certificate(folder: Path, name: str, subject: str) -> None:
    """A self-signed certificate `name`.pem and its key."""
    assert shutil.which("openssl"), "this test makes certificates with openssl; install it"
    options = f"req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN={subject} -addext subjectAltName=IP:127.0.0.1"
    files = ("-out", str(folder / f"{name}.pem"), "-keyout", str(folder / f"{name}-key.pem"))
    subprocess.run(["openssl", *options.split(), *files], check=True, capture_output=True)


@pytest.fixture(scope="module")
def proxy(shared_server: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """deploy/nginx.conf as it is, but for ports and folders, in front of the shared server."""
    nginx = shutil.which("nginx", path=os.environ["PATH"] + os.pathsep + "/usr/sbin")
    if nginx is None:
        pytest.skip("no nginx on PATH; on Debian and Ubuntu: nginx-light")
    folder, port = tmp_path_factory.mktemp("nginx"), free_ports().grpc
    for name, subject in (("server", "127.0.0.1"), ("device", "device"), ("stranger", "stranger")):
        certificate(folder, name, subject)
    (folder / "tokens.conf").write_text(f'"Bearer {TOKEN}" 1;\n', encoding="ascii")
    changes = {
        "listen 8443": f"listen 127.0.0.1:{port}",
        "grpc://127.0.0.1:8001": f"grpc://{shared_server.grpc_url}",
        "/etc/nginx/wisp-tokens.conf": f"{folder}/tokens.conf",
        "/etc/nginx/wisp/devices-ca.pem": f"{folder}/device.pem",
        "/etc/nginx/wisp/": f"{folder}/",
    }
    site = (ROOT / "deploy" / "nginx.conf").read_text(encoding="utf-8")
    for old, new in changes.items():
        assert old in site, f"deploy/nginx.conf has no {old!r} any more"
        site = site.replace(old, new)
    paths = "".join(
        f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    main = f"daemon off; pid {folder}/pid; error_log {folder}/error.log; events {{}} http {{ access_log off; {paths}\n"
    (folder / "nginx.conf").write_text(main + site + "}\n", encoding="utf-8")
    command = [nginx, "-p", str(folder), "-c", str(folder / "nginx.conf")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            wait_until(lambda: process.poll() is not None or answers(port), 10.0)
            assert process.poll() is None, (folder / "error.log").read_text(errors="replace")
            yield Proxy(f"127.0.0.1:{port}", folder)
        finally:
            process.terminate()


def answers(port: int) -> bool:
    """True if something listens there."""
    with socket.socket() as client:
        client.settimeout(1.0)
        return client.connect_ex(("127.0.0.1", port)) == 0


def test_a_bearer_token_opens_the_proxy(proxy: Proxy, text: str) -> None:
    result = generate(
        proxy.address, "--no-draft", "--tls", "--ca", str(proxy.ca), "--token-file", str(proxy.token(TOKEN))
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == text
    with pytest.raises(TransportError, match="401") as refused:
        first_commit(proxy, token=proxy.token("another"))
    assert "another" not in str(refused.value), "a token is not shown"


def test_a_client_certificate_opens_the_proxy(proxy: Proxy) -> None:
    def pair(name: str) -> dict[str, Path]:
        return {"cert": proxy.folder / f"{name}.pem", "key": proxy.folder / f"{name}-key.pem"}

    assert len(first_commit(proxy, **pair("device")).tokens) == 1
    for files in (pair("stranger"), {}):
        with pytest.raises(TransportError, match=proxy.address):
            first_commit(proxy, **files)


def first_commit(proxy: Proxy, **files: Path) -> Commit:
    """Of a session through the proxy."""
    stream = GrpcStream(proxy.address, TlsFiles(ca=proxy.ca, **files))
    try:
        stream.open(thin_open(prompts()[0], 4))
        commit = stream.receive(30.0)
        assert commit is not None
        return commit
    finally:
        stream.close()
