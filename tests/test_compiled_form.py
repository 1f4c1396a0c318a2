"""What `make compiled` asks of the sources; nothing is compiled here, which takes minutes."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent


def compiled_files() -> set[Path]:
    """The sources that setup.py names."""
    names = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    folders = {"_COMPILED": "wisp_plugin", "_COMPILED_SIMULATION": "bench"}
    return {ROOT / folder / f"{name}.py" for variable, folder in folders.items() for name in names[variable]}


def classes_of(path: Path) -> Iterator[tuple[str, set[str]]]:
    """Name and bases of every class in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef):
            yield node.name, {ast.unparse(base).rpartition(".")[2] for base in node.bases}


def test_setup_names_files_that_are_there() -> None:
    assert len(compiled_files()) > 30
    assert [path for path in compiled_files() if not path.is_file()] == []


def test_nothing_interpreted_derives_from_a_compiled_class() -> None:
    """Python refuses that when the class is made."""
    compiled = compiled_files()
    parents = {name for path in compiled for name, bases in classes_of(path) if "Protocol" not in bases}
    folders = ("wisp_plugin", "triton_models", "edge_runtime", "bench", "model_repository")
    sources = [path for folder in folders for path in (ROOT / folder).rglob("*.py") if path not in compiled]
    assert len(sources) > 100
    heirs = [f"{path.name}: {name}" for path in sources for name, bases in classes_of(path) if bases & parents]
    assert heirs == []


def test_nothing_compiled_asks_where_it_lies() -> None:
    """What compiled modules share tells them a folder that is not theirs."""
    assert [path.name for path in compiled_files() if "Path(__file__)" in path.read_text(encoding="utf-8")] == []
