"""How the engine answers: commits that tell a status, and ends of streams."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable

import numpy as np

from wisp_plugin.messages import Commit, Open, Status
from wisp_plugin.protocols import Reply
from wisp_plugin.server_session import ServerSession

log = logging.getLogger(__name__)


def deliver(answer: Callable[[], None]) -> bool:
    """Give an answer; one that cannot be given is the loss of its client, who may be gone, and not of everybody."""
    try:
        answer()
    except Exception:
        log.exception("an answer could not be delivered")
        return False
    return True


def end(reply: Reply, about: Open | ServerSession, status: Status, retry_after_ms: int | None = None) -> None:
    """Tell a final status and end the stream."""
    deliver(lambda: reply.send(status_commit(about, status, retry_after_ms)))
    deliver(reply.finish)


def end_closed(reply: Reply, session: ServerSession) -> None:
    """End the stream of a session as `closed`."""
    end(reply, session, Status.CLOSED)


def end_everybody(
    queued: Iterable[Reply],
    attached: Iterable[tuple[ServerSession, Reply]],
    refusal: str,
    end_one: Callable[[Reply, ServerSession], None],
) -> None:
    """Fail requests that wait with `refusal`, and give every stream its end; one that is both gets one end."""
    ends = {id(reply): functools.partial(reply.fail, refusal) for reply in queued}
    ends |= {id(reply): functools.partial(end_one, reply, session) for session, reply in attached}
    for answer in ends.values():
        deliver(answer)


def status_commit(about: Open | ServerSession, status: Status, retry_after_ms: int | None = None) -> Commit:
    """A commit without tokens that tells a status."""
    if isinstance(about, Open):
        session_id, start = about.session, len(about.tokens)
    else:
        session_id, start = about.id, about.num_committed
    tokens, origin = np.empty(0, np.int32), np.empty(0, np.uint8)
    return Commit(session_id, start, tokens, origin, status, retry_after_ms=retry_after_ms)
