"""Adds counts to the program of a chat template: each round of a loop, and each text that is made.

`Meter` changes the tree of a template. It adds ``work.step`` to each body that can run several
times, ``work.written`` around each value that is written, and ``work.made`` around each list and
slice. The values stay the same. See `Work`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.visitor import NodeTransformer


class Meter(NodeTransformer):
    """Adds calls of `Work` to the tree of a template."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self._body(node)
        if node.test is not None:  # rounds that it leaves out count too
            node.test = nodes.And(_call("step", nodes.Const(0)), node.test)
        return node

    def _body(self, node: Any) -> Any:
        self.generic_visit(node)
        texts = (text for child in node.body for text in _texts(child))
        size = sum(len(text.data) for text in texts)
        node.body.insert(0, nodes.ExprStmt(_call("step", nodes.Const(size)), lineno=node.lineno))
        return node

    visit_Macro = visit_CallBlock = visit_Block = _body

    def _parts(self, node: Any) -> Any:
        self.generic_visit(node)
        node.nodes = [part if _constant(part) else _call("written", part) for part in node.nodes]
        return node

    visit_Output = visit_Concat = _parts

    def _literal(self, node: Any) -> Any:
        self.generic_visit(node)
        if getattr(node, "ctx", "load") != "load" or all(map(_constant, node.items)):
            return node
        return _call("made", node)

    visit_List = visit_Tuple = visit_Dict = _literal

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        self.generic_visit(node)
        return _call("made", node) if isinstance(node.arg, nodes.Slice) else node


class Generator(CodeGenerator):
    """Writes the calls of `Meter` directly. The calls of a template go through the sandbox."""

    def visit_Call(self, node: nodes.Call, frame: Frame, forward_caller: bool = False) -> None:
        if not isinstance(node.node, nodes.EnvironmentAttribute):  # no template can name one
            return super().visit_Call(node, frame, forward_caller=forward_caller)
        self.write(f"environment.{node.node.name}(")
        self.visit(node.args[0], frame)
        self.write(")")


def _call(method: str, argument: nodes.Expr) -> nodes.Call:
    function = nodes.EnvironmentAttribute(f"work.{method}")
    return nodes.Call(function, [argument], [], None, None, lineno=argument.lineno)


def _constant(node: nodes.Node) -> bool:
    return isinstance(node, (nodes.TemplateData, nodes.Const))


def _texts(node: nodes.Node) -> Iterator[nodes.TemplateData]:
    """Yield the texts of a part of a template."""
    return node.find_all(nodes.TemplateData)
