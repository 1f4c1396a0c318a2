"""The sessions behind unary verification: what the server remembers between the requests of one client.

A session is a convenience here: it saves sending tokens again and computing KV again. Whatever is forgotten costs a
`need_prefix` (its token ids are gone) or a longer pass (its KV is gone), and never another text. So both are bounded,
least recently used first, and nothing has to be closed.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from wisp_plugin.errors import InvalidRequest
from wisp_plugin.kv_admission import KvAccount
from wisp_plugin.messages import Commit, Open
from wisp_plugin.server_session import ServerSession
from wisp_plugin.unary_wire import VerifyRequest, check_repeated, decode_first
from wisp_plugin.wire import WireLimits


@dataclass(slots=True)
class HeldSession:
    """One session between requests.

    Committed tokens from position `own_from` on are the target's own choices behind all that stands before them; the
    client brought those in front of it. `logprobs`, if asked for, float32 `[end]`, holds those of the own ones.
    """

    session: ServerSession
    own_from: int
    used_s: float
    logprobs: npt.NDArray[np.float32] | None = None

    def on_commit(self, commit: Commit) -> None:
        """A pass has given the session tokens."""
        if self.logprobs is not None and commit.logprobs is not None:
            self.logprobs[commit.start : commit.end] = commit.logprobs


class UnarySessions:
    """Sessions by capability, at most `max_sessions`, each for `linger_s` after its last request."""

    def __init__(
        self,
        limits: WireLimits,
        kv: KvAccount,
        release: Callable[[str], None],
        max_sessions: int,
        linger_s: float,
    ) -> None:
        """`release` drops the KV of a session, which `kv` accounts for."""
        self._limits = limits
        self._kv = kv
        self._release = release
        self._max_sessions = max_sessions
        self._linger_s = linger_s
        self._held: OrderedDict[str, HeldSession] = OrderedDict()  # least recently used first

    def __len__(self) -> int:
        return len(self._held)

    def find(self, name: str, request: VerifyRequest, now_s: float) -> HeldSession | None:
        """The session `name` in a state that answers `request`: its committed tokens begin with those of the request,
        and what it holds behind them is the target's own. None: the server does not hold the prefix.

        A request without a prefix says all there is to say, so it is answered as if nothing were held. What is held
        helps if it is of the same parameters (those given, else the defaults) and agrees with TOKENS as far as both
        go; else the session is held anew.

        Raises:
            InvalidRequest: a parameter's value, or tokens that the session cannot have. What is held stays.
        """
        held = self._held.get(name)
        if not request.prefix_len:
            opened = decode_first(request, name, self._limits)
            if held is None or held.session.conflicts_with(opened):
                self.forget(name)
                return self._hold(opened, now_s)
        if held is None:
            return None
        self._held.move_to_end(name)
        held.used_s = now_s
        session = held.session
        if request.prefix_len:
            check_repeated(request, session.opened, self._limits)
        if request.prefix_len > session.num_committed:
            return None
        low, high, end = session.opened.prompt_len, session.opened.end, request.num_committed
        if not low <= end <= high:
            raise InvalidRequest(f"PREFIX_LEN and TOKENS make {end} tokens; allowed for this session: {low} to {high}")
        return self._brought_to(held, request, now_s)

    def _brought_to(self, held: HeldSession, request: VerifyRequest, now_s: float) -> HeldSession:
        """`held` with what the client says: it knows best what it wants to be continued."""
        session, end = held.session, request.num_committed
        ours = session.committed[request.prefix_len : end]
        is_known = end <= session.num_committed
        agrees = np.array_equal(ours, request.tokens[: len(ours)])
        tokens = np.concatenate([session.committed[: request.prefix_len], request.tokens])
        opened = dataclasses.replace(session.opened, tokens=tokens)
        if not agrees or end < held.own_from or (session.finished and not is_known):
            self.forget(session.id)  # its blocks can still be adopted as far as the tokens agree
            return self._hold(opened, now_s)
        if not is_known:
            session.resume(opened, now_s)
            held.own_from = end
        return held

    def _hold(self, opened: Open, now_s: float) -> HeldSession:
        session = ServerSession(opened, now_s)
        session.settle_status()
        logprobs = np.zeros(opened.end, np.float32) if opened.logprobs else None
        held = self._held[opened.session] = HeldSession(session, len(opened.tokens), now_s, logprobs)
        return held

    def forget(self, name: str) -> None:
        """Drop a session with its KV; unknown ones are ignored."""
        if self._held.pop(name, None) is not None:
            self._release(name)

    def trim(self, now_s: float) -> list[ServerSession]:
        """Forget those that have waited for `linger_s`, and the least recently used beyond `max_sessions`."""
        gone = []
        for name, held in list(self._held.items()):
            if len(self._held) <= self._max_sessions and now_s - held.used_s < self._linger_s:
                break
            gone.append(held.session)
            self.forget(name)
        return gone

    def make_room(self, working: Collection[ServerSession]) -> int:
        """Drop the KV of others, least recently used first, until there is room for the next pass of all `working`
        or nobody else holds any. Their token ids stay. Returns of how many it was dropped."""
        names = {session.id for session in working}
        num_missing = sum(self._kv.num_missing(s.id, s.num_committed + s.num_buffered) for s in working)
        num_evicted = 0
        for name, held in self._held.items():
            if self._kv.num_free >= num_missing:
                break
            if name not in names and self._kv.length(name):
                self._release(name)
                held.session.num_cached = 0
                num_evicted += 1
        return num_evicted
