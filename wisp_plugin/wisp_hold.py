"""Is a pass worth waiting for drafts that are on their way? For few sessions, whose speed is what counts.

Right behind a rejection a session's buffer is empty: a pass now decodes one token; a pass a little later verifies the
first drafts of the new chain. What pays depends on the acceptance rate a, the time g between draft tokens, the time
t until the next one arrives and the time V(n) of a pass with n draft tokens of the session. Semi-Markov decision with
average reward (Howard 1960), per session: with b tokens buffered, waiting for j more gives

    Q(j) = 1 + S(b + j) - rate (wait_j + V(b + j))
         + alive_j (tokens - rate x time of the passes until the next rejection)

where S is the expected number of accepted draft tokens, `alive_j` the probability that the chain outlives the pass
(all accepted, and the pass's own token too), and `rate` the tokens per second of the best such policy. During a pass
the device drafts on for nothing, so a chain that lives finds V / g tokens buffered at the next pass; the number that
reproduces itself so is taken for all passes behind the next one.
"""

from __future__ import annotations

import numpy as np

from wisp_plugin.roster import Bools, Candidates, Floats

MAX_SESSIONS = 16  # with more, somebody always had rather go now
FEW_SESSIONS = 4  # so few have the server for themselves, whatever their SLOs make of its load
_MAX_WAITED = 24  # draft tokens that are waited for
_WAITED: Floats = np.arange(_MAX_WAITED + 1.0)  # j, `[J]`
_ACCEPTANCE = (0.02, 0.98)
_LEAST_GAIN = 0.1  # committed tokens that waiting has to win: nearer to zero the estimates are too rough


def waits_for_drafts(c: Candidates, now_s: float, pass_s: float, token_s: float = 0.0) -> Bools:
    """Bool `[S]`: sessions that commit more tokens per second if the next pass waits for their drafts.

    It takes `pass_s` without any drafts, and `token_s` more per draft token.

    Those whose next drafts are not expected are not among them.
    """
    a = np.clip(c.acceptance, *_ACCEPTANCE)[:, None]
    gap_s = np.maximum(c.draft_gap_s, 1e-4)[:, None]
    trip_s = 2.0 * c.way_s[:, None] + gap_s  # behind a rejection the first draft token is a round trip and a step away
    passes = _Passes(a, gap_s, pass_s, token_s)
    tokens, time_s = passes.cycle(trip_s, _WAITED)
    rates = tokens / time_s  # [S, J], behind a rejection
    gain = _gain(c, now_s, passes, rates.max(axis=1, keepdims=True))
    waits = gain[:, 1:].max(axis=1) > gain[:, 0] + _LEAST_GAIN
    # The device knows its own tokens better than their mean: it tells how far a new chain is worth waiting for.
    worth_s = trip_s[:, 0] + (c.worth_tokens - 1.0) * gap_s[:, 0] + pass_s + token_s * c.worth_tokens
    tells = (c.worth_tokens > 0) & (c.is_new_chain > 0) & ((1.0 + c.worth_gain) / worth_s > rates[:, 0])
    result: Bools = (waits | tells) & np.isfinite(c.next_draft_s)
    return result


def _gain(c: Candidates, now_s: float, passes: _Passes, rate: Floats) -> Floats:
    """Q(j), `[S, J]`: tokens until the next rejection if the next pass waits for j draft tokens, less what their time
    would give at `rate` `[S, 1]` tokens per second."""
    next_s = np.maximum(c.next_draft_s - now_s, 0.0)[:, None]
    next_s[~np.isfinite(c.next_draft_s)] = 0.0
    right, alive = c.survival.sum(axis=1)[:, None], np.ones((len(c), 1))
    has_drafts = np.flatnonzero(c.num_buffered > 0)
    alive[has_drafts, 0] = c.survival[has_drafts, c.num_buffered[has_drafts].astype(int) - 1]
    tokens, time_s = passes.cycle(next_s, _WAITED, c.num_buffered[:, None], right, alive)
    result: Floats = tokens - rate * time_s
    return result


class _Passes:
    """Passes of one session behind each other, and what they give until the next rejection."""

    def __init__(self, a: Floats, gap_s: Floats, pass_s: float, token_s: float) -> None:
        self._a, self._gap_s, self._pass_s, self._token_s = a, gap_s, pass_s, token_s
        # n drafts that arrive during a pass with n drafts, less the token that the pass itself chooses.
        grows = np.maximum(1.0 - token_s / gap_s, 1.0 / _MAX_WAITED)
        steady = np.clip((pass_s / gap_s - 1.0) / grows, 0.0, _MAX_WAITED)
        ends = 1.0 - a ** (np.floor(steady) + 1.0)
        self._steady_tokens = (1.0 + _accepted(a, np.floor(steady))) / ends
        self._steady_s = self._seconds(np.floor(steady)) / ends

    def _seconds(self, num_drafts: Floats) -> Floats:
        return self._pass_s + self._token_s * num_drafts

    def cycle(
        self, next_s: Floats, waited: Floats, num_buffered: Floats | float = 0.0, right: Floats | float = 0.0,
        alive: Floats | float = 1.0,
    ) -> tuple[Floats, Floats]:  # fmt: skip
        """Expected tokens and seconds `[S, J]` until the next rejection, if a pass waits for `waited[j]` draft tokens.

        `next_s`: until the first of them arrives. `num_buffered` wait already; as many as `right` of them will be
        accepted, and they are all right with probability `alive`.
        """
        a, gap_s = self._a, self._gap_s
        wait_s = np.where(waited > 0, next_s + (waited - 1) * gap_s, 0.0)
        pass_s = self._seconds(num_buffered + waited)
        during_s = np.where(waited > 0, pass_s, pass_s - next_s + gap_s)
        num_ready = np.maximum(np.floor(during_s / gap_s) - 1.0, 0.0)
        lives = a ** (num_ready + 1.0)
        next_tokens = 1.0 + _accepted(a, num_ready) + lives * self._steady_tokens
        next_pass_s = self._seconds(num_ready) + lives * self._steady_s
        outlives = alive * a ** (waited + 1.0)
        tokens = 1.0 + right + alive * _accepted(a, waited) + outlives * next_tokens
        return tokens, wait_s + pass_s + outlives * next_pass_s


def _accepted(a: Floats, num_tokens: Floats) -> Floats:
    """Expected accepted draft tokens of `num_tokens`: a + a^2 + ..."""
    result: Floats = a * (1.0 - a**num_tokens) / (1.0 - a)
    return result
