"""The tables of results and the README's pictures, made from the JSON documents in `bench/results`.

`make results` runs the benchmarks and keeps the last line of each there; this command then writes the tables between
two marks each: all figures into bench/RESULTS.md, some into the README. A test holds that they show what the documents
say.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from bench.cli import COMMANDS
from bench.result_plots import check_drawable, draw
from bench.result_rows import GROUPS
from bench.result_table import SHORT_HEAD, Document, Group
from wisp_plugin.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path(__file__).with_name("results")
# Benchmarks whose document has the options as they were given. Of others only what their command names is looked at, as
# say `--quick` changes other options. And options that change no figure.
_EXACT = {"goodput", "capacity", "matrix", "validate", "simulator", "scheduler"}
_MAY_DIFFER = {"jobs", "report", "state", "fresh", "finished"}
# What a document that is not like those of its benchmark may raise where it is looked into.
_STRANGE = (ArithmeticError, AttributeError, LookupError, RecursionError, StopIteration, TypeError, ValueError)
_Found = TypeVar("_Found")
BEGIN, END = "<!-- results: made by `wisp-bench results` -->", "<!-- end of results -->"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Command line of `wisp-bench results`."""
    parser.add_argument("--check", action="store_true",
        help="change nothing; exit code 1 if a table is out of date (pictures are not looked at)")  # fmt: skip
    parser.add_argument("--keep", nargs=2, metavar=("NAME", "FILE"),
        help="only keep the document that a benchmark has printed into FILE, as NAME")  # fmt: skip


def main(args: argparse.Namespace) -> int:
    """Write the tables and the pictures, or check the tables, or keep a document."""
    if args.keep:
        keep(args.keep[0], Path(args.keep[1]))
        return 0
    documents = read_documents()
    _check_pictures(documents)
    before = {path: path.read_text(encoding="utf-8") for path in TABLES}
    after = {path: with_table(path.name, text, TABLES[path](documents)) for path, text in before.items()}
    if not args.check:
        draw(documents, FOLDER)
        for path, text in after.items():
            path.write_text(text, encoding="utf-8")
    for path in TABLES:
        print(f"{path.name} {'is up to date' if before[path] == after[path] else 'was out of date'}")
    return int(args.check and before != after)


def _check_pictures(documents: Mapping[str, Document]) -> None:
    for name in ("goodput", "matrix"):
        try:
            check_drawable({name: documents[name]})
        except _STRANGE as error:
            raise ConfigError(f"{name}.json in bench/results has nothing to draw ({type(error).__name__}: {error}); "
                              "`make results` makes it anew") from error  # fmt: skip


def keep(name: str, printed: Path, folder: Path = FOLDER) -> None:
    """Keep the last line of what a benchmark has printed. What is kept stays if that is no document of it.

    Raises:
        ConfigError: there is no such row in the table, no such file, or no such document in it.
    """
    groups = {group.name: group for group in GROUPS}
    if name not in groups:
        raise ConfigError(f"--keep {name}: no figure is of that; allowed: {', '.join(groups)}")
    try:
        line = printed.read_text(encoding="utf-8").splitlines()[-1]
        document = json.loads(line)
        _check_is_of(groups[name], document)
    except (OSError, *_STRANGE) as error:
        raise ConfigError(f"--keep {name}: {printed} does not end with a document of `{groups[name].command}` "
                          f"({type(error).__name__}: {error}); what is kept stays as it is") from error  # fmt: skip
    new = folder / f"{name}.json.new"
    new.write_text(line + "\n", encoding="utf-8")
    os.replace(new, folder / f"{name}.json")


def _check_is_of(group: Group, document: Document) -> None:
    """One of _STRANGE if it was made by another command, or lacks a figure of a row."""
    if document["benchmark"] != group.benchmark:
        raise ValueError(f"it is of {document['benchmark']!r}")
    others = [f"{name} is {kept!r}, not {asked!r}" for name, (kept, asked) in differing(group, document).items()]
    if others:
        raise ValueError(f"made with other options: {', '.join(others)}")
    group.table(document)
    check_drawable({group.benchmark: document})


def differing(group: Group, document: Document) -> dict[str, tuple[Any, Any]]:
    """Options that are others in the document than in the group's command: what is kept, and what the command says."""
    parser = argparse.ArgumentParser()
    importlib.import_module(COMMANDS[group.benchmark][0]).add_arguments(parser)
    words = group.arguments.split()[1:]
    asked, usual = (json.loads(json.dumps(vars(parser.parse_args(given)), default=str)) for given in (words, []))
    kept, is_exact = document["config"], group.benchmark in _EXACT
    looked_at = asked.keys() - _MAY_DIFFER
    if not is_exact:
        looked_at = {name for name in looked_at & kept.keys() if asked[name] != usual[name]}
    return {name: (kept.get(name), asked[name]) for name in sorted(looked_at) if kept.get(name) != asked[name]}


def read_documents(folder: Path = FOLDER) -> dict[str, Document]:
    """The kept documents by benchmark.

    Raises:
        ConfigError: one that the tables need is missing, or no JSON.
    """
    documents = {}
    for group in GROUPS:
        path = folder / f"{group.name}.json"
        if not path.is_file():
            raise ConfigError(f"{path.name} is missing in bench/results; `make results` makes it")
        try:
            documents[group.name] = json.loads(path.read_text(encoding="utf-8"))
        except (RecursionError, ValueError) as error:
            raise ConfigError(f"{path.name} in bench/results is no JSON document: {error}") from None
    return documents


def whole_table(documents: Mapping[str, Document]) -> str:
    """All figures, by the commands that make them, in Markdown."""
    return "\n".join([_looked_into(group, documents, group.table) for group in GROUPS])


def short_table(documents: Mapping[str, Document]) -> str:
    """The README's, in Markdown."""
    rows = [row for group in GROUPS for row in _looked_into(group, documents, group.short_rows)]
    return "\n".join((*SHORT_HEAD, *rows)) + "\n"


TABLES = {Path(__file__).with_name("RESULTS.md"): whole_table, ROOT / "README.md": short_table}


def _looked_into(group: Group, documents: Mapping[str, Document], look: Callable[[Document], _Found]) -> _Found:
    """What `look` finds in the document of a group.

    Raises:
        ConfigError: it is of something else, or damaged.
    """
    try:
        return look(documents[group.name])
    except KeyError as error:
        raise ConfigError(f"{group.name}.json in bench/results has no figure {error}") from error
    except _STRANGE as error:
        raise ConfigError(f"{group.name}.json in bench/results is damaged, or of something else "
                          f"({type(error).__name__}: {error}); `make results` makes it anew") from error  # fmt: skip


def with_table(name: str, text: str, table: str) -> str:
    """The text of a file with a table between its marks.

    Raises:
        ConfigError: the file `name` has not one of each mark.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ConfigError(f"{name} has to have one line {BEGIN} and one line {END}")
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    return f"{head}{BEGIN}\n{table}{END}{tail}"
