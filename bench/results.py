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


def main(args: argparse.Namespace) -> int:
    """Write the table and the pictures, or check the table."""
    readme = ROOT / "README.md"
    before = readme.read_text(encoding="utf-8")
    documents = read_documents()
    after = with_table(before, documents)
    if not args.check:
        draw(documents, FOLDER)
        readme.write_text(after, encoding="utf-8")
    print("README.md is up to date" if before == after else "README.md was out of date")
    return int(args.check and before != after)


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
        documents[benchmark] = json.loads(path.read_text(encoding="utf-8"))
    return documents


def with_table(readme: str, documents: Mapping[str, Document]) -> str:
    """The README's text with the table of these documents between the marks."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise ConfigError(f"README.md has to have one line {BEGIN} and one line {END}")
    head, rest = readme.split(BEGIN)
    _, tail = rest.split(END)
    lines = ["| figure | asked | measured | command |", "|---|---|---|---|", *(row.text(documents) for row in ROWS)]
    return f"{head}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{tail}"
