"""What the engine's telemetry says about passes and sessions, by driving a real engine in fake time."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from tests.factories import ids, make_config, make_draft, make_open, make_session, session_id
from tests.fakes import FakeClock, FakeReply, FakeVerifier, make_engine, target_alone
from wisp_plugin.draft_buffer import DraftCounts
from wisp_plugin.messages import BatchPlan, Close, Commit, Draft, Mode, Open, PassItem, Sampling, Slo
from wisp_plugin.metric_set import DRAFTING_STATES, MetricSet
from wisp_plugin.telemetry import Telemetry, Totals, drafting_state

PASS_S = 0.05


class Server:
    """An engine without a thread whose passes take `PASS_S`."""

    def __init__(self, num_blocks: int = 64, **config: Any) -> None:
        self.clock = FakeClock()
        self.verifier = FakeVerifier(num_blocks, on_run=self._pass)
        self.engine = make_engine(self.verifier, self.clock, make_config(**{"policy": "continuous", **config}))

    def _pass(self) -> None:
        self.clock.now_s += PASS_S

    def send(self, message: Open | Draft | Close) -> FakeReply:
        reply = FakeReply()
        self.engine.submit(message, reply)
        return reply

    def open(self, number: int = 0, **values: Any) -> FakeReply:
        return self.send(make_open(session=session_id(number), **values))

    def steps(self, num_steps: int = 1) -> None:
        for _ in range(num_steps):
            self.engine.step()

    def series(self) -> dict[str, float]:
        """Every series by name and label values, gauges up to date."""
        self.engine.refresh_gauges(self.verifier.pool)
        telemetry = self.engine.telemetry
        keys = [
            " ".join([family.name.removeprefix("wisp_"), *labels.values()])
            for family in telemetry.families()
            for labels in family.labels
        ]
        return dict(zip(keys, telemetry.values(), strict=True))


def draft(start: int, *tokens: int, number: int = 0, seen: int | None = None) -> Draft:
    return make_draft(start, *tokens, seen=seen, session=session_id(number))


def target(num_tokens: int) -> list[int]:
    """The target's tokens behind the prompt of `make_open`."""
    return target_alone(ids(1, 2, 3), 3 + num_tokens)[3:]


# -- names --------------------------------------------------------------------------------------------------------


def test_names_follow_the_conventions() -> None:
    families = Telemetry(["tight"]).families()
    names = [family.name for family in families]
    assert len(set(names)) == len(names)
    for family in families:
        assert re.fullmatch(r"wisp_[a-z][a-z0-9_]*", family.name)
        assert family.help
        assert "\n" not in family.help
        assert not re.search(r"_(ms|us|millis)", family.name), "base units only"
        histogram = family.name.endswith(("_bucket", "_sum", "_count"))
        assert histogram or (family.kind.value == "counter") == family.name.endswith("_total"), family.name


def test_histograms_have_few_buckets_and_series_are_bounded() -> None:
    families = MetricSet([f"class{i}" for i in range(18)]).families()
    for family in families:
        buckets = {labels["le"] for labels in family.labels if "le" in labels}
        assert len(buckets) <= 10, family.name
    assert sum(len(family.labels) for family in families) < 700


def test_counters_of_the_first_release_keep_their_names() -> None:
    names = {family.name for family in Totals.families()}
    old = ("passes", "pass_seconds", "new_tokens", "commits", "committed_tokens", "verified_tokens", "accepted_tokens",
           "evictions")  # fmt: skip
    assert names >= {f"wisp_{name}_total" for name in old}


# -- passes -------------------------------------------------------------------------------------------------------


def test_a_pass_with_an_accepted_and_a_rejected_draft() -> None:
    server, tokens = Server(), target(5)
    server.open(max_new_tokens=20)
    server.open(1, max_new_tokens=20)
    server.steps()
    wrong = (tokens[2] + 1) % 7
    server.send(draft(4, tokens[1], tokens[2]))
    server.send(draft(4, tokens[1], wrong, 0, number=1))
    server.steps()
    found = server.series()
    assert (found["passes_total"], found["commits_total"], found["committed_tokens_total"]) == (2, 4, 2 + 3 + 2)
    assert (found["received_tokens_total"], found["verified_tokens_total"], found["accepted_tokens_total"]) == (5, 5, 3)
    assert (found["first_rejection_position_count"], found["first_rejection_position_sum"]) == (1, 1)
    assert (found["pass_accepted_tokens_bucket 2"], found["pass_accepted_tokens_bucket 4"]) == (1, 2)
    assert (found["pass_sessions_bucket 1"], found["pass_sessions_bucket 2"]) == (0, 2)
    assert found["pass_new_tokens_sum"] == found["new_tokens_total"] == (3 + 3) + (3 + 4)
    assert found["pass_cached_tokens_sum"] == 3 + 3
    assert found["pass_measured_seconds_sum"] == pytest.approx(2 * PASS_S)
    assert found["pass_time_ratio_count"] == 2
    assert found["stale_tokens_total"] == 0  # what stands behind a rejection was verified


def test_late_and_stale_drafts() -> None:
    server, tokens = Server(), target(6)
    server.open(max_new_tokens=30)
    server.steps(4)
    server.send(draft(4, tokens[1], tokens[2], tokens[3], 9, 9, seen=4))  # three come too late
    server.send(draft(11, 1, 2, seen=7))  # continues nothing
    server.steps()
    found = server.series()
    assert (found["received_tokens_total"], found["late_tokens_total"], found["stale_tokens_total"]) == (7, 3, 2)


def test_a_chain_that_a_pass_breaks_is_stale_at_once() -> None:
    server, tokens = Server(max_pass_tokens=3), target(3)
    server.open(max_new_tokens=30)
    server.steps()
    server.send(draft(4, (tokens[1] + 1) % 7, 1, 1, 1, 1))  # two are verified, the other three found wrong with them
    server.steps()
    found = server.series()
    assert (found["verified_tokens_total"], found["stale_tokens_total"], found["trimmed_tokens_total"]) == (2, 3, 3)


def test_a_resumed_session_throws_its_buffer_away() -> None:
    server = Server(max_pass_tokens=1)
    first = server.open(mode=Mode.SYNC, prompt=(1,), max_new_tokens=30)
    server.steps()
    server.send(draft(2, 5, 5))
    server.open(mode=Mode.SYNC, prompt=(1,), max_new_tokens=30)
    server.steps()
    assert first.finished
    assert server.series()["stale_tokens_total"] == 2


def test_slack_is_what_the_plan_knew() -> None:
    server = Server()
    stream = server.open(slo=Slo(ttft_ms=1000.0, tpot_ms=100.0))
    server.clock.now_s += 0.4
    server.steps()
    predicted_s = stream.commits[0].timing.predicted_us / 1e6
    assert server.series()["slack_seconds_sum"] == pytest.approx(1.0 - 0.4 - predicted_s, abs=1e-6)


def test_late_members_have_negative_slack() -> None:
    server = Server()
    server.open(slo=Slo(ttft_ms=100.0, tpot_ms=100.0))
    server.clock.now_s += 0.4
    server.steps()
    found = server.series()
    assert found["slack_seconds_bucket -0.3"] == 1
    assert found["slack_seconds_sum"] < -0.3


def test_held_sessions_and_what_their_turns_gave() -> None:
    """One place per pass: of two sessions one is left out every time, and had waited when its turn comes."""
    server, tokens = Server(max_pass_sessions=1), target_alone(ids(1), 4)
    for number in (0, 1):
        server.open(number, prompt=(1,), max_new_tokens=20)
    server.steps(2)  # session 1 had to wait for its first turn
    assert server.series()["turns_total true"] == 1
    server.send(draft(2, tokens[2], tokens[3]))
    server.steps()
    found = server.series()
    assert found["held_sessions_total"] == 3  # one in each pass
    assert (found["turns_total true"], found["turns_total false"]) == (2, 1)
    assert (found["turn_tokens_total true"], found["turn_tokens_total false"]) == (1 + 3, 1)


def test_adopted_prefixes_and_evictions() -> None:
    server = Server()
    prompt = tuple(range(1, 7)) * 2
    server.open(0, prompt=prompt, max_new_tokens=30)
    server.steps()
    server.open(1, prompt=(*prompt, 3), max_new_tokens=30)
    server.steps(2)
    assert server.series()["adopted_tokens_total"] == 12  # all of the three blocks that the first has computed
    small = Server(num_blocks=6)
    for number in range(4):
        small.open(number, max_new_tokens=20)
    small.steps(300)
    assert small.series()["evictions_total"] > 0


def test_decision_time_counts_only_where_there_was_something_to_decide() -> None:
    server = Server()
    server.steps(3)
    assert server.series()["plan_seconds_count"] == 0
    server.open()
    server.steps()
    assert server.series()["plan_seconds_count"] == 1


# -- sessions -----------------------------------------------------------------------------------------------------


def test_attainment_by_class() -> None:
    server = Server(slo_classes="tight=500/20")
    server.open(0, slo=Slo(500.0, 20.0, "tight"), max_new_tokens=4)  # a pass takes 50 ms
    server.open(1, slo=Slo(500.0, 80.0, "default"), max_new_tokens=4)
    server.open(2, slo=Slo(500.0, 80.0), max_new_tokens=1)
    server.open(3, slo=Slo(500.0, 80.0, "unknown to this server"), max_new_tokens=1)
    server.steps(4)
    found = server.series()
    ended = {key: value for key, value in found.items() if key.startswith("sessions_ended_total") and value}
    assert ended == {
        "sessions_ended_total tight false": 1, "sessions_ended_total default true": 1,
        "sessions_ended_total custom true": 2,
    }  # fmt: skip
    assert found["first_token_seconds_sum tight"] == pytest.approx(PASS_S)
    assert found["time_per_token_seconds_sum tight"] == pytest.approx(PASS_S)
    assert found["time_per_token_seconds_count custom"] == 0  # one token has no time per further token


def test_a_session_without_a_token_counts_only_if_it_was_overdue() -> None:
    server = Server(max_pass_sessions=1, max_load=0)
    server.open(9, max_new_tokens=90)
    waiting = [server.open(number, slo=Slo(ttft_ms, 100.0)) for number, ttft_ms in ((0, 10.0), (1, 5000.0))]
    server.steps()
    for number in (0, 1):
        server.send(Close(session_id(number)))
    server.steps()
    assert [reply.tokens for reply in waiting] == [[], []]
    found = server.series()
    assert (found["sessions_ended_total custom false"], found["sessions_ended_total custom true"]) == (1, 0)


def test_a_session_counts_once_however_often_it_leaves() -> None:
    server = Server()
    server.open(max_new_tokens=2)
    server.steps(3)
    again = server.open(max_new_tokens=2)  # its last commits had not reached the client
    server.steps()
    assert again.finished
    server.send(Close(session_id(0)))
    server.steps()
    found = server.series()
    assert found["sessions_ended_total custom true"] == 1
    assert found["first_token_seconds_count custom"] == 1


def test_refusals_by_reason() -> None:
    server = Server(max_sessions=1, max_queued_messages=3)
    replies = [server.open(number) for number in range(4)]
    server.steps()
    assert [reply.error is not None for reply in replies] == [False, False, False, True]
    found = server.series()
    refused = {reason: found[f"requests_refused_total {reason}"] for reason in ("load", "sessions", "queue")}
    assert refused == {"load": 0, "sessions": 2, "queue": 1}


def test_refusals_by_load() -> None:
    server = Server(max_load=0.5)
    server.open(0, slo=Slo(1000.0, 15.0), max_new_tokens=50)
    server.steps()
    refused = server.open(1, slo=Slo(1000.0, 15.0))
    server.steps()
    assert refused.commits[0].retry_after_ms is not None
    server.clock.now_s += 1.0
    server.steps()
    found = server.series()
    assert found["requests_refused_total load"] == 1
    assert found["predicted_load_ratio"] > 0.5


# -- gauges -------------------------------------------------------------------------------------------------------


def test_states_of_sessions() -> None:
    server = Server(max_unacked_tokens=128)
    server.open(0, max_new_tokens=200)
    server.steps(130)  # pauses: nothing is acknowledged
    server.open(1, mode=Mode.SYNC)
    server.open(2, max_new_tokens=3)
    server.steps(4)
    server.open(3)
    server.steps()
    found = server.series()
    states = {state: found[f"sessions {state}"] for state in ("running", "waiting", "paused", "lingering")}
    assert states == {"running": 1, "waiting": 1, "paused": 1, "lingering": 1}
    assert found["kv_blocks used"] + found["kv_blocks free"] == 64
    assert found["kv_blocks used"] > 30


def test_queue_and_buffers() -> None:
    server = Server()
    server.open(mode=Mode.SYNC)
    server.steps()
    server.send(draft(5, 1, 2, seen=4))
    assert server.series()["queue_messages"] == 1
    session = next(iter(server.engine.scheduler.sessions))
    session.on_draft(draft(4, 1, 2, 3), server.clock.now_s)
    assert server.series()["buffered_draft_tokens"] == 3


@pytest.mark.parametrize(
    ("state", "counts"),
    [
        ("none", DraftCounts()),
        ("working", DraftCounts(received=5, verified=5)),
        ("working", DraftCounts(received=90, verified=31, late=40)),
        ("working", DraftCounts(received=90, verified=80, accepted=1)),
        ("working", DraftCounts(received=90)),  # trimmed by the scheduler: no fault of theirs
        ("rejected", DraftCounts(received=32, verified=32)),
        ("rejected", DraftCounts(received=400, verified=32, late=300)),
        ("working", DraftCounts(received=31, late=31)),
        ("late", DraftCounts(received=40, late=20, stale=20)),
        ("stale", DraftCounts(received=40, late=10, stale=30)),
    ],
)
def test_drafting_by_choice_broken_or_too_slow(state: str, counts: DraftCounts) -> None:
    assert drafting_state(counts) == state
    assert state in DRAFTING_STATES


def test_a_broken_draft_model_shows_and_a_thin_client_looks_different() -> None:
    server = Server()
    for number in (0, 1):
        server.open(number, max_new_tokens=60)
    server.steps()
    for at in range(4, 37):
        wrong = (target(at)[at - 3] + 1) % 7
        server.send(draft(at, wrong))
        server.steps()
    found = server.series()
    assert {state: found[f"sessions_drafting {state}"] for state in DRAFTING_STATES} == {
        "none": 1, "working": 0, "rejected": 1, "late": 0, "stale": 0,
    }  # fmt: skip
    assert found["first_rejection_position_bucket 0"] == 33


# -- consistency --------------------------------------------------------------------------------------------------


def test_totals_and_histograms_tell_the_same() -> None:
    server, rng = Server(num_blocks=40, max_pass_tokens=6), np.random.default_rng(1)
    replies = {number: server.open(number, max_new_tokens=24) for number in range(5)}
    for _ in range(120):
        for number, reply in replies.items():
            at = 3 + len(reply.tokens)
            if not reply.ended and rng.random() < 0.6:
                server.send(draft(at, *rng.integers(0, 7, rng.integers(0, 4)).tolist(), number=number))
        server.steps()
    found = server.series()
    assert all(reply.ended for reply in replies.values())
    assert found["committed_tokens_total"] == 5 * 24
    assert found["turn_tokens_total true"] + found["turn_tokens_total false"] == 5 * 24
    assert found["turns_total true"] + found["turns_total false"] == found["commits_total"]
    assert found["pass_accepted_tokens_sum"] == found["accepted_tokens_total"]
    assert 0 < found["accepted_tokens_total"] <= found["verified_tokens_total"] <= found["received_tokens_total"]
    assert (
        found["verified_tokens_total"] + found["late_tokens_total"] + found["stale_tokens_total"]
        <= found["received_tokens_total"]
    )
    assert found["sessions_ended_total custom true"] + found["sessions_ended_total custom false"] == 5
    assert found["price"] == 0


def test_a_plan_with_everybody_held_makes_the_next_turn_a_held_one() -> None:
    telemetry, session = Telemetry(), make_session()
    telemetry.on_plan(BatchPlan(num_held=1), [], 1.0, 1e-4)
    item = PassItem(session.id, session.committed, 0, 0, Sampling())
    record = telemetry.on_plan(BatchPlan((item,), predicted_s=0.01), [session], 2.0, 1e-4)
    assert list(record.was_held) == [True]
    commit = Commit(session.id, 3, ids(4), np.zeros(1, np.uint8))
    telemetry.on_pass(record, [session], [commit], 2.0, 0.01)
    assert telemetry.totals.held_sessions == 0  # nobody was left out of a pass
