"""The trace: one line per pass, bounded, never in the way of the engine."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.factories import ids, make_config, make_draft, make_estimator, make_open, session_id
from tests.fakes import FakeClock, FakeReply, FakeVerifier
from wisp_plugin.engine import Engine
from wisp_plugin.errors import ConfigError
from wisp_plugin.messages import BatchPlan, Commit, Origin, PassItem, Sampling
from wisp_plugin.pass_trace import PassRecord, PassTrace, trace_line
from wisp_plugin.scheduler import make_scheduler

SESSION = "89abcdef" + "0" * 24


def record(number: int = 1) -> PassRecord:
    """A pass with a chunk of prefill and a draft of two tokens, one of them accepted."""
    items = (
        PassItem("f" * 32, ids(1, 2), 0, 0, Sampling(), is_prefill_chunk=True, reason="prefill"),
        PassItem(SESSION, ids(1, 2, 3, 4, 5), 2, 2, Sampling(), reason="need"),
    )
    origin = np.array([Origin.ACCEPTED, Origin.CORRECTION], np.uint8)
    plan = BatchPlan(items, ("e" * 32,), predicted_s=0.02, price=0.5, num_held=3, num_trimmed_tokens=4)
    return PassRecord(
        plan, 7.0, [1.0, -0.25], [False, True], load=0.75, number=number, started_s=7.5, measured_s=0.0251,
        waited_s=0.001, commits=[Commit(SESSION, 3, ids(4, 6), origin)],
    )  # fmt: skip


def test_a_line() -> None:
    line = trace_line(record())
    assert "\n" not in line
    assert json.loads(line) == {
        "pass": 1, "time_s": 7.5, "wait_s": 0.001, "idle": False, "predicted_s": 0.02, "measured_s": 0.0251,
        "price": 0.5, "load": 0.75, "held": 3, "trimmed": 4, "evicted": ["eeeeeeee"],
        "items": [
            {"session": "ffffffff", "reason": "prefill", "cached": 0, "new": 2, "drafts": 0,
             "server_drafts": 0, "accepted": 0, "committed": 0, "slack_s": 1.0},
            {"session": "89abcdef", "reason": "need", "cached": 2, "new": 3, "drafts": 2,
             "server_drafts": 0, "accepted": 1, "committed": 2, "slack_s": -0.25},
        ],
    }  # fmt: skip


def test_the_capability_is_not_told() -> None:
    assert SESSION[:9] not in trace_line(record())


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_file_is_appended_to_and_the_rest_is_written_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "passes.jsonl"
    for numbers in ((1, 2), (1, 2, 3)):
        trace = PassTrace(path)
        for number in numbers:
            trace.add(record(number))
        trace.close()
        trace.close()
    assert [line["pass"] for line in lines(path)] == [1, 2, 1, 2, 3]


def test_the_buffer_has_a_bound_and_what_it_drops_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "passes.jsonl"
    trace = PassTrace(path, max_pending=2)
    for number in range(1, 6):
        trace.add(record(number))
    trace.flush()
    trace.add(record(6))
    trace.close()
    assert [line["pass"] for line in lines(path)] == [1, 2, 6]
    assert trace.num_dropped == 3
    assert "lacks 3 lines" in caplog.text


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_ends_the_trace_with_one_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    trace = PassTrace(Path("/dev/full"))
    for number in (1, 2, 3):
        trace.add(record(number))
        trace.flush()
    trace.close()
    assert trace.num_dropped == 3
    assert caplog.text.count("cannot be written any more: No space left on device") == 1


@pytest.mark.parametrize("path", ["missing/passes.jsonl", "."])
def test_a_file_that_cannot_be_written_is_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(ConfigError, match=r"^trace_file .* cannot be written: ") as refused:
        PassTrace(tmp_path / path)
    assert "\n" not in str(refused.value)


def test_lines_of_an_engine_add_up(tmp_path: Path) -> None:
    path, clock = tmp_path / "passes.jsonl", FakeClock()
    trace = PassTrace(path)
    verifier = FakeVerifier(on_run=lambda: setattr(clock, "now_s", clock.now_s + 0.05))
    config = make_config(max_pass_tokens=4)  # prefill in chunks
    scheduler = make_scheduler(config, verifier.pool, make_estimator())
    engine = Engine(scheduler, verifier, config, clock, trace=trace)
    replies = [FakeReply() for _ in range(3)]
    for number, reply in enumerate(replies):
        prompt = range(1, 8 + number)
        engine.submit(make_open(session=session_id(number), prompt=list(prompt), max_new_tokens=6), reply)
    for _ in range(40):
        if replies[0].commits and not replies[0].ended:
            engine.submit(make_draft(replies[0].commits[-1].end, 1, 2, session=session_id(0)), FakeReply())
        engine.step()
        clock.now_s += 0.01
    trace.close()
    found, totals = lines(path), engine.telemetry.totals
    items = [item for line in found for item in line["items"]]
    assert [line["pass"] for line in found] == list(range(1, int(totals.passes) + 1))
    assert sum(item["committed"] for item in items) == totals.committed_tokens == 18
    assert sum(item["new"] for item in items) == totals.new_tokens
    assert sum(item["drafts"] for item in items) == totals.verified_tokens > 0
    assert sum(item["accepted"] for item in items) == totals.accepted_tokens
    assert found[0]["wait_s"] is None
    assert found[1]["wait_s"] == pytest.approx(0.01)
    assert found[1]["time_s"] - found[0]["time_s"] == pytest.approx(0.06)


def test_a_line_tells_whether_the_engine_was_idle_before(tmp_path: Path) -> None:
    path, verifier = tmp_path / "passes.jsonl", FakeVerifier()
    trace, config = PassTrace(path), make_config()
    engine = Engine(make_scheduler(config, verifier.pool, make_estimator()), verifier, config, FakeClock(), trace=trace)
    for number in range(2):
        engine.submit(make_open(session=session_id(number), prompt=[1, 2], max_new_tokens=3), FakeReply())
        while engine.step():
            pass
    trace.close()
    assert [line["idle"] for line in lines(path)] == [True, False, False] * 2
