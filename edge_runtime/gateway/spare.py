"""One connection to the server, made ahead of the session that will use it: its first token comes that much sooner.

It is made at the end of a session, when nobody waits for it, and its age does no harm: a connection that has broken
meanwhile is made anew like any other.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

from edge_runtime.transport import GrpcStream
from wisp_plugin.errors import WispError


class Spare:
    """Any thread may use it."""

    def __init__(self, connect: Callable[[], GrpcStream]) -> None:
        self._connect = connect
        self._lock = threading.Lock()
        self._stream: GrpcStream | None = None
        self._is_busy = self._is_closed = False

    def take(self) -> GrpcStream:
        """The spare transport if there is one, else a new one that has no connection yet."""
        with self._lock:
            stream, self._stream = self._stream, None
        return stream or self._connect()

    def prepare(self) -> None:
        """See to it that there is a spare one, unless the server does not answer."""
        with self._lock:
            if self._stream is not None or self._is_busy or self._is_closed:
                return
            self._is_busy = True
        stream = self._connect()  # makes no connection yet
        try:
            with contextlib.suppress(WispError):
                stream.prepare()
        finally:
            with self._lock:
                self._is_busy = False
                is_wanted = not self._is_closed
                self._stream = stream if is_wanted else None
        if not is_wanted:
            stream.close()

    def close(self) -> None:
        """End the spare connection, and make no more."""
        with self._lock:
            self._is_closed = True
            stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()
