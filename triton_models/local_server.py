"""The verifier's end of the local link: sessions for other models of this tritonserver, straight into the engine."""

from __future__ import annotations

import contextlib
import errno
import logging
import queue
import socket
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from triton_models.local_link import address, encode, is_same_user, messages, shut
from triton_models.lookup_reply import LookupReply
from wisp_plugin.errors import InvalidRequest
from wisp_plugin.messages import Close, Commit, Draft, Open
from wisp_plugin.prompt_lookup import PromptLookup
from wisp_plugin.protocols import Reply
from wisp_plugin.wire import WireLimits, decode_request

MAX_PEERS = 8
MAX_QUEUED_LINES = 65_536  # on their way to a peer; one that reads so slowly is given up
POLL_S = 0.25  # how often the listening thread looks whether it should end
FLUSH_S = 2.0  # limit of sending what is queued when all ends

Submit = Callable[[Open | Draft | Close, Reply], None]

log = logging.getLogger(__name__)


class LocalServer:
    """Listens at `local_link.address()`."""

    def __init__(self, submit: Submit, limits: WireLimits, at: str | None = None) -> None:
        """`submit`: the engine's own, which any thread may call."""
        self._submit, self._limits, self._address = submit, limits, at or address()
        self._peers: list[_Peer] = []
        self._stop = threading.Event()
        self._listener: socket.socket | None = None
        self._thread = threading.Thread(target=self._serve, name="wisp-local", daemon=True)

    def start(self) -> None:
        """Listen, and start the thread that accepts connections."""
        self._listener = self._listen()
        self._thread.start()

    def stop(self) -> None:
        """Send what is queued, then end all connections."""
        self._stop.set()
        self._thread.join(4 * POLL_S)
        for peer in self._peers:
            peer.finish(FLUSH_S)

    def _listen(self) -> socket.socket | None:
        """None while another verifier of this tritonserver listens: when a model is loaded anew, for a moment."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(self._address)
        except OSError as error:
            listener.close()
            if error.errno != errno.EADDRINUSE:
                raise
            return None
        listener.listen(MAX_PEERS)
        listener.settimeout(POLL_S)
        return listener

    def _serve(self) -> None:
        while self._listener is None and not self._stop.wait(POLL_S):
            self._listener = self._listen()
        if self._listener is None:
            return
        with self._listener:
            while not self._stop.is_set():
                with contextlib.suppress(TimeoutError):
                    self._accept(self._listener.accept()[0])

    def _accept(self, connection: socket.socket) -> None:
        connection.settimeout(None)
        self._peers = [peer for peer in self._peers if not peer.is_closed]
        if not is_same_user(connection) or len(self._peers) >= MAX_PEERS:
            log.warning("wisp_verifier: a local connection is refused: of another user, or one too many")
            connection.close()
            return
        self._peers.append(_Peer(connection, self._submit, self._limits))


class _Peer:
    """One connection, a thread for each direction: the engine never waits for the other process."""

    def __init__(self, connection: socket.socket, submit: Submit, limits: WireLimits) -> None:
        self._connection, self._submit, self._limits = connection, submit, limits
        self._lines: queue.Queue[bytes | None] = queue.Queue(MAX_QUEUED_LINES)
        self.is_closed = False
        self._writer = threading.Thread(target=self._write, name="wisp-local-out", daemon=True)
        self._writer.start()
        threading.Thread(target=self._read, name="wisp-local-in", daemon=True).start()

    def put(self, message: dict[str, Any]) -> None:
        """Send later. A peer that is gone is told nothing; one that does not read is given up."""
        if self.is_closed:
            return
        try:
            self._lines.put_nowait(encode(message))
        except queue.Full:
            log.warning("wisp_verifier: a local connection is ended: it does not read")
            self.close()

    def close(self) -> None:
        """End the connection now; its sessions are then found without a client."""
        self.is_closed = True
        shut(self._connection)
        with contextlib.suppress(queue.Full):  # then the writer is inside a send, which fails now
            self._lines.put_nowait(None)

    def finish(self, limit_s: float) -> None:
        """Send what is queued, then close."""
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(None)
        self._writer.join(limit_s)
        self.close()

    def _read(self) -> None:
        try:
            for message in messages(self._connection):
                self._take(message)
        finally:
            self.close()

    def _take(self, message: dict[str, Any]) -> None:
        reply = _PeerReply(self, int(message["id"]))
        tensors = {"SESSION": np.array([message["session"].encode()], np.object_)}
        if "tokens" in message:
            tensors["TOKENS"] = np.array(message["tokens"], np.int32)
        try:
            request = decode_request(message["parameters"], tensors, self._limits)
        except InvalidRequest as error:
            reply.fail(str(error))
            return
        if not isinstance(request, Open):
            self._submit(request, reply)
            return
        drafts = PromptLookup(request.session, request.tokens, request.end, drafts=message["lookup"] == "auto")
        self._submit(request, LookupReply(reply, self._submit, drafts))

    def _write(self) -> None:
        try:
            while (line := self._lines.get()) is not None:
                self._connection.sendall(line)
        except OSError:
            pass  # the other process has gone, or the connection was given up
        finally:
            self.close()


class _PeerReply:
    """`engine.Reply` over a connection."""

    def __init__(self, peer: _Peer, number: int) -> None:
        self._peer, self._number = peer, number

    def send(self, commit: Commit) -> None:
        """See `Reply.send`."""
        told = [commit.start, commit.tokens.tolist(), int(commit.status), commit.retry_after_ms]
        self._peer.put({"id": self._number, "commit": told})

    def finish(self) -> None:
        """See `Reply.finish`."""
        self._peer.put({"id": self._number, "end": True})

    def fail(self, message: str) -> None:
        """See `Reply.fail`."""
        self._peer.put({"id": self._number, "error": message})

    def is_cancelled(self) -> bool:
        """See `Reply.is_cancelled`."""
        return self._peer.is_closed
