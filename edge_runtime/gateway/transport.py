"""A transport that a session can be called away from, whatever its thread is waiting for."""

from __future__ import annotations

import threading

from edge_runtime.transport import VerifyTransport
from wisp_plugin.messages import Close, Commit, Draft, Open


class Left(Exception):
    """The client of this session is gone: nobody wants its tokens."""


class LeavableTransport:
    """Another transport, until `leave`: from then on opening, receiving and pausing raise `Left`.

    `disarm` ends that, so that the session can be closed in good order.
    """

    def __init__(self, inner: VerifyTransport) -> None:
        self._inner = inner
        self._left = threading.Event()
        self._is_armed = True

    def leave(self) -> None:
        """From any thread."""
        self._left.set()
        self._inner.wake()

    def disarm(self) -> None:
        """By the session's thread, which is leaving."""
        self._is_armed = False

    @property
    def is_left(self) -> bool:
        """Whether `leave` was called."""
        return self._left.is_set()

    def await_leave(self, limit_s: float) -> None:
        """Wait until `leave` is called, at most `limit_s`."""
        self._left.wait(limit_s)

    def pause(self, seconds: float) -> None:
        """Sleep. Raises Left."""
        self._left.wait(seconds)
        self._check()

    def open(self, message: Open) -> None:
        """See `VerifyTransport.open`."""
        self._check()
        self._inner.open(message)

    def send(self, message: Draft | Close) -> None:
        """See `VerifyTransport.send`."""
        self._inner.send(message)

    def receive(self, timeout_s: float) -> Commit | None:
        """See `VerifyTransport.receive`."""
        self._check()
        commit = self._inner.receive(timeout_s)
        self._check()
        return commit

    def wake(self) -> None:
        """See `VerifyTransport.wake`."""
        self._inner.wake()

    def close(self) -> None:
        """See `VerifyTransport.close`."""
        self._inner.close()

    def _check(self) -> None:
        if self._is_armed and self._left.is_set():
            raise Left
