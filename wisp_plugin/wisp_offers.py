"""What running sessions offer to a pass of policy `wisp`: columns over sessions and the tokens that each could get."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from wisp_plugin.roster import Floats, Ints

Bools = npt.NDArray[np.bool_]


@dataclass(slots=True)
class Offers:
    """What running sessions offer: level 0 is the own token, level k the k-th draft token, `[S, L]`."""

    rows: Ints  # into the candidates
    value: Floats  # 0 where there is no such draft token
    num_levels: Ints  # own token and buffered drafts
    num_uncached: Floats
    levels: Ints  # 0 to L - 1
    existing: Ints  # flat indices of the offers that there are
    work: Floats  # [2, S, L]: memory and arithmetic
    needs: Bools  # [S]: takes part whatever it costs
    need_s: Floats  # [S]: when a session starts to need a token
