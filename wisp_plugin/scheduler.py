"""What goes into the next pass: `Scheduler.plan` / `Scheduler.complete` around a policy (DESIGN.md section 7).

The scheduler keeps the columns that policies look at, fits what a policy wants into KV memory, lets sessions share
prefixes, and tells prediction and price of the result. It is deterministic: equal calls give equal plans. It never
sleeps, draws or measures: time is an argument, so that the simulator drives this very code.

Waiting is bounded but under `edf`, where hopelessly late sessions may fill every pass. `continuous` and `fcfs` order by
readiness, and being served puts a session behind; `wisp` holds nobody for longer than `WispParameters.max_hold_s`.
Who has waited longer is served before all others; of prompts only the one that has waited longest. Under KV pressure
see `kv_admission`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from wisp_plugin.admission import predicted_load, prefill_wait_s, retry_after_s
from wisp_plugin.config import EngineConfig
from wisp_plugin.errors import ConfigError
from wisp_plugin.estimator import Estimator
from wisp_plugin.kv_admission import KvAccount, KvAdmission, Share
from wisp_plugin.messages import BatchPlan, Commit, Open, PassItem, PassOutcome, Timing
from wisp_plugin.pass_features import pass_features, predict_pass
from wisp_plugin.policies import Choice, Continuous, Edf, Fcfs, Policy
from wisp_plugin.roster import Candidates, Ints, Roster
from wisp_plugin.server_drafts import ServerDrafts
from wisp_plugin.server_session import ServerSession
from wisp_plugin.wisp_policy import Wisp

POLICIES: dict[str, Callable[[EngineConfig, Estimator], Policy]] = {
    "continuous": Continuous,
    "edf": Edf,
    "fcfs": Fcfs,
    "wisp": Wisp,
}


class Scheduler:
    """Sessions that may be served, and the two questions asked about them: what next, and what did it give."""

    def __init__(
        self, policy: Policy, config: EngineConfig, kv: KvAccount, estimator: Estimator,
        draft_steps: Estimator | None = None,
    ) -> None:  # fmt: skip
        """`draft_steps`: what a step of a draft model on the server takes, if there is one (see `server_drafts`)."""
        self.estimator = estimator
        self._server_drafts = ServerDrafts(estimator, draft_steps, config.max_server_drafts) if draft_steps else None
        self._policy = policy
        self._config = config
        self._kv = kv
        self._sessions: dict[str, ServerSession] = {}
        self._roster = Roster(config.max_draft_ahead)
        self._hopes_for_prefix: dict[str, None] = {}  # hold nothing yet: another's prefill may become theirs
        self._mean_session_s = 5.0  # smoothed, of sessions that have committed something
        self._may_share = False  # somebody has prefilled in the last pass

    @property
    def sessions(self) -> Iterable[ServerSession]:
        """Sessions that may be served, in the order of their opening."""
        return self._sessions.values()

    # -- sessions change ----------------------------------------------------------------------------------------

    def add(self, session: ServerSession) -> None:
        """Let a session take part from now on."""
        self._sessions[session.id] = session
        session.has_place = False
        self._roster.add(session)
        self._adopt(session)
        self.note(session)

    def note(self, session: ServerSession) -> None:
        """Take notice that a session has changed: a draft has arrived, or it was resumed."""
        if session.id in self._sessions:
            may_run = session.is_due and not session.is_paused(self._config.max_unacked_tokens)
            self._roster.note(session, may_run)

    def remove(self, session_id: str) -> None:
        """Take a session out; unknown ones are ignored. Its KV is the caller's to release."""
        session = self._sessions.pop(session_id, None)
        last_s = session.timeline.last_s if session else None
        if session and last_s is not None:
            self._mean_session_s += 0.1 * (last_s - session.opened_s - self._mean_session_s)
        self._roster.remove(session_id)
        self._hopes_for_prefix.pop(session_id, None)

    def evict(self, session_ids: Iterable[str]) -> None:
        """Note that the KV of these sessions is gone; it is computed again when their turn comes."""
        for session_id in session_ids:
            session = self._sessions[session_id]
            session.num_cached, session.has_place = 0, False
            self._hopes_for_prefix[session_id] = None
            self.note(session)

    def _adopt(self, session: ServerSession) -> None:
        """Let a session share the KV of a longer prefix than it holds, if somebody holds it already."""
        if not self._config.prefix_sharing:
            return
        session.num_cached = self._kv.adopt_more(session.id, session.committed)
        if session.num_cached:
            self._hopes_for_prefix.pop(session.id, None)
        else:
            self._hopes_for_prefix[session.id] = None

    def _retry_adoption(self) -> None:
        self._may_share = False
        for session_id in list(self._hopes_for_prefix):
            self._adopt(self._sessions[session_id])
            self.note(self._sessions[session_id])

    # -- admission ----------------------------------------------------------------------------------------------

    def load(self, newcomer: Open | None = None) -> float:
        """Predicted load, with `newcomer` if given; above 1 SLOs cannot be kept (see `admission`)."""
        return predicted_load(self._roster.everyone(), newcomer, self.estimator)

    def refuses(self, newcomer: Open) -> float | None:
        """None if the predicted load with `newcomer` can be served, else seconds after which it should come again.

        Nobody is refused at an idle server: alone, a session gets what there is.
        """
        max_load, num_sessions = self._config.max_load, len(self._sessions)
        if not max_load or not num_sessions:
            return None
        everyone = self._roster.everyone()
        load = predicted_load(everyone, newcomer, self.estimator)
        waits_s = prefill_wait_s(self._roster.candidates(), load, self.estimator)  # who waits for its client does not
        if load <= max_load and waits_s <= newcomer.slo.ttft_ms / 1e3:
            return None
        return retry_after_s(load, max_load, num_sessions, self._mean_session_s)

    # -- plan ---------------------------------------------------------------------------------------------------

    def plan(self, now_s: float) -> BatchPlan:
        """The next pass. Without items nobody runs before `wake_s` unless something arrives."""
        if self._may_share:
            self._retry_adoption()
        candidates = self._roster.candidates()
        if not len(candidates):
            return BatchPlan()
        num_candidates, drafts = len(candidates), self._server_drafts
        offered = drafts.offer(candidates) if drafts else candidates
        admission = None if self._has_room(offered) else self._admission(candidates, now_s)
        if admission is not None:
            kept = self._eligible(candidates, admission)
            candidates, offered = candidates.only(kept), offered.only(kept)
        choice = self._without_twins(offered, self._policy.choose(offered, now_s))
        if drafts:
            choice = drafts.settle(candidates, offered, choice)
        if admission is not None:
            choice = self._fit(candidates, choice, admission)
        self._policy.note(offered, choice, now_s)
        drafting_s = drafts.seconds(candidates, choice) if drafts else 0.0
        predicted_s, price = predict_pass(self.estimator, offered, choice, drafting_s)
        return BatchPlan(
            items=self._items(candidates, choice),
            evict=tuple(admission.evicted) if admission is not None else (),
            predicted_s=predicted_s,
            price=price,
            num_held=num_candidates - len(choice.members),
            num_trimmed_tokens=int(candidates.num_buffered[choice.members].sum() - choice.num_drafts.sum()),
            wake_s=choice.wake_s,
        )

    def _items(self, candidates: Candidates, choice: Choice) -> tuple[PassItem, ...]:
        sessions = [self._roster.sessions[row] for row in candidates.rows[choice.members].tolist()]
        own = [0] * len(sessions) if choice.num_to_draft is None else choice.num_to_draft.tolist()
        parts = zip(
            sessions, choice.num_committed.tolist(), choice.num_drafts.tolist(), choice.reasons, own, strict=True
        )
        return tuple([session.pass_item(new, drafts, reason, more) for session, new, drafts, reason, more in parts])

    def _without_twins(self, candidates: Candidates, choice: Choice) -> Choice:
        """Without prefills that would compute the same block as another one of this pass: they share it afterwards."""
        prefills = np.flatnonzero(candidates.num_uncached[choice.members] > 1)
        if len(prefills) < 2 or not self._config.prefix_sharing:
            return choice
        seen: set[object] = set()
        twins = []
        for at in prefills.tolist():
            session = self._roster.sessions[candidates.rows[choice.members[at]]]
            key = self._kv.prefill_key(session.committed, session.num_cached)
            if key is not None and key in seen:
                twins.append(at)
                self._hopes_for_prefix[session.id] = None
            seen.add(key)
        return choice.only(np.delete(np.arange(len(choice.members)), twins)) if twins else choice

    def _has_room(self, c: Candidates) -> bool:
        """True if there are blocks for everybody's next pass: the usual case, and a quick answer."""
        size = self._kv.block_tokens
        most = np.ceil((c.num_cached + c.num_uncached + c.num_buffered + 1) / size) - c.num_cached // size
        return bool(most.sum() <= self._kv.num_free)

    def _admission(self, candidates: Candidates, now_s: float) -> KvAdmission:
        may_run = [self._roster.sessions[row] for row in candidates.rows.tolist()]
        return KvAdmission(self._kv, self.sessions, may_run, now_s)

    def _eligible(self, candidates: Candidates, admission: KvAdmission) -> Ints:
        rows, ids = candidates.rows.tolist(), admission.admit()
        return np.array([i for i, row in enumerate(rows) if self._roster.sessions[row].id in ids])

    def _fit(self, c: Candidates, choice: Choice, admission: KvAdmission) -> Choice:
        """The part of a choice that KV memory allows."""
        sessions = [self._roster.sessions[row] for row in c.rows[choice.members].tolist()]
        parts = zip(sessions, choice.num_committed.tolist(), choice.all_drafts.tolist(), strict=True)
        num_drafts = {share.session.id: share.num_drafts for share in admission.fit([Share(*part) for part in parts])}
        fitting = choice.only(np.array([i for i, s in enumerate(sessions) if s.id in num_drafts], np.int64))
        fitted = np.array(list(num_drafts.values()), np.int64)
        own = None if choice.num_to_draft is None else np.maximum(0, fitted - fitting.num_drafts)
        return dataclasses.replace(fitting, num_drafts=np.minimum(fitted, fitting.num_drafts), num_to_draft=own)

    # -- complete -----------------------------------------------------------------------------------------------

    def complete(
        self, plan: BatchPlan, outcomes: Sequence[PassOutcome], started_s: float, measured_s: float,
        drafting_s: float = 0.0,
    ) -> list[Commit]:  # fmt: skip
        """Apply the outcomes of a pass; one commit for each member that got tokens.

        `drafting_s`: the part of `measured_s` in which the server drafted.
        """
        commits = []
        predicted_us, measured_us = round(1e6 * plan.predicted_s), round(1e6 * measured_s)
        for item, outcome in zip(plan.items, outcomes, strict=True):
            assert outcome.session == item.session, "outcomes come in the order of the plan"
            session = self._sessions[item.session]
            waited_us = round(1e6 * max(0.0, started_s - session.newest_input_s))
            timing = Timing(waited_us, predicted_us, measured_us, len(plan.items))
            commit = session.commit(item, outcome, timing, started_s + measured_s, plan.price)
            session.has_place = True
            self.note(session)
            if commit is not None:
                commits.append(commit)
        if self._server_drafts:
            self._server_drafts.note(drafting_s)
        self._may_share = any(len(item.tokens) - item.num_draft_tokens - item.num_cached > 1 for item in plan.items)
        self.estimator.observe(pass_features(plan.items, outcomes), measured_s - drafting_s)
        return commits


def make_scheduler(
    config: EngineConfig, kv: KvAccount, estimator: Estimator, draft_steps: Estimator | None = None
) -> Scheduler:
    """The scheduler with the policy that `config` names.

    Raises:
        ConfigError: there is no such policy.
    """
    if config.policy not in POLICIES:
        raise ConfigError(f"policy is {config.policy!r}; allowed: {', '.join(POLICIES)}")
    return Scheduler(POLICIES[config.policy](config, estimator), config, kv, estimator, draft_steps)
