"""Every private name of torch is listed on its page, with the one file that uses it, and so is
every exception of the type checker."""

from __future__ import annotations

import ast
import importlib
import re
import tomllib

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


IGNORED = re.compile(r"^\| `([\w/.]+)` \| `([a-z-]+)` \| .+ \|$", re.M)
SILENCED = re.compile(r"#\s*(?:type:\s*ignore|mypy:|pyright:)|\bno_type_check\b")
EXPLAINED = re.compile(r"# type: ignore\[([a-z-]+)\]  # \w+")


def ignores(sources: dict[str, str]) -> list[tuple[str, str]]:
    """The file and the error code of every exception of the type checker. The code is "?" if there
    is no code or no reason on the line."""
    found = []
    for file, source in sources.items():
        for line in filter(SILENCED.search, source.splitlines()):
            match = EXPLAINED.search(line)
            found.append((file, match[1] if match else "?"))
    return sorted(found)


def test_every_exception_of_the_type_checker_is_on_the_page():
    page = (ROOT / "docs" / "torch-internals.md").read_text().partition("## Exceptions")[2]
    sources = {**SOURCES, "../train.py": (ROOT / "train.py").read_text()}
    assert ignores(sources) == sorted(IGNORED.findall(page))


def test_an_exception_without_code_or_reason_is_noticed():
    lines = {
        "x = f()  # type: ignore[arg-type]  # a stub": "arg-type",
        "x = f()  # type: ignore[arg-type]": "?",
        "x = f()  # type: ignore  # a stub": "?",
        "x = f()  #type:ignore": "?",
        "# mypy: ignore-errors": "?",
        "@typing.no_type_check": "?",
    }
    for line, code in lines.items():
        assert ignores({"a.py": line}) == [("a.py", code)]


def test_the_type_checker_skips_no_file_of_the_library():
    """Only packages without types are skipped."""
    mypy = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]
    assert mypy["files"] == ["dtron", "train.py"] and mypy["disallow_untyped_defs"]
    assert not {"exclude", "ignore_errors", "disable_error_code"} & mypy.keys()
    for part in mypy["overrides"]:
        assert part.keys() == {"module", "follow_imports", "ignore_missing_imports"}
        assert not any(name.startswith(("dtron", "torch.", "*")) for name in part["module"])
