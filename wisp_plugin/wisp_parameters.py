"""Constants of policy `wisp`, the outcome of simulations: `bench/SIMULATION.md`, and `bench/SCHEDULER.md` before it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WispParameters:
    """Values are those of one token: 1 to a session on its schedule. Times of a session count in its tpot as tokens."""

    # What a token is worth
    horizon_tokens: float = 8.0  # so far ahead of its schedule a session's token has the least value
    least_value: float = 0.02
    most_value: float = 2.0  # of a session that is `horizon_tokens` behind
    lost_pace: float = 0.97  # whoever bears less than this much of the mean pass at everybody's pace is beyond help
    least_saving: float = 0.1  # share of a pass that longer ones have to save; no SLO is given up for less
    least_saving_ahead: float = 0.04  # the same while everybody is ahead enough to bear the longer pass
    reserve_tokens: float = 25.0  # of what it is ahead, kept where no server drafts
    lost_value: float = 0.05  # factor for a session whose SLO cannot be met any more
    # Who takes part, who waits
    need_tokens: float = 1.5  # a session with less slack takes part whatever it costs
    max_hold_s: float = 1.0  # nobody waits longer than this for a place
    holds: bool = True  # False: whoever is due takes part in every pass
    hold_load: float = 0.3  # from this predicted load on, sessions wait for drafts that are on their way
    draft_grace_s: float = 0.02  # drafts that are so late are not on their way any more
    young_turns: int = 8  # whoever has had fewer turns is expected to get as many tokens from each as others do
    late_first_tokens: float = 20.0  # a first token that will be late queues as if it were needed in so many tpot
    latest_first_tokens: float = 60.0  # at most so many tpot behind its due time: nothing that is new comes before then
    latest_first_token_s: float = 10.0  # nor more than this, whatever its tpot
    poor_turn_passes: float = 1.5  # turns that are worth fewer passes are poor: draft tokens count more to them
    most_draft_weight: float = 4.0  # and so many times as much at most
    # Where everybody keeps the pace without drafts
    own_pace: float = 0.95  # or nearly: with a token from each pass of so much of the longest that saves time
    own_pace_tokens: float = 1.0  # who is further ahead gives up its drafts to prompts that wait
    level_margin: float = 1.2  # of the new tokens that come with what a pass commits: so many it may have
    draft_margin: float = 1.15  # so many times its price a draft token has to be worth
    first_token_passes: float = 6.0  # a prompt comes before running sessions if it is needed in so many passes
    # Prefill
    prefill_tokens: int = 16  # more uncached tokens than this are prefill; the smallest chunk
    prefill_haste: float = 0.5  # share of the time to its first token in which a prefill is to be done
    least_stretch: float = 1.03  # a pass may always grow by this for prefill
    borne_share: float = 0.12  # of running sessions: so many may lose their pace to the prefill of others
    spend_passes: float = 8.0  # passes over which sessions may spend what they are ahead on others
