"""Unary verification: a batch of requests in, their answers out (DESIGN.md section 9). Pure, and in one thread.

Triton's dynamic batcher says what comes together; here it is packed into as few passes as there can be: sessions,
scheduler and verifier are those of streaming, in mode `sync` under the policy `continuous`, since everybody in a
batch waits for its end anyway. A session takes part once in a pass; a second request of it waits for the first one.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from wisp_plugin.config import EngineConfig, parse_slo_classes
from wisp_plugin.coupling import count_accepted
from wisp_plugin.errors import InvalidRequest
from wisp_plugin.estimator import Estimator
from wisp_plugin.kv_admission import KvAccount
from wisp_plugin.messages import Draft, Status
from wisp_plugin.pass_trace import PassTrace
from wisp_plugin.policies import Continuous
from wisp_plugin.protocols import Verifier
from wisp_plugin.scheduler import Scheduler
from wisp_plugin.telemetry import Telemetry
from wisp_plugin.unary_sessions import HeldSession, UnarySessions
from wisp_plugin.unary_wire import NEED_PREFIX, VerifyAnswer, VerifyRequest
from wisp_plugin.wire import WireLimits, new_session_id

Answer = VerifyAnswer | InvalidRequest


@dataclass(slots=True)
class _Job:
    """One request on its way to its answer; `held` as long as its session takes part in passes."""

    request: VerifyRequest
    name: str  # of its session; drawn for a request that stands alone
    held: HeldSession | None = None
    answer: Answer | None = None


class UnaryEngine:
    """Answers batches of unary requests."""

    def __init__(
        self,
        verifier: Verifier,
        kv: KvAccount,
        limits: WireLimits,
        config: EngineConfig,
        estimator: Estimator,
        clock: Callable[[], float] = time.monotonic,
        trace: PassTrace | None = None,
    ) -> None:
        """`kv` accounts for the KV of `verifier`. Of `config`, policy and admission are not for this engine."""
        self.telemetry = Telemetry(parse_slo_classes(config.slo_classes), trace)
        self.sessions = UnarySessions(limits, kv, verifier.release, config.max_sessions, config.linger_s)
        self._kv = kv
        self._verifier = verifier
        self._config = config
        self._estimator = estimator
        self._clock = clock
        self._scheduler = self._new_scheduler()

    def _new_scheduler(self) -> Scheduler:
        return Scheduler(Continuous(self._config, self._estimator), self._config, self._kv, self._estimator)

    def serve(self, requests: Sequence[VerifyRequest]) -> list[Answer]:
        """Answers in the order of `requests`; an InvalidRequest is the one line for its client.

        Raises:
            Exception: whatever a pass raises; the sessions of `requests` are forgotten then.
        """
        jobs = [_Job(request, request.session or new_session_id()) for request in requests]
        try:
            answers = self._serve(jobs)
        except BaseException:
            self._scheduler = self._new_scheduler()
            for job in jobs:
                self.sessions.forget(job.name)
            raise
        for job in jobs:
            if not job.request.session:
                self.sessions.forget(job.name)
        now_s = self._clock()
        for session in self.sessions.trim(now_s):
            self.telemetry.on_leave(session, now_s)
        return answers

    def refresh_gauges(self) -> None:
        """Bring the gauges of `telemetry` up to date; in the thread that publishes them. It only reads."""
        self.telemetry.look([], self._config.max_unacked_tokens)
        self.telemetry.look_around(len(self.sessions), 0, self._estimator, self._kv)

    def _serve(self, jobs: Sequence[_Job]) -> list[Answer]:
        waiting, working = list(jobs), dict[str, _Job]()
        while True:
            waiting = self._begin(waiting, working)
            if not working:
                return [job.answer for job in jobs if job.answer is not None]
            self._run_pass(working)

    # -- a job --------------------------------------------------------------------------------------------------

    def _begin(self, waiting: Sequence[_Job], working: dict[str, _Job]) -> list[_Job]:
        """Begin what does not wait for an earlier request of its session; returns the rest."""
        rest = []
        for job in waiting:
            if job.name in working:
                rest.append(job)
                continue
            try:
                job.held = self.sessions.find(job.name, job.request, self._clock())
            except InvalidRequest as error:
                job.answer = error
                continue
            if job.held is None:
                job.answer = NEED_PREFIX
            elif not self._answer(job, job.held):
                working[job.name] = job
                self._arm(job, job.held)
                self._scheduler.add(job.held.session)
        return rest

    def _answer(self, job: _Job, held: HeldSession) -> bool:
        """Answer a job from what its session has committed; False if that does not go far enough."""
        session, start = held.session, job.request.num_committed
        known = session.committed[start:]
        num_accepted = count_accepted(job.request.draft, known)
        if num_accepted == len(known) and not session.finished:
            return False
        tokens = known[: num_accepted + 1].copy()
        end = start + len(tokens)
        status = session.status if end == session.num_committed else Status.RUNNING
        logprobs = None if held.logprobs is None else held.logprobs[start:end].copy()
        job.answer = VerifyAnswer(status, num_accepted, tokens, logprobs)
        return True

    def _arm(self, job: _Job, held: HeldSession) -> None:
        """What of the draft is not decided yet waits for the next pass."""
        session = held.session
        at = session.num_committed
        before = dataclasses.replace(session.drafts.counts)
        draft = job.request.draft[at - job.request.num_committed :]
        session.on_draft(Draft(session.id, at, at, draft), self._clock())
        self.telemetry.on_drafts(before, session.drafts.counts)

    def _finish(self, job: _Job, held: HeldSession) -> None:
        """Take the session of an answered job out of service; it keeps its KV unless it has ended."""
        session = held.session
        self._scheduler.remove(session.id)
        if session.finished:
            self._verifier.release(session.id)
            session.num_cached = 0
            self.telemetry.on_leave(session, self._clock())

    # -- a pass -------------------------------------------------------------------------------------------------

    def _run_pass(self, working: dict[str, _Job]) -> None:
        """One pass over those `working`; who has its answer leaves them."""
        held = {name: job.held for name, job in working.items() if job.held is not None}
        self.telemetry.totals.evictions += self.sessions.make_room([one.session for one in held.values()])
        now_s = self._clock()
        plan = self._scheduler.plan(now_s)
        if not plan.items:
            raise RuntimeError(f"{len(working)} sessions wait for a pass and none is in the plan")
        members = [held[item.session].session for item in plan.items]
        record = self.telemetry.on_plan(plan, members, now_s, self._clock() - now_s)
        for name in plan.evict:
            self._verifier.release(name)
        self._scheduler.evict(plan.evict)
        started_s = self._clock()
        outcomes = self._verifier.run(plan.items)
        measured_s = self._clock() - started_s
        commits = self._scheduler.complete(plan, outcomes, started_s, measured_s)
        self.telemetry.on_pass(record, members, commits, started_s, measured_s)
        for commit in commits:
            job, one = working[commit.session], held[commit.session]
            one.on_commit(commit)
            if self._answer(job, one):
                self._finish(job, one)
                del working[commit.session]
            else:
                self._arm(job, one)
                self._scheduler.note(one.session)
