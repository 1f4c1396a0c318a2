"""The loop that joins session, drafter and transport: draft, send, take in what came back.

One thread drafts; the transport's own threads receive. Between two draft steps the loop looks whether commits
have arrived, so drafting and the network overlap and neither waits for the other.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from edge_runtime.transport import VerifyTransport
from wisp_plugin.edge_session import EdgeSession, Step
from wisp_plugin.errors import RequestRefused, TransportError
from wisp_plugin.messages import Close, Commit, Open, Sampling, Slo, Status, Tokens

log = logging.getLogger(__name__)


class TokenDrafter(Protocol):
    """The draft model (`drafter.Drafter`, or emulated)."""

    def advance(self, tokens: Tokens) -> int:
        """Feed at most one chunk of `tokens`; how many are still to be fed before the next draft token."""

    def draft_token(self, tokens: Tokens, sampling: Sampling) -> int:
        """The draft token behind `tokens`."""


@dataclass(frozen=True, slots=True)
class Patience:
    """Limits of waiting, in seconds."""

    commit_s: float = 60.0  # without any commit this long, the connection counts as lost
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

    `drafter` None is a thin client: the server decodes alone, the stream carries commits only.
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
    _lost_since_s: float | None = None
    _pause_s: float = 0.0

    def run(self) -> Iterator[Tokens]:
        """Committed tokens as they arrive, until the session has its final status.

        Raises:
            RequestRefused: the server refused the session, or another connection took it over.
            TransportError: the server could not be reached at first, or not again for `patience.reconnect_s`,
                or was overloaded for that long.
        """
        self.times.opened_s = self.clock()
        self.transport.open(self.session.reopen())
        while (step := self.session.next_step()) is not Step.DONE:
            try:
                commit = self._take(step)
                while commit is not None:  # all that have arrived: a slow drafter must not fall behind the server
                    self._check_status(commit)
                    tokens = self.session.on_commit(commit)
                    self._lost_since_s, self._pause_s = None, 0.0
                    self.times.on_tokens(len(tokens), self.clock())
                    self.on_commit(commit)
                    yield tokens
                    done = self.session.next_step() is Step.DONE
                    commit = None if done else self.transport.receive(0.0)
            except RequestRefused:
                raise
            except TransportError as error:
                self._reconnect(error)

    def _take(self, step: Step) -> Commit | None:
        """Do one step; return a commit if one has arrived."""
        if step is Step.DRAFT:
            self._draft()
        elif step is Step.SEND:
            self.transport.send(self.session.take_message())
        else:
            commit = self.transport.receive(self.patience.commit_s)
            if commit is None:
                raise TransportError(f"no commit from the server for {self.patience.commit_s:g} s")
            return commit
        return self.transport.receive(0.0)

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

    def _draft(self) -> None:
        """One draft token, or one chunk of a long prefill, so that commits are looked at in between."""
        assert self.drafter is not None, "a session without drafter needs a controller that never drafts"
        if self.drafter.advance(self.session.context()) > 0:
            return
        started_s = self.clock()
        token = self.drafter.draft_token(self.session.context(), self.opened.sampling)
        self.session.on_drafted(token, self.clock() - started_s)

    def _reconnect(self, lost: TransportError) -> None:
        """Open the session again, with growing pauses, until `reconnect_s` after the last sign of life.

        A pause that would end later than that is not begun.
        """
        if self._lost_since_s is None:
            self._lost_since_s = self.clock()
            self._pause_s = max(self._pause_s, self.patience.first_retry_s)
        while self.clock() + self._pause_s <= self._lost_since_s + self.patience.reconnect_s:
            self.sleep(self._pause_s)
            self._pause_s = min(2 * self._pause_s, self.patience.max_retry_s)
            try:
                self.transport.open(self.session.reopen())
                self.session.stats.num_reopened += 1
                return
            except RequestRefused:
                raise
            except TransportError as error:
                lost = error
        raise TransportError(f"gave up after waiting {self.clock() - self._lost_since_s:.1f} s: {lost}")

    def close(self) -> None:
        """Leave: tell the server if the session still runs (a stop string was found, the user left)."""
        try:
            if self.session.status is Status.RUNNING:
                self.transport.send(Close(self.opened.session))
                self._await_end()
        except TransportError:
            log.debug("the connection was lost before the session was closed; the server will notice")
        finally:
            self.transport.close()

    def _await_end(self) -> None:
        """Give the close a moment to reach the server; cancelling the stream would overtake it."""
        deadline_s = self.clock() + self.patience.close_s
        while (left_s := deadline_s - self.clock()) > 0:
            commit = self.transport.receive(left_s)
            if commit is None or commit.status is not Status.RUNNING:
                return
