"""Who may hold KV when there is not enough for all: admission and eviction that know due times (DESIGN.md section 7).

- A member of a pass that holds KV and grows may evict another session: one that waits for its client first, else
  the one whose next token is needed last, and never one whose token is needed before the member's own.
- A session without a place (new, or evicted; it may share a prefix already) takes what is free and evicts only those
  that wait for their client. Such newcomers enter in the order of their opening, each with room for all its committed
  tokens: nobody is overtaken, and nothing thrashes, because who was evicted does not evict in turn.
- Nobody is evicted for a session that stays out all the same.
- Draft tokens take what is left and evict nobody.
- If that lets nobody run, the oldest member runs, whomever it costs: one session alone always fits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from wisp_plugin.messages import Tokens
from wisp_plugin.server_session import ServerSession

IDLE_S = 1.0  # a session that waits for its client this long no longer keeps others from its KV blocks


class KvAccount(Protocol):
    """The part of `kv_blocks.BlockPool` that planning needs."""

    @property
    def num_blocks(self) -> int:
        """Blocks in all."""

    @property
    def block_tokens(self) -> int:
        """Tokens of one block."""

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""

    def length(self, session: str) -> int:
        """Tokens of a session whose KV is held."""

    def num_missing(self, session: str, num_tokens: int) -> int:
        """Blocks still to be taken until the session can hold `num_tokens`."""

    def num_exclusive(self, session: str) -> int:
        """Blocks that become free when the session lets go."""

    def adopt_more(self, session: str, tokens: Tokens) -> int:
        """Share held KV of a prefix of `tokens` with a session that holds less of it; tokens it now holds."""

    def prefill_key(self, tokens: Tokens, num_cached: int) -> object | None:
        """Identity of the block that a prefill going on at `num_cached` computes next."""


@dataclass(frozen=True, slots=True)
class Share:
    """Tokens of one member of a pass: uncached committed ones, and draft tokens behind them."""

    session: ServerSession
    num_committed: int
    num_drafts: int


class KvAdmission:
    """Fits the members of one pass into KV memory."""

    def __init__(
        self, kv: KvAccount, sessions: Iterable[ServerSession], candidates: Sequence[ServerSession], now_s: float
    ) -> None:
        """`candidates` are those of `sessions` that may run: the others wait for their client."""
        self._kv = kv
        self._candidates = candidates
        self._num_free = kv.num_free
        self.evicted: list[str] = []
        self._newcomers: set[str] = set()  # those that have got a place
        self._holders = {s.id: s for s in sessions if kv.length(s.id)}
        self._residents = {s.id for s in self._holders.values() if s.has_place}
        # Who only holds a prefix that it has adopted does not run either.
        may_run = {s.id for s in candidates}
        long_ago_s = now_s - IDLE_S
        self._idle = {
            s.id
            for s in self._holders.values()
            if not s.has_place or (s.id not in may_run and s.ready_since_s <= long_ago_s)
        }
        # What residents in the middle of their prefill still need: newcomers and drafts may not take it.
        self._promised = {i: kv.num_missing(i, self._holders[i].num_committed) for i in self._residents}

    def admit(self) -> set[str]:
        """Who may be chosen at all: residents, and newcomers, who get their places now, as far as there is room; never
        nobody."""
        found = {s.id for s in self._candidates if s.id in self._residents}
        for session in sorted((s for s in self._candidates if s.id not in self._residents), key=_age):
            if session.id in self.evicted or not self._seat(session):  # an older one took what it had adopted
                break
            self._newcomers.add(session.id)
        found |= self._newcomers
        if not found:
            found = self._newcomers = {self._clear_for(min(self._candidates, key=_age))}
        return found

    def fit(self, wanted: Sequence[Share]) -> list[Share]:
        """The members that may run, in order, with the draft tokens that fit. Asked after `admit`, once."""
        admitted = {s.session.id for s in wanted if s.session.id in self._newcomers or self._grow(s)}
        if not admitted and wanted:
            admitted.add(self._clear_for(min((share.session for share in wanted), key=_age)))
        return [self._with_drafts(share) for share in wanted if share.session.id in admitted]

    def _grow(self, share: Share) -> bool:
        """Blocks for the committed tokens of a resident; False if it must stay out."""
        session = share.session
        if session.id not in self._residents:  # it was the victim of one before it
            return False
        num_missing = self._kv.num_missing(session.id, session.num_cached + share.num_committed)
        if not self._evict_for(num_missing - self._num_free, self._victims(session)):
            return False
        self._take(session, num_missing)
        self._promised[session.id] = max(0, self._promised[session.id] - num_missing)
        return True

    def _seat(self, session: ServerSession) -> bool:
        """A place for all committed tokens of a newcomer."""
        num_missing = self._kv.num_missing(session.id, session.num_committed)
        if not self._evict_for(num_missing - self._num_spare, self._by_need(self._idle - {session.id})):
            return False
        self._take(session, num_missing)
        return True

    def _clear_for(self, session: ServerSession) -> str:
        """A place for `session`, whomever it costs."""
        num_missing = self._kv.num_missing(session.id, session.num_committed)
        for victim in self._by_need(self._holders.keys() - {session.id}):
            if self._num_free >= num_missing:
                break
            self._evict(victim)  # if all go, what only they shared is free as well, which is not in the count
        self._take(session, num_missing)
        return session.id

    def _with_drafts(self, share: Share) -> Share:
        session, num_drafts = share.session, share.num_drafts
        end = session.num_cached + share.num_committed
        own = self._kv.num_missing(session.id, end)
        while num_drafts and self._kv.num_missing(session.id, end + num_drafts) - own > self._num_spare:
            num_drafts -= 1
        self._num_free -= self._kv.num_missing(session.id, end + num_drafts) - own
        return Share(session, share.num_committed, num_drafts)

    @property
    def _num_spare(self) -> int:
        return self._num_free - sum(self._promised.values())

    def _victims(self, member: ServerSession) -> list[ServerSession]:
        """Whose KV may go for a member that grows, in this order: the idle, and who is needed later than the member."""
        others = self._by_need(self._residents - self._idle - {member.id})
        later = [other for other in others if other.timeline.needed_s > member.timeline.needed_s]
        return self._by_need(self._idle - {member.id}) + later

    def _by_need(self, ids: Iterable[str]) -> list[ServerSession]:
        """The holders `ids`, who is needed last first."""
        return sorted((self._holders[i] for i in ids), key=lambda s: (s.timeline.needed_s, *_age(s)), reverse=True)

    def _evict_for(self, num_blocks: int, victims: Sequence[ServerSession]) -> bool:
        """Evict the first of `victims` until `num_blocks` more are free; nobody, and False, if all are not enough."""
        chosen = []
        for victim in victims:
            if num_blocks <= 0:
                break
            chosen.append(victim)
            num_blocks -= self._kv.num_exclusive(victim.id)
        if num_blocks > 0:
            return False
        for victim in chosen:
            self._evict(victim)
        return True

    def _take(self, session: ServerSession, num_blocks: int) -> None:
        self._num_free -= num_blocks
        self._holders.pop(session.id, None)  # who is in the pass is no victim
        self._residents.discard(session.id)
        self._idle.discard(session.id)

    def _evict(self, victim: ServerSession) -> None:
        self._num_free += self._kv.num_exclusive(victim.id)
        self.evicted.append(victim.id)
        del self._holders[victim.id]
        self._residents.discard(victim.id)
        self._idle.discard(victim.id)
        self._promised.pop(victim.id, None)


def _age(session: ServerSession) -> tuple[float, str]:
    """Order of opening."""
    return session.opened_s, session.id
