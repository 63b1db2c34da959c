"""What a plan asks of the nodes of a graph: their tensors, their memory, and how they read it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.fx import Node

from dtron.planner.operator_names import GATHERS, VIEWS
from dtron.planner.operators import called, is_library, name_of, tensors_in


def base_of(node: Node) -> Node:
    """Return the node of which a node is a view."""
    while node.op == "call_function" and is_view(node):
        node = node.all_input_nodes[0]
    return node


def memory_of(node: Node) -> Node:
    """Return the node that has allocated the memory of a node."""
    node = base_of(node)
    waits = name_of(node.target) == "wait_tensor"
    return memory_of(node.all_input_nodes[0]) if waits else node


def by_library(node: Node) -> bool:
    return node.op == "call_function" and is_library(called(node.target, node.args)[0])


def is_view(node: Node) -> bool:
    return node.op == "call_function" and name_of(node.target) in VIEWS


def is_reduction(node: Node) -> bool:
    made, given = results_of(node), inputs_of(node)
    if name_of(node.target) in GATHERS:  # reads a part of a tensor
        return False
    return bool(made and given) and made[0].numel() < max(x.numel() for x in given) / 2


def results_of(node: Node) -> list[Tensor]:
    """Return the results of a node. A wrapped operator has none itself, but its parts have."""
    if node.op == "output":
        return []
    if (value := node.meta.get("val")) is not None:
        return tensors_in(value)
    return [x for user in node.users if is_view(user) for x in results_of(user)]


def inputs_of(node: Node) -> list[Tensor]:
    return [x for n in node.all_input_nodes for x in results_of(n)]


def nodes_in(xs: Any) -> Sequence[Node]:
    if isinstance(xs, Node):
        return [xs]
    return [n for x in xs for n in nodes_in(x)] if isinstance(xs, (list, tuple)) else []


def access_of(nodes: Sequence[Node]) -> str:
    """Return how a kernel of these operators reads memory; see ``Operator.access``."""
    most = max((x.numel() for node in nodes for x in results_of(node)), default=0)
    large = [n for n in nodes if max((x.numel() for x in results_of(n)), default=0) > most // 2]
    if any(map(_is_transposed, large)):
        return "transposed"
    sums = [node for node in nodes if is_reduction(node)]
    if any(map(_is_over_rows, sums)):
        return "columns"
    if any(name_of(n.target) in GATHERS for n in large):
        return "gathered"
    return "rows" if sums else "stream"


def _is_over_rows(node: Node) -> bool:
    """Whether a reduction is over other dims than the last one."""
    dims = node.args[1] if len(node.args) > 1 else None
    last = inputs_of(node)[0].ndim - 1
    return isinstance(dims, (list, tuple)) and last not in dims and -1 not in dims


def _is_transposed(node: Node) -> bool:
    """Whether an operator reads columns and writes rows, or the reverse."""
    (made, *_), given = results_of(node), inputs_of(node)
    same = [x for x in given if x.numel() == made.numel() and x.ndim > 1 and x.shape[-1] > 1]
    return made.ndim > 1 and any((x.stride(-1) > 1) != (made.stride(-1) > 1) for x in same)
