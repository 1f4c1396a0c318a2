"""Co-located speculation: the draft model runs on the server, and the server pays for it.

Before a pass the draft model drafts for all its members together, one step per draft token; a step costs what its
`Costs` say for a batch of the sessions that draft in it. The first step also computes the tokens that were committed
since (a prompt for instance). Devices are thin: they get commits over their link. So there is no wasted waiting for a
network and no late draft token, but every draft token takes server time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bench.sim_client import SimulatedClient
from wisp_plugin.edge_session import Step
from wisp_plugin.estimator import EMPTY_PASS, Costs, Estimator, item_features
from wisp_plugin.messages import Commit, Draft, Open, PassItem, Status

MESSAGE_TOKENS = 64  # all that is drafted for a pass goes in one message


class DraftingCost:
    """Time of the draft steps before a pass."""

    def __init__(self, costs: Costs) -> None:
        self._costs = Estimator(costs)
        self.step_s = self.step_of(1.0)

    def step_of(self, num_sessions: float) -> float:
        """Seconds of a step for so many sessions with 256 tokens of context each."""
        return float(self._costs.predict(EMPTY_PASS + num_sessions * item_features(256.0, 1.0, 1.0)))

    def client(self, *args: Any) -> ColocatedClient:
        """A client whose drafts are made on the server; arguments of `SimulatedClient`."""
        client = ColocatedClient(*args)
        client.step_s = self.step_s
        return client

    def before(self, items: Sequence[PassItem]) -> float:
        """Seconds that the draft tokens in `items` took, and the draft model's own prefill."""
        drafts = np.array([item.num_draft_tokens for item in items])
        new = np.array([item.num_new_tokens for item in items], np.float64) - drafts
        context = np.array([item.num_cached for item in items], np.float64)
        total_s, steps = 0.0, int(drafts.max(initial=0))
        for step in range(max(1, steps)):
            takes_part = drafts > step if step else np.ones(len(items), bool)
            own = item_features(context + (new + step if step else 0.0), new if not step else np.ones(len(items)), 1.0)
            total_s += float(self._costs.predict(EMPTY_PASS + own[takes_part].sum(axis=0)))
        # Nobody drafts and nothing but single tokens is new: they are computed with the next draft.
        return total_s if steps or new.max(initial=0.0) > 1 else 0.0


class ColocatedClient(SimulatedClient):
    """A thin device, and beside it on the server what drafts for its session (a real edge session, without a link)."""

    __slots__ = ("step_s",)
    step_s: float  # told to the session as the time of a draft token

    def open(self, _: object = None) -> None:
        """Open the session, or try again after a refusal; drafts come behind the first commit."""
        self._is_refused = False
        self._transmit(self.edge.reopen())

    def answer(self, commit: Commit) -> None:
        """A commit: the drafting beside the server goes on at once, the device gets it over the link."""
        arrival_s = self.downlink.arrival_s(self._events.now_s)
        if commit.status not in (Status.RUNNING, Status.LENGTH):
            self._events.schedule(arrival_s, self.receive, commit)
            return
        self._events.schedule(arrival_s, self._show, commit)
        self.edge.on_commit(commit, self._events.now_s)
        self._draft()

    def _show(self, commit: Commit) -> None:
        """The commit is at the device."""
        self._note(commit)
        if commit.status is Status.LENGTH and not self._is_done:
            self._is_done = True
            self._on_done(self)

    def _draft(self) -> None:
        now_s = self._events.now_s
        while (step := self.edge.next_step(now_s)) in (Step.DRAFT, Step.SEND):
            if step is Step.SEND:
                self._transmit(self.edge.take_message(now_s))
                continue
            job = self.edge.begin_draft()
            token, stats = self.tokens.draft(len(self.edge.committed), len(job.context))
            self.edge.on_drafted(job, token, self.step_s, stats)

    def _transmit(self, message: Open | Draft) -> None:
        if isinstance(message, Open):
            super()._transmit(message)
        else:
            self._send(self, message)
