"""The serving loop: drain, plan, run, complete, respond. One thread owns every session (DESIGN.md section 5).

Transports call `submit` from any thread and get their answers through the `Reply` they pass in. Collaborators
(scheduler, verifier, clock) are passed in, so that tests and the simulator run this loop without a thread by
calling `step`.

Nothing a client does raises here: what it sends was checked by `wire`, what remains (unknown session, SEEN out
of range) is answered through its reply. Any other exception is a defect of ours: the engine fails every open
request, calls `on_failure` and stops.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from wisp_plugin.config import EngineConfig
from wisp_plugin.errors import EngineFailed, InvalidRequest
from wisp_plugin.messages import BatchPlan, Close, Commit, Draft, Open, PassItem, PassOutcome, Status
from wisp_plugin.scheduler import Scheduler
from wisp_plugin.server_session import ServerSession
from wisp_plugin.session_table import SessionTable
from wisp_plugin.telemetry import Totals
from wisp_plugin.wire import UNAVAILABLE

log = logging.getLogger(__name__)

RETRY_AFTER_MS = 1_000  # told to clients that find the server full
_IDLE_WAIT_S = 0.25  # an idle engine looks for vanished clients this often


class Reply(Protocol):
    """The answer channel of one request. Exactly one of `finish` and `fail` is called, once, last."""

    def send(self, commit: Commit) -> None:
        """Stream a commit to the client."""

    def finish(self) -> None:
        """End the response stream."""

    def fail(self, message: str) -> None:
        """End the request with an error of one line."""

    def is_cancelled(self) -> bool:
        """True if the client has left."""


class Verifier(Protocol):
    """The target model (torch, or emulated)."""

    def run(self, items: Sequence[PassItem]) -> list[PassOutcome]:
        """One pass. KV of rejected draft tokens is dropped before this returns."""

    def release(self, session: str) -> None:
        """Drop the KV of a session; unknown ones are ignored."""


Request = tuple[float, Open | Draft | Close, Reply]


class Engine:
    """Sessions, their streams and the loop that serves them."""

    def __init__(
        self,
        scheduler: Scheduler,
        verifier: Verifier,
        config: EngineConfig,
        clock: Callable[[], float] = time.monotonic,
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_failure` is called after all open requests were failed."""
        self.scheduler = scheduler
        self._verifier = verifier
        self._config = config
        self._clock = clock
        self._on_failure = on_failure
        self.totals = Totals()
        self._table = SessionTable(config.linger_s, max_detached=4 * config.max_sessions)
        self._inbox: deque[Request] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._failure: str | None = None
        self._thread: threading.Thread | None = None
        self._next_poll_s = 0.0

    # -- called from other threads ------------------------------------------------------------------------------

    def submit(self, message: Open | Draft | Close, reply: Reply) -> None:
        """Hand a request to the engine; it is answered through `reply`."""
        with self._wake:
            refusal = self._refusal()
            if refusal is None:
                self._inbox.append((self._clock(), message, reply))
                self._wake.notify()
        if refusal is not None:
            reply.fail(refusal)

    def start(self) -> None:
        """Start the engine thread."""
        self._thread = threading.Thread(target=self._serve, name="wisp-engine", daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """End the loop after the running pass; open streams end as `closed`.

        Raises:
            EngineFailed: the running pass did not end within `timeout_s`.
        """
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread is None:
            self._end_all(_end_closed)
            return
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise EngineFailed(f"the engine thread did not end within {timeout_s} s")

    @property
    def failure(self) -> str | None:
        """Why the engine stopped by itself, if it did."""
        return self._failure

    def _refusal(self) -> str | None:
        if self._failure is not None:
            return f"{UNAVAILABLE}the engine has failed: {self._failure}"
        if self._stopping:
            return f"{UNAVAILABLE}the server is shutting down"
        if len(self._inbox) >= self._config.max_queued_messages:
            return f"{UNAVAILABLE}the queue is full ({self._config.max_queued_messages} messages)"
        return None

    # -- the loop -----------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            while not self._stopping:
                if not self.step():
                    self._wait()
            self._end_all(_end_closed)
        except Exception as error:
            log.exception("the engine thread has failed")
            with self._wake:
                self._failure = f"{type(error).__name__}: {error}".splitlines()[0]
            try:
                self._end_all(lambda reply, _: reply.fail(f"{UNAVAILABLE}the engine has failed: {self._failure}"))
            finally:
                self._on_failure()

    def _wait(self) -> None:
        with self._wake:
            if not self._inbox and not self._stopping:
                self._wake.wait(_IDLE_WAIT_S)

    def step(self) -> bool:
        """One turn of the loop. Returns False if there was nothing to run."""
        self._drain()
        self._look_around()
        plan = self.scheduler.plan(self._clock())
        if not plan.items:
            return False
        outcomes, started_s, measured_s = self._run(plan)
        commits = self.scheduler.complete(plan, outcomes, started_s, measured_s)
        self._respond(commits)
        self.totals.count_pass(plan, commits, measured_s)
        return True

    def _drain(self) -> None:
        for _ in range(len(self._inbox)):  # what arrives meanwhile waits for the next turn
            now_s, message, reply = self._inbox[0]  # stays in the queue until it is answered or attached
            try:
                if isinstance(message, Open):
                    self._on_open(message, reply, now_s)
                elif isinstance(message, Draft):
                    self._table.find(message.session).on_draft(message, now_s)
                    _deliver(reply.finish)
                else:
                    self._on_close(message)
                    _deliver(reply.finish)
            except InvalidRequest as error:
                _deliver(functools.partial(reply.fail, str(error)))
            self._inbox.popleft()

    def _run(self, plan: BatchPlan) -> tuple[list[PassOutcome], float, float]:
        for session_id in plan.evict:
            self._verifier.release(session_id)
        self.scheduler.evict(plan.evict)
        started_s = self._clock()
        outcomes = self._verifier.run(plan.items)
        return outcomes, started_s, self._clock() - started_s

    def _respond(self, commits: Sequence[Commit]) -> None:
        for commit in commits:
            reply = self._table.reply(commit.session)
            reached = _deliver(functools.partial(reply.send, commit))
            if commit.status is not Status.RUNNING or not reached:
                self._detach(commit.session)
                _deliver(reply.finish)

    # -- sessions come and go -----------------------------------------------------------------------------------

    def _on_open(self, opened: Open, reply: Reply, now_s: float) -> None:
        known = self._table.get(opened.session)
        if not self._table.is_attached(opened.session) and self._table.num_attached >= self._config.max_sessions:
            _end(reply, opened, Status.OVERLOADED, RETRY_AFTER_MS)
            return
        if known is None:
            known = ServerSession(opened, now_s)
            known.settle_status()
            catch_up = _status_commit(known, known.status) if known.finished else None
        elif known.conflicts_with(opened):
            _end(reply, opened, Status.CONFLICT)
            return
        else:
            first = self._table.detach(opened.session, now_s)
            if first is not None:
                _end(first, known, Status.SUPERSEDED)
            catch_up = known.resume(opened, now_s)
        self._attach(known, reply)
        if catch_up is not None:
            self._respond([catch_up])

    def _on_close(self, message: Close) -> None:
        session = self._table.find(message.session)
        session.status = Status.CLOSED if not session.finished else session.status
        reply = self._detach(session.id)
        if reply is not None:
            _end(reply, session, session.status)

    def _attach(self, session: ServerSession, reply: Reply) -> None:
        self._table.attach(session, reply)
        self.scheduler.add(session)

    def _detach(self, session_id: str) -> Reply | None:
        """Take a session out of service; its token ids stay for a while, so that it can be resumed."""
        self.scheduler.remove(session_id)
        self._verifier.release(session_id)
        self._table.find(session_id).num_cached = 0
        return self._table.detach(session_id, self._clock())

    def _look_around(self) -> None:
        """From time to time: unschedule sessions whose client has left or stopped reading."""
        now_s = self._clock()
        if now_s < self._next_poll_s:
            return
        self._next_poll_s = now_s + self._config.cancel_poll_s
        self._table.expire(now_s)
        for session, reply in self._table.attached():
            stuck = session.is_paused(self._config.max_unacked_tokens)
            if reply.is_cancelled():
                self._detach(session.id)
                _deliver(reply.finish)
            elif stuck and now_s - session.newest_input_s > self._config.linger_s:
                self._detach(session.id)
                _end(reply, session, Status.CLOSED)

    def _end_all(self, end: Callable[[Reply, ServerSession], None]) -> None:
        refusal = self._refusal() or f"{UNAVAILABLE}the server is shutting down"
        ends = {id(reply): functools.partial(reply.fail, refusal) for _, _, reply in self._inbox}
        # An open at which the loop failed may be queued and attached: one end.
        ends |= {id(reply): functools.partial(end, reply, session) for session, reply in self._table.attached()}
        self._inbox.clear()
        self._table.clear()  # Triton does not unload a model while a response sender is alive
        for end_one in ends.values():
            _deliver(end_one)


def _deliver(answer: Callable[[], None]) -> bool:
    """Give an answer; one that cannot be given is the loss of its client, who may be gone, and not of everybody."""
    try:
        answer()
    except Exception:
        log.exception("an answer could not be delivered")
        return False
    return True


def _end(reply: Reply, about: Open | ServerSession, status: Status, retry_after_ms: int | None = None) -> None:
    """Tell a final status and end the stream."""
    _deliver(lambda: reply.send(_status_commit(about, status, retry_after_ms)))
    _deliver(reply.finish)


def _end_closed(reply: Reply, session: ServerSession) -> None:
    _end(reply, session, Status.CLOSED)


def _status_commit(about: Open | ServerSession, status: Status, retry_after_ms: int | None = None) -> Commit:
    """A commit without tokens that tells a status."""
    if isinstance(about, Open):
        session_id, start = about.session, len(about.tokens)
    else:
        session_id, start = about.id, about.num_committed
    tokens, origin = np.empty(0, np.int32), np.empty(0, np.uint8)
    return Commit(session_id, start, tokens, origin, status, retry_after_ms=retry_after_ms)
