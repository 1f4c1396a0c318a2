"""What a session on the device has drafted and received."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from wisp_plugin.messages import Commit, Origin

_ACCEPTED, _CORRECTION = int(Origin.ACCEPTED), int(Origin.CORRECTION)


@dataclasses.dataclass(slots=True)
class EdgeStats:
    """Counts and times of one session.

    WDT share (DESIGN.md section 2, our own definition): drafting time of tokens that were rejected, behind a
    rejection, late or stale, over all drafting time. A token counts as useful when a commit names it accepted.
    """

    num_committed: int = 0
    num_commits: int = 0
    num_accepted: int = 0
    num_corrections: int = 0
    num_drafted: int = 0
    num_sent: int = 0
    num_messages: int = 0
    num_interrupted: int = 0  # draft tokens whose prefix was rolled back, or overtaken, while they were made
    num_reopened: int = 0
    drafting_s: float = 0.0
    useful_drafting_s: float = 0.0

    @property
    def wdt_share(self) -> float:
        """Wasted drafting time / all drafting time (0 without drafts)."""
        return max(0.0, 1.0 - self.useful_drafting_s / self.drafting_s) if self.drafting_s else 0.0

    @property
    def tokens_per_pass(self) -> float:
        """Committed tokens per commit."""
        return self.num_committed / self.num_commits if self.num_commits else 0.0

    def on_commit(self, commit: Commit, drafting_s: npt.NDArray[np.float64]) -> None:
        """A commit with tokens; `drafting_s`: of each of its positions, what drafting it took (0: not drafted)."""
        origins = commit.origin.tolist()  # a few: faster than columns
        self.num_commits += 1
        self.num_committed += len(origins)
        self.num_accepted += commit.num_accepted
        self.num_corrections += origins.count(_CORRECTION)
        times_s = zip(origins, drafting_s.tolist(), strict=True)
        self.useful_drafting_s += sum(time_s for origin, time_s in times_s if origin == _ACCEPTED)
