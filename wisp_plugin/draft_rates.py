"""What a server learns of a session's drafts: how often they hold, and whether what a device tells of them is true."""

from __future__ import annotations

from wisp_plugin.coupling import count_accepted
from wisp_plugin.messages import PassItem, PassOutcome

# Acceptance before anything is known of a session, as so many draft tokens accepted and rejected, and how much
# of the count each commit keeps.
_PRIOR_ACCEPTED, _PRIOR_REJECTED, _MEMORY = 3.0, 1.0, 0.95
_FADING = 0.01
# Promised tokens and those that came true, before anything is known; below which share of them nobody is believed.
_PRIOR_PROMISED, _LEAST_KEPT = 24.0, 0.3
_PAUSE = 3  # turns in which nothing is planned for who got no draft of the server: it had no room, or no context


class AcceptanceRate:
    """Learnt probability that a draft token is accepted if all before it were."""

    __slots__ = ("_accepted", "_rejected")

    def __init__(self) -> None:
        self._accepted, self._rejected = _PRIOR_ACCEPTED, _PRIOR_REJECTED

    @property
    def value(self) -> float:
        """The probability."""
        return self._accepted / (self._accepted + self._rejected)

    def fade(self) -> None:
        """Nothing was verified: what was known gets old."""
        self._accepted += _FADING * (_PRIOR_ACCEPTED - self._accepted)
        self._rejected += _FADING * (_PRIOR_REJECTED - self._rejected)

    def learn(self, num_accepted: int, num_verified: int) -> None:
        """Of a chain with `num_verified` tokens the first `num_accepted` were right."""
        self._accepted = _MEMORY * self._accepted + num_accepted
        self._rejected = _MEMORY * self._rejected + (num_accepted < num_verified)


class Trust:
    """Whether the survival that a device tells of its drafts comes true."""

    __slots__ = ("_kept", "_promised")

    def __init__(self) -> None:
        self._promised = self._kept = _PRIOR_PROMISED

    @property
    def holds(self) -> bool:
        """True while enough of what was promised came true."""
        return self._kept >= _LEAST_KEPT * self._promised

    def learn(self, num_promised: float, num_accepted: int) -> None:
        """Of verified tokens `num_promised` were to be right by what was told, and `num_accepted` were."""
        self._promised = _MEMORY * self._promised + num_promised
        self._kept = _MEMORY * self._kept + num_accepted


class ServerDraftRate:
    """How often what the server itself drafts for the session holds, and whether it can draft for it now."""

    __slots__ = ("_pause", "_rate")

    def __init__(self) -> None:
        self._rate = AcceptanceRate()
        self._pause = 0  # turns

    @property
    def acceptance(self) -> float:
        """Of what the server would draft now; 0: it would not."""
        return 0.0 if self._pause else self._rate.value

    def count(self, item: PassItem, outcome: PassOutcome) -> int:
        """Accepted tokens of the server's draft in a pass that accepted all that the device had sent.

        What was planned and not made is not planned for a while.
        """
        if outcome.drafted is None:
            self._pause = _PAUSE if item.num_to_draft else max(0, self._pause - 1)
            self._rate.fade()
            return 0
        num_accepted = count_accepted(outcome.drafted, outcome.chosen[item.num_draft_tokens :])
        self._rate.learn(num_accepted, len(outcome.drafted))
        return num_accepted
