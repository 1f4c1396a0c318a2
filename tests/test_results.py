"""The README's table is the one that the kept documents give."""

from __future__ import annotations

import pytest

from bench.results import BEGIN, END, ROOT, ROWS, read_documents, with_table
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


def test_a_readme_without_marks_is_refused() -> None:
    with pytest.raises(ConfigError, match="one line"):
        with_table("nothing here", read_documents())
