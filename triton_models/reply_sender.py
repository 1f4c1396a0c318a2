"""Answers that leave while the next pass runs already.

To hand a response to tritonserver takes a round trip to its process, 0.1 to 1 ms: with a hundred sessions in a pass
as long as a short pass. On a device of its own the target computes meanwhile, so the engine only queues answers, and
some threads send them, those of one session in their order. They begin when the next pass has begun: before, they
would only take the interpreter from the planning of that pass. With nothing to run they leave at once. Most of a
round trip is waiting, so several at once are faster. Where the target computes on the cores that the sending needs,
nothing is gained by all this.
"""

from __future__ import annotations

import functools
import queue
import threading
import time
import zlib
from collections.abc import Callable, Sequence

from wisp_plugin.answers import deliver
from wisp_plugin.engine import Engine
from wisp_plugin.messages import Close, Commit, Draft, Open, PassItem, PassOutcome
from wisp_plugin.protocols import Reply, Verifier

NUM_THREADS = 4
PASS_S = 0.01  # limit of waiting for the next pass
FLUSH_S = 3.0  # limit of waiting for what is queued when the engine has ended


class _Line:
    """Answers in a row, and the thread that sends them."""

    def __init__(self, in_pass: threading.Event) -> None:
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._in_pass, self._is_closed = in_pass, False
        self._lock = threading.Lock()  # nothing comes behind the end of a line: it would never be sent
        self._thread = threading.Thread(target=self._run, name="wisp-replies", daemon=True)
        self._thread.start()

    def put(self, send: Callable[[], None]) -> None:
        """Send later; at once if the line is closed."""
        with self._lock:
            if not self._is_closed:
                self._queue.put(send)
                return
        send()

    def close(self) -> None:
        """End behind what is queued."""
        with self._lock:
            self._is_closed = True
            self._queue.put(None)

    def join(self, limit_s: float) -> None:
        """Wait for the end."""
        self._thread.join(limit_s)

    def _run(self) -> None:
        while (send := self._queue.get()) is not None:
            self._in_pass.wait(PASS_S)
            while send is not None:
                send()
                del send  # Triton does not unload a model while a response sender is alive
                try:
                    send = self._queue.get_nowait()
                except queue.Empty:
                    break
            else:
                return


class ReplySender:
    """Answers replies from threads of its own, which this starts."""

    def __init__(self, num_threads: int = NUM_THREADS) -> None:
        self._in_pass = threading.Event()
        self._lines = [_Line(self._in_pass) for _ in range(num_threads)]

    def wrap(self, reply: Reply, session: str) -> Reply:
        """The same reply, answered later, in a row with all others of its session: a draft that is refused because its
        session was does not overtake the reason."""
        return _LaterReply(reply, self._lines[zlib.crc32(session.encode()) % len(self._lines)].put)

    def watch(self, verifier: Verifier) -> Verifier:
        """The same verifier, whose passes are noticed."""
        return _WatchedVerifier(verifier, self._in_pass)

    def let_go(self) -> None:
        """No pass comes next: nothing is to be waited for."""
        self._in_pass.set()

    def close(self, limit_s: float = FLUSH_S) -> None:
        """Send what is queued, for at most `limit_s`, and end; what is answered later is sent at once by who does."""
        end_s = time.monotonic() + limit_s
        for line in self._lines:
            line.close()
        for line in self._lines:
            line.join(max(0.0, end_s - time.monotonic()))


class SendingEngine:
    """An engine's `submit`, with replies of a sender."""

    def __init__(self, engine: Engine, sender: ReplySender) -> None:
        self._engine, self._sender = engine, sender

    def submit(self, message: Open | Draft | Close, reply: Reply) -> None:
        """See `Engine.submit`."""
        self._engine.submit(message, self._sender.wrap(reply, message.session))


class _WatchedVerifier:
    """`Verifier` that says when a pass runs."""

    def __init__(self, verifier: Verifier, in_pass: threading.Event) -> None:
        self.release = verifier.release
        self._run, self._in_pass = verifier.run, in_pass

    def run(self, items: Sequence[PassItem]) -> list[PassOutcome]:
        """See `Verifier.run`."""
        self._in_pass.set()
        try:
            return self._run(items)
        finally:
            self._in_pass.clear()


class _LaterReply:
    """`Reply` whose answers are put into a queue; a client that one does not reach has left."""

    __slots__ = ("_has_left", "_put", "_reply")

    def __init__(self, reply: Reply, put: Callable[[Callable[[], None]], None]) -> None:
        self._reply, self._put = reply, put
        self._has_left = False

    def send(self, commit: Commit) -> None:
        """See `Reply.send`."""
        self._put(functools.partial(self._try, functools.partial(self._reply.send, commit)))

    def finish(self) -> None:
        """See `Reply.finish`."""
        self._put(functools.partial(self._try, self._reply.finish))

    def fail(self, message: str) -> None:
        """See `Reply.fail`."""
        self._put(functools.partial(self._try, functools.partial(self._reply.fail, message)))

    def is_cancelled(self) -> bool:
        """See `Reply.is_cancelled`."""
        return self._has_left or self._reply.is_cancelled()

    def _try(self, answer: Callable[[], None]) -> None:
        if not deliver(answer):
            self._has_left = True
