"""`wisp-bench classes`: emulated drafting, what counts as a met SLO, and the figures over rounds."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.class_figures import ClassFigures, RunFigures, figures_over_rounds
from bench.class_workload import LOOSE, TIGHT, Drafts, Text, make_devices
from bench.emulated_device import Arrival, Device, DeviceResult, ReplayingDrafter, run_devices
from edge_runtime.client import TokenTimes
from tests.factories import ids
from wisp_plugin.messages import Sampling, Slo, Tokens

TEXT = np.arange(100, 200, dtype=np.int32)
GREEDY = Sampling()
SLOS = {TIGHT: Slo(100.0, 50.0, TIGHT), LOOSE: Slo(1_000.0, 200.0, LOOSE)}


def drafter(acceptance: float, slept_s: list[float] | None = None, seed: int = 0) -> ReplayingDrafter:
    """A drafter of TEXT that notes what it sleeps."""
    return ReplayingDrafter(TEXT, 50.0, acceptance, seed, sleep=(slept_s if slept_s is not None else []).append)


def draft(device: ReplayingDrafter, tokens: Tokens) -> int:
    """The draft token behind `tokens`; there are no logits."""
    token, stats = device.draft_token_with_stats(tokens, GREEDY)
    assert stats is None
    return token


def chain(device: ReplayingDrafter, num_known: int, num_drafts: int) -> Tokens:
    """Draft tokens behind the first `num_known` of TEXT."""
    tokens = TEXT[:num_known]
    for _ in range(num_drafts):
        assert device.advance(tokens) == 0
        tokens = np.append(tokens, np.int32(draft(device, tokens)))
    return tokens[num_known:]


def result(
    slo_class: str = TIGHT, gap_ms: float = 40.0, ttft_ms: float = 90.0, cut_after_ms: float | None = None
) -> DeviceResult:
    """A session of 11 tokens, one per commit; cut off so long behind its last token."""
    first_s = 5.0 + ttft_ms / 1e3
    at_s = [first_s + i * gap_ms / 1e3 for i in range(11)]
    arrivals = [Arrival(time_s, 1, 0.060, 3) for time_s in at_s]
    cut_s = None if cut_after_ms is None else at_s[-1] + cut_after_ms / 1e3
    times = TokenTimes(5.0, first_s, at_s[-1], 11)
    return DeviceResult(slo_class, TEXT[:11], times, arrivals, num_drafted=20, num_accepted=5, cut_s=cut_s)


class TestDrafter:
    def test_a_perfect_drafter_gives_the_text_and_sleeps_for_every_token(self) -> None:
        slept_s: list[float] = []
        assert np.array_equal(chain(drafter(1.0, slept_s), 10, 20), TEXT[10:30])
        assert slept_s == [1 / 50.0] * 20

    @given(st.integers(0, 1_000), st.integers(1, 60), st.integers(1, 30))
    def test_behind_a_wrong_token_nothing_is_right(self, seed: int, num_known: int, num_drafts: int) -> None:
        drafts = chain(drafter(0.7, seed=seed), num_known, num_drafts)
        is_right = drafts == TEXT[num_known : num_known + num_drafts]
        assert np.array_equal(is_right, np.minimum.accumulate(is_right))

    def test_the_same_position_is_wrong_again_and_the_rate_is_the_one_asked_for(self) -> None:
        text = np.zeros(4_000, np.int32)
        device = ReplayingDrafter(text, 50.0, 0.7, 3, sleep=lambda _: None)
        found = [draft(device, text[:at]) for at in range(1, len(text))]
        again = [draft(device, text[:at]) for at in range(1, len(text))]
        assert found == again
        assert np.mean(np.array(found) == 0) == pytest.approx(0.7, abs=0.03)

    def test_nothing_can_be_drafted_behind_the_text_and_a_speed_is_above_zero(self) -> None:
        with pytest.raises(IndexError):
            draft(drafter(1.0), TEXT)
        with pytest.raises(ValueError, match="a drafter makes 0 tokens/s; allowed: more than 0"):
            ReplayingDrafter(TEXT, 0, 1.0, 0)

    def test_a_thin_client_has_none_and_somebody_sets_the_end(self) -> None:
        device = Device(LOOSE, ids(1, 2), ids(3), 0.0, sets_end=False)
        assert device.drafter() is None
        with pytest.raises(ValueError, match="no device sets the end"):
            run_devices("localhost:1", [device])


def test_opens_and_draft_speed_follow_the_unloaded_pass() -> None:
    texts = [Text(TIGHT, ids(1), TEXT), Text(TIGHT, ids(2), TEXT), Text(LOOSE, ids(3), TEXT), Text(LOOSE, ids(4), TEXT)]
    slow, fast = (make_devices(texts, Drafts(2.2 / s, 0.7, 8, 5), s, tight_tokens=30) for s in (0.2, 0.1))
    assert [device.opens_s for device in slow] == pytest.approx([2 * device.opens_s for device in fast])
    assert [device.slo_class for device in fast] == [TIGHT, TIGHT, LOOSE, LOOSE]
    assert [device.sets_end for device in fast] == [True, True, False, False]
    assert [len(device.generated) for device in fast] == [30, 30, 100, 100]
    assert [device.drafts_per_s for device in fast] == pytest.approx([0.0, 0.0, 22.0, 22.0])
    assert fast[2].seed != fast[3].seed  # else all would be wrong at the same positions


class TestSlo:
    def test_ttft_and_mean_tpot_both_count(self) -> None:
        assert result().meets(SLOS[TIGHT])
        assert not result(gap_ms=51.0).meets(SLOS[TIGHT])
        assert not result(ttft_ms=101.0).meets(SLOS[TIGHT])

    def test_who_is_cut_off_while_a_token_is_overdue_has_not_met_it(self) -> None:
        slack_ms = 11 * 50.0 - 10 * 40.0  # the next token is needed 550 ms behind the first one
        assert result(cut_after_ms=slack_ms - 1).meets(SLOS[TIGHT])
        assert not result(cut_after_ms=slack_ms + 1).meets(SLOS[TIGHT])

    def test_a_session_without_tokens_meets_nothing(self) -> None:
        silent = DeviceResult(TIGHT, ids(), TokenTimes(5.0), [], 0, 0, cut_s=9.0)
        assert math.isinf(silent.tpot_ms)
        assert not silent.meets(SLOS[TIGHT])

    def test_tokens_of_a_commit_share_its_gap(self) -> None:
        several = result()
        several.arrivals = [Arrival(1.0, 1, 0.05, 1), Arrival(1.3, 3, 0.05, 1), Arrival(1.4, 1, 0.05, 1)]
        assert several.token_gaps_ms() == pytest.approx([100.0, 100.0, 100.0, 100.0])


class TestFigures:
    def test_of_a_class(self) -> None:
        figures = ClassFigures.of([result(), result(gap_ms=60.0)], SLOS[TIGHT], unloaded_pass_s=0.040)
        assert figures.attainment == 0.5
        assert figures.tpot_ms == pytest.approx(50.0)
        assert figures.worst_tpot_ms == pytest.approx(60.0)
        assert figures.p95_tpot_ms == pytest.approx(60.0)
        assert figures.interference_ms == pytest.approx(20.0)
        assert figures.num_sessions == 3

    def test_over_rounds_medians_and_the_worst_round(self) -> None:
        runs = {"wisp": [run(40.0), run(45.0), run(70.0)]}
        figures = figures_over_rounds(runs)
        assert figures["attainment_tight_wisp"] == 1.0
        assert figures["worst_attainment_tight_wisp"] == 0.0
        assert figures["attainment_loose_wisp"] == 1.0
        assert figures["tpot_ms_tight_wisp"] == pytest.approx(45.0)
        assert figures["tpot_over_slo_tight_wisp"] == pytest.approx(0.9)

    def test_speed_is_that_of_all_sessions_and_who_ended_early_is_counted(self) -> None:
        figures = run(40.0)
        assert figures.tokens_per_s == pytest.approx(22 / (0.090 + 10 * 0.150))
        assert figures.acceptance_rate == 0.25
        assert figures.num_ended_early == 0
        ended = [result(), result(LOOSE, gap_ms=150.0)]
        assert RunFigures.of(ended, SLOS, 0.040).num_ended_early == 1


def run(tight_gap_ms: float) -> RunFigures:
    """A run of a tight session and a loose one that was cut off."""
    return RunFigures.of([result(gap_ms=tight_gap_ms), result(LOOSE, 150.0, cut_after_ms=1.0)], SLOS, 0.040)
