"""TCP ports, process groups, and the guard that ends a group when its parent has died."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import subprocess
from pathlib import Path
from typing import IO, NamedTuple

from wisp_plugin.errors import ConfigError

SHM = Path("/dev/shm")


class Ports(NamedTuple):
    """TCP ports of one server."""

    grpc: int
    http: int
    metrics: int


DEFAULT_PORTS = Ports(grpc=8001, http=8000, metrics=8002)  # Triton's own


def free_ports(host: str = "127.0.0.1") -> Ports:
    """Three ports that are free now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in Ports._fields]
        for sock in sockets:
            sock.bind((host, 0))
        return Ports(*(sock.getsockname()[1] for sock in sockets))


def check_ports_free(host: str, ports: Ports) -> None:
    """Raise ConfigError, naming port and option, if one of them cannot be listened on."""
    if len(set(ports)) != len(ports):
        raise ConfigError(f"--grpc-port, --http-port and --metrics-port must differ, not {', '.join(map(str, ports))}")
    for name, port in ports._asdict().items():
        if not 1 <= port <= 65535:
            raise ConfigError(f"--{name}-port is {port}; allowed: 1 to 65535")
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind((host, port))
            except OSError as error:
                reason = error.strerror
                raise ConfigError(f"cannot listen on {host}:{port} ({reason}); choose with --{name}-port") from None


def group_members(group: int) -> list[int]:
    """Ids of the live processes (no zombies) of a process group."""
    members = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            state, _, member_group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(member_group) == group and state not in "ZX":
                members.append(int(stat.parent.name))
    return members


def kill_group(group: int) -> None:
    """SIGKILL for every process of a group that may be gone."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def start_guard(group: int, shm_prefix: str) -> subprocess.Popen[bytes]:
    """A shell that acts when its standard input ends without a line: then we have died."""
    script = f"read line || {{ kill -KILL -{group}; rm -f {shlex.quote(str(SHM / shm_prefix))}*; }}"
    return subprocess.Popen(
        ["/bin/sh", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def dismiss_guard(guard: subprocess.Popen[bytes]) -> None:
    """Let a guard end without acting."""
    pipe: IO[bytes] | None = guard.stdin
    assert pipe is not None
    with contextlib.suppress(BrokenPipeError):
        pipe.write(b"done\n")
        pipe.close()
    guard.wait()
