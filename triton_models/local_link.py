"""The way between two models of one tritonserver on one machine: a Unix socket, JSON lines, one user.

Why not Triton's own calls from model to model (BLS)? In its Python backend (2.51) they cannot be trusted with streams:
a call that begins while another thread waits for the next response of its own may stop both for ever, and the process
with them (three locks in turns: the interpreter's, that of the table of calls, that of one call's responses). It was
seen within seconds at 32 requests at once. A call also holds one of the 32 threads that send responses until its first
response is there. Through a socket, moreover, a vanished process is noticed at once, on either side.

Lines from `wisp_generate`: {"id", "lookup", "parameters", "session", "tokens"}, the parameters and tensors of the wire
(DESIGN.md section 6). Lines to it: {"id", "commit": [start, tokens, status, retry_after_ms]}, {"id", "error"}, {"id",
"end"}; each id ends with an error or an end.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
from collections.abc import Iterator
from typing import Any

MAX_LINE_BYTES = 1 << 24
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


def address() -> str:
    """Where the verifier of this process's tritonserver listens: a name without a file, unique on this machine.

    Triton starts the process of every model itself, so they have the same parent. Process ids are told apart by the
    namespace they belong to: containers may share a network, in which such names live.
    """
    return f"\0wisp-verifier-{os.stat('/proc/self/ns/pid').st_ino}-{os.getppid()}"


def is_same_user(connection: socket.socket) -> bool:
    """True if the process at the other end runs as our user: nobody else is talked to."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return bool(_CREDENTIALS.unpack(raw)[1] == os.getuid())


def encode(message: dict[str, Any]) -> bytes:
    """A line."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def messages(connection: socket.socket) -> Iterator[dict[str, Any]]:
    """What the other end sends, until it or somebody here closes the connection, or a line is no message."""
    with connection.makefile("rb") as file:
        try:
            while (line := file.readline(MAX_LINE_BYTES)).endswith(b"\n"):
                yield json.loads(line)
        except (OSError, ValueError):
            return


def shut(connection: socket.socket) -> None:
    """End a connection; whoever waits on it, here or there, is woken."""
    with contextlib.suppress(OSError):  # the other end was first
        connection.shutdown(socket.SHUT_RDWR)
