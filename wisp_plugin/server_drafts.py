"""Drafts that the server makes itself, for sessions whose device has none ready: for whom, and how many.

A device behind a slow link or with a slow processor has nothing ready when a tight SLO wants the next pass. A small
model beside the target then drafts for all such sessions together, one step per token: co-located speculation, inside
the passes of this scheduler and behind what the devices have sent. A device that drafts fast and well enough gets none.
The output is the same either way (DESIGN.md section 3).

The policy decides as if these tokens waited in the buffers already (`offer`). Unlike those of devices they take the
server's time before the pass, so they have to pay for that (`settle`): a step is taken for as many members, the
likeliest first, as make the expected tokens per second of the pass the highest, and among many sessions only if what
it adds is worth `LEAST_GAIN` times what the pass is worth without it: longer passes cost others their SLO. A token
counts the more, the less its session gets from a turn: it is by those that passes are limited. (Batched
speculation whose length follows the load: SmartSpec, Liu et al. 2024. How large the gain has to be is an outcome of
simulations: `bench/SIMULATION.md`.)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from wisp_plugin.estimator import EMPTY_PASS, Estimator, item_features, token_features
from wisp_plugin.pass_features import choice_features
from wisp_plugin.policies import Choice, expected_tokens
from wisp_plugin.roster import Candidates, Floats, Ints
from wisp_plugin.wisp_hold import FEW_SESSIONS
from wisp_plugin.wisp_offers import tells_turns
from wisp_plugin.wisp_parameters import WispParameters

LEAST_GAIN = 1.2  # tokens per second that a step adds, over those of the pass without it; 1 among FEW_SESSIONS
MOST_SKIPPED = 31  # plans without an offer, after offers that did not pay: 0, 1, 3, 7, ... behind each other
_DRAFTING_MEMORY = 0.7  # share of the smoothed drafting time that a pass keeps
_WEIGHTS = (0.6, 2.0)  # of a token, for sessions whose turns are worth much time, and little
_PARAMETERS = WispParameters()


@dataclass(frozen=True, slots=True)
class _Drafted:
    """A pass as far as it is drafted: its work `[2]`, the value of the tokens that it is expected to commit, and the
    seconds of drafting before it."""

    work: Floats
    tokens: float
    drafting_s: float


class ServerDrafts:
    """See the top of this file. `steps` predicts what a step of the draft model takes, `target` a pass."""

    def __init__(self, target: Estimator, steps: Estimator, max_tokens: int) -> None:
        """`max_tokens`: draft tokens of a session in a pass at most."""
        self._target, self._steps, self._max_tokens = target, steps, max_tokens
        self._num_paid = 0  # steps that paid in the newest pass
        self._skip = 0  # plans without an offer, if the next one does not pay
        self._drafting_s = 0.0  # before a pass, smoothed
        self._retry_in = 0  # plans until a step is offered again

    def offer(self, c: Candidates) -> Candidates:
        """`c` as if what the server could draft for each session waited in its buffer already.

        One step more than paid in the newest pass is offered, and seldom where none ever pays: what is offered for
        nothing keeps others out. In `sync` there is one commit per draft of the device; a prompt is computed
        without, as the draft model would have to compute it as well before the first token.
        """
        if self._retry_in:
            return c
        room = np.clip(c.num_left - 1.0 - c.num_buffered, 0.0, min(self._num_paid + 1, self._max_tokens))
        num_own = np.where((c.is_sync > 0) | (c.num_uncached > 1) | (c.own_acceptance <= 0), 0.0, room)
        if not num_own.any():
            return c
        num_buffered = c.num_buffered + num_own
        levels = np.arange(max(int(num_buffered.max()), c.survival.shape[1]))
        survival = np.zeros((len(c), len(levels)))
        survival[:, : c.survival.shape[1]] = c.survival
        has_drafts = np.flatnonzero(c.num_buffered > 0)
        reached = np.ones(len(c))  # probability that all of the device's draft is right
        reached[has_drafts] = c.survival[has_drafts, c.num_buffered[has_drafts].astype(np.int64) - 1]
        behind = levels - c.num_buffered[:, None]
        own = reached[:, None] * c.own_acceptance[:, None] ** (np.maximum(behind, 0.0) + 1.0)
        is_own = (behind >= 0.0) & (levels < num_buffered[:, None])
        survival = np.where(is_own, own, survival)
        return replace(c, num_buffered=num_buffered, survival=survival, drafting_s=self._drafting_s)

    def settle(self, c: Candidates, offered: Candidates, choice: Choice) -> Choice:
        """`choice` among what was `offered`, less what does not pay. `c`: what there is without drafting."""
        members = choice.members
        if not len(members):
            return choice
        self._retry_in = max(0, self._retry_in - 1)
        real = np.minimum(choice.num_drafts, c.num_buffered[members].astype(np.int64))
        wanted = choice.num_drafts - real
        choice = replace(choice, num_drafts=real)
        self._num_paid = 0
        if not wanted.any():
            return choice
        least_gain = LEAST_GAIN if len(c) > FEW_SESSIONS else 1.0
        value = self._values(c, members)
        tokens = float(value @ expected_tokens(offered, choice))
        drafted = _Drafted(self._target.work(choice_features(c, choice)), tokens, 0.0)
        counts = np.zeros(len(members), np.int64)
        context = _context(c, choice)
        token_work = self._target.work(token_features(context))
        for step in range(int(wanted.max())):
            takes = np.flatnonzero((wanted > step) & (counts == step))
            gain = value[takes] * offered.survival[members[takes], real[takes] + step]
            best = np.argsort(-gain, kind="stable")
            order = takes[best]
            step_s = self._step_s(context[order] + step)
            further = self._further(drafted, token_work[order], gain[best], step_s, least_gain)
            if further is None:
                break
            drafted, num_members = further
            counts[order[:num_members]] += 1
            self._num_paid = step + 1
        if not counts.any():
            self._retry_in, self._skip = self._skip, min(2 * self._skip + 1, MOST_SKIPPED)
            return choice
        self._skip = 0
        return replace(choice, num_to_draft=counts)

    def _values(self, c: Candidates, members: Ints) -> Floats:
        """What a token counts for each of the members, `[M]`."""
        value = np.where(c.is_lost[members] > 0, _PARAMETERS.lost_value, 1.0)
        return value if len(c) <= FEW_SESSIONS else value * draft_weights(c, members)

    def note(self, drafting_s: float) -> None:
        """Before the newest pass the server drafted for so long, with what its model had to catch up with."""
        self._drafting_s += (1.0 - _DRAFTING_MEMORY) * (drafting_s - self._drafting_s)

    def seconds(self, c: Candidates, choice: Choice) -> float:
        """How long drafting for `choice` takes. What the draft model has to catch up with is not known here."""
        if choice.num_to_draft is None:
            return 0.0
        seconds, context = 0.0, _context(c, choice)
        for step in range(int(choice.num_to_draft.max(initial=0))):
            seconds += float(self._step_s(context[choice.num_to_draft > step] + step)[-1])
        return seconds

    def _further(
        self, before: _Drafted, work: Floats, gain: Floats, step_s: Floats, least_gain: float
    ) -> tuple[_Drafted, int] | None:
        """One more step and for how many members, who add `work` `[M, 2]` and `gain` `[M]`, best first; None: nobody.

        `step_s` `[M]`: what the step takes for the first 1, 2, ... of them. `least_gain`: what it has to win.
        """
        if not len(gain):
            return None
        reached, tokens = before.work + work.cumsum(axis=0), before.tokens + gain.cumsum()
        seconds = self._target.seconds(reached) + step_s
        last = int((tokens / (seconds + before.drafting_s)).argmax())
        pass_s = self._target.pass_s(before.work)
        per_s = before.tokens / (pass_s + before.drafting_s)
        if tokens[last] - before.tokens <= least_gain * per_s * (seconds[last] - pass_s):
            return None
        drafting_s = before.drafting_s + float(step_s[last])
        return _Drafted(reached[last], float(tokens[last]), drafting_s), last + 1

    def _step_s(self, context: Floats) -> Floats:
        """Seconds of a step for the first 1, 2, ... of the sessions with `context` tokens."""
        parts = item_features(context, np.ones(len(context)), 1.0).cumsum(axis=0)
        return self._steps.predict(EMPTY_PASS + parts)


def _context(c: Candidates, choice: Choice) -> Floats:
    """Tokens behind which the server drafts, `[M]`."""
    result: Floats = c.num_cached[choice.members] + choice.num_committed + choice.num_drafts
    return result


def draft_weights(c: Candidates, rows: Ints) -> Floats:
    """What a draft token counts for each of the sessions `rows`: 1 where a turn is worth as much as in their median.

    A turn is worth its tokens times the tpot. 1 as well for those whose turns tell nothing.
    """
    weights = np.ones(len(rows))
    known = np.flatnonzero(tells_turns(c, _PARAMETERS)[rows])
    if len(known):
        turn_s = (c.tpot_s * c.tokens_per_turn)[rows[known]]
        weights[known] = np.median(turn_s) / turn_s
    return weights.clip(*_WEIGHTS)
