"""The README's table of results and its pictures, made from the JSON documents in `bench/results`.

`make results` runs the benchmarks and keeps the last line of each there; this command then writes the table into the
README, between its two marks. A test holds that the README shows what the documents say.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.cli import COMMANDS
from bench.result_plots import check_drawable, draw
from bench.result_rows import ROWS, Document, Row
from wisp_plugin.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path(__file__).with_name("results")
# Benchmarks that keep every option as it was given; others keep what became of some, as `--quick` changes others, so
# that only what their command names is looked at. And options that change no figure.
_EXACT = {"goodput", "capacity", "matrix", "validate", "simulator", "scheduler"}
_MAY_DIFFER = {"jobs", "report", "state", "fresh", "finished"}
# What a document that is not like those of its benchmark may raise where it is looked into.
_STRANGE = (ArithmeticError, AttributeError, LookupError, RecursionError, StopIteration, TypeError, ValueError)
BEGIN, END = "<!-- results: made by `wisp-bench results` -->", "<!-- end of results -->"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Command line of `wisp-bench results`."""
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if the README is out of date")
    parser.add_argument("--keep", nargs=2, metavar=("NAME", "FILE"),
        help="only keep the document that a benchmark has printed into FILE, as NAME")  # fmt: skip


def main(args: argparse.Namespace) -> int:
    """Write the table and the pictures, or check the table, or keep a document."""
    if args.keep:
        keep(args.keep[0], Path(args.keep[1]))
        return 0
    readme = ROOT / "README.md"
    before = readme.read_text(encoding="utf-8")
    documents = read_documents()
    after = with_table(before, documents)
    try:
        check_drawable(documents)
    except _STRANGE as error:
        raise ConfigError(f"goodput.json or matrix.json in bench/results has nothing to draw "
                          f"({type(error).__name__}: {error}); `make results` makes them anew") from None  # fmt: skip
    if not args.check:
        draw(documents, FOLDER)
        readme.write_text(after, encoding="utf-8")
    print("README.md is up to date" if before == after else "README.md was out of date")
    return int(args.check and before != after)


def keep(name: str, printed: Path, folder: Path = FOLDER) -> None:
    """Keep the last line of what a benchmark has printed. What is kept stays if that is no document of it.

    Raises:
        ConfigError: there is no such row in the table, no such file, or no such document in it.
    """
    rows = [row for row in ROWS if row.benchmark == name]
    if not rows:
        names = ", ".join(dict.fromkeys(row.benchmark for row in ROWS))
        raise ConfigError(f"--keep {name}: no row of the table is of that; allowed: {names}")
    try:
        line = printed.read_text(encoding="utf-8").splitlines()[-1]
        document = json.loads(line)
        _check_is_of(rows, document)
    except (OSError, *_STRANGE) as error:
        raise ConfigError(f"--keep {name}: {printed} does not end with a document of `{rows[0].command}` "
                          f"({type(error).__name__}: {error}); what is kept stays as it is") from None  # fmt: skip
    new = folder / f"{name}.json.new"
    new.write_text(line + "\n", encoding="utf-8")
    os.replace(new, folder / f"{name}.json")


def _check_is_of(rows: list[Row], document: Document) -> None:
    """ValueError or KeyError if it was made by another command, or lacks a figure of a row."""
    if document["benchmark"] != rows[0].command_name:
        raise ValueError(f"it is of {document['benchmark']!r}")
    for row in rows:
        others = [f"{name} is {kept!r}, not {asked!r}" for name, (kept, asked) in differing(row, document).items()]
        if others:
            raise ValueError(f"made with other options: {', '.join(others)}")
        row.text({row.benchmark: document})
    check_drawable({rows[0].command_name: document})


def differing(row: Row, document: Document) -> dict[str, tuple[Any, Any]]:
    """Options that are others in the document than in the row's command: what is kept, and what the command says."""
    parser = argparse.ArgumentParser()
    importlib.import_module(COMMANDS[row.command_name][0]).add_arguments(parser)
    words = row.command.split()[2:]
    asked, usual = (json.loads(json.dumps(vars(parser.parse_args(given)), default=str)) for given in (words, []))
    kept, is_exact = document["config"], row.command_name in _EXACT
    looked_at = [name for name in asked.keys() & kept.keys() - _MAY_DIFFER if is_exact or asked[name] != usual[name]]
    return {name: (kept[name], asked[name]) for name in sorted(looked_at) if kept[name] != asked[name]}


def read_documents(folder: Path = FOLDER) -> dict[str, Document]:
    """The kept documents by benchmark.

    Raises:
        ConfigError: one that the table needs is missing, or lacks a figure.
    """
    documents = {}
    for benchmark in dict.fromkeys(row.benchmark for row in ROWS):
        path = folder / f"{benchmark}.json"
        if not path.is_file():
            raise ConfigError(f"{path.name} is missing in bench/results; `make results` makes it")
        try:
            documents[benchmark] = json.loads(path.read_text(encoding="utf-8"))
        except (RecursionError, ValueError) as error:
            raise ConfigError(f"{path.name} in bench/results is no JSON document: {error}") from None
    return documents


def with_table(readme: str, documents: Mapping[str, Document]) -> str:
    """The README's text with the table of these documents between the marks."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise ConfigError(f"README.md has to have one line {BEGIN} and one line {END}")
    head, rest = readme.split(BEGIN)
    _, tail = rest.split(END)
    lines = ["| figure | asked | measured | command |", "|---|---|---|---|"]
    for row in ROWS:
        try:
            lines.append(row.text(documents))
        except KeyError as error:
            raise ConfigError(f"{row.benchmark}.json in bench/results has no figure {error}") from None
        except _STRANGE as error:
            raise ConfigError(f"{row.benchmark}.json in bench/results is damaged, or of something else "
                              f"({type(error).__name__}: {error}); `make results` makes it anew") from None  # fmt: skip
    return f"{head}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{tail}"
