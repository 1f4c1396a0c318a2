"""What running sessions need and offer in policy `wisp`: columns over sessions and the tokens that each could get."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from wisp_plugin.roster import Bools, Candidates, Floats, Ints
from wisp_plugin.wisp_parameters import WispParameters


@dataclass(slots=True)
class Running:
    """Running sessions: when they need their next tokens, `[S]`, and what their own tokens cost."""

    rows: Ints  # into the candidates
    sessions: Candidates  # those of `rows`
    num_uncached: Floats  # at most the smallest chunk
    own_work: Floats  # [S, 2]: memory and arithmetic of the own tokens
    slack_s: Floats  # until the next token is needed, less a pass with everybody's own tokens
    due_s: Floats  # from when on a session needs a token
    is_due: Bools  # takes part whatever it costs


@dataclass(slots=True)
class Offers:
    """What running sessions offer: level 0 is the own token, level k the k-th draft token, `[S, L]`."""

    value: Floats  # 0 where there is no such draft token
    num_levels: Ints  # own token and buffered drafts
    num_uncached: Floats
    levels: Ints  # 0 to L - 1
    existing: Ints  # flat indices of the offers that there are
    work: Floats  # [2, S, L]: memory and arithmetic
    is_due: Bools  # [S]: takes part whatever it costs
    due_s: Floats  # [S]: from when on a session needs a token


def tells_turns(c: Candidates, parameters: WispParameters) -> Bools:
    """Whose turns tell how rich turns have to be, `[S]`: neither those that are not known yet, prompts among them, nor
    those that set no length of a pass: lost sessions, and `sync`."""
    return np.asarray((c.num_turns >= parameters.young_turns) & (c.is_lost == 0) & (c.is_sync == 0))
