"""Lost cells of a matrix on more seeds, with made-up hills of goodput in place of simulations."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from bench import cli, matrix, search
from bench.best import Figures
from bench.cells import Cell, Timing
from bench.comparison import chosen_kinds
from bench.matrix_figures import before_and_after, is_lost
from bench.matrix_parts import Part
from bench.matrix_recheck import Recheck
from bench.matrix_run import MatrixRuns
from bench.search import Measure
from bench.settings import Setting
from bench.systems import BASELINES, FEW, WISP
from tests.comparison_fakes import document_of
from wisp_plugin.errors import ConfigError

HOLDS = {"published": 0, "sled": 1, "centralized": 20, "slo-central": 24, "colocated": 40, "fixed-edf": 30, "wisp": 38}
PEAK = {"published": (60, 500.0), "sled": (45, 250.0), "wisp": (40, 480.0), "colocated": (44, 520.0)}
CELL, SAME = Cell(1.5, "slow", (20.0, 20.0), "int8"), Cell(1.5, "fast", (20.0, 20.0), "mixed48")


def hills(cell: Cell, timing: Timing, seed: int) -> Measure:
    """Every system holds so many devices, has its peak there or elsewhere, and a little more with every seed."""

    def measure(setting: Setting, num_devices: int) -> Figures:
        devices, height = PEAK.get(setting.system, (30, 200.0))
        goodput = (height + 20.0 * seed * (setting.system == "wisp")) * math.exp(-abs(math.log(num_devices / devices)))
        return {"attainment": 1.0 if num_devices <= HOLDS[setting.system] else 0.5, "goodput": goodput}

    return measure


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MatrixRuns:
    """Both cells are in the file with one seed."""
    monkeypatch.setattr(search, "measure_in", hills)
    runs = MatrixRuns(Timing(), [0], chosen_kinds(BASELINES, FEW), tmp_path / "state.jsonl")
    runs.run([CELL, SAME])
    return runs


def test_what_holds_nobody_finds_its_peak_with_every_seed(runs: MatrixRuns) -> None:
    (before,) = runs.finished([CELL])
    assert is_lost(before)
    assert before.capacity["published"] == [0.0]
    (after,) = Recheck(runs, [1, 2]).run([CELL])
    (whole,) = replace(runs, seeds=[0, 1, 2], path=runs.path.with_name("other")).run([CELL])
    for name in ("wisp", "colocated", "published"):
        assert (after.capacity[name], after.goodput[name]) == (whole.capacity[name], whole.goodput[name])
    assert min(after.goodput["published"]) > 0.9 * 500.0
    assert after.capacity["published"] == [0.0, 0.0, 0.0]
    row = before_and_after(before, after)
    assert (row["seeds"], row["best_other_goodput"], row["best_other_capacity"]) == (3, "colocated", "colocated")
    assert row["capacity_before"] == row["capacity"] == pytest.approx(38 / 40, rel=0.03)
    assert row["goodput_before"] < row["goodput"]


def test_who_is_far_behind_stays_as_with_the_first_seed(runs: MatrixRuns) -> None:
    (before,), (after,) = runs.finished([CELL]), Recheck(runs, [1, 2]).run([CELL])
    far = ("sled", "centralized", "slo-central", "fixed-edf")
    assert {name: before.goodput[name] for name in far} == {name: after.goodput[name] for name in far}
    assert [len(own) for name, own in after.goodput.items() if name not in far] == [3, 3, 3]


def test_a_setting_that_joins_behind_the_others_runs_alone(runs: MatrixRuns, monkeypatch: pytest.MonkeyPatch) -> None:
    (before,) = runs.finished([CELL])
    ran = set[str]()

    def noted(cell: Cell, timing: Timing, seed: int) -> Measure:
        def measure(setting: Setting, num_devices: int) -> Figures:
            ran.add(str(setting))
            figures = hills(cell, timing, seed)(setting, num_devices)
            return figures | {"goodput": 1.1 * figures["goodput"], "wdt_share": 0.25}

        return measure

    monkeypatch.setattr(search, "measure_in", noted)
    joined = replace(WISP.settings[1], server_drafts=5)
    systems = [replace(kind, settings=[*kind.settings, joined]) if kind is WISP else kind for kind in runs.systems]
    more = replace(runs, systems=systems)
    (after,) = more.run([CELL])
    assert ran == {str(joined)}
    assert after.settings["wisp"][1] == str(joined)
    assert after.goodput["wisp"][0] > 1.05 * before.goodput["wisp"][0]
    assert after.capacity["wisp"] == before.capacity["wisp"]
    assert after.goodput["colocated"] == before.goodput["colocated"]
    assert after.wdt_share["wisp"] == 0.25
    assert more.finished([CELL]) == [after]
    assert runs.finished([CELL]) == [before]


def test_a_finished_recheck_is_taken_from_the_file(runs: MatrixRuns, monkeypatch: pytest.MonkeyPatch) -> None:
    recheck = Recheck(runs, [1, 2])
    assert recheck.finished([CELL]) == []
    found = recheck.run([CELL])
    monkeypatch.setattr(search, "measure_in", None)  # nothing can run
    assert recheck.run([CELL]) == recheck.finished([CELL]) == found
    assert runs.finished([CELL])[0].goodput["wisp"] != found[0].goodput["wisp"]  # the first result stays what it was
    assert replace(runs, seeds=[0, 1, 2]).finished([CELL]) == []


def test_a_recheck_of_another_first_result_runs_again(runs: MatrixRuns, monkeypatch: pytest.MonkeyPatch) -> None:
    recheck = Recheck(runs, [1])
    recheck.run([CELL])
    monkeypatch.setitem(PEAK, "wisp", (40, 450.0))
    replace(runs, fresh=True).run([CELL])
    assert recheck.finished([CELL]) == []
    (after,) = recheck.run([CELL])
    assert after.goodput["wisp"] == pytest.approx([450.0, 470.0], rel=0.05)


def test_systems_that_see_no_difference_share_their_rechecks(
    runs: MatrixRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    recheck = Recheck(runs, [1])
    recheck.run([CELL])
    monkeypatch.setitem(PEAK, "centralized", (30, 900.0))  # it does not run again
    (shared,) = recheck.run([SAME])
    assert max(shared.goodput["centralized"]) < 250.0


def test_parts_tell_all_commits_that_made_them() -> None:
    first = Part(CELL, "wisp", [1.0], [2.0], ("a", "b"), "abc", 4)
    more = first.and_more([first.best()])
    assert more.made_by.startswith("abc, ")
    assert more.goes_on_from(first)
    assert not first.goes_on_from(more)
    assert not replace(more, settings=("a", "c")).goes_on_from(first)
    assert more.best().peak_devices == 4
    assert replace(first, peak_devices=None).best().peak_devices == 1


def test_settings_of_another_time_are_an_error(runs: MatrixRuns) -> None:
    text = runs.path.read_text(encoding="utf-8")
    runs.path.write_text(text.replace("paper 0.7", "paper 0.123"), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"no setting .+0\.123"):
        Recheck(runs, [1]).run([CELL])


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "measure_in", hills)
    monkeypatch.setitem(matrix.RUNS, "short", Timing())
    options = ["matrix", "--drafts", "int8", "--jobs", "1", "--cells", "2", "--state", str(tmp_path / "state.jsonl")]
    assert cli.main([*options, "--recheck", "3"]) == 0
    output = capsys.readouterr()
    assert "recheck: 2/2" in output.err
    document = document_of(output.out)
    assert [row["seeds"] for row in document["cells_rechecked"]] == [3, 3]
    assert cli.main([*options, "--finished"]) == 0
    before = document_of(capsys.readouterr().out)
    assert before["cells_rechecked"] == []
    assert before["matrix_min_goodput"] < document["matrix_min_goodput"]
    assert cli.main([*options, "--recheck", "1"]) == 2
    assert "adds no seed" in capsys.readouterr().err
