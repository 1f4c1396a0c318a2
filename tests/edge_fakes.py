"""An edge client in real time: a transport made of queues, a drafter that sleeps, a thread that consumes tokens."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edge_runtime.client import EdgeClient, Patience
from edge_runtime.commit_inbox import CommitInbox
from tests.factories import make_open
from wisp_plugin.controller import SpeculationController
from wisp_plugin.edge_session import EdgeSession
from wisp_plugin.errors import TransportError
from wisp_plugin.messages import Close, Commit, Draft, Open, Sampling, Tokens
from wisp_plugin.stop_rules import Fixed

STEP_S = 0.05
LOST = TransportError("connection reset")


class QueueTransport:
    """What the test puts into `inbox` arrives; everything that goes out is in `log`, in order."""

    def __init__(self) -> None:
        self.inbox = CommitInbox()
        self.log: list[Open | Draft | Close] = []
        self.opened = threading.Event()
        self.fail_sends = 0
        self.is_closed = False

    def open(self, message: Open) -> None:
        self.log.append(message)
        self.opened.set()

    def send(self, message: Draft | Close) -> None:
        if self.fail_sends:
            self.fail_sends -= 1
            raise LOST
        self.log.append(message)

    def receive(self, timeout_s: float) -> Commit | None:
        return self.inbox.take(timeout_s)

    def wake(self) -> None:
        self.inbox.wake()

    def close(self) -> None:
        self.is_closed = True

    @property
    def drafts(self) -> list[Draft]:
        return [message for message in self.log if isinstance(message, Draft)]


class SleepingDrafter:
    """Drafts by `choose` and sleeps `step_s` for it. Notices two users at once."""

    def __init__(self, step_s: float = STEP_S, choose: Callable[[Tokens], int] = lambda tokens: 5) -> None:
        self.step_s = step_s
        self.choose = choose
        self.began = threading.Semaphore(0)  # once per step that has begun
        self.num_steps = 0
        self._in_use = threading.Lock()

    def advance(self, tokens: Tokens) -> int:
        return 0

    def draft_token_with_stats(self, tokens: Tokens, sampling: Sampling) -> tuple[int, None]:
        assert self._in_use.acquire(blocking=False), "two threads use one drafter"
        before = tokens.copy()
        try:
            self.num_steps += 1
            self.began.release()
            time.sleep(self.step_s)
            assert np.array_equal(tokens, before), "a commit has changed what a step drafts behind"
            return self.choose(tokens), None
        finally:
            self._in_use.release()

    def wait_for_step(self) -> None:
        assert self.began.acquire(timeout=5.0), "no draft step begins"


def make_client(
    drafter: Any, max_new_tokens: int = 20, transport: Any = None, patience: Patience | None = None, **opened: Any
) -> EdgeClient:
    """A client behind the prompt 1, 2, 3 that drafts at most 8 tokens ahead."""
    message = make_open(max_new_tokens=max_new_tokens, **opened)
    session = EdgeSession(message, SpeculationController(Fixed(8)), message_tokens=1)
    patience = patience or Patience(first_retry_s=0.01, close_s=0.05)
    return EdgeClient(message, session, transport or QueueTransport(), drafter, patience)


@dataclass
class Consumer:
    """Runs a client in a thread of its own and notes when tokens came."""

    client: EdgeClient
    tokens: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    error: BaseException | None = None

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._consume, daemon=True)
        self._thread.start()

    def _consume(self) -> None:
        try:
            for tokens in self.client.run():
                self.times_s.append(time.monotonic())
                self.tokens += tokens.tolist()
        except BaseException as error:
            self.error = error

    def finish(self) -> None:
        self._thread.join(5.0)
        assert not self._thread.is_alive(), "the client does not end"
        self.client.close()


def wait_until(condition: Callable[[], bool], limit_s: float = 5.0) -> None:
    deadline_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {limit_s} s"
        time.sleep(0.002)


def drafting_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "wisp-drafting"]
