"""One session on the device from open to its end: commits as they arrive, over lost connections too.

The caller's thread, in `EdgeClient.run`, receives commits and applies them. What the device itself has to do, draft and
send, happens beside it in a thread of its own (`drafting_thread`), so neither waits for the other.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from edge_runtime.drafting_thread import DraftingThread, EdgeWork, TokenDrafter
from edge_runtime.transport import VerifyTransport
from wisp_plugin.edge_session import EdgeSession
from wisp_plugin.errors import RequestRefused, TransportError
from wisp_plugin.messages import Close, Commit, Open, Slo, Status, Tokens

log = logging.getLogger(__name__)

__all__ = ["EdgeClient", "Patience", "TokenDrafter", "TokenTimes"]


@dataclass(frozen=True, slots=True)
class Patience:
    """Limits of waiting, in seconds."""

    commit_s: float = 60.0  # without any commit this long, the connection counts as lost
    prefill_token_s: float = 0.05  # longer by this for each committed token, before the first commit on a connection
    reconnect_s: float = 60.0  # how long a lost connection or an overloaded server is tried again
    first_retry_s: float = 0.1  # first pause between two tries; doubles up to `max_retry_s`
    max_retry_s: float = 2.0
    close_s: float = 1.0  # for the server's last word after a close


@dataclass(slots=True)
class TokenTimes:
    """When a session's tokens came, by the client's clock: what its SLO is measured on (DESIGN.md section 2).

    Time counts from the first try to open the session: who waits for an overloaded server waits, too.
    """

    opened_s: float = 0.0
    first_s: float = math.inf
    last_s: float = math.inf
    num_tokens: int = 0

    def on_tokens(self, num_tokens: int, now_s: float) -> None:
        """`num_tokens` have come."""
        if not num_tokens:
            return
        self.first_s = min(self.first_s, now_s)
        self.last_s = now_s
        self.num_tokens += num_tokens

    @property
    def ttft_ms(self) -> float:
        """Time to the first token; infinite before it."""
        return 1e3 * (self.first_s - self.opened_s)

    @property
    def mean_tpot_ms(self) -> float:
        """Mean time per further token (0 before the second)."""
        return 1e3 * (self.last_s - self.first_s) / (self.num_tokens - 1) if self.num_tokens > 1 else 0.0

    def meet(self, slo: Slo) -> bool:
        """True if the first token came in time and the further ones took at most `tpot_ms` each on average."""
        return self.ttft_ms <= slo.ttft_ms and self.mean_tpot_ms <= slo.tpot_ms


@dataclass(slots=True)
class EdgeClient:
    """Runs one session from open to its final status.

    `drafter` None is a thin client: the server decodes alone, the stream carries commits only, and there is no
    drafting thread. Nor is there one with `threaded` False: the device's steps then alternate with looks at what has
    arrived, always in the same order, for tests. Behind `close` the drafter is free for another session.
    """

    opened: Open
    session: EdgeSession
    transport: VerifyTransport
    drafter: TokenDrafter | None = None
    patience: Patience = field(default_factory=Patience)
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    on_commit: Callable[[Commit], None] = lambda commit: None
    times: TokenTimes = field(default_factory=TokenTimes)
    threaded: bool = True
    _work: EdgeWork = field(init=False)
    _thread: DraftingThread | None = field(init=False, default=None)
    _lost_since_s: float | None = field(init=False, default=None)
    _pause_s: float = field(init=False, default=0.0)
    _is_answered: bool = field(init=False, default=False)  # a commit has come on this connection

    def __post_init__(self) -> None:
        self._work = EdgeWork(self.session, self.transport, self.drafter, self.opened.sampling, self.clock)

    def run(self) -> Iterator[Tokens]:
        """Committed tokens as they arrive, until the session has its final status.

        Raises:
            RequestRefused: the server refused the session, or another connection took it over.
            TransportError: the server could not be reached at first, or not again for `patience.reconnect_s`,
                or was overloaded for that long.
            Exception: whatever the drafter raises.
        """
        self.times.opened_s = self.clock()
        self._work.connect()
        if self.drafter is not None and self.threaded:
            self._thread = DraftingThread(self._work, self.transport.wake)
        try:
            while self.session.status is Status.RUNNING:
                try:
                    commit = self._next_commit()
                    while commit is not None:  # all that have arrived: nobody falls behind the server
                        self._check_status(commit)
                        yield self._apply(commit)
                        is_running = self.session.status is Status.RUNNING
                        commit = self.transport.receive(0.0) if is_running else None
                except RequestRefused:
                    raise
                except TransportError as error:
                    self._reconnect(error)
        finally:
            if self._thread is not None:
                self._thread.stop()

    def _apply(self, commit: Commit) -> Tokens:
        now_s = self.clock()
        tokens = self._work.on_commit(commit, now_s)
        self._lost_since_s, self._pause_s, self._is_answered = None, 0.0, True
        self.times.on_tokens(len(tokens), now_s)
        self.on_commit(commit)
        return tokens

    def _next_commit(self) -> Commit | None:
        """The next commit; None if there is none yet and the device had something to do itself."""
        self._check()
        if self._thread is None and self._work.step():
            self._check()
            return self.transport.receive(0.0)
        return self._wait_for_commit()

    def _check(self) -> None:
        """Raise what went wrong beside us."""
        self._work.check()
        if self._thread is not None:
            self._thread.check()

    def _wait_for_commit(self) -> Commit:
        """The next commit. TransportError if both sides are silent for longer than `patience` allows."""
        started_s, limit_s = self.clock(), self.patience.commit_s
        if not self._is_answered:
            limit_s += self.patience.prefill_token_s * len(self.session.committed)
        while True:
            silent_s = self.clock() - max(started_s, self._work.active_s())
            if silent_s >= limit_s:
                raise TransportError(f"no commit from the server for {limit_s:g} s")
            commit = self.transport.receive(limit_s - silent_s)
            if commit is not None:
                return commit
            self._check()

    def _check_status(self, commit: Commit) -> None:
        """Raise for a status that is no end of the text: TransportError where opening again may help."""
        if commit.status is Status.CLOSED:  # not by us: the server is going down, or lost patience
            raise TransportError("the server closed the session")
        if commit.status is Status.OVERLOADED:
            if commit.retry_after_ms is None:
                raise TransportError("the server is overloaded")
            retry_after_s = commit.retry_after_ms / 1e3
            self._pause_s = max(self._pause_s, retry_after_s)
            raise TransportError(f"the server is overloaded (it asks to try again after {retry_after_s:g} s)")
        if commit.status is Status.CONFLICT:
            raise RequestRefused("the server holds this session with other parameters or other tokens")
        if commit.status is Status.SUPERSEDED:
            raise RequestRefused("another connection has taken this session over")

    def _reconnect(self, lost: TransportError) -> None:
        """Open the session again, with growing pauses, until `reconnect_s` after the last sign of life.

        A pause that would end later than that is not begun.
        """
        self._work.disconnect()
        self._is_answered = False
        if self._lost_since_s is None:
            self._lost_since_s = self.clock()
            self._pause_s = max(self._pause_s, self.patience.first_retry_s)
        while self.clock() + self._pause_s <= self._lost_since_s + self.patience.reconnect_s:
            self.sleep(self._pause_s)
            self._pause_s = min(2 * self._pause_s, self.patience.max_retry_s)
            try:
                self._work.connect()
                self.session.stats.num_reopened += 1
                return
            except RequestRefused:
                raise
            except TransportError as error:
                lost = error
        raise TransportError(f"gave up after waiting {self.clock() - self._lost_since_s:.1f} s: {lost}")

    def close(self) -> None:
        """Leave: tell the server if the session still runs (a stop string was found, the user left).

        Raises:
            ModelError: the draft step that was running hangs; the drafter can not be used any more.
        """
        if self._thread is not None:
            self._thread.stop()
        try:
            if self.session.status is Status.RUNNING:
                self._work.send_close(Close(self.opened.session))
                self._await_end()
        except TransportError:
            log.debug("the connection was lost before the session was closed; the server will notice")
        finally:
            try:
                if self._thread is not None:
                    self._thread.join()
            finally:
                self.transport.close()

    def _await_end(self) -> None:
        """Give the close a moment to reach the server; cancelling the stream would overtake it."""
        deadline_s = self.clock() + self.patience.close_s
        while (left_s := deadline_s - self.clock()) > 0:
            commit = self.transport.receive(left_s)
            if commit is not None and commit.status is not Status.RUNNING:
                return
