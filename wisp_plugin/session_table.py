"""Which sessions the server holds: attached to a stream, or kept for resumption (DESIGN.md section 6).

A session without a stream (its client vanished, or it has finished) stays for `linger_s`: an open with the
same capability resumes it, and drafts that were still on their way find it. The number kept is bounded;
the one that has waited longest goes first.
"""

from __future__ import annotations

from wisp_plugin.errors import UnknownSession
from wisp_plugin.protocols import Reply
from wisp_plugin.server_session import ServerSession


class SessionTable:
    """Sessions by capability."""

    def __init__(self, linger_s: float, max_detached: int) -> None:
        self._linger_s = linger_s
        self._max_detached = max_detached
        self._attached: dict[str, tuple[ServerSession, Reply]] = {}
        self._detached: dict[str, tuple[ServerSession, float]] = {}  # with the time of detachment, oldest first

    @property
    def num_attached(self) -> int:
        """Sessions with a stream."""
        return len(self._attached)

    @property
    def num_lingering(self) -> int:
        """Sessions without a stream, kept for resumption."""
        return len(self._detached)

    def is_attached(self, session_id: str) -> bool:
        """True if the session has a stream."""
        return session_id in self._attached

    def attached(self) -> list[tuple[ServerSession, Reply]]:
        """Sessions with a stream, and the stream."""
        return list(self._attached.values())

    def get(self, session_id: str) -> ServerSession | None:
        """The session, or None if it is not held."""
        held = self._attached.get(session_id) or self._detached.get(session_id)
        return held[0] if held else None

    def find(self, session_id: str) -> ServerSession:
        """The session.

        Raises:
            UnknownSession: it is not held.
        """
        session = self.get(session_id)
        if session is None:
            raise UnknownSession(f"session {session_id[:8]}... is not known here; open it first")
        return session

    def reply(self, session_id: str) -> Reply:
        """The stream of an attached session."""
        return self._attached[session_id][1]

    def attach(self, session: ServerSession, reply: Reply) -> None:
        """Give a session its stream; it must not have one."""
        assert session.id not in self._attached, "detach the first stream before the second"
        self._detached.pop(session.id, None)
        self._attached[session.id] = (session, reply)

    def detach(self, session_id: str, now_s: float) -> Reply | None:
        """Take the stream away and keep the session for resumption. Returns the stream, if it had one."""
        held = self._attached.pop(session_id, None)
        if held is None:
            return None
        session, reply = held
        self._detached[session_id] = (session, now_s)
        if len(self._detached) > self._max_detached:
            del self._detached[next(iter(self._detached))]
        return reply

    def clear(self) -> None:
        """Forget all sessions and their streams."""
        self._attached.clear()
        self._detached.clear()

    def expire(self, now_s: float) -> None:
        """Forget sessions whose time for resumption is over."""
        for session_id, (_, since_s) in list(self._detached.items()):
            if now_s - since_s < self._linger_s:
                break
            del self._detached[session_id]
