"""What a pass was, as a record, and the trace: one JSON line per pass (`EngineConfig.trace_file`).

    {"pass": 12, "time_s": 81.2, "wait_s": 0.001, "idle": false, "predicted_s": 0.021, "measured_s": 0.023,
     "price": 0.1, "load": 0.4, "held": 1, "trimmed": 0, "evicted": [], "items": [{"session": "0123abcd",
     "reason": "need", "cached": 40, "new": 3, "drafts": 2, "server_drafts": 0, "accepted": 1, "committed": 2,
     "slack_s": 0.08}]}

`pass` counts from 1 since the start of the engine, so a missing line shows. `time_s` is the start of the pass on the
engine's clock (CLOCK_MONOTONIC: clients on the same machine have the same), `wait_s` the time since the end of the pass
before it (null at the first), and `idle` tells whether there was a time with nothing to run. A session is told by the
first 8 of its 32 digits: the whole is a capability.

The engine thread only puts the record into a bounded buffer; another thread formats and writes. What finds the buffer
full, or the disk, is dropped and counted.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wisp_plugin.errors import ConfigError
from wisp_plugin.messages import BatchPlan, Commit, PassItem

MAX_PENDING = 4096  # passes whose line is not written yet
_ID_DIGITS = 8
_DECIMALS = 6

log = logging.getLogger(__name__)


@dataclass(slots=True)
class PassRecord:
    """One pass, filled in two steps: at its planning, and when it has been answered.

    `slack_s[i]` and `was_held[i]` are of `plan.items[i]` at `planned_s`: whether an earlier decision had left the
    session out since it was ready. `commits` are those of the items that are no prefill chunks, in their order.
    """

    plan: BatchPlan
    planned_s: float
    slack_s: Sequence[float]
    was_held: Sequence[bool]
    load: float
    number: int = 0
    started_s: float = 0.0
    measured_s: float = 0.0
    waited_s: float | None = None
    was_idle: bool = False
    commits: Sequence[Commit] = ()

    def turns(self) -> Iterator[tuple[int, PassItem, Commit]]:
        """Index, item and commit of every member that got tokens."""
        commits = iter(self.commits)
        for i, item in enumerate(self.plan.items):
            if not item.is_prefill_chunk:
                yield i, item, next(commits)


def trace_line(record: PassRecord) -> str:
    """The record as one line of JSON, without a line break."""
    plan = record.plan
    items = [_item(item, slack_s) for item, slack_s in zip(plan.items, record.slack_s, strict=True)]
    for i, _, commit in record.turns():
        items[i] |= {"accepted": commit.num_accepted, "committed": len(commit.tokens)}
    line = {
        "pass": record.number,
        "time_s": round(record.started_s, _DECIMALS),
        "wait_s": None if record.waited_s is None else round(record.waited_s, _DECIMALS),
        "idle": record.was_idle,
        "predicted_s": round(plan.predicted_s, _DECIMALS),
        "measured_s": round(record.measured_s, _DECIMALS),
        "price": round(plan.price, _DECIMALS),
        "load": round(record.load, _DECIMALS),
        "held": plan.num_held,
        "trimmed": plan.num_trimmed_tokens,
        "evicted": [session[:_ID_DIGITS] for session in plan.evict],
        "items": items,
    }
    return json.dumps(line, separators=(",", ":"))


def _item(item: PassItem, slack_s: float) -> dict[str, Any]:
    """A member of the pass, before its commit."""
    return {
        "session": item.session[:_ID_DIGITS],
        "reason": item.reason,
        "cached": item.num_cached,
        "new": item.num_new_tokens,
        "drafts": item.num_draft_tokens,
        "server_drafts": item.num_to_draft,
        "accepted": 0,
        "committed": 0,
        "slack_s": round(slack_s, _DECIMALS),
    }


class PassTrace:
    """The trace file: `add` in the engine thread, everything else in other threads. Appends to what is there."""

    def __init__(self, path: Path, max_pending: int = MAX_PENDING) -> None:
        """Open the file. ConfigError if it cannot be written."""
        self._path = path
        self._max_pending = max_pending
        self._pending: deque[PassRecord] = deque()
        self._num_overflowed = self._num_unwritten = 0  # counted by the engine thread, and by the writing one
        self._writing = threading.Lock()
        try:
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"trace_file {path} cannot be written: {error.strerror}") from None

    @property
    def num_dropped(self) -> int:
        """Lines that are not in the file and will never be."""
        return self._num_overflowed + self._num_unwritten

    def add(self, record: PassRecord) -> None:
        """Take a pass; never waits."""
        if len(self._pending) >= self._max_pending:
            self._num_overflowed += 1
        else:
            self._pending.append(record)

    def flush(self) -> None:
        """Write what has been added. A file that cannot be written any more is told in the log, once."""
        with self._writing:
            records = [self._pending.popleft() for _ in range(len(self._pending))]
            if self._file.closed or not records:
                self._num_unwritten += len(records)
                return
            try:
                self._file.write("".join(f"{trace_line(record)}\n" for record in records))
                self._file.flush()
            except OSError as error:
                self._num_unwritten += len(records)
                log.error("trace_file %s cannot be written any more: %s; tracing has ended", self._path, error.strerror)
                with contextlib.suppress(OSError):  # it tries once more to write what Python still buffers
                    self._file.close()

    def close(self) -> None:
        """Write the rest and close the file; what is added later is dropped."""
        self.flush()
        with self._writing:
            self._file.close()
        if self.num_dropped:
            log.warning("trace_file %s lacks %d lines", self._path, self.num_dropped)
