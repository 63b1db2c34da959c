"""Every private name of torch is listed on its page, with the one file that uses it."""

from __future__ import annotations

import ast
import importlib
import re

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from tests.helpers.paths import ROOT

ROW = re.compile(r"^\| `([\w.]+)` \| `([\w/.]+)` \| .+ \| `(tests/[\w/]+\.py)` \|$", re.M)
ROWS = ROW.findall((ROOT / "docs" / "torch-internals.md").read_text())
CLASSES = {"DeviceMesh": DeviceMesh, "DTensor": DTensor}


def private(source: str) -> set[str]:
    """The private names of torch in a source: imported, or written out as ``torch._x``."""
    tree = ast.parse(source)
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute):
            names.add(ast.unparse(node))
    return {n for n in names if n.startswith("torch.") and re.search(r"\._(?!_)", n)}


def listed(name: str, names: set[str]) -> bool:
    """Whether the page lists the name, its module, or a name that begins with it."""
    return any(
        name == n or name.startswith((n + ".", n + "_")) or n.startswith(name) for n in names
    )


def missing(sources: dict[str, str], rows: list[tuple[str, str, str]]) -> list[str]:
    return [
        f"{file}: {name}"
        for file, source in sources.items()
        for name in sorted(private(source))
        if not listed(name, {n for n, at, _ in rows if at == file})
    ]


SOURCES = {
    str(p.relative_to(ROOT / "dtron")): p.read_text() for p in (ROOT / "dtron").rglob("*.py")
}


def test_every_private_name_is_on_the_page():
    assert not missing(SOURCES, ROWS)


def test_a_name_that_is_not_on_the_page_is_noticed():
    """A missing name is noticed. So is a listed name in another file."""
    assert len(missing(SOURCES, ROWS[1:])) >= 1
    assert missing({"mesh.py": "import torch._foreach_norm"}, ROWS)
    assert missing({"mesh.py": "from torch._dynamo import config"}, ROWS)


@pytest.mark.parametrize(("name", "file", "smoke"), ROWS)
def test_a_listed_name_exists_and_its_file_uses_it(name, file, smoke):
    assert name.rpartition(".")[2] in SOURCES[file]
    assert (ROOT / smoke).exists()
    first, *rest = name.split(".")
    found = CLASSES.get(first) or importlib.import_module(first)
    for i, part in enumerate(rest):
        if not hasattr(found, part):  # a module that nothing has imported yet
            importlib.import_module(".".join([first, *rest[: i + 1]]))
        if name == "DTensor._spec":  # declared, not set, on the class
            assert "_spec" in DTensor.__annotations__ or hasattr(DTensor, "_spec")
            return
        found = getattr(found, part)
    assert found is not None and torch is not None
