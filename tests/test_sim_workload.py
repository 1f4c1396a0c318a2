"""The mix of devices, throttling, think time, and tokens from recorded texts."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.scenario import Scenario
from bench.simulator import simulate
from bench.trace_walk import TraceRing, WalkOf, WalkTokens, load_ring
from bench.workload import DeviceKind, Throttling, Workload
from wisp_plugin.draft_trace import DraftTrace, TextTrace
from wisp_plugin.messages import Mode

KINDS = (DeviceKind(8.0), DeviceKind(30.0), DeviceKind(60.0), DeviceKind(120.0))
MIX = Workload(num_devices=400, kinds=KINDS, throttling=Throttling(), think_s=2.0)


def text_of(agrees: list[bool], first_token: int) -> TextTrace:
    """A text behind a prompt of two tokens; drafts are wrong where `agrees` is False."""
    tokens = np.arange(first_token, first_token + 2 + len(agrees), dtype=np.int32)
    drafted = np.where(agrees, tokens[2:], -tokens[2:]).astype(np.int32)
    stats = np.tile(np.arange(len(agrees), dtype=np.float32)[:, None], (1, 5))
    num_wrong = agrees.count(False)
    behind = np.full((num_wrong, 3, 5), 0.5, np.float32)
    behind_tokens = np.arange(3 * num_wrong, dtype=np.int32).reshape(num_wrong, 3) + 9000
    return TextTrace(tokens, 2, drafted, stats, behind, behind_tokens)


TEXTS = [text_of([True, False, True], 100), text_of([True, True], 200), text_of([False, True, True, False], 300)]
RING = TraceRing(DraftTrace(TEXTS, {}))


class TestDevices:
    def test_kinds_come_in_their_shares_whatever_the_number(self) -> None:
        kinds = (DeviceKind(10.0, 1.0), DeviceKind(100.0, 3.0))
        for num_devices in (8, 40, 200):
            devices = Workload(num_devices=num_devices, kinds=kinds, speed_sigma=0.0).devices()
            share = sum(d.drafted_tokens_per_s == 100.0 for d in devices) / num_devices
            assert share == pytest.approx(0.75, abs=1.5 / num_devices)

    def test_more_devices_contain_fewer(self) -> None:
        assert MIX.devices()[:7] == replace(MIX, num_devices=7).devices()

    def test_speeds_spread_around_those_of_the_kinds(self) -> None:
        speeds = np.array([d.drafted_tokens_per_s for d in MIX.devices()])
        kinds = np.array([kind.drafted_tokens_per_s for kind in KINDS])
        nearest = kinds[np.abs(np.log(speeds[:, None] / kinds)).argmin(axis=1)]
        assert min(Counter(nearest.tolist()).values()) > 80
        assert np.std(np.log(speeds / nearest)) == pytest.approx(0.15, abs=0.03)

    def test_a_hot_device_drafts_slower_and_recovers(self) -> None:
        device = MIX.devices()[0]
        first, second = device.episodes_s[:2]
        cool_s, hot_s = device.draft_step_s(first - 1e-3), device.draft_step_s(0.5 * (first + second))
        assert hot_s == pytest.approx(2.0 * cool_s)
        assert device.draft_step_s(second + 1e-6) == cool_s

    def test_devices_are_hot_for_the_stated_share_of_time(self) -> None:
        hot = [d.draft_step_s(t) > 1.5 / d.drafted_tokens_per_s for d in MIX.devices() for t in range(100, 500, 40)]
        assert np.mean(hot) == pytest.approx(8.0 / 38.0, abs=0.03)

    def test_users_think_between_sessions(self) -> None:
        workload = replace(MIX, num_devices=6, prompt_range=(8, 40), output_range=(10, 30), stagger_s=1.0)
        result = simulate(Scenario(workload, ahead=0, duration_s=12.0, warm_up_s=0.0, drain=True))
        pauses = []
        for device in range(6):
            own = [s for s in result.sessions if s.spec.device == device]
            pauses += [b.opened_s - a.ended_s - b.spec.think_s for a, b in pairwise(own)]
        assert len(pauses) > 6
        assert pauses == pytest.approx([0.0] * len(pauses), abs=0.1)


class TestTraceRing:
    def test_inside_a_text_it_is_the_recorded_chain(self) -> None:
        offset = 0
        for text in TEXTS:
            for index in range(len(text.generated)):
                last = len(text.generated) - index if text.run_length(index) == len(text.generated) - index else 4
                for ahead in range(last):
                    assert RING.draft(offset + index, ahead) == text.chain_token(index, ahead)
            offset += len(text.generated)

    def test_where_texts_meet_the_chain_goes_on(self) -> None:
        token, _ = RING.draft(2, 1)  # the last token of the first text is right, and so is the first of the second
        assert token == TEXTS[1].generated[0]

    def test_it_is_a_ring(self) -> None:
        assert RING.draft(RING.length - 3, 0) == RING.draft(2 * RING.length - 3, 0)
        assert RING.draft(4, 0)[0] == TEXTS[1].generated[1]

    def test_a_training_trace_is_refused(self) -> None:
        bare = [replace(t, behind=t.behind[:, :0], behind_tokens=t.behind_tokens[:, :0]) for t in TEXTS]
        with pytest.raises(ValueError, match="evaluation trace"):
            TraceRing(DraftTrace(bare, {}))

    @settings(max_examples=30, deadline=None)
    @given(st.integers(0, 50), st.integers(1, 40), st.integers(0, 10))
    def test_a_session_of_any_length_walks_on(self, number: int, num_output_tokens: int, seed: int) -> None:
        spec = next(MIX.sessions(MIX.devices()[0]))
        spec = replace(spec, number=number, prompt_len=5, num_output_tokens=num_output_tokens)
        tokens = WalkTokens(RING, spec, seed)
        assert len(tokens.target) == 5 + num_output_tokens
        for position in range(5, len(tokens.target)):
            right = tokens.draft(position, position)[0] == tokens.target[position]
            assert right == (tokens.draft(position, position)[0] > 0)

    @pytest.mark.parametrize(
        ("draft", "low", "high"), [("int4", 0.6, 0.8), ("mixed48", 0.85, 0.95), ("int8", 0.94, 1.0)]
    )
    def test_a_simulated_session_is_accepted_as_its_trace_says(self, draft: str, low: float, high: float) -> None:
        assert low < load_ring(draft).acceptance < high
        workload = Workload(num_devices=12, stagger_s=0.5, output_range=(20, 80), prompt_range=(8, 40))
        result = simulate(Scenario(workload, mode=Mode.SYNC, ahead=1, tokens=WalkOf(draft), duration_s=12.0))
        assert result.server.verified > 500
        accepted = result.server.accepted / result.server.verified
        assert accepted == pytest.approx(load_ring(draft).acceptance, abs=0.05)
