"""The other end of the local link: sessions of the verifier for `wisp_generate`."""

from __future__ import annotations

import itertools
import queue
import socket
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from triton_models.local_link import address, encode, is_same_user, messages, shut
from wisp_plugin.errors import RequestRefused, TransportError
from wisp_plugin.messages import Commit, Status, Tokens
from wisp_plugin.wire import UNAVAILABLE
from wisp_plugin.wire_values import Parameter

CONNECT_LIMIT_S = 2.0
_GONE = "the verifier has gone"


class LocalCalls:
    """`generate_session.Calls` over one connection, made when it is needed and again when it has broken."""

    def __init__(self, silence_limit_s: float, at: str | None = None) -> None:
        """A session that hears nothing for `silence_limit_s` is given up."""
        self._silence_limit_s, self._address = silence_limit_s, at or address()
        self._lock = threading.Lock()
        self._link: _Link | None = None

    def open(self, session: str, parameters: Mapping[str, Parameter], tokens: Tokens, lookup: str) -> Iterator[Commit]:
        """See `Calls.open`."""
        link = self._connected()
        message = {"parameters": dict(parameters), "session": session, "tokens": tokens.tolist(), "lookup": lookup}
        number, answers = link.ask(message)
        return self._commits(link, number, answers)

    def close(self, session: str) -> None:
        """See `Calls.close`."""
        with self._lock:
            link = self._link
        if link is not None and not link.is_closed:  # else the session has ended with its connection
            link.tell({"parameters": {"op": "close"}, "session": session})

    def stop(self) -> None:
        """End the connection."""
        with self._lock:
            if self._link is not None:
                self._link.close()

    def _connected(self) -> _Link:
        with self._lock:
            if self._link is None or self._link.is_closed:
                self._link = _Link(self._connect())
            return self._link

    def _connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(CONNECT_LIMIT_S)
        try:
            connection.connect(self._address)
            if not is_same_user(connection):
                raise PermissionError(0, "it runs as another user")
        except OSError as error:
            connection.close()
            reason = f"model 'wisp_verifier' cannot be reached, it has to be loaded too: {error.strerror or error}"
            raise TransportError(f"{UNAVAILABLE}{reason}") from None
        connection.settimeout(None)
        return connection

    def _commits(self, link: _Link, number: int, answers: queue.SimpleQueue[dict[str, Any]]) -> Iterator[Commit]:
        try:
            while True:
                answer = answers.get(timeout=self._silence_limit_s)
                if "end" in answer:
                    return
                if "error" in answer:
                    message = str(answer["error"])
                    raise TransportError(message) if message.startswith(UNAVAILABLE) else RequestRefused(message)
                yield _commit(*answer["commit"])
        except queue.Empty:
            silence = f"nothing has come from the verifier for {self._silence_limit_s:g} s"
            raise TransportError(f"{UNAVAILABLE}{silence}") from None
        finally:
            link.forget(number)


class _Link:
    """A connection: lines out from any thread, lines in to those who wait for them."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self._numbers = itertools.count()
        self._waiting: dict[int, queue.SimpleQueue[dict[str, Any]]] = {}
        self.is_closed = False
        threading.Thread(target=self._read, name="wisp-local-in", daemon=True).start()

    def ask(self, message: dict[str, Any]) -> tuple[int, queue.SimpleQueue[dict[str, Any]]]:
        """Send a message; its number, and where its answers come. The last has an "end" or an "error"."""
        number, answers = next(self._numbers), queue.SimpleQueue[dict[str, Any]]()
        self._waiting[number] = answers
        self._send(message | {"id": number})
        if self.is_closed:  # perhaps after the last look at those who wait
            answers.put({"error": f"{UNAVAILABLE}{_GONE}"})
        return number, answers

    def tell(self, message: dict[str, Any]) -> None:
        """Send a message whose answer is of no interest."""
        self._send(message | {"id": next(self._numbers)})

    def forget(self, number: int) -> None:
        """Nobody waits for these answers any more."""
        self._waiting.pop(number, None)

    def close(self) -> None:
        """End the connection; everybody who waits hears of it."""
        self.is_closed = True
        shut(self._connection)

    def _send(self, message: dict[str, Any]) -> None:
        try:
            with self._sending:
                self._connection.sendall(encode(message))
        except OSError:
            self.close()  # who waits is told by the reading thread

    def _read(self) -> None:
        for answer in messages(self._connection):
            answers = self._waiting.get(answer["id"])
            if answers is not None:
                answers.put(answer)
        self.close()
        for answers in list(self._waiting.values()):
            answers.put({"error": f"{UNAVAILABLE}{_GONE}"})


def _commit(start: int, tokens: list[int], status: int, retry_after_ms: int | None) -> Commit:
    ids, origin = np.array(tokens, np.int32), np.zeros(len(tokens), np.uint8)
    return Commit("", start, ids, origin, Status(status), retry_after_ms=retry_after_ms)
