"""What the documentation points at is there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = (".", "docs", "bench", "wisp_plugin/batch_strategy")
PAGES = sorted(page for folder in FOLDERS for page in (ROOT / folder).glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        assert (page.parent / path).exists(), target
        if anchor:
            assert anchor in headings(page.parent / path if path else page), target


def headings(page: Path) -> set[str]:
    outside_of_code = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", outside_of_code, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_benchmarks_and_targets_that_are_named_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"wisp-bench ([a-z][a-z0-9-]*)", text))
    assert named <= set(COMMANDS)
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(re.findall(r"`make ([a-z]+)", text)) <= set(targets)


@pytest.mark.parametrize("program", ["wisp-edge", "wisp-server"])
def test_options_of_commands_that_are_named_exist(program: str) -> None:
    """`wisp-bench` shows its options with heavy imports; its commands in the tables are parsed in `test_results`."""
    module = {"wisp-edge": "edge_runtime.cli", "wisp-server": "triton_models.cli"}[program]
    for command, options in named_options(program).items():
        words = [sys.executable, "-m", module, command, "--help"]
        help_text = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60, cwd=ROOT).stdout
        unknown = {option for option in options if not re.search(rf"(?<![\w-]){option}(?![\w-])", help_text)}
        assert not unknown, (command, unknown)


def named_options(program: str) -> dict[str, set[str]]:
    """Options behind each command in lines of code, but not what is behind ` -- `, which is tritonserver's."""
    found: dict[str, set[str]] = {}
    for page in PAGES:
        for line in re.findall(rf"{program} [a-z][^\n`#]*", page.read_text(encoding="utf-8").replace("\\\n", " ")):
            command, *rest = line.removeprefix(f"{program} ").partition(" -- ")[0].split()
            found.setdefault(command, set()).update(re.findall(r"(?<!\S)--[a-z][a-z-]*", " ".join(rest)))
    return {command: options for command, options in found.items() if options}
