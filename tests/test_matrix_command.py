"""`wisp-bench matrix`: what it finishes, goes on with and looks at twice, with runs of two seconds."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from bench import cli, matrix
from bench.cells import FULL_AXES, Timing, cells, corners_first
from bench.systems import FEW
from tests.comparison_fakes import document_of


@pytest.fixture
def options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """A command with runs of two seconds of at most two devices."""
    monkeypatch.setitem(matrix.RUNS, "short", Timing(2.0, 0.5, 0.2))
    monkeypatch.setattr("bench.search.MOST_DEVICES", 2)
    return ["matrix", "--drafts", "int8", "--jobs", "1", "--state", str(tmp_path / "state.jsonl")]


def test_a_stopped_run_goes_on(options: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    state = tmp_path / "state.jsonl"
    assert cli.main([*options, "--cells", "1"]) == 0
    assert len(state.read_text().splitlines()) == len(FEW) + 1
    assert cli.main([*options, "--cells", "2", "--report", str(tmp_path)]) == 0
    output = capsys.readouterr()
    assert len(state.read_text().splitlines()) == 2 * (len(FEW) + 1)
    assert "matrix: 14/14" in output.err
    document = document_of(output.out)
    assert document["cells"] == 2
    assert {"matrix_min", "capacity_vs_published_gm", "goodput_vs_sled_median"} <= set(document)
    page = (tmp_path / "matrix.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "wisp, price, chunk" in page  # settings
    assert cli.main([*options, "--finished"]) == 0
    output = capsys.readouterr()
    assert "/14" not in output.err
    assert document_of(output.out)["results"] == document["results"]
    assert cli.main([*options, "--finished", "--runs", "long"]) == 2
    assert "no whole cell" in capsys.readouterr().err


def test_the_corners_come_first() -> None:
    order = corners_first(list(cells(FULL_AXES)))
    assert len(set(order)) == len(order) == 5 * 3 * 3 * 3
    places = [(cell.tpot_passes, cell.speeds, cell.rtt_ms[0], cell.draft) for cell in order]
    assert set(places[:16]) == set(product((1.05, 4.0), ("slow", "fast"), (5.0, 100.0), ("int4", "int8")))
    assert places[-1] == (1.5, "mixed", 20.0, "mixed48")
