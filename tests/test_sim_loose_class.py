"""Where everybody keeps its pace with own tokens, WISP is no worse than continuous batching at its best, and those with
slow devices keep it too."""

from __future__ import annotations

from bench.cells import MEDIUM, Cell, Timing
from bench.settings import NO_DRAFTS, Setting
from bench.simulator import simulate
from bench.systems import SLO_CENTRAL, WISP

CELL = Cell(4.0, "slow", (20.0, 20.0), "mixed48")
NUM_DEVICES = 110
LEAST = 0.97  # here 0.997 (1.04 over three seeds of 36 s); 0.89 when prompts went first


def goodput(setting: Setting) -> float:
    scenario = CELL.scenario(Timing(24.0, 10.0), 0)
    return simulate(setting.serve(scenario, CELL.draft).with_devices(NUM_DEVICES)).figures()["goodput"]


def test_prompts_are_spread_and_passes_alike() -> None:
    ours = goodput(SLO_CENTRAL.settings[0])
    centralized = goodput(Setting("centralized", "continuous", NO_DRAFTS, chunk=256))
    assert ours >= LEAST * centralized, (ours, centralized)


def test_passes_take_no_longer_than_slow_devices_bear() -> None:
    """They get hardly more than a token from a pass: 0.974; 0.874 when passes took what sessions were to win back."""
    cell = Cell(2.5, "slow", (20.0, 20.0), "int8")
    devices_alone = WISP.settings[0]
    figures = simulate(devices_alone.serve(cell.scenario(MEDIUM, 3), cell.draft).with_devices(94)).figures()
    assert figures["attainment"] >= 0.95, figures
