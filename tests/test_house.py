"""The order of folders: a file imports only from folders below its own. No two files import each
other."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

# From the ground up. Folders on one line may import each other.
LEVELS = [
    {"errors", "bounds", "json_files", "lazy_names", "renamed", "torch_compile"},
    {"distributed"},
    {"rules", "mesh", "local_region", "mup", "params", "frozen", "tree"},
    {"fp8"},
    {"layers", "moe"},
    {"losses"},
    {"schedules"},
    {"model"},
    {"training"},
    {"checkpoint", "data", "hf"},
    {"generation"},
    {"runtime"},
    {"planner"},
    {"tools", "testing"},
    {"course"},
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
PROGRAMS = {
    "__main__",
    "verify",
    "show",
    "generate",
    "profile",
}  # what ``python -m`` starts: on top


def modules() -> dict[str, Path]:
    """Every module of the package, by its dotted name without ``dtron.``."""
    paths = (ROOT / "dtron").rglob("*.py")
    names = ((".".join(p.relative_to(ROOT / "dtron").with_suffix("").parts), p) for p in paths)
    return {name.removesuffix(".__init__"): p for name, p in names if name != "__init__"}


MODULES = modules()


def is_program(module: str) -> bool:
    return module.endswith("__main__") or module in PROGRAMS


def imports(tree: ast.AST) -> set[str]:
    """The modules of the package that a file imports, anywhere in the file."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "dtron":
            base = node.module.removeprefix("dtron").lstrip(".")
            for name in node.names:
                full = f"{base}.{name.name}".lstrip(".")
                found.add(full if full in MODULES else base)
        elif isinstance(node, ast.Import):
            found |= {
                n.name.removeprefix("dtron.") for n in node.names if n.name.startswith("dtron.")
            }
    return found - {""}


def upward(module: str, imported: set[str]) -> list[str]:
    level = LEVEL[module.split(".")[0]]
    return [f"{module} imports {other}" for other in imported if LEVEL[other.split(".")[0]] > level]


def graph() -> dict[str, set[str]]:
    return {name: imports(ast.parse(path.read_text())) for name, path in MODULES.items()}


def test_imports_run_down():
    found = [
        line
        for name, others in graph().items()
        if not is_program(name)
        for line in upward(name, others)
    ]
    assert not found


def test_no_two_files_import_each_other():
    """Imports inside functions count too. A folder's ``__init__`` may import from the folder."""
    inner = {
        name: {o for o in others if o != name.split(".")[0]} for name, others in graph().items()
    }
    try:
        TopologicalSorter(inner).prepare()
    except CycleError as error:
        pytest.fail(f"a cycle of imports: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize(
    ("module", "line", "runs_up"),
    [
        ("layers.mlp", "from dtron.training.step import TrainStep", True),
        ("layers.mlp", "def f():\n    from dtron import checkpoint", True),
        ("distributed.collectives", "import dtron.mesh", True),
        ("training.step", "from dtron.layers.mlp import mlp", False),
        ("layers.mlp", "from dtron.moe.config import MoE", False),
    ],
)
def test_an_arrow_that_runs_up_is_seen(module, line, runs_up):
    assert bool(upward(module, imports(ast.parse(line)))) == runs_up
