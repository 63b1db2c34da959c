"""Every term of the glossary links to its definition: the object that a link names is in the file
that it names, and the site has the object in its API reference."""

from __future__ import annotations

import ast
import importlib.util
import re

import pytest

from tests.helpers.paths import ROOT

GLOSSARY = (ROOT / "docs" / "glossary.md").read_text()
OBJECT = re.compile(r"\[`([\w.]+)`\]\(\.\./dtron/([\w/]+\.py)#([\w.]+)\)")
ROWS = [
    line.split(" | ")
    for line in GLOSSARY.splitlines()
    if line.startswith("| ") and not line.startswith("| term")
]


def has(source: str, name: str) -> bool:
    """Whether a file defines a name, such as ``Layout.constrain``, and has a docstring of it. The
    site shows no other."""
    body = ast.parse(source).body
    for part in name.split("."):
        found = [i for i, node in enumerate(body) if part in names(node)]
        if not found:
            return False
        node, after = body[found[0]], body[found[0] + 1 :]
        inner = getattr(node, "body", None)
        documented, body = inner or after, inner or []
    return bool(documented) and is_text(documented[0])


def is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def names(node: ast.stmt) -> list[str]:
    match node:
        case ast.ClassDef(name=name) | ast.FunctionDef(name=name):
            return [name]
        case ast.AnnAssign(target=ast.Name(id=name)):
            return [name]
        case ast.Assign(targets=targets):
            return [t.id for t in targets if isinstance(t, ast.Name)]
    return []


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].removeprefix("| "))
def test_a_term_links_to_its_definition(row):
    links = OBJECT.findall(row[-1])
    assert links
    for said, file, name in links:
        assert said == name and has((ROOT / "dtron" / file).read_text(), name), name
        assert not any(part.startswith("_") for part in name.split(".")), "the site has no such"


def test_a_name_that_is_not_there_is_noticed():
    source = "class A:\n  'a'\n  b: int = 1\n  'b'\n  def c(self): 'c'\nD = 1\n'd'\nE = 1\n"
    assert all(has(source, name) for name in ("A", "A.b", "A.c", "D"))
    assert not any(has(source, name) for name in ("b", "A.D", "D.c", "E", "F"))


def test_a_link_to_an_object_leads_to_the_reference_on_the_site():
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "draw" / "site.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    page = "[a](../dtron/mesh.py#Layout.group) [b](../dtron/mesh.py#L3) [c](../dtron/mesh.py)"
    assert hooks.on_page_markdown(page) == (
        "[a](api.md#dtron.mesh.Layout.group) [b](api.md#dtron.mesh) [c](api.md#dtron.mesh)"
    )
