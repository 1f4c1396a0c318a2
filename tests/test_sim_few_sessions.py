"""A server with hardly anything to do serves everybody in time, whatever its passes cost."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.cells import MIX, Timing
from bench.settings import Setting
from bench.simulator import simulate
from bench.systems import SLO_CENTRAL, WISP

_TIMING = Timing(24.0, 4.0)


@pytest.mark.parametrize("profile", ["a100-qwen3-32b-additive", "h100-qwen3-32b"])
@pytest.mark.parametrize("setting", WISP.settings[:2], ids=["devices draft", "server drafts too"])
def test_first_tokens_are_in_time_beside_few_others(profile: str, setting: Setting) -> None:
    """Where a pass takes longer for every token, a prompt beside sessions without slack is a matter of small chunks."""
    cell = replace(MIX, profile=profile)
    figures = simulate(setting.serve(cell.scenario(_TIMING, 0), cell.draft).with_devices(3)).figures()
    assert figures["sessions"] >= 5
    assert figures["attainment"] == 1.0


def test_first_tokens_do_not_pay_for_a_class_that_cannot_be_helped() -> None:
    """12 devices without drafts where a pass takes longer for every token: the tight class is beyond help, and if its
    passes were kept short all the same, prompts would wait for seconds and the other classes miss their SLO too."""
    cell = replace(MIX, profile="a100-qwen3-32b-additive")
    setting = SLO_CENTRAL.settings[0]
    figures = simulate(setting.serve(cell.scenario(Timing(), 0), cell.draft).with_devices(12)).figures()
    assert figures["attainment_medium"] >= 0.95
    assert figures["attainment_loose"] >= 0.95


@pytest.mark.parametrize(("factor", "drafts"), [(0.0, True), (1e6, True), (10.0, True), (1e-3, False)])
def test_a_device_drafts_when_it_has_read_its_prompt(factor: float, drafts: bool) -> None:
    cell = replace(MIX, prefill_factor=factor)
    result = simulate(WISP.settings[0].serve(cell.scenario(_TIMING, 0), cell.draft).with_devices(3))
    assert (result.drafting_s > 0) is drafts
    assert (result.server.verified > 0) is drafts
    at_once = simulate(WISP.settings[0].serve(MIX.scenario(_TIMING, 0), MIX.draft).with_devices(3))
    assert (result.server.accepted < at_once.server.accepted) is (factor in (10.0, 1e-3))
