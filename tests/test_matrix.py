"""Matrix of the comparison: finished parts, cells that share them, figures over cells."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from bench import matrix_parts
from bench.cells import FULL_AXES, REDUCED_AXES, Cell, Timing, cells
from bench.matrix_figures import (
    WASTE_COLUMNS,
    against,
    against_best,
    matrix_figures,
    median_rows,
    waste_figures,
    waste_rows,
)
from bench.matrix_parts import CellResult, Part, key_of, same_to
from bench.matrix_state import append_part, load_parts
from bench.search import measure_in
from bench.settings import Kind
from bench.systems import FEW, WISP
from tests.comparison_fakes import best_of
from wisp_plugin.errors import ConfigError
from wisp_plugin.messages import Mode
from wisp_plugin.wisp_parameters import WispParameters

CELL = Cell(1.1, "fast", (20.0, 20.0), "int4")


def result_of(cell: Cell, **values: tuple[int, float]) -> CellResult:
    """A made-up cell; names have underscores."""
    named = {name.replace("_", "-"): value for name, value in values.items()}
    return CellResult.of([Part.of(cell, [best_of(name, *value)]) for name, value in named.items()])


SYSTEMS_OF_A_CELL = {"sled": (0, 10.0), "published": (10, 90.0), "slo_central": (20, 200.0), "colocated": (30, 220.0),
                     "fixed_edf": (15, 150.0)}  # fmt: skip


class TestMatrix:
    def test_figures(self) -> None:
        good = result_of(CELL, wisp=(60, 440.0), centralized=(20, 200.0), **SYSTEMS_OF_A_CELL)
        lost = result_of(replace(CELL, speeds="slow"), wisp=(24, 209.0), centralized=(16, 200.0), **SYSTEMS_OF_A_CELL)
        figures = matrix_figures([good, lost])
        assert figures["matrix_min_goodput"] == pytest.approx(209 / 220)
        assert figures["matrix_min_capacity"] == pytest.approx(24 / 30)
        assert figures["matrix_min_capacity_without_colocated"] == pytest.approx(24 / 20)
        assert figures["matrix_min"] == figures["matrix_min_capacity"]
        assert [c["cell"] for c in figures["cells_lost_goodput"]] == [lost.cell.name]
        medians = {name: values for name, *values in median_rows([good, lost])}
        assert medians["slow devices"][:4] == pytest.approx([209 / 220, 24 / 30, 209 / 200, 24 / 16])
        assert medians["all"][2] == pytest.approx(0.5 * (440 + 209) / 200)
        assert medians["all"] == medians[f"tpot {CELL.tpot_passes:g}"]
        assert figures["cells_lost_goodput"][0]["best_other"] == "colocated"
        assert figures["capacity_vs_centralized_share"] == 0.5
        assert figures["capacity_vs_sled_share"] == 1.0
        assert figures["capacity_vs_sled_median"] is None  # SLED holds nobody
        assert figures["goodput_vs_published_gm"] == pytest.approx(math.sqrt(440 / 90 * 209 / 90))
        assert figures["goodput_vs_published_gm_median"] == pytest.approx((440 / 90 + 209 / 90) / 2)
        assert figures["goodput_vs_published_gm_slow_devices"] == pytest.approx(209 / 90)
        assert against(good, "capacity", "sled") is None
        assert against_best(good, "goodput").value == pytest.approx(2.0)

    def test_cells_with_a_small_centralized_count_for_no_headline(self) -> None:
        small = result_of(CELL, wisp=(60, 440.0), centralized=(15, 200.0), **SYSTEMS_OF_A_CELL)
        assert matrix_figures([small])["capacity_vs_centralized_share"] is None

    def test_wasted_drafting_and_interference(self) -> None:
        figures = {"wdt_share": 0.25, "interference_ms_x1.1": 3.5}
        wisp = replace(best_of("wisp", 6, 44.0), peak_figures=figures)
        sled = replace(best_of("sled", 0, 44.0), peak_figures=figures)
        result = CellResult.of([Part.of(CELL, [best]) for best in (wisp, sled, best_of("published", 4, 30.0))])
        (row,) = waste_rows([result])
        told = dict(zip(WASTE_COLUMNS, row, strict=True))
        assert (told["WDT share, wisp"], told["interference of sled, ms"]) == (0.25, 3.5)
        assert told["WDT share, published"] is None
        assert waste_figures([result])["wdt_share_published_median"] is None
        assert waste_figures([result, result])["interference_ms_wisp_median"] == 3.5

    def test_axes(self) -> None:
        assert len(list(cells(FULL_AXES))) == 135
        assert len(list(cells(REDUCED_AXES))) == 12
        assert len({cell.name for cell in cells(FULL_AXES)}) == 135

    def test_finished_parts_are_kept_and_a_half_line_is_dropped(self, tmp_path: Path) -> None:
        path, key = tmp_path / "state.jsonl", key_of(Timing(), [0], WISP)
        first = replace(Part.of(CELL, [best_of("wisp", 60, 440.0)]), wdt_share=0.25, interference_ms=1.5)
        second = Part.of(replace(CELL, draft="int8"), [best_of("wisp", 6, 44.0)])
        append_part(path, key, first)
        with path.open("a") as file:
            file.write('{"key": "' + key)
        assert load_parts(path, {"wisp": key}) == {(first.cell, "wisp"): first}
        append_part(path, key, second)
        assert load_parts(path, {"wisp": key}) == {(first.cell, "wisp"): first, (second.cell, "wisp"): second}
        assert load_parts(path, {"wisp": key_of(Timing(), [1], WISP)}) == {}

    def test_only_who_uses_the_policy_runs_again_when_its_constants_change(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = {kind.name: key_of(Timing(), [0], kind) for kind in (*FEW, WISP)}
        monkeypatch.setattr(matrix_parts, "WispParameters", lambda: WispParameters(max_hold_s=2.0))
        changed = {kind.name for kind in (*FEW, WISP) if key_of(Timing(), [0], kind) != before[kind.name]}
        assert changed == {"wisp", "published", "slo-central"}

    @pytest.mark.parametrize("change", [{"mode": Mode.SYNC}, {"on_server": True}, {"draft_kv_share": 0.354}])
    def test_whatever_is_set_otherwise_has_another_key(self, change: dict[str, object]) -> None:
        setting = WISP.settings[-1]
        changed = Kind("wisp", [replace(setting, **change)])
        assert key_of(Timing(), [0], changed) != key_of(Timing(), [0], Kind("wisp", [setting]))

    def test_a_malformed_line_is_an_error(self, tmp_path: Path) -> None:
        path = tmp_path / "state.jsonl"
        path.write_text("nonsense\n{}\n")
        with pytest.raises(ConfigError, match="line 1"):
            load_parts(path, {"wisp": "any"})


class TestSharedCells:
    """A matrix takes from a finished cell what is the same there; it has to be the same to the last digit."""

    def test_a_system_sees_no_more_than_it_says(self) -> None:
        cell = Cell(1.5, "slow", (20.0, 20.0), "int4")
        others = {"speeds": replace(cell, speeds="fast"), "draft": replace(cell, draft="int8")}
        for kind in FEW:
            figures = {name: measure_in(c, Timing(4.0, 1.0), 0)(kind.settings[-1], 4)
                       for name, c in {"": cell, **others}.items()}  # fmt: skip
            for name in others:
                assert (figures[name] == figures[""]) == (name not in kind.sees), (kind.name, name)

    def test_what_is_missing_comes_from_a_cell_that_is_the_same(self) -> None:
        cell, colocated = Cell(1.5, "slow", (20.0, 20.0), "int4"), FEW[4]
        parts = {(cell, kind.name): Part(cell, kind.name, [1.0], [2.0], ("a", "b")) for kind in (*FEW, WISP)}
        other, faster = replace(cell, draft="int8"), replace(cell, speeds="fast")
        assert same_to(FEW[0], other, parts) == Part(other, "centralized", [1.0], [2.0], ("a", "b"))
        assert same_to(colocated, other, parts) is None
        newer = Part(replace(cell, draft="mixed48"), "centralized", [7.0], [8.0], ("c", "d"))
        assert same_to(FEW[0], other, {**parts, (newer.cell, "centralized"): newer}) == replace(newer, cell=other)
        assert same_to(colocated, faster, parts) == replace(parts[cell, "colocated"], cell=faster)
        assert same_to(WISP, replace(cell, rtt_ms=(5.0, 5.0)), parts) is None
