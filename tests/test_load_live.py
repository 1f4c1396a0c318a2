"""Live load on a server that a test has the say of: what is reported, judged and counted, in real time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from bench import cli, load, load_clients, load_run
from bench.load_clients import LiveWorld
from bench.load_run import LiveRun, MakeController, run_load
from bench.load_tokens import LoadTokens
from bench.scenario import Scenario
from bench.workload import Workload
from tests.comparison_fakes import document_of
from tests.load_fakes import LIMIT_S, AskedSession, serving
from wisp_plugin.messages import Commit, Mode, Status

RTT_S = 0.02
SCENARIO = Scenario(
    Workload(num_devices=2, rtt_s=(RTT_S, RTT_S), stagger_s=0.0), controller=MakeController("none", Mode.FREE),
    tokens=LoadTokens(None), duration_s=0.3, warm_up_s=0.0, drain=True,
)  # fmt: skip
COMMAND = (
    "load", "--trace", "none", "--rule", "none", "--devices", "2", "--stagger", "0", "--warm-up", "0", "--server",
)  # fmt: skip


def played(url: str, scenario: Scenario, start_s: float) -> LiveWorld:
    """A run whose clock shows 0 at `start_s`, by `time.monotonic`."""

    async def play() -> LiveWorld:
        world = LiveWorld(url, scenario, scenario.workload.devices(), start_s)
        await asyncio.wait_for(world.run(), LIMIT_S)
        return world

    return asyncio.run(play())


def test_a_run_tells_how_far_it_is() -> None:
    """In whole seconds, those that it has when its end cuts it among them."""
    reached: list[int] = []
    progress = SimpleNamespace(reach=reached.append)
    scenario = replace(SCENARIO, duration_s=1.2, drain=False)

    async def play(url: str) -> None:
        world = LiveWorld(url, scenario, scenario.workload.devices(), time.monotonic())
        await asyncio.wait_for(world.run(progress), LIMIT_S)  # type: ignore[arg-type]

    with serving() as url:
        asyncio.run(play(url))
    assert reached == sorted(reached)
    assert (reached[0], reached[-1]) == (0, 1)


@pytest.mark.parametrize("num_wrong", [0, 1])
def test_a_session_with_a_wrong_token_is_counted_and_told_by_the_exit_code(
    num_wrong: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def script(session: AskedSession) -> Iterator[Commit]:
        yield session.commit(1, wrong=int(session.number < num_wrong))
        yield session.rest()

    def run_drained(url: str, scenario: Scenario, *further: Any) -> LiveRun:
        return run_load(url, replace(scenario, drain=True), *further)  # however slow the machine: all sessions end

    monkeypatch.setattr(load, "run_load", run_drained)
    with serving(script) as url:
        assert cli.main([*COMMAND, url, "--duration", "0.3"]) == num_wrong
    document = document_of(capsys.readouterr().out)
    assert document["mismatches"] == num_wrong
    assert document["sessions"] >= 2
    assert document["commits_per_s"] > 0


def test_a_late_client_says_so_and_gains_nothing() -> None:
    """The process comes 5 s too late: sessions were opened when they were due, and latency counts from there."""
    late_s = 5.0
    start_s = time.monotonic() - late_s
    with serving() as url:
        world = played(url, SCENARIO, start_s)
    assert [client.record.opened_s for client in world.clients] == [0.0, 0.0]
    assert min(world.lag_s) >= late_s - RTT_S / 2
    assert all(client.record.ttft_s >= late_s + RTT_S / 2 for client in world.clients)
    arrivals_s = sorted(at_s for session in world.log.arrivals_s.values() for at_s in session)
    assert len(arrivals_s) == len(world.received_s) == 4
    # Into the link goes a commit when it has really come, not when the last event was.
    for arrival_s, received_s in zip(arrivals_s, world.received_s, strict=True):
        assert arrival_s >= received_s - start_s + RTT_S / 2


def test_a_run_ends_when_its_time_is_over_and_not_when_its_sessions_are_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A server that commits on after the close, and does not let go: nothing of that counts."""
    monkeypatch.setattr(load_clients, "_CLOSE_S", 0.5)
    closed_at_s: list[float] = []

    def script(session: AskedSession) -> Iterator[Commit]:
        yield session.commit(1)
        session.wait_close()
        closed_at_s.append(time.monotonic())
        yield session.rest()
        session.wait_end()

    start_s = time.monotonic() + 0.2
    with serving(script) as url:
        world = played(url, replace(SCENARIO, drain=False), start_s)
    run = load_run._run_of(world, 0.0)
    assert SCENARIO.duration_s <= run.result.end_s <= min(closed_at_s, default=time.monotonic()) - start_s
    assert run.elapsed_s == run.result.end_s
    assert {session.num_tokens for session in run.result.sessions} <= {0, 1}  # 0: this machine was slow
    assert len(run.received_s) <= 2


def end_early(session: AskedSession) -> Iterator[Commit]:
    """Device 1, of the second process, gets an end that no emulated target gives; the other waits to be closed."""
    if session.device == 1:
        yield session.commit(1, Status.EOS)
    session.wait_close()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_server_with_another_target_ends_the_run_at_once_in_one_line(
    num_processes: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where another process would play on for a long time."""
    monkeypatch.setattr(load_run, "_START_PROCESSES_S", 0.0)
    with serving(end_early) as url:
        assert cli.main([*COMMAND, url, "--duration", "600", "--processes", str(num_processes)]) == 2
    *told, line = capsys.readouterr().err.splitlines()
    assert all(text.startswith("2 devices, seconds: ") for text in told)  # progress, of this process
    assert " ended as EOS at " in line
    assert line.endswith("; is the target of --server the emulated one of this --profile and --trace?")
