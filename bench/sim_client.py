"""The device's side of a simulated session: the real `EdgeSession` in the loop of `edge_runtime/client.py`.

As there, the device drafts one token at a time, and a commit is applied when it arrives, also during a draft step,
whose token is then dropped if its prefix was rolled back. Only the time of a draft step, its token and the statistics
of it are modelled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from bench.sim_result import SessionRecord, SimulationError
from bench.virtual_time import EventQueue, Link
from bench.workload import Device, SessionSpec
from triton_models.emulated_text import position_hashes
from wisp_plugin.controller import SpeculationController
from wisp_plugin.draft_stats import DraftStats
from wisp_plugin.draft_trace import TextTrace
from wisp_plugin.edge_session import DraftJob, EdgeSession, Step
from wisp_plugin.messages import Commit, Draft, Mode, Open, Sampling, Status, Tokens

_FIRST_RETRY_S = 0.1  # as `Patience.first_retry_s` of the real client
_VOCAB_BITS = 15


class SessionTokens:
    """What the target and the draft model say at every position of one session: pure functions of seed and position.

    The draft model is right with probability `acceptance` at a position, independently, as long as the chain before
    is right; behind a wrong draft token it is always wrong.
    """

    __slots__ = ("_drafted", "_first_wrong", "_wrong", "target")

    def __init__(self, seed: int, spec: SessionSpec, acceptance: float) -> None:
        end = spec.prompt_len + spec.num_output_tokens
        key = (seed << 40) ^ spec.number
        self.target: Tokens = hashed_tokens(2 * key, end)
        uniform = (position_hashes(2 * key + 1, 0, end) >> np.uint64(11)) * 2.0**-53
        is_wrong = uniform >= acceptance
        self._wrong: list[int] = (self.target ^ 1).tolist()
        self._drafted: list[int] = np.where(is_wrong, self.target ^ 1, self.target).tolist()
        # Position of the first wrong draft at or behind each position (end: none).
        positions = np.where(is_wrong, np.arange(end), end)
        self._first_wrong: list[int] = [*np.minimum.accumulate(positions[::-1])[::-1].tolist(), end]

    def draft(self, num_committed: int, position: int) -> tuple[int, DraftStats | None]:
        """The draft token at `position`, in the chain behind `num_committed` tokens, and its statistics if known."""
        chain_is_right = self._first_wrong[num_committed] >= position
        return (self._drafted if chain_is_right else self._wrong)[position], None


class DraftsAlong(Protocol):
    """What is said in a session, from wherever."""

    target: Tokens

    def draft(self, num_committed: int, position: int) -> tuple[int, DraftStats | None]:
        """See `SessionTokens.draft`."""


class TraceTokens:
    """The same from a recorded text: real rejections and real statistics."""

    __slots__ = ("_text", "target")

    def __init__(self, text: TextTrace) -> None:
        self._text = text
        self.target = text.tokens

    def draft(self, num_committed: int, position: int) -> tuple[int, DraftStats | None]:
        """See `SessionTokens.draft`."""
        return self._text.chain_token(num_committed - self._text.prompt_len, position - num_committed)


def hashed_tokens(key: int, length: int) -> Tokens:
    """Tokens that a key stands for, int32 `[length]`."""
    return (position_hashes(key, 0, length) >> np.uint64(64 - _VOCAB_BITS)).astype(np.int32)


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """What all devices of a scenario have in common."""

    mode: Mode
    make_controller: Callable[[], SpeculationController]
    message_tokens: int
    warm_up_s: float
    duration_s: float
    prefill_factor: float = 0.0  # see `Cell`


class SimulatedClient:
    """One session on its device, driven by events."""

    __slots__ = (
        "_device", "_events", "_is_done", "_is_drafting", "_is_refused", "_on_done", "_send", "_settings", "_uplink",
        "downlink", "edge", "id", "record", "tokens",
    )  # fmt: skip

    def __init__(
        self,
        events: EventQueue,
        spec: SessionSpec,
        device: Device,
        tokens: DraftsAlong,
        settings: ClientSettings,
        send: Callable[[SimulatedClient, Open | Draft], None],
        on_done: Callable[[SimulatedClient], None],
    ) -> None:
        """`send` delivers a message that has reached the server; `on_done` is told once the final status is applied."""
        self._events, self.tokens, self._settings, self._send, self._on_done = events, tokens, settings, send, on_done
        self._uplink = Link(device.rtt_s / 2, device.jitter_s, 2 * spec.link_seed)
        self.downlink = Link(device.rtt_s / 2, device.jitter_s, 2 * spec.link_seed + 1)
        self._device = device
        self.id = f"{spec.number:032x}"
        opened = Open(
            self.id, tokens.target[: spec.prompt_len], spec.prompt_len, spec.num_output_tokens, Sampling(), spec.slo,
            settings.mode,
        )  # fmt: skip
        self.edge = EdgeSession(opened, settings.make_controller(), settings.message_tokens)
        self.record = SessionRecord(spec, events.now_s)
        self._is_drafting = self._is_refused = self._is_done = False

    def open(self, _: Any = None) -> None:
        """Open the session, or try again after a refusal, and start to draft."""
        is_first, self._is_refused = not self._is_refused, False
        self._transmit(self.edge.reopen())
        if is_first and self._settings.prefill_factor:
            self._read_prompt()
        self._advance()

    def _read_prompt(self) -> None:
        """The device's own prefill: no draft step runs meanwhile."""
        self._is_drafting = True
        now_s = self._events.now_s
        draft_s = self._device.draft_step_s(now_s) * self.record.spec.prompt_len
        self._events.schedule(now_s + draft_s / self._settings.prefill_factor, self._has_read, None)

    def _has_read(self, _: Any) -> None:
        self._is_drafting = False
        self._advance()

    def answer(self, commit: Commit) -> None:
        """The server has sent a commit: it is on its way."""
        self._events.schedule(self.downlink.arrival_s(self._events.now_s), self.receive, commit)

    def receive(self, commit: Commit) -> None:
        """A commit has reached the device."""
        self._note(commit)
        if commit.status is Status.OVERLOADED:
            self.record.num_refused += 1
            self._is_refused = True
            pause_s = max(_FIRST_RETRY_S, (commit.retry_after_ms or 0) / 1e3)
            self._events.schedule(self._events.now_s + pause_s, self.open, None)
        elif commit.status in (Status.RUNNING, Status.LENGTH):
            self.edge.on_commit(commit, self._events.now_s)
            self._advance()
        else:
            raise SimulationError(f"session {self.id} ended as {commit.status.name} at {self._events.now_s:.3f} s")

    def _advance(self) -> None:
        """Do what the session asks for until a draft step runs or only a commit can help; nothing while refused."""
        if self._is_refused or self._is_done:
            return
        now_s = self._events.now_s
        while (step := self.edge.next_step(now_s)) is Step.SEND:
            self._transmit(self.edge.take_message(now_s))
        if step is Step.DRAFT and not self._is_drafting:
            self._is_drafting = True
            job = self.edge.begin_draft()
            drafted = self.tokens.draft(len(self.edge.committed), len(job.context))
            step_s = self._device.draft_step_s(now_s)
            self._events.schedule(now_s + step_s, self._finish_draft, (job, *drafted, step_s))
        elif step is Step.DONE:
            self._is_done = True
            self._on_done(self)

    def _finish_draft(self, drafted: tuple[DraftJob, int, DraftStats | None, float]) -> None:
        self._is_drafting = False
        job, token, stats, step_s = drafted
        self.edge.on_drafted(job, token, step_s, stats)
        self._advance()

    def _transmit(self, message: Open | Draft) -> None:
        self._events.schedule(self._uplink.arrival_s(self._events.now_s), self._arrive, message)

    def _arrive(self, message: Open | Draft) -> None:
        """A message has reached the server."""
        self.record.arrived_s = min(self.record.arrived_s, self._events.now_s)
        self._send(self, message)

    def _note(self, commit: Commit) -> None:
        record, now_s, num_tokens = self.record, self._events.now_s, len(commit.tokens)
        if commit.status is Status.LENGTH:
            record.ended_s = now_s
        if not num_tokens:
            return
        if not record.num_tokens:
            record.first_s = now_s
        if now_s > record.due_s(record.num_tokens):  # else the tokens behind are in time too
            record.num_overdue += sum(now_s > record.due_s(record.num_tokens + i) for i in range(num_tokens))
        record.num_tokens += num_tokens
        record.last_s = now_s
        if self._settings.warm_up_s <= now_s <= self._settings.duration_s:
            record.num_counted += num_tokens
