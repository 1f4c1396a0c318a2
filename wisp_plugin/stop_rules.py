"""Stop rules: how far to draft (DESIGN.md section 8). See `controller.StopRule` for the protocol.

`fixed`   a fixed number of draft tokens (Leviathan et al. 2023; SLED)
`svip`    while the entropy of the last draft token is low (SVIP, arXiv 2411.18462)
`adaedl`  while a bound on its acceptance, from its entropy, is above a threshold that follows the acceptance rate
          (AdaEDL, arXiv 2410.18351)
`paper`   up to the first predicted rejection (WISP, arXiv 2601.11652)
`ratio`   `sync`: while it raises committed tokens per second, with the measured round
`price`   `free`: while the expected gain exceeds the server's price and the device's own cost of energy
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

from wisp_plugin.controller import MAX_AHEAD, Chain
from wisp_plugin.errors import ConfigError
from wisp_plugin.pace import Pace

DEFAULT_ENERGY_PRICE = 0.06  # committed tokens that a draft token has to win
_DOUBTFUL = 0.8  # of the cube of the usual acceptance, see bench/CONTROLLER.md
_LOOK_AHEAD = 24  # draft tokens whose gain is weighed together
# Passes without the session that may come before a draft token is late, on a server with many sessions and with few
# (bench/CONTROLLER.md).
_SPARED_PASSES, _SPARED_AMONG_FEW, _FEW_SESSIONS = 4, 2, 4


class Fixed:
    """At most a fixed number of draft tokens in front of the last known committed token."""

    def __init__(self, num_tokens: int) -> None:
        if not 0 <= num_tokens <= MAX_AHEAD:
            raise ConfigError(f"draft length is {num_tokens}; allowed: 0 (draft nothing) to {MAX_AHEAD}")
        self._num_tokens = num_tokens

    def draft_on(self, chain: Chain, pace: Pace, now_s: float) -> bool:
        """See `StopRule.draft_on`."""
        return len(chain) < self._num_tokens

    def waits(self, chain: Chain, pace: Pace) -> bool:
        """See `StopRule.waits`."""
        return True

    def on_commit(self, num_right: int, num_drafted: int) -> None:
        """See `StopRule.on_commit`."""


def _checked(energy_price: float) -> float:
    if not 0.0 <= energy_price <= 1.0:
        raise ConfigError(f"energy price is {energy_price}; allowed: 0 (drafting is free) to 1 (never worth it)")
    return energy_price


class Svip:
    """SVIP: stop behind a draft token whose entropy's root exceeds `threshold`."""

    def __init__(self, threshold: float = 1.0, max_tokens: int = 32) -> None:
        self._threshold, self._max_tokens = threshold, max_tokens

    def draft_on(self, chain: Chain, pace: Pace, now_s: float) -> bool:
        """See `StopRule.draft_on`."""
        if len(chain) >= self._max_tokens:
            return False
        return chain.stats is None or math.sqrt(chain.stats.entropy) <= self._threshold

    def waits(self, chain: Chain, pace: Pace) -> bool:
        """See `StopRule.waits`."""
        return raises_rate(chain, pace)

    def on_commit(self, num_right: int, num_drafted: int) -> None:
        """See `StopRule.on_commit`."""


class AdaEdl:
    """AdaEDL: stop when 1 - sqrt(gamma x entropy) < lambda, which follows the acceptance rate (equations 5 to 7)."""

    def __init__(self, gamma: float = 0.2, target_acceptance: float = 0.9, max_tokens: int = 32) -> None:
        self._gamma, self._target, self._max_tokens = gamma, target_acceptance, max_tokens
        self._lambda, self._rate = 0.4, target_acceptance

    def draft_on(self, chain: Chain, pace: Pace, now_s: float) -> bool:
        """See `StopRule.draft_on`."""
        if len(chain) >= self._max_tokens:
            return False
        return chain.stats is None or 1.0 - math.sqrt(self._gamma * chain.stats.entropy) >= self._lambda

    def waits(self, chain: Chain, pace: Pace) -> bool:
        """See `StopRule.waits`."""
        return raises_rate(chain, pace)

    def on_commit(self, num_right: int, num_drafted: int) -> None:
        """See `StopRule.on_commit`."""
        if num_drafted:
            self._rate = 0.5 * self._rate + 0.5 * num_right / num_drafted
            step = 0.01 if self._rate < self._target else -0.01
            self._lambda = min(max(0.9 * self._lambda + 0.1 * (self._lambda + step), 0.0), 1.0)


class Paper:
    """WISP as published: stop at the predicted first rejection.

    A draft token is predicted to be rejected below `threshold`; with false alarms that cost c wasted draft tokens, the
    least expected cost is at 1 / (1 + c).
    """

    def __init__(self, threshold: float = 0.5, max_tokens: int = 32) -> None:
        self._threshold, self._max_tokens = threshold, max_tokens

    def draft_on(self, chain: Chain, pace: Pace, now_s: float) -> bool:
        """See `StopRule.draft_on`."""
        if len(chain) >= self._max_tokens:
            return False
        return not chain.survival or chain.accepts >= self._threshold

    def waits(self, chain: Chain, pace: Pace) -> bool:
        """See `StopRule.waits`."""
        return raises_rate(chain, pace)

    def on_commit(self, num_right: int, num_drafted: int) -> None:
        """See `StopRule.on_commit`."""


class Ratio:
    """Draft on while one more draft token brings more per second than the round has without it.

    Rounds follow each other, so what a second is worth is the rate over many rounds (renewal reward), not that of this
    round alone: in an easy passage it pays to go on for longer. That rate is taken as the geometric mean of what the
    last rounds gave, which is noisy, and of what the best fixed length would give at the recent acceptance rate, which
    knows nothing of single tokens. Beyond that a token is asked to win `energy_price` committed tokens: close to its
    best the speed hardly changes, the drafting does. And a round ends behind a doubtful token, one far below what is
    usual: the next one knows what became of it. With a good draft that is worth more than the tokens behind it.
    """

    def __init__(self, energy_price: float = DEFAULT_ENERGY_PRICE) -> None:
        self._energy_price = _checked(energy_price)

    def draft_on(self, chain: Chain, pace: Pace, now_s: float) -> bool:
        """See `StopRule.draft_on`."""
        if chain.survival and chain.accepts < _DOUBTFUL * chain.acceptance**3:
            return False
        rate = best_fixed_rate(chain.acceptance, pace.draft_s, pace.overhead_s)
        if pace.tokens_per_round:
            rate = math.sqrt(rate * pace.tokens_per_s)
        return chain.expected(1) > rate * pace.draft_s + self._energy_price

    def waits(self, chain: Chain, pace: Pace) -> bool:
        """See `StopRule.waits`."""
        return raises_rate(chain, pace)

    def on_commit(self, num_right: int, num_drafted: int) -> None:
        """See `StopRule.on_commit`."""


class Price:
    """Draft on while the next draft tokens are expected to win more than they cost.

    A draft token wins a commit if the chain is right up to it and it reaches the server before a pass gets to its
    position; it costs the server's price (commits of others that it displaces) and `energy_price`, what the device asks
    for drafting a token, in committed tokens. Looked at together are as many next tokens as do best: behind a
    rejection the first ones may be late, and yet must be drafted for the sake of those that are not.
    """

    def __init__(self, energy_price: float = DEFAULT_ENERGY_PRICE) -> None:
        self._energy_price = _checked(energy_price)

    def draft_on(self, chain: Chain, pace: Pace, now_s: float) -> bool:
        """See `StopRule.draft_on`."""
        cost = pace.price + self._energy_price
        if chain.expected(1) <= cost:  # survival only falls from here
            return False
        gain, survival = 0.0, chain.expected(1)
        for number, is_late in enumerate(late_tokens(len(chain), pace, now_s), 1):
            gain += 0.0 if is_late else survival
            if gain > cost * number:
                return True
            survival *= chain.acceptance
        return False

    def waits(self, chain: Chain, pace: Pace) -> bool:
        """See `StopRule.waits`."""
        return raises_rate(chain, pace)

    def on_commit(self, num_right: int, num_drafted: int) -> None:
        """See `StopRule.on_commit`."""


def best_fixed_rate(acceptance: float, draft_s: float, overhead_s: float) -> float:
    """Committed tokens per second of rounds with the best fixed draft length, if each token is accepted with this
    probability (Leviathan et al. 2023, theorem 3.8)."""
    a = min(max(acceptance, 0.05), 0.99)
    tokens, alive, best, elapsed_s = 1.0, 1.0, 0.0, max(overhead_s, 1e-6)
    for _ in range(MAX_AHEAD):
        rate = tokens / elapsed_s
        if rate < best:  # of a concave and a linear function: it only falls from here
            break
        best = rate
        alive *= a
        tokens += alive
        elapsed_s += draft_s
    return best


def raises_rate(chain: Chain, pace: Pace) -> bool:
    """True if the next draft token brings more per second of drafting than the session commits per second anyway."""
    return chain.expected(1) > max(pace.committed_per_s, 1.0 / pace.verify_s) * pace.draft_s


def late_tokens(num_ahead: int, pace: Pace, now_s: float) -> Iterator[bool]:
    """For each of the next draft tokens behind a chain of `num_ahead`, while it is right: does a pass get there first?

    Passes follow each other; each commits the draft tokens that have arrived and one of the target's own. A few may go
    by without the session: under load a server lets those wait that are ahead of their schedule, and a chain that is
    once ahead stays there. Whoever gives up at the first late token never gets so far.
    """
    way_s, draft_s = pace.rtt_s / 2, pace.draft_s
    first_s, period_s = now_s + way_s + draft_s, max(pace.verify_s + pace.wait_alive_s, 1e-3)
    num_spared = _SPARED_PASSES if pace.num_in_pass > _FEW_SESSIONS else _SPARED_AMONG_FEW
    pass_s = pace.heard_s - way_s + pace.wait_s + num_spared * period_s
    is_committed = False  # whether the pass at `pass_s` has given its own token
    chain_and_next = itertools.chain(pace.arrivals_s, (first_s + k * draft_s for k in range(_LOOK_AHEAD)))
    for number, arrival_s in enumerate(chain_and_next):  # in the order of their arrival
        if is_committed:
            pass_s += period_s
        is_committed = arrival_s > pass_s
        if number >= num_ahead:
            yield is_committed
