"""The device's own work for one session, draft and send, and the thread that does it.

Who does what: the drafting thread drafts and sends; the caller's thread receives commits and applies them, also while
a draft step runs (ONNX Runtime releases the interpreter for its time). Both see the session under one lock, which is
held for bookkeeping only, never during a draft step or a send.

Nothing stale piles up: a job is taken anew for every token and every chunk of a long prefill, so a commit that came
meanwhile counts at once; what was not sent when a chain is rolled back is never sent; and what is on the way is
bounded by the session (`MAX_AHEAD`, `SendWindow`).
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Protocol

from edge_runtime.transport import VerifyTransport
from wisp_plugin.draft_stats import DraftStats
from wisp_plugin.edge_session import DraftJob, EdgeSession, Step
from wisp_plugin.errors import ModelError, TransportError
from wisp_plugin.messages import Close, Commit, Draft, Sampling, Tokens

SEND_LIMIT_S = 5.0  # a send only queues a message; one that takes longer than this hangs
STEP_LIMIT_S = 10.0  # of waiting for the draft step that runs when the thread is to end
SWITCH_S = 5e-4  # longest wait for the interpreter while a draft step runs Python; its own default is 5 ms
MAX_SWITCH_S = 2e-2
_SESSIONS_A_TURN = 4  # that the shortest time between turns is good for
_IDLE_S = 1.0  # longest sleep without a look at the session; what becomes due wakes the thread at once


_switch_s = SWITCH_S


def set_switch_interval(num_sessions: int = 1) -> None:
    """Set how often the threads of this process take turns, for `num_sessions` that run in it.

    A thread that waits for the interpreter wakes that often to ask for it. Hundreds that do so every `SWITCH_S` leave
    no time for work: 64 sessions that end at once took 85 s of CPU, instead of 7 s with 5 ms between turns.
    """
    global _switch_s
    _switch_s = min(max(SWITCH_S, SWITCH_S * num_sessions / _SESSIONS_A_TURN), MAX_SWITCH_S)
    sys.setswitchinterval(_switch_s)


class TokenDrafter(Protocol):
    """The draft model (`drafter.Drafter`, or emulated). One thread at a time uses it."""

    def advance(self, tokens: Tokens) -> int:
        """Feed at most one chunk of `tokens`; how many are still to be fed before the next draft token."""

    def draft_token_with_stats(self, tokens: Tokens, sampling: Sampling) -> tuple[int, DraftStats | None]:
        """The draft token behind `tokens`, and the statistics of its logits (None: there are no logits)."""


class EdgeWork:
    """A session, its transport and its drafter: one `step` at a time, and what the other thread tells meanwhile."""

    def __init__(
        self,
        session: EdgeSession,
        transport: VerifyTransport,
        drafter: TokenDrafter | None,
        sampling: Sampling,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.due = threading.Event()  # set whenever something may have become due
        self._session = session
        self._transport = transport
        self._drafter = drafter
        self._sampling = sampling
        self._clock = clock
        # Of the session, `_connection`, `_is_busy` and `_active_s`; held for microseconds.
        self._lock = threading.Lock()
        # Held by who sends or opens the stream, so of `_lost` and of `_is_connected` where that becomes True (anybody
        # may disconnect at any time). Of two locks it is taken first.
        self._sending = threading.Lock()
        self._connection = 0  # number of the connection in use
        self._is_connected = False
        self._lost: TransportError | None = None  # how that connection was lost while sending
        self._is_busy = False
        self._active_s = 0.0  # end of the last step that did something

    # -- the worker's side --------------------------------------------------------------------------------------

    def step(self) -> bool:
        """Draft a token or a chunk, or send a message. False if nothing is due.

        A connection that is lost while sending is noted for `check`. Raises whatever the drafter raises.
        """
        message: Draft | None = None
        job: DraftJob | None = None
        with self._lock:
            now_s, connection = self._clock(), self._connection
            step = self._session.next_step(now_s) if self._is_connected else Step.WAIT
            if step is Step.SEND:
                message = self._session.take_message(now_s)
            elif step is Step.DRAFT:
                job = self._session.begin_draft()
            self._is_busy = message is not None or job is not None
        if message is not None:
            self._send(message, connection)
        elif job is not None:
            self._draft(job)
        else:
            return False
        with self._lock:
            self._is_busy, self._active_s = False, self._clock()
        return True

    def _draft(self, job: DraftJob) -> None:
        """One draft token, or one chunk of a long prefill."""
        assert self._drafter is not None, "a session without drafter needs a controller that never drafts"
        if self._drafter.advance(job.context) > 0:
            return
        started_s = self._clock()
        token, stats = self._drafter.draft_token_with_stats(job.context, self._sampling)
        drafting_s = self._clock() - started_s
        with self._lock:
            self._session.on_drafted(job, token, drafting_s, stats)

    def _send(self, message: Draft, connection: int) -> None:
        with self._turn_to_send():
            if connection != self._connection or not self._is_connected:
                return  # it belongs to a connection that is gone; the chain is sent again on the new one
            started_s = self._clock()
            try:
                self._transport.send(message)
            except TransportError as error:
                self._lost, self._is_connected = error, False
                self._transport.wake()
                return
            cost_s = self._clock() - started_s
        with self._lock:
            self._session.on_sent(cost_s)

    # -- the side of who receives -------------------------------------------------------------------------------

    def disconnect(self) -> None:
        """Draft and send nothing until `connect`: the connection is lost, or the session ends."""
        self._is_connected = False

    def connect(self) -> None:
        """Open the session, or resume it over a new connection; nothing is sent meanwhile. Raises TransportError."""
        self.disconnect()
        with self._turn_to_send():
            with self._lock:
                message = self._session.reopen()
                self._connection += 1
            self._lost = None
            self._transport.open(message)
            self._is_connected = True
        self.due.set()

    def on_commit(self, commit: Commit, now_s: float) -> Tokens:
        """See `EdgeSession.on_commit`."""
        with self._lock:
            tokens = self._session.on_commit(commit, now_s)
        self.due.set()
        return tokens

    def send_close(self, message: Close) -> None:
        """Tell the server that the session ends; no draft follows. Raises TransportError."""
        self.disconnect()
        with self._turn_to_send():
            self._transport.send(message)

    def active_s(self) -> float:
        """When this side last had something to do: now, or the end of the last step."""
        with self._lock:
            return self._clock() if self._is_busy else self._active_s

    def check(self) -> None:
        """Raise the TransportError by which the connection was lost while sending."""
        lost = self._lost
        if lost is not None:
            raise lost

    @contextlib.contextmanager
    def _turn_to_send(self) -> Iterator[None]:
        if not self._sending.acquire(timeout=SEND_LIMIT_S):
            raise TransportError(f"a message to the server hangs for {SEND_LIMIT_S:g} s")
        try:
            yield
        finally:
            self._sending.release()


class DraftingThread:
    """Does the steps of one `EdgeWork` until it is told to stop.

    Sees to it that the threads of this process take turns often enough (`set_switch_interval`).
    """

    def __init__(self, work: EdgeWork, wake_receiver: Callable[[], None]) -> None:
        """`wake_receiver` is called when the thread has failed, so that who waits for commits calls `check`."""
        self._work = work
        self._wake_receiver = wake_receiver
        self._stopped = False
        self._failure: BaseException | None = None
        sys.setswitchinterval(min(_switch_s, sys.getswitchinterval()))
        self._thread = threading.Thread(target=self._run, name="wisp-drafting", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while True:
                self._work.due.clear()  # before both looks: what becomes due behind them is not missed
                if self._stopped:
                    return
                if not self._work.step():
                    self._work.due.wait(_IDLE_S)
        except BaseException as error:  # raised again by `check`, in the caller's thread
            self._failure = error
            self._wake_receiver()

    def check(self) -> None:
        """Raise what ended the thread, if it has failed."""
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Let it end behind the step that runs; returns at once."""
        self._stopped = True
        self._work.due.set()

    def join(self, limit_s: float = STEP_LIMIT_S) -> None:
        """Wait until it has ended, behind `stop`: then another thread may use the drafter.

        Raises:
            ModelError: its step takes longer than `limit_s`.
        """
        self._thread.join(limit_s)
        if self._thread.is_alive():
            raise ModelError(f"the draft model has not finished a step within {limit_s:g} s")
