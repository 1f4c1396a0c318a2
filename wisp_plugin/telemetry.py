"""What the engine counts over its life, and how: one `on_plan` and one `on_pass` per pass, one `on_leave` per session.

The engine thread writes; the thread that publishes reads without a lock (see `metrics`) and asks for the gauges
(`look`, `look_around`) when it needs them. A pass with 64 sessions, all with drafts, costs the engine thread about
100 us (`on_plan` 40, `on_pass` 60; two-core machine with other load, trace on).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from wisp_plugin.config import DEFAULT_SLO_CLASS
from wisp_plugin.draft_buffer import DraftCounts
from wisp_plugin.estimator import Estimator
from wisp_plugin.kv_admission import KvAccount
from wisp_plugin.messages import BatchPlan, Commit, Origin
from wisp_plugin.metric_set import FALSE, MIN_JUDGED_DRAFTS, TRUE, MetricSet
from wisp_plugin.metrics import Family, Kind
from wisp_plugin.pass_trace import PassRecord, PassTrace
from wisp_plugin.server_session import ServerSession

_CORRECTION = int(Origin.CORRECTION)
CUSTOM_SLO_CLASS = "custom"  # label of an SLO that the client gave in numbers


def _counter(text: str) -> float:
    """A field of `Totals` with the help text of its Prometheus counter."""
    return field(default=0.0, metadata={"text": text})


@dataclass(slots=True)
class Totals:
    """Counters since the start of the engine. Names become `wisp_NAME_total`.

    Acceptance rate = accepted_tokens / verified_tokens; tokens per pass = committed_tokens / commits.
    """

    passes: float = _counter("Passes of the target model")
    pass_seconds: float = _counter("Time of passes, forward and choice of tokens, in seconds")
    new_tokens: float = _counter("Tokens computed by passes: prefill, decoding and drafts")
    commits: float = _counter("Commits: parts of a session in a pass that gave it tokens")
    committed_tokens: float = _counter("Tokens committed to sessions")
    received_tokens: float = _counter("Draft tokens received")
    verified_tokens: float = _counter("Draft tokens verified by passes")
    accepted_tokens: float = _counter("Draft tokens accepted")
    server_drafted_tokens: float = _counter("Draft tokens that the server made itself")
    server_accepted_tokens: float = _counter("Of those, accepted")
    late_tokens: float = _counter("Draft tokens whose position was committed before they arrived")
    stale_tokens: float = _counter("Draft tokens drafted on a prefix that turned out different")
    trimmed_tokens: float = _counter("Buffered draft tokens of members left out of a pass, summed over passes")
    held_sessions: float = _counter("Sessions left out of a pass that could have taken part, summed over passes")
    adopted_tokens: float = _counter("Tokens whose KV a session shares with others instead of computing it")
    evictions: float = _counter("Sessions whose KV was dropped to make room")
    trace_lines_dropped: float = _counter("Lines that the trace file lacks")

    @classmethod
    def families(cls) -> list[Family]:
        """The counters, in the order of `values`."""
        return [Family(f"wisp_{f.name}_total", str(f.metadata["text"]), Kind.COUNTER) for f in dataclasses.fields(cls)]

    def values(self) -> list[float]:
        """The counters, in the order of `families`."""
        return list(dataclasses.astuple(self))


class Telemetry:
    """Counters, gauges and histograms of one engine, and its trace."""

    def __init__(self, slo_classes: Iterable[str] = (), trace: PassTrace | None = None) -> None:
        """`slo_classes` are those of the configuration; sessions of others are told as `custom`."""
        self._slo_classes = (DEFAULT_SLO_CLASS, CUSTOM_SLO_CLASS, *slo_classes)
        self.totals = Totals()
        self.metrics = MetricSet(self._slo_classes)
        self._trace = trace
        self._load = 0.0
        self._decided_s = -math.inf  # when the newest plan was made that had somebody to choose from
        self._ended_s: float | None = None  # end of the newest pass
        self._was_idle = True  # there was nothing to run, or nobody who should, since then
        self._num_stale = 0  # of the members of the planned pass, before it
        self._holders: set[str] = set()  # sessions whose KV was seen in a pass, adopted part included

    # -- in the engine thread -----------------------------------------------------------------------------------

    def on_plan(self, plan: BatchPlan, members: Sequence[ServerSession], now_s: float, decision_s: float) -> PassRecord:
        """Note a plan made at `now_s` within `decision_s`, and what its pass changes about its `members`.

        Returns the record that `on_pass` wants if the plan has items.
        """
        metrics, before_s = self.metrics, self._decided_s
        metrics.price.set(plan.price)
        ends_s = now_s + plan.predicted_s
        slack_s = [session.timeline.needed_s - ends_s for session in members]
        was_held = [session.ready_since_s <= before_s for session in members]
        self._was_idle = self._was_idle or not plan.items
        if plan.items or plan.num_held:
            self._decided_s = now_s
            metrics.plan_seconds.observe(decision_s)
        self._num_stale = sum([session.drafts.counts.stale for session in members])
        self._holders.difference_update(plan.evict)
        for item in plan.items:
            if item.session not in self._holders:
                self._holders.add(item.session)
                self.totals.adopted_tokens += item.num_cached
        return PassRecord(plan, now_s, slack_s, was_held, self._load)

    def on_pass(
        self,
        record: PassRecord,
        members: Sequence[ServerSession],
        commits: Sequence[Commit],
        started_s: float,
        measured_s: float,
    ) -> None:
        """Count the pass that `record` planned; `commits` are what its `members` got."""
        record.number = int(self.totals.passes) + 1
        record.commits, record.started_s, record.measured_s = commits, started_s, measured_s
        record.waited_s = None if self._ended_s is None else started_s - self._ended_s
        record.was_idle, self._was_idle = self._was_idle, False
        self._ended_s = started_s + measured_s
        totals, metrics, plan = self.totals, self.metrics, record.plan
        num_new = sum([item.num_new_tokens for item in plan.items])
        num_tokens, accepted = self._count_turns(record)
        totals.passes += 1
        totals.pass_seconds += measured_s
        totals.new_tokens += num_new
        totals.commits += len(commits)
        totals.committed_tokens += num_tokens
        totals.verified_tokens += sum([item.num_draft_tokens for item in plan.items])
        totals.accepted_tokens += accepted
        for session, item in zip(members, plan.items, strict=True):
            if item.num_to_draft:
                totals.server_drafted_tokens += session.newest_own[0]
                totals.server_accepted_tokens += session.newest_own[1]
        totals.stale_tokens += sum([session.drafts.counts.stale for session in members]) - self._num_stale
        totals.trimmed_tokens += plan.num_trimmed_tokens
        totals.held_sessions += plan.num_held
        totals.evictions += len(plan.evict)
        metrics.pass_sessions.observe(len(plan.items))
        metrics.pass_new.observe(num_new)
        metrics.pass_cached.observe(sum([item.num_cached for item in plan.items]))
        metrics.pass_accepted.observe(accepted)
        metrics.pass_seconds.observe(measured_s)
        metrics.pass_ratio.observe(measured_s / plan.predicted_s)
        metrics.slack.observe_all(record.slack_s)
        if self._trace is not None:
            self._trace.add(record)
            totals.trace_lines_dropped = self._trace.num_dropped

    def _count_turns(self, record: PassRecord) -> tuple[int, int]:
        """Tokens committed by the pass, and draft tokens accepted."""
        num_tokens, accepted, rejected_at, held, was_held = 0, 0, [], [0, 0], record.was_held
        for i, item, commit in record.turns():
            length = len(commit.tokens)
            num_tokens += length
            if was_held[i]:
                held[0] += 1
                held[1] += length
            if item.num_draft_tokens:
                if commit.last_origin == _CORRECTION:
                    rejected_at.append(length - 1)
                accepted += commit.num_accepted
        self.metrics.first_rejection.observe_all(rejected_at)
        self.metrics.turns.add(held[0], TRUE)
        self.metrics.turns.add(len(record.commits) - held[0], FALSE)
        self.metrics.turn_tokens.add(held[1], TRUE)
        self.metrics.turn_tokens.add(num_tokens - held[1], FALSE)
        return num_tokens, accepted

    def on_drafts(self, before: DraftCounts, after: DraftCounts) -> None:
        """Count what a draft message, or a new stream, has changed about a session's counts."""
        self.totals.received_tokens += after.received - before.received
        self.totals.late_tokens += after.late - before.late
        self.totals.stale_tokens += after.stale - before.stale

    def on_leave(self, session: ServerSession, now_s: float) -> None:
        """A session has left its stream; one that is resumed and leaves again is not counted twice."""
        self._holders.discard(session.id)
        timeline = session.timeline
        was_told, timeline.is_told = timeline.is_told, True
        if was_told or (timeline.first_s is None and now_s < timeline.due_s(0)):
            return
        name = session.opened.slo.name
        slo = name if name in self._slo_classes else CUSTOM_SLO_CLASS
        self.metrics.ended.add(1, slo, TRUE if timeline.is_met else FALSE)
        if timeline.first_s is None or timeline.last_s is None:
            return
        self.metrics.first_token.observe(timeline.first_s + timeline.way_s - timeline.opened_s, slo)
        if timeline.num_tokens > 1:
            self.metrics.per_token.observe((timeline.last_s - timeline.first_s) / (timeline.num_tokens - 1), slo)

    def on_refused(self, reason: str) -> None:
        """A request was refused for one of the reasons of `metric_set`."""
        self.metrics.refused.add(1, reason)

    def on_load(self, load: float) -> None:
        """The predicted load is this now."""
        self._load = load
        self.metrics.load.set(load)

    # -- in the thread that publishes ---------------------------------------------------------------------------

    def look(self, sessions: Iterable[ServerSession], max_unacked_tokens: int) -> None:
        """Set the gauges about attached `sessions`; only reads them."""
        states = {"running": 0, "waiting": 0, "paused": 0}
        drafting = {"none": 0, "working": 0, "rejected": 0, "late": 0, "stale": 0}
        num_buffered = 0
        for session in sessions:
            paused = session.is_paused(max_unacked_tokens)
            states["paused" if paused else "running" if session.is_due else "waiting"] += 1
            drafting[drafting_state(session.drafts.counts)] += 1
            num_buffered += session.num_buffered
        for state, number in states.items():
            self.metrics.sessions.set(number, state)
        for state, number in drafting.items():
            self.metrics.drafting.set(number, state)
        self.metrics.buffered.set(num_buffered)

    def look_around(self, num_lingering: int, num_queued: int, estimator: Estimator, kv: KvAccount) -> None:
        """Set the gauges about everything else."""
        self.metrics.sessions.set(num_lingering, "lingering")
        self.metrics.queue.set(num_queued)
        self.metrics.margin.set(estimator.margin)
        self.metrics.noise.set(estimator.noise)
        self.metrics.kv_blocks.set(kv.num_blocks - kv.num_free, "used")
        self.metrics.kv_blocks.set(kv.num_free, "free")

    def families(self) -> list[Family]:
        """All families: first those of `totals`."""
        return Totals.families() + self.metrics.families()

    def values(self) -> list[float]:
        """Values of all series, in the order of `families` and their labels."""
        return self.totals.values() + self.metrics.values()


def drafting_state(counts: DraftCounts) -> str:
    """One of `metric_set.DRAFTING_STATES`, as the help text of `wisp_sessions_drafting` defines them."""
    if not counts.received:
        return "none"
    if counts.verified >= MIN_JUDGED_DRAFTS and not counts.accepted:
        return "rejected"
    if not counts.verified and counts.late + counts.stale >= MIN_JUDGED_DRAFTS:
        return "late" if counts.late >= counts.stale else "stale"
    return "working"
