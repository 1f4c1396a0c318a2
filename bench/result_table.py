"""Tables of results: figures of a kept document, the goal of each, and the command that makes the document."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bench.report import format_cell

Document = Mapping[str, Any]
GOALS = ("goal", "measured")
_NAME = re.compile(r"{([\w.]+)}")


@dataclass(frozen=True, slots=True)
class Row:
    """A line of a table."""

    figure: str
    show: str | Callable[[Document], str]  # text with figures by name in braces, or what makes it
    goal: str = ""
    in_readme: str = ""  # what the figure is called there; empty: it is not in the README

    def measured(self, document: Document) -> str:
        """The last cell of the line, or the last cells if the group has columns of its own."""
        return self.show(document) if callable(self.show) else filled(self.show, document)


@dataclass(frozen=True, slots=True)
class Group:
    """The lines of one document, below the command that makes it."""

    title: str
    name: str  # of the document: bench/results/NAME.json; NAME_cuda is of a run on a GPU
    arguments: str  # of wisp-bench: the benchmark, and its options as `make results` gives them
    rows: tuple[Row, ...]
    columns: tuple[str, ...] = GOALS

    @property
    def command(self) -> str:
        """What makes the document."""
        return f"wisp-bench {self.arguments}"

    @property
    def benchmark(self) -> str:
        """That of `wisp-bench`."""
        return self.arguments.split()[0]

    def table(self, document: Document) -> str:
        """All lines in Markdown, with the command, and what it ran on."""
        lines = [f"**{self.title}.** `{self.command}` ({_origin(document)})", "", *_head(("figure", *self.columns))]
        for row in self.rows:
            goal = (row.goal or "-",) if self.columns == GOALS else ()
            lines.append(_line((row.figure, *goal, row.measured(document))))
        return "\n".join(lines) + "\n"

    def short_rows(self, document: Document) -> list[str]:
        """The lines that the README has."""
        shown = [row for row in self.rows if row.in_readme]
        return [_line((row.in_readme, row.goal or "-", row.measured(document), f"`{self.name}`")) for row in shown]


def _origin(document: Document) -> str:
    """Commit, day, machine, and whether the package was compiled, if that is known."""
    hardware = document["hardware"]
    machine = ", ".join([gpu.partition(",")[0] for gpu in hardware["gpu"] or ()] or [hardware["cpu"]])
    known = [document["commit"], document["date"][:10], machine, document["versions"].get("wisp_plugin")]
    return ", ".join(text for text in known if text)


def _line(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def _head(columns: tuple[str, ...]) -> tuple[str, str]:
    return _line(columns), f"|{'---|' * len(columns)}"


SHORT_HEAD = _head(("figure", *GOALS, "table"))


def filled(template: str, document: Document) -> str:
    """`template` with figures by name in braces, with intervals, and those marked that miss their goal, or what the
    paper has."""
    missed = {line.partition(":")[0] for line in document.get("missed", ())}

    def text(name: str) -> str:
        is_missed = name in missed or document.get(f"{name}_reaches_published") is False
        low, high = document.get(f"{name}_ci") or (None, None)
        interval = None if low is None else f"{format_cell(low)} to {format_cell(high)}"
        notes = ", ".join(note for note in (interval, "missed" if is_missed else None) if note)
        if not isinstance(document[name], int | float | None):
            raise TypeError(f"{name} is {document[name]!r}, no number")
        return format_cell(document[name]) + (f" ({notes})" if notes else "")

    return _NAME.sub(lambda match: text(match.group(1)), template)
