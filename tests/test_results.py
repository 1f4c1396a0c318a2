"""The tables of results are those that the kept documents give."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from bench.report import format_cell
from bench.result_rows import GROUPS
from bench.result_table import Group, Row
from bench.results import (
    BEGIN,
    END,
    FOLDER,
    ROOT,
    TABLES,
    differing,
    keep,
    read_documents,
    short_table,
    whole_table,
    with_table,
)
from wisp_plugin.errors import ConfigError


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.name)
def test_the_tables_show_the_kept_results(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert with_table(path.name, text, TABLES[path](read_documents())) == text, "run `wisp-bench results`"


def test_only_the_table_is_written() -> None:
    text = with_table("A.md", f"before\n{BEGIN}\nold\n{END}\nbehind\n", "new\n")
    assert text == f"before\n{BEGIN}\nnew\n{END}\nbehind\n"


def test_every_row_is_in_the_table_below_its_command() -> None:
    whole = whole_table(read_documents())
    for group in GROUPS:
        part = whole.partition(f"`{group.command}` (")[2].partition("\n\n**")[0]
        for row in group.rows:
            assert f"\n| {row.figure} | " in part
    assert whole.count("\n| ") == len(GROUPS) + sum(len(group.rows) for group in GROUPS)


def test_the_readme_has_the_rows_that_have_a_name_there() -> None:
    short = short_table(read_documents())
    names = [row.in_readme for group in GROUPS for row in group.rows if row.in_readme]
    assert short.count("\n") == 2 + len(names)
    assert all(f"\n| {name} | " in short for name in names)


def test_what_is_missed_says_so() -> None:
    document = {"a": 1.5, "ab": 2.5, "c": 3.5, "missed": ["a: asked >= 2, measured 1.5"], "c_reaches_published": False}
    assert Row("figure", "{a} / {ab} times; {c}").measured(document) == "1.500 (missed) / 2.500 times; 3.500 (missed)"


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.name)
def test_a_figure_that_misses_its_goal_is_marked(group: Group) -> None:
    document = read_documents()[group.name]
    shown = [row.show for row in group.rows if isinstance(row.show, str)]
    for line in document.get("missed", ()):
        name = line.partition(":")[0]
        if any(f"{{{name}}}" in text for text in shown) or name == "cells_without_verified_drafts":
            assert f"{format_cell(document[name])} (missed)" in group.table(document), line


def test_a_table_tells_where_it_was_made() -> None:
    hardware = {"cpu": "some", "gpu": None}
    document = {"a": 1.5, "commit": "abc", "date": "2026-11-28T10:00:00+00:00", "hardware": hardware, "versions": {}}
    group = Group("Title", "lossless_cuda", "lossless --device cuda", (Row("figure", "{a}", "2", "short"),))
    assert group.table(document).startswith("**Title.** `wisp-bench lossless --device cuda` (abc, 2026-11-28, some)\n")
    assert group.table(document).endswith("\n| figure | 2 | 1.500 |\n")
    on_gpu = group.table(document | {"hardware": hardware | {"gpu": ["H100, 80 GiB"]}})
    assert "(abc, 2026-11-28, H100)" in on_gpu
    assert "(abc, 2026-11-28, some, compiled)" in group.table(document | {"versions": {"wisp_plugin": "compiled"}})
    assert group.short_rows(document) == ["| short | 2 | 1.500 | `lossless_cuda` |"]


def test_every_assumption_has_its_row() -> None:
    (group,) = (group for group in GROUPS if group.name == "sensitivity")
    document = read_documents()["sensitivity"]
    named = group.table(document)
    assert all(f"; {row['goodput']:.0f} |" in named for row in document["sensitivity"])
    with pytest.raises(ValueError, match="no row is of the assumption"):
        group.table(document | {"sensitivity": [document["sensitivity"][0] | {"draft": "int2"}]})


def test_make_results_runs_the_commands_of_the_tables() -> None:
    variables = dict(re.findall(r"^(\w+) := (.+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    made = variables["RESULTS"].split()
    for group in GROUPS:
        if group.name in made:
            options = variables.get(f"{group.name}_ARGS", "").replace(" --fresh", "")
            assert group.arguments == f"{variables.get(f'{group.name}_COMMAND', group.name)} {options}".strip()
    assert {group.name for group in GROUPS if not group.name.endswith("_cuda")} == set(made)


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.name)
def test_a_document_was_made_by_the_command_beside_it(group: Group) -> None:
    assert differing(group, read_documents()[group.name]) == {}


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
        whole_table(documents)


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
        whole_table(documents)


@pytest.mark.parametrize(
    ("name", "damaged"),
    [
        ("other_seeds", {"curve_columns": []}), ("other_seeds", {"curves": None}), ("other_seeds", {"config": []}),
        ("other_seeds", {"capacity_vs_centralized": "x"}), ("other_seeds", {"curves": {"wisp": []}}),
        ("matrix", {"results": []}),
    ],
)  # fmt: skip
def test_what_cannot_be_shown_is_not_kept(name: str, damaged: dict[str, Any], tmp_path: Path) -> None:
    printed = tmp_path / "printed"
    printed.write_text(json.dumps(json.loads((FOLDER / f"{name}.json").read_text()) | damaged))
    with pytest.raises(ConfigError, match="does not end with a document of"):
        keep(name, printed, tmp_path)
    printed.write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="RecursionError"):
        keep(name, printed, tmp_path)


def test_a_file_without_marks_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"A\.md has to have one line"):
        with_table("A.md", "nothing here", "")
