"""Tables of results: figures of a kept document, what was asked of each, and the command that makes the document."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bench.report import format_cell

Document = Mapping[str, Any]
_NAME = re.compile(r"{(\w+)}")
# Documents that are not called after their command.
_COMMANDS = {**dict.fromkeys(("sensitivity", "ablations", "other_seeds"), "goodput"), "full_speed": "validate"}


@dataclass(frozen=True, slots=True)
class Row:
    """A line of a table."""

    figure: str
    show: str | Callable[[Document], str]  # text with figures by name in braces, or what makes it
    asked: str = ""
    in_readme: str = ""  # what the figure is called there; empty: it is not in the README

    def cells(self, document: Document) -> tuple[str, str]:
        """What was asked, and what was measured."""
        return self.asked or "-", self.show(document) if callable(self.show) else filled(self.show, document)


@dataclass(frozen=True, slots=True)
class Group:
    """The lines of one document, below the command that makes it."""

    title: str
    benchmark: str  # NAME or NAME_cuda, for a run on a GPU
    rows: tuple[Row, ...]
    options: str = ""  # of the command, as `make results` gives them

    @property
    def command(self) -> str:
        """What makes the document."""
        return f"wisp-bench {self.command_name}{self.options}"

    @property
    def command_name(self) -> str:
        """That of `wisp-bench`."""
        name = self.benchmark.removesuffix("_cuda")
        return _COMMANDS.get(name, name)

    def table(self, document: Document) -> str:
        """All lines in Markdown, with the command and where it ran."""
        hardware = document["hardware"]
        on = ", ".join([gpu.partition(",")[0] for gpu in hardware["gpu"] or ()] or [hardware["cpu"]])
        made = f"`{self.command}` ({document['commit']}, {document['date'][:10]}, {on})"
        lines = [f"**{self.title}.** {made}", "", *_HEAD]
        for row in self.rows:
            asked, measured = row.cells(document)
            lines.append(f"| {row.figure} | {asked} | {measured} |")
        return "\n".join(lines) + "\n"

    def short_rows(self, document: Document) -> list[str]:
        """The lines that the README has."""
        rows = [(row.in_readme, *row.cells(document)) for row in self.rows if row.in_readme]
        return [f"| {' | '.join(cells)} | `wisp-bench {self.command_name}` |" for cells in rows]


_HEAD = ("| figure | goal | measured |", "|---|---|---|")
SHORT_HEAD = ("| figure | goal | measured | command |", "|---|---|---|---|")


def filled(template: str, document: Document) -> str:
    """`template` with figures by name in braces, with intervals, and those marked that are not what was asked, or what
    the paper has."""
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
