"""Load on an emulated target, without a server: drafts along the ring, the wire, events in real time, options."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import math
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tritonclient.grpc import service_pb2

from bench import load
from bench.commit_log import CommitLog, simulate_logged
from bench.load_clients import LiveEvents, LiveWorld
from bench.load_figures import load_figures, pass_figures
from bench.load_options import Load, dilated
from bench.load_run import MakeController
from bench.load_tokens import LoadTokens, session_seed
from bench.load_wire import decode, encode
from bench.scenario import Scenario
from bench.simulator import simulate
from bench.trace_walk import TraceRing
from bench.validate import relative
from bench.workload import Workload
from tests.factories import make_commit, make_draft, make_open, same, session_id
from tests.load_fakes import response_of
from tests.traces import make_trace
from triton_models.emulated_text import RingText
from wisp_plugin.errors import RequestRefused, TransportError
from wisp_plugin.estimator import EMPTY_PASS, Estimator
from wisp_plugin.messages import Close, Commit, Mode, Sampling, Status, Timing
from wisp_plugin.pace import Pace
from wisp_plugin.stop_rules import Price, Ratio
from wisp_plugin.wire import WireLimits, decode_request
from wisp_plugin.wire_values import Array

TRACE = make_trace(4)
RING = TraceRing(TRACE)
SMALL = Workload(num_devices=4, prompt_range=(8, 60), output_range=(10, 60), stagger_s=0.5)
_NUMPY = {"INT32": np.int32, "UINT8": np.uint8}


def test_a_session_drafts_along_what_the_server_says() -> None:
    spec = next(SMALL.sessions(SMALL.devices()[1]))
    tokens = LoadTokens(RING, seed=3)(spec)
    num_tokens = spec.prompt_len + spec.num_output_tokens
    assert np.array_equal(tokens.target, RingText(RING.generated).tokens(session_seed(3, spec), 0, num_tokens))
    right = [tokens.draft(at, at)[0] == tokens.target[at] for at in range(num_tokens)]
    assert 0.5 < np.mean(right) < 1.0


@pytest.mark.parametrize(
    "message",
    [
        make_open((1, 2, 3), session=session_id(5), sampling=Sampling(seed=2**62 + 1, temperature=0.5)),
        make_draft(7, 4, 5, 6, session=session_id(5)),
        make_draft(7, session=session_id(5)),
        Close(session_id(5)),
    ],
)
def test_a_message_comes_through_the_wire(message: object) -> None:
    request = service_pb2.ModelInferRequest.FromString(encode(message, "wisp_verifier"))  # type: ignore[arg-type]
    parameters = {name: getattr(p, str(p.WhichOneof("parameter_choice"))) for name, p in request.parameters.items()}
    tensors: dict[str, Array] = {}
    for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True):
        if tensor.datatype == "BYTES":
            tensors[tensor.name] = np.array([raw[4:]], np.object_)
        else:
            tensors[tensor.name] = np.frombuffer(raw, _NUMPY[tensor.datatype]).reshape(tuple(tensor.shape))
    assert same(decode_request(parameters, tensors, WireLimits(1000, 1000, 64)), message)


def test_commits_and_errors_come_back() -> None:
    commit = make_commit(5, 8, 9, session=session_id(5))
    assert same(decode(response_of(commit)), commit)
    refused = service_pb2.ModelStreamInferResponse(error_message="two\nlines")
    with pytest.raises(RequestRefused, match="two lines"):
        decode(refused.SerializeToString())
    with pytest.raises(TransportError, match="no ModelStreamInferResponse"):
        decode(b"\xff\xff")


def test_events_happen_at_their_times_even_when_they_come_late() -> None:
    """A busy loop delays what happens, but not the times by which it happens, nor the order."""

    async def play() -> tuple[list[tuple[str, float]], float]:
        events = LiveEvents(CommitLog(), time.monotonic())
        seen: list[tuple[str, float]] = []

        def note(name: str) -> None:
            seen.append((name, events.now_s))
            if name == "first":
                events.schedule(events.now_s + 0.01, note, "its follower")

        events.schedule(0.03, note, "second")
        events.schedule(0.01, note, "first")
        time.sleep(0.06)  # the loop is stuck
        await asyncio.sleep(0.03)
        return seen, events.real_s

    seen, real_s = asyncio.run(play())
    assert seen == [("first", 0.01), ("its follower", 0.02), ("second", 0.03)]
    assert real_s >= 0.06


def test_gaps_between_commits_are_within_sessions_and_within_the_time() -> None:
    log = CommitLog()
    for at_s, session in [(1.0, "a"), (1.5, "b"), (2.0, "a"), (4.0, "a"), (9.0, "a")]:
        log.add(make_commit(0, 1, session=session), at_s)
    log.add(Commit("a", 1, make_commit(0).tokens, make_commit(0).origin), 3.0)  # a status without tokens
    assert log.gaps_s(0.0, 5.0) == [1.0, 2.0, 3.5]  # b waits since 1.5; a since 4.0, which is not its longest
    assert log.gaps_s(1.2, 5.0) == [1.0, 2.0, 3.5]  # a gap belongs to where it ends
    assert log.gaps_s(2.5, 4.0) == [2.0, 2.5]
    log.add(dataclasses.replace(make_commit(1, 1, session="b"), status=Status.LENGTH), 2.0)
    assert log.gaps_s(0.0, 5.0) == [1.0, 2.0, 0.5]


def test_what_was_resent_is_of_no_pass() -> None:
    log = CommitLog()
    log.add(dataclasses.replace(make_commit(0, 1), timing=Timing()), 1.0)
    assert all(map(math.isnan, log.passes()))
    log.add(dataclasses.replace(make_commit(1, 1), timing=Timing(measured_us=40_000, num_sessions=2)), 2.0)
    assert log.passes() == pytest.approx((0.04, 2.0))


def test_a_server_that_stalls_has_bad_latencies() -> None:
    """Sessions without a token and the gap that lasts at the end count, and a class that nobody judged has no share."""
    result, log = simulate_logged(Scenario(SMALL, duration_s=6.0, warm_up_s=1.0))
    before = load_figures(result, log)
    for session in result.sessions:
        if session.opened_s > 0.3:
            session.num_tokens, session.first_s, session.last_s, session.ended_s = 0, math.inf, math.inf, math.inf
    log.arrivals_s = {name: [at_s for at_s in times if at_s < 1.5] for name, times in log.arrivals_s.items()}
    log.ended_s = {}
    stalled = load_figures(dataclasses.replace(result), log)
    assert stalled["median_ttft_ms"] > 2 * before["median_ttft_ms"]
    assert stalled["commit_gap_p95_ms"] > 4000.0 > 10 * before["commit_gap_p95_ms"]
    one_class = [s for s in result.sessions if s.spec.class_index == 0]
    shares = load_figures(dataclasses.replace(result, sessions=one_class), log)
    names = result.class_names
    assert [math.isnan(shares[f"attainment_{name}"]) for name in names] == [False, True, True]


def test_the_time_between_passes_is_that_of_a_busy_engine(tmp_path: Path) -> None:
    """Not where it was idle, nor where a line is missing."""
    starts = [(1, 0.0, True), (2, 0.012, False), (3, 0.524, True), (4, 0.536, False), (6, 0.7, False)]
    passes = tmp_path / "passes.jsonl"
    passes.write_text("".join(
        json.dumps({"pass": number, "time_s": at_s, "measured_s": 0.01, "idle": idle}) + "\n"
        for number, at_s, idle in starts
    ))  # fmt: skip
    figures = pass_figures(passes, [0.013, 0.03, 0.548])
    assert figures["passes"] == 5
    assert figures["between_ms"] == pytest.approx(2.0)
    assert figures["way_ms"] == pytest.approx(3.0)  # 3, 8 and 2 ms behind the pass that had ended last


def test_a_stream_that_ends_in_the_middle_of_a_session_fails_the_run() -> None:
    async def check(has_ended: bool) -> None:
        world = LiveWorld("127.0.0.1:1", Scenario(SMALL), [], time.monotonic())
        task = asyncio.create_task(asyncio.sleep(0))
        await task
        world._sessions["0"] = SimpleNamespace(task=task, has_ended=has_ended)  # type: ignore[assignment]
        world._check()

    asyncio.run(check(has_ended=True))
    with pytest.raises(TransportError, match="in the middle of its session"):
        asyncio.run(check(has_ended=False))


def test_the_simulation_can_be_watched_without_changing_it() -> None:
    scenario = Scenario(SMALL, tokens=LoadTokens(RING), duration_s=3.0, warm_up_s=1.0)
    result, log = simulate_logged(scenario)
    figures = load_figures(result, log)
    assert result.figures() == simulate(scenario).figures()
    assert figures["goodput"] == result.goodput
    assert figures["pass_ms"] == pytest.approx(1e3 * result.server.pass_s / result.server.num_passes, rel=0.1)
    assert 30.0 < figures["commit_gap_ms"] <= figures["commit_gap_p95_ms"]


def options(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    load.add_arguments(parser)
    return parser.parse_args(["--no-timed", *words])


def test_a_dilated_run_is_the_same_run() -> None:
    """In virtual time exactly, but for what has a time of its own (the pause before a retry): figures agree."""
    plain = Load.of(options("--duration", "6", "--warm-up", "2", "--stagger", "1", "--rule", "fixed:4"), 3)
    slow = Load.of(
        options("--duration", "6", "--warm-up", "2", "--stagger", "1", "--rule", "fixed:4", "--dilation", "4"), 3
    )
    assert slow.scenario.duration_s == 24.0
    first, second = (load_figures(*simulate_logged(one.scenario), one.dilation) for one in (plain, slow))
    for name in ("goodput", "commit_gap_ms", "commit_gap_p95_ms", "attainment"):
        assert first[name] == pytest.approx(second[name], rel=0.05), name


def test_dilated_costs_take_longer() -> None:
    costs = Load.of(options(), 1).profile.costs
    features = EMPTY_PASS + np.array([0.0, 3.0, 9.0, 9.0, 900.0, 3000.0])
    ratio = Estimator(dilated(costs, 3.0)).predict(features) / Estimator(costs).predict(features)
    assert float(ratio) == pytest.approx(3.0)


def test_controllers_are_made_by_name() -> None:
    assert not MakeController("none", Mode.FREE)().draft_on(Pace(), 0.0)
    assert isinstance(MakeController("auto", Mode.SYNC)().rule, Ratio)
    assert isinstance(MakeController("auto", Mode.FREE)().rule, Price)


def test_relative_differences() -> None:
    assert relative(1.1, 1.0) == pytest.approx(0.1)
    assert relative(0.0, 0.0) == 0.0
    assert relative(1.0, 0.0) == float("inf")
