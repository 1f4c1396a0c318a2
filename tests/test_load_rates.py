"""Rates and shares of a load, from sessions made up one by one, and what it asked of this machine."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from bench import load_figures
from bench.commit_log import CommitLog
from bench.load_figures import ServerCpu, machine_figures
from bench.load_run import LiveRun
from bench.sim_result import ServerRecord, SessionRecord, SimResult
from bench.workload import SessionSpec
from wisp_plugin.messages import Slo

SLO = Slo(ttft_ms=1000.0, tpot_ms=100.0, name="tight")
NUM_TOKENS = 41


def session(first_s: float, last_s: float, ended: bool = True, num_overdue: int = 0) -> SessionRecord:
    """Opened at 9.5 s, with its first and its last token then; all of its tokens, or all but the last."""
    return SessionRecord(
        SessionSpec(0, 0, 0, SLO, 5, NUM_TOKENS, 9.5, 0), opened_s=9.5, arrived_s=9.5, first_s=first_s,
        last_s=last_s, ended_s=last_s if ended else math.inf, num_tokens=NUM_TOKENS - (not ended),
        num_counted=10, num_overdue=num_overdue,
    )  # fmt: skip


MET = session(10.0, 12.0)
UNEVEN = session(10.0, 12.0, num_overdue=3)  # at its pace on the whole, with tokens that came late
TOO_LATE = session(11.0, 13.0, num_overdue=5)
CUT = session(10.0, 12.9, ended=False)  # at its pace when the run ends
NEVER_SERVED = SessionRecord(MET.spec, opened_s=9.5, arrived_s=9.5)


def result_of(*sessions: SessionRecord) -> SimResult:
    """A run of 8 counted seconds."""
    return SimResult(("tight",), 13.0, 5.0, 13.0, list(sessions), ServerRecord.of(1))


def make_run(result: SimResult, lag_s: list[float], num_mismatches: int = 0) -> LiveRun:
    """Of 4 s, with 10 commits and 6 messages."""
    return LiveRun(
        result, CommitLog(), lag_s, received_s=[0.1] * 10, num_messages=6, num_mismatches=num_mismatches,
        verified=0, accepted=0, client_cpu_s=1.0, elapsed_s=4.0,
    )  # fmt: skip


def figures_of(*sessions: SessionRecord, dilation: float = 1.0) -> dict[str, float]:
    return load_figures.load_figures(result_of(*sessions), CommitLog(), dilation)


def test_requests_are_those_that_ended_and_good_ones_those_that_met_their_slo() -> None:
    figures = figures_of(MET, UNEVEN, TOO_LATE, CUT, NEVER_SERVED)
    assert figures["sessions"] == 5
    assert figures["requests_per_s"] == pytest.approx(3 / 8)
    assert figures["request_goodput"] == pytest.approx(2 / 8)


def test_attainment_is_by_the_mean_and_strict_by_every_token() -> None:
    figures = figures_of(MET, UNEVEN, TOO_LATE, CUT, NEVER_SERVED)
    assert figures["attainment"] == figures["attainment_tight"] == pytest.approx(3 / 5)
    assert figures["strict_attainment"] == pytest.approx(2 / 5)


def test_rates_of_a_dilated_run_are_per_second_of_the_gpu() -> None:
    """What took 8 s here took the emulated GPU 2."""
    plain, dilated = figures_of(MET, TOO_LATE), figures_of(MET, TOO_LATE, dilation=4.0)
    assert dilated["requests_per_s"] == pytest.approx(2 / 2)
    assert dilated["request_goodput"] == pytest.approx(1 / 2)
    assert dilated["goodput"] == pytest.approx(10 / 2)
    assert dilated["throughput"] == pytest.approx(20 / 2)
    for share in ("attainment", "strict_attainment", "wdt_share", "sessions"):
        assert dilated[share] == plain[share]


def test_what_a_run_asked_of_this_machine() -> None:
    lag_s = [0.001] * 98 + [0.5, 0.5]
    figures = machine_figures(make_run(result_of(MET), lag_s, num_mismatches=2), {"server": 2.0, "stub": 6.0})
    assert figures == {
        "commits_per_s": 2.5, "messages_per_s": 1.5, "client_cores": 0.25, "server_cores": 0.5, "stub_cores": 1.5,
        "lag_ms": 1.0, "lag_p99_ms": pytest.approx(500.0), "mismatches": 2.0,
    }  # fmt: skip


def test_a_run_without_messages_was_not_late() -> None:
    figures = machine_figures(make_run(result_of(MET), []), {})
    assert figures["lag_ms"] == figures["lag_p99_ms"] == 0.0


def test_processor_time_of_the_server_and_of_its_stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one process group, user and system, whatever processes are called; one may end while it is looked at."""

    def process(number: int, name: str, group: int, user_ticks: int, system_ticks: int) -> None:
        (tmp_path / str(number)).mkdir()
        line = f"{number} ({name}) S 1 {group} 70 0 -1 4194304 900 901 902 903 {user_ticks} {system_ticks} 904 905 20 0"
        (tmp_path / str(number) / "stat").write_text(line)

    process(70, "tritonserver", 70, 250, 50)
    process(71, "triton (python) stub", 70, 400, 0)
    process(72, "triton (python) stub", 70, 80, 20)
    process(80, "tritonserver", 80, 7000, 7000)  # another server
    (tmp_path / "73").mkdir()
    (tmp_path / "73" / "stat").symlink_to(tmp_path / "gone")
    (tmp_path / "self").mkdir()
    monkeypatch.setattr(load_figures, "Path", lambda _: tmp_path)
    now = ServerCpu.now(70)
    assert now.seconds == {"server": 3.0, "stub": 5.0}
    assert now.since(ServerCpu({"server": 1.0})) == {"server": 2.0, "stub": 5.0}
