"""What a comparison keeps and shows: finished parts of a matrix, means over them, the ratios of its page."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench import cli, comparison_command, goodput, matrix_state
from bench.best import Best
from bench.cells import MIX, Cell, Timing
from bench.comparison import Comparison, ratio_figures
from bench.comparison_command import RATIO_COLUMNS, missed_lines, page_of, ratio_rows
from bench.matrix_figures import geometric_mean, matrix_figures
from bench.matrix_parts import CellResult, Part
from bench.matrix_state import append_part, load_parts
from bench.systems import BASELINES, SYSTEMS
from wisp_plugin.errors import ConfigError

CELL = Cell(1.1, "fast", (20.0, 20.0), "int8")
NAMES = [*BASELINES, "wisp"]


def line_of(key: str = "k", **changes: object) -> str:
    """A finished part as a line of the file, with other values at the top."""
    document = {
        "key": key, "made_by": "abc", "cell": {"tpot_passes": 1.1, "speeds": "fast", "rtt_ms": [20.0, 20.0],
                                              "draft": "int8", "profile": "p"},
        "system": "wisp", "capacity": [4.0], "goodput": [5.0], "settings": ["a", "b"], **changes,
    }  # fmt: skip
    return json.dumps({name: value for name, value in document.items() if value is not None})


class TestState:
    @pytest.mark.parametrize(
        "line",
        [
            "nonsense", "", "[]", "3", "{}", '{"key": "k"}', line_of(settings=None), line_of(capacity=None),
            line_of(goodput={}), line_of(system=None), line_of(cell={}), line_of(made_by=None), line_of(system="sled"),
            line_of(capacity=[]), line_of(capacity=["x"]), line_of(capacity=4.0), line_of(goodput=[-1.0]),
            line_of(goodput=[float("nan")]), line_of(settings=[]),
            *(line_of(cell={"tpot_passes": 1.1, "speeds": "fast", "rtt_ms": [5.0, 5.0], "draft": "int8", "profile": "p",
                            **other})
              for other in ({"speeds": []}, {"speeds": "turbo"}, {"rtt_ms": []}, {"rtt_ms": "ab"}, {"rtt_ms": [5.0]},
                            {"draft": "int2"}, {"tpot_passes": "x"}, {"tpot_passes": -1.0})),
            line_of(capacity=[10**400]), line_of(goodput=[1.0, 2.0]),
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("following", ["", line_of() + "\n", '{"half": '])
    def test_a_malformed_line_is_refused_wherever_it_stands(self, line: str, following: str, tmp_path: Path) -> None:
        path = tmp_path / "state.jsonl"
        path.write_text(line_of() + "\n" + line + "\n" + following)
        with pytest.raises(ConfigError, match=r"line 2: no finished part \(.+\)"):
            load_parts(path, {"wisp": "k"})

    def test_no_text_and_no_file(self, tmp_path: Path) -> None:
        path = tmp_path / "state.jsonl"
        assert load_parts(path, {"wisp": "k"}) == {}
        path.write_bytes(b'{"key": "\xff"}\n')
        with pytest.raises(ConfigError, match="line 1"):
            load_parts(path, {"wisp": "k"})
        with pytest.raises(ConfigError, match="cannot be read"):
            load_parts(tmp_path, {"wisp": "k"})

    @pytest.mark.parametrize("half", [line_of(settings=None), line_of()[:40], "{", "\udcff"])
    def test_a_line_without_its_end_is_dropped_and_the_run_goes_on(self, half: str, tmp_path: Path) -> None:
        path = tmp_path / "state.jsonl"
        path.write_bytes((line_of() + "\n" + half).encode("utf-8", "surrogateescape"))
        before = load_parts(path, {"wisp": "k"})
        assert len(before) == 1
        other = Part(CELL, "wisp", [1.0, 2.0], [3.0, 4.0], ("a", "b"))
        append_part(path, "k", other)
        assert load_parts(path, {"wisp": "k"}) == {**before, (CELL, "wisp"): other}

    def test_a_part_that_cannot_be_written_is_told_in_one_line(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"^.*: a finished part cannot be written: [^\n]+$"):
            append_part(tmp_path, "k", Part(CELL, "wisp", [1.0], [3.0], ("a", "b")))

    def test_lines_of_another_commit_are_told(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        told: list[str] = []
        path = tmp_path / "state.jsonl"
        path.write_text(line_of() + "\n" + line_of("another key", made_by="old") + "\n")
        monkeypatch.setattr(matrix_state, "commit", lambda: "new")
        load_parts(path, {"wisp": "k"}, warn=told.append)
        (line,) = told
        assert "1 of 1 finished parts" in line
        assert "(abc; this is new)" in line
        monkeypatch.setattr(matrix_state, "commit", lambda: "abc")
        load_parts(path, {"wisp": "k"}, warn=told.append)
        assert told == [line]


class TestFigures:
    def test_geometric_mean(self) -> None:
        assert geometric_mean([]) is None
        assert geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
        assert geometric_mean([2.0, 0.0]) == 0.0

    def test_a_cell_in_which_wisp_has_nothing_counts(self) -> None:
        values = {name: [4.0] for name in NAMES}
        good = CellResult(CELL, values, values, {name: ("a", "b") for name in NAMES})
        none = CellResult(replace(CELL, draft="mixed48"), {**values, "wisp": [0.0]}, values, good.settings)
        figures = matrix_figures([good, none])
        assert (figures["capacity_vs_sled_gm"], figures["capacity_vs_sled_gm_cells"]) == (0.0, 2)
        assert figures["goodput_vs_sled_gm"] == pytest.approx(1.0)


def comparison(**held: list[int]) -> Comparison:
    """Made-up capacities by system and seed; goodput is ten times as much."""

    def best(system: str, num_devices: int) -> Best:
        setting = str(SYSTEMS[system].settings[0])
        return Best(system, num_devices, setting, {}, 10.0 * num_devices, num_devices, setting, {}, [])

    named = {name.replace("_", "-"): values for name, values in held.items()}
    return Comparison(MIX, {name: [best(name, value) for value in values] for name, values in named.items()})


class TestRatios:
    def test_without_a_baseline_there_is_no_best_one(self) -> None:
        figures = ratio_figures(comparison(wisp=[40], wisp_no_holding=[38]), "capacity")
        assert (figures["capacity_vs_best_other"], figures["capacity_best_other"]) == (None, None)
        assert ratio_figures(comparison(wisp=[40]), "goodput")["goodput_best_other"] is None

    def test_a_row_per_system(self) -> None:
        found = comparison(wisp=[40, 44], centralized=[20, 22], sled=[4, 4], fixed_edf=[39, 41])
        rows = {row[0]: row for row in ratio_rows(found, "capacity")}
        assert list(rows) == ["centralized", "sled", "fixed-edf", "best other: fixed-edf, by means"]
        assert rows["centralized"][1:] == [pytest.approx(2.0), "2 to 2", 2.1, False]
        assert rows["sled"][3:] == [4.1, True]
        assert rows["fixed-edf"][3:] == [None, None]
        (line,) = missed_lines(found, "capacity")
        assert line.startswith("Not reached: capacity of wisp is 2 (2 to 2) times that of centralized")
        assert "paper is 2.1." in line

    def test_a_ratio_that_there_is_not_is_said(self) -> None:
        found = comparison(wisp=[40], centralized=[10], sled=[0])
        assert ratio_rows(found, "capacity")[1] == ["sled", None, None, 4.1, None]
        (line,) = missed_lines(found, "capacity")
        assert line == "Capacity over sled: no ratio, because sled or wisp has none with some seed; published is 4.1."

    def test_the_page_has_the_table(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(comparison_command, "assumptions", lambda *_: [])
        found = comparison(wisp=[40], centralized=[20], sled=[4])
        text = page_of("T", found, Timing(), [0], ["goodput", "capacity"]).write(tmp_path / "page.html").read_text()
        assert text.count("".join(f"<th>{column}</th>" for column in RATIO_COLUMNS)) == 2
        assert "<tr class=lost><td>centralized</td><td>2.000</td><td>-</td><td>2.100</td><td>no</td></tr>" in text
        assert "Not reached: capacity of wisp is 2 times that of centralized" in text


@pytest.mark.parametrize("command", ["capacity", "goodput"])
def test_wisp_alone(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("bench.search.MOST_DEVICES", 2)
    monkeypatch.setattr(comparison_command, "QUICK", Timing(2.0, 0.5, 0.2))
    monkeypatch.setattr(goodput, "GRID", (1, 2))
    folder = tmp_path / "new" / "folder"
    assert cli.main([command, "--systems", "wisp", "--quick", "--jobs", "1", "--report", str(folder)]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document[f"{command}_vs_best_other"] is None
    assert (folder / f"{command}.html").is_file()
