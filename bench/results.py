"""The README's table of results and its pictures, made from the JSON documents in `bench/results`.

`make results` runs the benchmarks and keeps the last line of each there; this command then writes the table into the
README, between its two marks. A test holds that the README shows what the documents say.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

from bench.result_plots import draw
from bench.result_rows import ROWS, Document
from wisp_plugin.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path(__file__).with_name("results")
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
    commands = {row.benchmark: row.command.split()[1] for row in ROWS}
    if name not in commands:
        raise ConfigError(f"--keep {name}: no row of the table is of that; allowed: {', '.join(commands)}")
    try:
        lines = printed.read_text(encoding="utf-8").splitlines()
        document = json.loads(lines[-1])
        if document["benchmark"] != commands[name]:
            raise ValueError(f"it is of {document['benchmark']!r}")
    except (OSError, ValueError, IndexError, KeyError, TypeError) as error:
        raise ConfigError(f"--keep {name}: {printed} does not end with a document of `wisp-bench {commands[name]}` "
                          f"({type(error).__name__}: {error}); what is kept stays as it is") from None  # fmt: skip
    (folder / f"{name}.json").write_text(lines[-1] + "\n", encoding="utf-8")


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
        except ValueError as error:
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
    return f"{head}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{tail}"
