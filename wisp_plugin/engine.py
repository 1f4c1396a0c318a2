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
import math
import threading
import time
from collections.abc import Callable, Sequence

from wisp_plugin.answers import deliver, end, end_closed, end_everybody, status_commit
from wisp_plugin.config import EngineConfig, parse_slo_classes
from wisp_plugin.errors import EngineFailed, InvalidRequest
from wisp_plugin.inbox import Inbox
from wisp_plugin.kv_admission import KvAccount
from wisp_plugin.messages import BatchPlan, Close, Commit, Draft, Open, PassOutcome, Status
from wisp_plugin.metric_set import BY_LOAD, BY_QUEUE, BY_SESSIONS
from wisp_plugin.pass_trace import PassTrace
from wisp_plugin.protocols import Reply, Verifier
from wisp_plugin.scheduler import Scheduler
from wisp_plugin.server_session import ServerSession
from wisp_plugin.session_table import SessionTable
from wisp_plugin.telemetry import Telemetry

log = logging.getLogger(__name__)

RETRY_AFTER_MS = 1_000  # told to clients that find the server full
_IDLE_WAIT_S = 0.25  # an idle engine looks for vanished clients this often


class Engine:
    """Sessions, their streams and the loop that serves them."""

    def __init__(
        self,
        scheduler: Scheduler,
        verifier: Verifier,
        config: EngineConfig,
        clock: Callable[[], float] = time.monotonic,
        on_failure: Callable[[], None] = lambda: None,
        trace: PassTrace | None = None,
        on_idle: Callable[[], None] = lambda: None,
        drafting_s: Callable[[], float] = lambda: 0.0,
    ) -> None:
        """`on_failure` is called after all open requests were failed, `on_idle` at every turn with nothing to run;
        `trace` takes every pass; `drafting_s` tells how much of the newest pass went into drafting on the server."""
        self.scheduler = scheduler
        self._verifier = verifier
        self._config = config
        self._clock = clock
        self._on_failure = on_failure
        self._on_idle = on_idle
        self._drafting_s = drafting_s
        self.telemetry = Telemetry(parse_slo_classes(config.slo_classes), trace)
        self._table = SessionTable(config.linger_s, max_detached=4 * config.max_sessions)
        self._inbox = Inbox(config.max_queued_messages, clock, lambda: self.telemetry.on_refused(BY_QUEUE))
        self._stopping = False
        self.failure: str | None = None  # why the engine stopped by itself, if it did
        self._pass_thread: threading.Thread | None = None
        self._next_poll_s = 0.0
        self.wake_s = math.inf  # with nothing to run and nothing arriving: when the scheduler wants to plan again

    # -- called from other threads ------------------------------------------------------------------------------

    def submit(self, message: Open | Draft | Close, reply: Reply) -> None:
        """Hand a request to the engine; it is answered through `reply`."""
        self._inbox.put(message, reply)

    def start(self) -> None:
        """Start the engine thread."""
        self._pass_thread = threading.Thread(target=self._serve, name="wisp-engine", daemon=True)
        self._pass_thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """End the loop after the running pass; open streams end as `closed`.

        Raises:
            EngineFailed: the running pass did not end within `timeout_s`.
        """
        if self.failure is None:  # first, so that nothing is queued behind the end of the loop
            self._inbox.close("the server is shutting down")
        self._stopping = True
        if self._pass_thread is None:
            self._end_all(end_closed)
            return
        self._pass_thread.join(timeout_s)
        if self._pass_thread.is_alive():
            raise EngineFailed(f"the engine thread did not end within {timeout_s} s")

    def refresh_gauges(self, kv: KvAccount) -> None:
        """Bring the gauges of `telemetry` up to date; in the thread that publishes them. It only reads."""
        sessions = [session for session, _ in self._table.attached()]
        self.telemetry.look(sessions, self._config.max_unacked_tokens)
        self.telemetry.look_around(self._table.num_lingering, len(self._inbox.requests), self.scheduler.estimator, kv)

    # -- the loop -----------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            while not self._stopping:
                if not self.step():
                    self._inbox.wait(min(_IDLE_WAIT_S, self.wake_s - self._clock()))
            self._end_all(end_closed)
        except Exception as error:
            log.exception("the engine thread has failed")
            self.failure = f"{type(error).__name__}: {error}".splitlines()[0]
            self._inbox.close(f"the engine has failed: {self.failure}")
            try:
                self._end_all(lambda reply, _: reply.fail(str(self._inbox.refusal)))
            finally:
                self._on_failure()

    def step(self) -> bool:
        """One turn of the loop. Returns False if there was nothing to run."""
        self._drain()
        self._look_around()
        now_s = self._clock()
        plan = self.scheduler.plan(now_s)
        self.wake_s = plan.wake_s
        members = [self._table.find(item.session) for item in plan.items]
        record = self.telemetry.on_plan(plan, members, now_s, self._clock() - now_s)
        if not plan.items:
            self._on_idle()
            return False
        outcomes, started_s, measured_s = self._run(plan)
        commits = self.scheduler.complete(plan, outcomes, started_s, measured_s, self._drafting_s())
        self._respond(commits)
        self.telemetry.on_pass(record, members, commits, started_s, measured_s)
        return True

    def _drain(self) -> None:
        requests = self._inbox.requests
        for _ in range(len(requests)):  # what arrives meanwhile waits for the next turn
            now_s, message, reply = requests[0]  # stays in the queue until it is answered or attached
            try:
                if isinstance(message, Open):
                    self._on_open(message, reply, now_s)
                elif isinstance(message, Draft):
                    self._on_draft(message, now_s)
                    deliver(reply.finish)
                else:
                    self._on_close(message)
                    deliver(reply.finish)
            except InvalidRequest as error:
                deliver(functools.partial(reply.fail, str(error)))
            requests.popleft()

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
            reached = deliver(functools.partial(reply.send, commit))
            if commit.status is not Status.RUNNING or not reached:
                self._detach(commit.session)
                deliver(reply.finish)

    # -- sessions come and go -----------------------------------------------------------------------------------

    def _on_open(self, opened: Open, reply: Reply, now_s: float) -> None:
        known = self._table.get(opened.session)
        if not self._table.is_attached(opened.session) and self._table.num_attached >= self._config.max_sessions:
            self._refuse(opened, reply, RETRY_AFTER_MS, BY_SESSIONS)
            return
        if known is None:
            retry_after_s = self.scheduler.refuses(opened)
            if retry_after_s is not None:
                self._refuse(opened, reply, round(1e3 * retry_after_s), BY_LOAD)
                return
            known = ServerSession(opened, now_s)
            known.settle_status()
            catch_up = status_commit(known, known.status) if known.finished else None
        elif known.conflicts_with(opened):
            end(reply, opened, Status.CONFLICT)
            return
        else:
            first = self._table.detach(opened.session, now_s)
            if first is not None:
                end(first, known, Status.SUPERSEDED)
            before = known.drafts.counts.copy()
            catch_up = known.resume(opened, now_s)
            self.telemetry.on_drafts(before, known.drafts.counts)
        self._attach(known, reply)
        if catch_up is not None:
            self._respond([catch_up])

    def _refuse(self, opened: Open, reply: Reply, retry_after_ms: int, reason: str) -> None:
        self.telemetry.on_refused(reason)
        end(reply, opened, Status.OVERLOADED, retry_after_ms)

    def _on_draft(self, draft: Draft, now_s: float) -> None:
        session = self._table.find(draft.session)
        before = session.drafts.counts.copy()
        session.on_draft(draft, now_s)
        self.telemetry.on_drafts(before, session.drafts.counts)
        self.scheduler.note(session)

    def _on_close(self, message: Close) -> None:
        session = self._table.find(message.session)
        session.status = Status.CLOSED if not session.finished else session.status
        reply = self._detach(session.id)
        if reply is not None:
            end(reply, session, session.status)

    def _attach(self, session: ServerSession, reply: Reply) -> None:
        self._table.attach(session, reply)
        self.scheduler.add(session)

    def _detach(self, session_id: str) -> Reply | None:
        """Take a session out of service; its token ids stay for a while, so that it can be resumed."""
        self.scheduler.remove(session_id)
        self._verifier.release(session_id)
        session, now_s = self._table.find(session_id), self._clock()
        session.num_cached = 0
        self.telemetry.on_leave(session, now_s)
        return self._table.detach(session_id, now_s)

    def _look_around(self) -> None:
        """From time to time: unschedule sessions whose client has left or stopped reading."""
        now_s = self._clock()
        if now_s < self._next_poll_s:
            return
        self._next_poll_s = now_s + self._config.cancel_poll_s
        self._table.expire(now_s)
        self.telemetry.on_load(self.scheduler.load())
        for session, reply in self._table.attached():
            stuck = session.is_paused(self._config.max_unacked_tokens)
            if reply.is_cancelled():
                self._detach(session.id)
                deliver(reply.finish)
            elif stuck and now_s - session.newest_input_s > self._config.linger_s:
                self._detach(session.id)
                end(reply, session, Status.CLOSED)

    def _end_all(self, end_one: Callable[[Reply, ServerSession], None]) -> None:
        queued, attached = [reply for _, _, reply in self._inbox.requests], self._table.attached()
        self._inbox.requests.clear()
        self._table.clear()  # Triton does not unload a model while a response sender is alive
        end_everybody(queued, attached, str(self._inbox.refusal), end_one)
