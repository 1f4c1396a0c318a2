"""What running sessions need and offer in policy `wisp`: columns over sessions and the tokens that each could get."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from wisp_plugin.roster import Bools, Candidates, Floats, Ints
from wisp_plugin.wisp_parameters import WispParameters


@dataclass(slots=True)
class Needs:
    """When running sessions need their next tokens, `[S]`, and what their own tokens cost."""

    rows: Ints  # into the candidates
    sessions: Candidates  # those of `rows`
    num_uncached: Floats  # at most the smallest chunk
    own_work: Floats  # [S, 2]: memory and arithmetic of the own tokens
    slack_s: Floats  # until the next token is needed, less a pass with everybody's own tokens
    need_s: Floats  # when a session starts to need a token
    needs: Bools  # takes part whatever it costs


@dataclass(slots=True)
class Offers:
    """What running sessions offer: level 0 is the own token, level k the k-th draft token, `[S, L]`."""

    value: Floats  # 0 where there is no such draft token
    num_levels: Ints  # own token and buffered drafts
    num_uncached: Floats
    levels: Ints  # 0 to L - 1
    existing: Ints  # flat indices of the offers that there are
    work: Floats  # [2, S, L]: memory and arithmetic
    needs: Bools  # [S]: takes part whatever it costs
    need_s: Floats  # [S]: when a session starts to need a token


def draft_weights(c: Candidates, parameters: WispParameters, rows: Ints | None = None) -> Floats:
    """What a draft token counts for each of the sessions `rows` (None: all), `[S]`: 1 where a turn is worth as much as
    in their median.

    A turn is worth its tokens times the tpot. Whoever gets less from it than others sets the length of passes, or is
    given up: a token more of his is worth more than one of a session that has turns to spare. 1 as well for those whose
    turns are not known yet, prompts among them, and for those whose turns set no length: lost ones, and `sync`.
    """
    rows = np.arange(len(c)) if rows is None else rows
    weights = np.ones(len(rows))
    is_known = (c.num_turns >= parameters.young_turns) & (c.is_lost == 0) & (c.is_sync == 0)
    known = np.flatnonzero(is_known[rows])
    if len(known):
        turn_s = (c.tpot_s * c.tokens_per_turn)[rows[known]]
        weights[known] = np.median(turn_s) / turn_s
    return weights.clip(parameters.least_draft_weight, parameters.most_draft_weight)
