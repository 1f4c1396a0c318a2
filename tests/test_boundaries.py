"""Who may import whom (DESIGN section 11), for every module on disk.

Two looks: at the source (every import statement, also those inside functions) and at `sys.modules` after a real
import in a process of its own. A forked child per module keeps the second look fast: what a module brings in is
what the child has and the parent, which imported `PRELOAD`, had not.
"""

from __future__ import annotations

import ast
import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("wisp_plugin", "edge_runtime", "triton_models", "bench")
PB_UTILS = "triton_python_backend_utils"
FORBIDDEN = {  # top-level packages that a package may never bring in
    "edge_runtime": {"torch", "transformers", "triton_models", "bench", PB_UTILS},
    "triton_models": {"edge_runtime", "bench"},
}
PURE = set(sys.stdlib_module_names) | {"numpy", "wisp_plugin"}  # all that wisp_plugin may bring in
NUMPY = "import numpy, numpy.random, numpy.typing"  # leaves helper modules with names of their own behind
PRELOAD = {  # what the parent imports, to spare every child the time
    "wisp_plugin": NUMPY,
    "edge_runtime": NUMPY,
    "triton_models": f"{NUMPY}, torch; from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel",
}
_CHILD = """
import importlib, json, os, sys, traceback, types

class Anything(types.ModuleType):  # Triton's module exists only inside its backend
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})

def look(module):
    before = set(sys.modules)
    sys.modules["triton_python_backend_utils"] = Anything("triton_python_backend_utils")
    try:
        importlib.import_module(module)
    except BaseException:
        return {"error": traceback.format_exc()}
    return {"modules": sorted(set(sys.modules) - before - {"triton_python_backend_utils"})}

preload, modules = json.loads(sys.argv[1])
exec(preload)
for module in modules:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        with os.fdopen(writer, "w") as pipe:
            json.dump(look(module), pipe)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    print(json.dumps([module, json.loads(text)]))
"""


def module_files(package: str) -> dict[str, Path]:
    """Modules of a package by dotted name."""
    paths = sorted((ROOT / package).rglob("*.py"))
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]
    return dict(zip(names, paths, strict=True))


def modules_of(*packages: str) -> list[str]:
    return [name for package in packages for name in module_files(package)]


def source_files() -> list[Path]:
    """Every Python file that is part of the product."""
    served = sorted((ROOT / "model_repository").rglob("*.py"))
    return [path for package in PACKAGES for path in module_files(package).values()] + served


def imported_packages(path: Path) -> set[str]:
    """Top-level packages that the file's import statements name, wherever they stand."""
    return imports_in(path.read_text(encoding="utf-8"), own=path.relative_to(ROOT).parts[0])


def imports_in(source: str, own: str) -> set[str]:
    """Top-level packages that `source`, a module of package `own`, imports."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(own if node.level else str(node.module).partition(".")[0])
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            names = [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)]
            found |= {str(name).partition(".")[0] for name in names}
    return found


def run_looks(preload: str, modules: list[str]) -> dict[str, dict[str, object]]:
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, json.dumps([preload, modules])],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))


@functools.cache
def looks(package: str) -> dict[str, dict[str, object]]:
    return run_looks(PRELOAD[package], modules_of(package))


def brought_in(package: str, module: str) -> set[str]:
    """Top-level names of the modules that importing `module` adds."""
    look = looks(package)[module]
    assert "error" not in look, f"importing {module} failed:\n{look.get('error')}"
    names = look["modules"]
    assert isinstance(names, list)
    own = "__mypyc"  # how `make compiled` calls the module behind all others
    return {name.partition(".")[0] for name in names if not name.endswith(own)}


@pytest.mark.parametrize("module", modules_of("wisp_plugin"))
def test_wisp_plugin_needs_only_the_standard_library_and_numpy(module: str) -> None:
    assert imported_packages(module_files("wisp_plugin")[module]) <= PURE
    assert brought_in("wisp_plugin", module) <= PURE


@pytest.mark.parametrize("module", modules_of("edge_runtime", "triton_models"))
def test_a_package_stays_on_its_side(module: str) -> None:
    package = module.partition(".")[0]
    assert not imported_packages(module_files(package)[module]) & FORBIDDEN[package]
    assert not brought_in(package, module) & FORBIDDEN[package]


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_outside_bench_imports_bench(path: Path) -> None:
    inside = path.relative_to(ROOT).parts[0] == "bench"
    assert inside or "bench" not in imported_packages(path)


def test_only_the_adapters_import_tritons_module() -> None:
    importers = {path.relative_to(ROOT).as_posix() for path in source_files() if PB_UTILS in imported_packages(path)}
    # path_floor and foreign_model are models of their own, with nothing of ours in them.
    foreign = {"bench/path_floor/path_floor/1/model.py", "bench/foreign_model/model.py"}
    assert importers <= {"triton_models/pb_adapter.py", "triton_models/pb_generate.py", *foreign}


def test_served_models_import_only_the_server_side() -> None:
    for path in (ROOT / "model_repository").rglob("*.py"):
        assert imported_packages(path) <= {"__future__", "triton_models", "wisp_plugin"}, path


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_a_package_alone_is_light(package: str) -> None:
    look = run_looks("", [package])[package]
    names = look["modules"]
    assert isinstance(names, list)
    outside = {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names)
    assert outside == {package}


def test_the_looks_see_violations() -> None:
    """The tests above can fail: a lazy import, a dynamic one, a relative one and a real one are noticed."""
    source = "def f():\n    import torch.nn\n    from . import x\n    importlib.import_module('bench.demo')\n"
    assert imports_in(source, own="edge_runtime") == {"torch", "edge_runtime", "bench"}
    assert "numpy" in str(run_looks("", ["wisp_plugin.messages"]).popitem()[1]["modules"])
    assert "ModuleNotFoundError" in str(run_looks("", ["wisp_plugin.no_such_module"]).popitem()[1]["error"])
