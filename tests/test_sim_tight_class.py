"""On a profile where every token and every step of the draft model costs, the tight class of a mix keeps its pace."""

from __future__ import annotations

from dataclasses import replace

from bench.cells import MIX, Timing
from bench.simulator import simulate
from bench.systems import WISP


def test_the_tight_class_is_not_given_up_beside_looser_ones() -> None:
    """Where passes did not count the drafting before them, and draft tokens counted alike whatever a session got from
    its turns, the others were far ahead of their SLO while a third of the tight class lost its pace."""
    setting = next(setting for setting in WISP.settings if setting.server_drafts)
    scenario = replace(MIX, profile="h100-qwen3-32b").scenario(Timing(24.0, 4.0), 0).with_devices(61)
    assert simulate(setting.serve(scenario, MIX.draft)).figures()["attainment_tight"] >= 0.95
