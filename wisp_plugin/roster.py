"""Sessions as columns: what a scheduling decision looks at, kept up to date session by session.

A decision about a thousand sessions has no time to ask each of them: `Roster.note` writes one session's figures when
they change (a draft has arrived, a pass has ended), and `Roster.candidates` cuts the columns of those that may run.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from wisp_plugin.messages import Mode
from wisp_plugin.server_session import ServerSession

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
_COLUMNS = (
    "num_cached", "num_uncached", "num_buffered", "needed_s", "tpot_s", "next_draft_s", "ready_s", "tokens_per_turn",
    "is_lost", "opened_s", "draft_gap_s", "acceptance", "way_s",
    "worth_tokens", "worth_gain", "is_new_chain", "is_sync", "num_turns", "num_left", "own_acceptance",
)  # fmt: skip
_FIRST_ROWS = 64


@dataclass(frozen=True, slots=True)
class Candidates:
    """Sessions that may take part in a pass; entry i of every column belongs to session i, in the order of opening.

    `num_uncached` (at least 1) committed tokens must be computed before anything is chosen; `survival[i, k]`, float
    `[S, K]`, is the probability that buffered draft token k and all before it are right, 0 behind the buffer;
    `needed_s` is when the next token has to be committed (see `Timeline`), `next_draft_s` when the next draft tokens
    are expected (inf: none are on the way), `ready_s` since when the session could have run, `is_lost` 1 if its SLO
    cannot be met any more. `draft_gap_s`: between its draft messages, `acceptance`: of its draft tokens, `way_s`: half
    a round trip, as far as they are known; `worth_tokens` and `worth_gain`: what is waited for behind a rejection (see
    `ServerSession`), `is_new_chain` 1 if the last commit left no draft chain; `is_sync` 1 in mode `sync`;
    `num_turns`: passes that have given it tokens; `num_left`: tokens that it may still commit; `own_acceptance`: of
    what the server drafts for it, 0 if it would not. And for all of them together, `drafting_s`: how long the server is
    expected to draft before the pass.
    """

    rows: Ints
    num_cached: Floats
    num_uncached: Floats
    num_buffered: Floats
    needed_s: Floats
    tpot_s: Floats
    next_draft_s: Floats
    ready_s: Floats
    tokens_per_turn: Floats
    is_lost: Floats
    opened_s: Floats
    draft_gap_s: Floats
    acceptance: Floats
    way_s: Floats
    worth_tokens: Floats
    worth_gain: Floats
    is_new_chain: Floats
    is_sync: Floats
    num_turns: Floats
    num_left: Floats
    own_acceptance: Floats
    survival: Floats
    drafting_s: float = 0.0

    def __len__(self) -> int:
        return len(self.rows)

    def only(self, wanted: Ints) -> Candidates:
        """The candidates with the indices `wanted`."""
        columns = {name: getattr(self, name)[wanted] for name in _FIELDS}
        return Candidates(**columns, drafting_s=self.drafting_s)


_FIELDS = tuple(field.name for field in fields(Candidates) if field.name != "drafting_s")


class Roster:
    """Rows of sessions. A session keeps its row until it leaves."""

    def __init__(self, max_draft_ahead: int) -> None:
        self._columns = np.zeros((len(_COLUMNS), _FIRST_ROWS))
        self._survival = np.zeros((_FIRST_ROWS, max_draft_ahead))
        self._opened = np.full(_FIRST_ROWS, np.inf)  # order of opening; inf: the row is free
        self._may_run = np.zeros(_FIRST_ROWS, bool)
        self._rows: dict[str, int] = {}
        self._free = list(range(_FIRST_ROWS - 1, -1, -1))
        self._num_added = 0
        self.sessions: dict[int, ServerSession] = {}  # by row

    def add(self, session: ServerSession) -> None:
        """Give a session a row, if it has none."""
        if session.id in self._rows:
            return
        if not self._free:
            self._grow()
        row = self._free.pop()
        self._rows[session.id] = row
        self._opened[row] = self._num_added
        self._num_added += 1
        self.sessions[row] = session

    def remove(self, session_id: str) -> None:
        """Free the row of a session; unknown ones are ignored."""
        row = self._rows.pop(session_id, None)
        if row is None:
            return
        self._opened[row], self._may_run[row] = np.inf, False
        del self.sessions[row]
        self._free.append(row)

    def note(self, session: ServerSession, may_run: bool) -> None:
        """Write what has become of a session that has a row; its new draft tokens included."""
        row = self._rows[session.id]
        self._may_run[row] = may_run
        num_buffered = session.drafts.num_tokens
        before = int(self._columns[2, row])
        self._columns[:, row] = (
            session.num_cached,
            session.num_committed - session.num_cached,
            num_buffered,
            session.timeline.needed_s,
            session.timeline.tpot_s,
            session.expected.next_s,
            session.ready_since_s,
            session.tokens_per_turn,
            session.timeline.is_lost(session.num_left),
            session.opened_s,
            session.expected.gap_s or 0.0,
            session.drafts.acceptance,
            session.timeline.way_s,
            session.expected.worth_tokens,
            session.expected.worth_gain,
            session.drafts.is_new(session.num_committed),
            session.opened.mode is Mode.SYNC,
            session.num_turns,
            session.num_left,
            session.own_rate.acceptance,
        )
        if num_buffered:
            self._survival[row, :num_buffered] = session.drafts.survival(session.num_committed)
        if before > num_buffered:
            self._survival[row, num_buffered:before] = 0.0

    def candidates(self) -> Candidates:
        """The sessions that may run."""
        return self._cut(np.flatnonzero(self._may_run))

    def everyone(self) -> Candidates:
        """All sessions, those that wait for their client included."""
        return self._cut(np.flatnonzero(np.isfinite(self._opened)))

    def _cut(self, rows: Ints) -> Candidates:
        rows = rows[np.argsort(self._opened[rows], kind="stable")]
        columns = self._columns[:, rows]
        width = int(columns[2].max()) if len(rows) else 0
        named = dict(zip(_COLUMNS, columns, strict=True))
        return Candidates(rows=rows, survival=self._survival[rows, :width], **named)

    def _grow(self) -> None:
        """Twice as many rows."""
        num_rows = len(self._may_run)
        self._columns = np.concatenate([self._columns, np.zeros_like(self._columns)], axis=1)
        self._survival = np.concatenate([self._survival, np.zeros_like(self._survival)])
        self._opened = np.concatenate([self._opened, np.full(num_rows, np.inf)])
        self._may_run = np.concatenate([self._may_run, np.zeros(num_rows, bool)])
        self._free.extend(range(2 * num_rows - 1, num_rows - 1, -1))
