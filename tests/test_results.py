"""The README's table is the one that the kept documents give."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from bench.result_rows import ROWS, Row
from bench.results import BEGIN, END, FOLDER, ROOT, differing, keep, read_documents, with_table
from wisp_plugin.errors import ConfigError


def test_the_readme_shows_the_kept_results() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert with_table(readme, read_documents()) == readme, "run `wisp-bench results`"


def test_every_row_shows_a_figure_and_other_text_stays() -> None:
    text = with_table(f"before\n{BEGIN}\nold\n{END}\nbehind\n", read_documents())
    assert text.startswith(f"before\n{BEGIN}\n| figure")
    assert text.endswith(f"{END}\nbehind\n")
    assert "\nold\n" not in text
    assert text.count("\n| ") == len(ROWS) + 1


def test_what_is_missed_says_so() -> None:
    document = {"a": 1.5, "ab": 2.5, "c": 3.5, "missed": ["a: asked >= 2, measured 1.5"], "c_reaches_published": False}
    text = Row("figure", "some", "{a} / {ab} times; {c}").text({"some": document})
    assert text == "| figure | - | 1.500 (missed) / 2.500 times; 3.500 (missed) | `wisp-bench some` |"


def test_make_results_runs_the_commands_of_the_table() -> None:
    variables = dict(re.findall(r"^(\w+) := (.+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    made = variables["RESULTS"].split()
    for row in ROWS:
        if row.benchmark in made:
            options = variables.get(f"{row.benchmark}_ARGS", "").replace(" --fresh", "")
            command = f"wisp-bench {variables.get(f'{row.benchmark}_COMMAND', row.benchmark)} {options}".strip()
            assert row.command == command, row.figure
    assert {row.benchmark for row in ROWS if not row.benchmark.endswith("_cuda")} == set(made)


@pytest.mark.parametrize("row", {row.benchmark: row for row in ROWS}.values(), ids=lambda row: row.benchmark)
def test_a_document_was_made_by_the_command_beside_it(row: Row) -> None:
    assert differing(row, read_documents()[row.benchmark]) == {}


def test_no_document_names_a_folder_of_this_machine() -> None:
    for path in sorted(FOLDER.glob("*.json*")):
        assert f"{ROOT}/" not in path.read_text(encoding="utf-8"), path.name


def test_only_a_document_of_the_command_is_kept(tmp_path: Path) -> None:
    kept, printed = tmp_path / "other_seeds.json", tmp_path / "printed"
    kept.write_text("as it was")
    whole, headline = ((FOLDER / f"{name}.json").read_text() for name in ("other_seeds", "goodput"))
    figures = json.loads(whole)
    without = json.dumps({name: value for name, value in figures.items() if name != "capacity_vs_sled"})
    for text, says in (
        ("", "IndexError"), ("a table\n", "JSONDecodeError"), ("3\n", "TypeError"), ("{}\n", "benchmark"),
        ('{"benchmark": "matrix"}\n', "it is of 'matrix'"), (headline, "other options: .*seed is 0, not 20"),
        (without, "capacity_vs_sled"),
    ):  # fmt: skip
        printed.write_text(text)
        with pytest.raises(ConfigError, match=says):
            keep("other_seeds", printed, tmp_path)
    with pytest.raises(ConfigError, match=r"allowed: .*goodput"):
        keep("nothing", printed, tmp_path)
    assert kept.read_text() == "as it was"
    printed.write_text(f"a table\n{whole}")
    keep("other_seeds", printed, tmp_path)
    assert kept.read_text() == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other_seeds.json", "printed"]


def test_a_damaged_document_is_told(tmp_path: Path) -> None:
    for path in FOLDER.glob("*.json"):
        shutil.copy(path, tmp_path)
    (tmp_path / "goodput.json").write_text("")
    with pytest.raises(ConfigError, match=r"goodput\.json in bench/results is no JSON document"):
        read_documents(tmp_path)
    documents = read_documents() | {"goodput": {}}
    with pytest.raises(ConfigError, match=r"goodput\.json in bench/results has no figure"):
        with_table(f"{BEGIN}\n{END}\n", documents)


@pytest.mark.parametrize(
    ("name", "damaged"),
    [
        ("goodput", []), ("goodput", 5), ("goodput", {"missed": 5}), ("capacity", {"colocated_check": ["x"]}),
        ("sensitivity", {"sensitivity": []}), ("goodput", {"capacity_vs_centralized": "x"}),
    ],
)  # fmt: skip
def test_a_document_of_something_else_is_told_in_one_line(name: str, damaged: Any) -> None:
    whole = read_documents()
    documents = whole | {name: {**whole[name], **damaged} if isinstance(damaged, dict) else damaged}
    says = rf"^{name}\.json in bench/results is damaged, .*; `make results` makes it anew$"
    with pytest.raises(ConfigError, match=says):
        with_table(f"{BEGIN}\n{END}\n", documents)


@pytest.mark.parametrize(
    ("name", "damaged"),
    [
        ("other_seeds", {"curve_columns": []}), ("other_seeds", {"curves": None}), ("other_seeds", {"config": []}),
        ("other_seeds", {"capacity_vs_centralized": "x"}), ("other_seeds", {"curves": {"wisp": []}}),
        ("matrix", {"results": []}),
    ],
)  # fmt: skip
def test_what_the_readme_cannot_show_is_not_kept(name: str, damaged: dict[str, Any], tmp_path: Path) -> None:
    printed = tmp_path / "printed"
    printed.write_text(json.dumps(json.loads((FOLDER / f"{name}.json").read_text()) | damaged))
    with pytest.raises(ConfigError, match="does not end with a document of"):
        keep(name, printed, tmp_path)
    printed.write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="RecursionError"):
        keep(name, printed, tmp_path)


def test_a_readme_without_marks_is_refused() -> None:
    with pytest.raises(ConfigError, match="one line"):
        with_table("nothing here", read_documents())
