"""A link with a delay: a `VerifyTransport` around another one, as if the server were far away.

Every message and every commit spends half a round trip, and perhaps some jitter, on the way. Order is kept, as on one
TCP connection: what was sent later does not arrive sooner. The way itself costs almost no processor time.
"""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from edge_runtime.commit_inbox import CommitInbox
from edge_runtime.transport import VerifyTransport
from wisp_plugin.errors import TransportError, WispError
from wisp_plugin.messages import Close, Commit, Draft, Open

T = TypeVar("T")
_LOOK_S = 0.25  # the receiving thread looks this often whether it is to end
_END_S = 5.0  # limit of waiting for a thread's end


class DelayLine(Generic[T]):
    """Hands over what is put in, in order, each item after its delay, in a thread of its own."""

    def __init__(self, delay_s: Callable[[], float], deliver: Callable[[T], None]) -> None:
        """`delay_s` gives the delay of each item; `deliver` must not raise."""
        self._delay_s = delay_s
        self._deliver = deliver
        self._items: queue.SimpleQueue[tuple[float, T] | None] = queue.SimpleQueue()
        self._last_due_s = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="delay-line", daemon=True)
        self._thread.start()

    def put(self, item: T) -> None:
        """`item` begins its way now."""
        self._last_due_s = max(self._last_due_s, time.monotonic() + self._delay_s())
        self._items.put((self._last_due_s, item))

    def _run(self) -> None:
        while (entry := self._items.get()) is not None:
            due_s, item = entry
            if self._ended.wait(max(0.0, due_s - time.monotonic())):
                return
            self._deliver(item)

    def close(self) -> None:
        """Drop what is still on its way and end the thread."""
        self._ended.set()
        self._items.put(None)
        self._thread.join(_END_S)


class DelayedLink:
    """`inner` behind a link whose round trip takes `rtt_s`, and each way up to `jitter_s` more."""

    def __init__(self, inner: VerifyTransport, rtt_s: float, jitter_s: float = 0.0, seed: int = 0) -> None:
        self._inner = inner
        self._way_s = rtt_s / 2
        self._jitter_s = jitter_s
        self._random = random.Random(seed)
        self._inbox = CommitInbox()
        self._up: DelayLine[Draft | Close] | None = None
        self._down: DelayLine[Commit | WispError] | None = None
        self._receiver: threading.Thread | None = None
        self._ended = threading.Event()

    def _delay_s(self) -> float:
        return self._way_s + self._jitter_s * self._random.random()

    def open(self, message: Open) -> None:
        """See `VerifyTransport.open`; returns when the message has reached the server."""
        self._end_threads()
        time.sleep(self._delay_s())
        self._inner.open(message)
        inbox = self._inbox = CommitInbox()
        self._ended = threading.Event()
        self._up = DelayLine(self._delay_s, self._deliver_up)
        self._down = DelayLine(self._delay_s, inbox.put)
        self._receiver = threading.Thread(
            target=self._receive_all, args=(self._down, self._ended), name="delayed-link", daemon=True
        )
        self._receiver.start()

    def send(self, message: Draft | Close) -> None:
        """See `VerifyTransport.send`; a connection that breaks meanwhile is noticed by `receive`."""
        if self._up is None:
            raise TransportError("the link is not open")
        self._up.put(message)

    def _deliver_up(self, message: Draft | Close) -> None:
        try:
            self._inner.send(message)
        except TransportError as error:
            self._inbox.put(error)

    def _receive_all(self, down: DelayLine[Commit | WispError], ended: threading.Event) -> None:
        """Put everything that comes from the server on its way down."""
        while not ended.is_set():
            try:
                commit = self._inner.receive(_LOOK_S)
            except WispError as error:  # raised again by `receive`, when it has arrived
                down.put(error)
            else:
                if commit is not None:
                    down.put(commit)

    def receive(self, timeout_s: float) -> Commit | None:
        """See `VerifyTransport.receive`."""
        return self._inbox.take(timeout_s)

    def wake(self) -> None:
        """See `VerifyTransport.wake`."""
        self._inbox.wake()

    def close(self) -> None:
        """See `VerifyTransport.close`; what is still on its way is lost."""
        self._end_threads()
        self._inner.close()

    def _end_threads(self) -> None:
        if self._up is None or self._down is None or self._receiver is None:
            return
        self._ended.set()
        self._inner.wake()
        self._receiver.join(_END_S)
        self._up.close()
        self._down.close()
        self._up = self._down = self._receiver = None
