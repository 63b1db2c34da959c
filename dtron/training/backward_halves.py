"""The backward of a compiled unit in two graphs: the gradients of its inputs (I), later the
gradients of its weights (W).

A compiled unit has one graph for its backward. Zero-bubble schedules need two (Qi et al. 2023,
arXiv:2401.10241), as schedules/split_backward.py makes them of an eager backward. The compiler
hands the graph over before it generates code, and ``split`` takes it apart:

    I  everything that the gradients of activations depend on
    W  the rest: the matmul of each weight's gradient, and everything that only these need

W reads what forward saved, and a few results of I: the gradients that arrive at each matmul. What W
can cheaply compute from saved tensors (views, operators on single elements) it computes again, so
that it need not be kept. Each half is compiled by itself. Between the halves inductor fuses
nothing.

The unit's node in autograd's graph runs the first graph. In I it returns no gradients of weights,
and leaves the second graph, with its inputs, to the runner of the schedule. In B the second graph
runs at once.

Left out: a choice of what W keeps by size, as the partitioner's min-cut makes it for forward and
backward. Saved tensors that only I reads are freed after I."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from dtron.schedules.split_backward import DeferredWeightGrad

Grads = list[Tensor | None]
OPERATOR = type(torch.ops.aten.mm.default)


class BackwardHalves:
    """Splits the backward graphs of compiled units. Holds the W of a unit until the runner takes
    it.

    ``deferring``: nodes leave their W to the runner, and do not run it themselves."""

    def __init__(self) -> None:
        self.deferring = False
        self._left: DeferredWeightGrad | None = None

    def leave(self, later: DeferredWeightGrad) -> None:
        assert self._left is None  # the runner takes each one before the next node runs
        self._left = later

    def take(self) -> DeferredWeightGrad | None:
        """Return the W of the node that has just run. None: it has left nothing."""
        later, self._left = self._left, None
        return later

    def compiler(self, compile: Callable, weights: Sequence[int]) -> Callable:
        """Return a compiler of graphs that splits a backward graph.

        ``compile``: inductor's compiler of one graph.
        ``weights``: the indices of the unit's inputs that are weights."""
        late = set(weights)

        def compile_halves(graph: GraphModule, inputs: Sequence[Any], **how: Any) -> Callable:
            halves = split(graph, late) if how.get("is_backward") else None
            if halves is None:
                return compile(graph, inputs, **how)
            given = [inputs[i] for i in halves.saved]
            made = [node.meta["val"] for node in halves.crossing]
            first = compile(halves.first, inputs, **how)
            second = compile(halves.second, [*given, *made], **how | {"static_input_idxs": []})
            return TwoGraphs(self, first, second, halves)

        return compile_halves


@dataclass(frozen=True)
class Halves:
    """The two graphs of a backward.

    ``first``: takes all inputs; returns the gradients, with None for each weight, and then the
        values of ``crossing``.
    ``second``: takes the inputs ``saved`` and the values of ``crossing``; returns the gradients of
        weights, with None for all others."""

    first: GraphModule
    second: GraphModule
    saved: list[int]
    crossing: list[Node]


class TwoGraphs:
    """A compiled backward in two halves, called as torch calls a compiled backward: with a list of
    inputs, which is emptied."""

    def __init__(self, owner: BackwardHalves, first: Callable, second: Callable, halves: Halves):
        self._owner, self._first, self._second = owner, first, second
        self._saved, self._crossing = halves.saved, len(halves.crossing)
        self._boxed_call = True  # torch copies this mark to its wrapper of the instance

    def __call__(self, inputs: list[Any]) -> Grads:
        saved = [inputs[i] for i in self._saved]
        done = list(self._first(inputs))
        inputs.clear()
        count = len(done) - self._crossing
        grads, rest = done[:count], [*saved, *done[count:]]
        del saved, done

        if self._owner.deferring:
            self._owner.leave(lambda: list(self._second(rest)))
            return grads
        late = self._second(rest)
        return [g if other is None else other for g, other in zip(grads, late, strict=True)]


def split(graph: GraphModule, late: set[int]) -> Halves | None:
    """Split a backward graph. None: it cannot be split, since it computes gradients of weights
    only, or of activations only, or an operator of it changes a tensor in place.

    ``late``: the indices of the gradients that W computes."""
    nodes = list(graph.graph.nodes)
    (outputs,) = graph.graph.output_node().args
    assert isinstance(outputs, tuple | list)
    now = [x if i not in late else None for i, x in enumerate(outputs)]
    then = [x if i in late else None for i, x in enumerate(outputs)]
    if not any(now) or not any(then) or any(map(_writes, nodes)):
        return None
    early = _needed(now)
    # One operator computes all items of a tuple. Only tensors cross.
    early |= {n for n in nodes if n.target is operator.getitem and n.args[0] in early}
    saved = _from_saved(nodes)

    def crosses(node: Node) -> bool:
        return node in early and not _recomputed(node, saved)

    own = _needed(then, crosses)
    crossing = [n for n in nodes if n in own and n.op != "placeholder" and crosses(n)]
    placeholders = [n for n in nodes if n.op == "placeholder"]
    used = [i for i, n in enumerate(placeholders) if n in own]
    inputs = [*(placeholders[i] for i in used), *crossing]
    first = _graph(graph, placeholders, early, [*now, *crossing])
    second = _graph(graph, inputs, own, then)
    return Halves(first, second, used, crossing)


def _needed(roots: Sequence[Any], end: Callable[[Node], bool] = lambda node: False) -> set[Node]:
    """The nodes that these outputs depend on. Nothing above a node at which ``end`` is true."""
    found: set[Node] = set()
    stack = [node for node in roots if isinstance(node, Node)]
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            if not end(node):
                stack += node.all_input_nodes
    return found


def _from_saved(nodes: Sequence[Node]) -> set[Node]:
    """The cheap nodes that depend on no gradient: W can compute them from saved tensors."""
    found: set[Node] = set()
    for node in nodes:
        saved = node.op == "placeholder" and not node.name.startswith("tangents")
        if saved or (_cheap(node) and all(x in found for x in node.all_input_nodes)):
            found.add(node)
    return found


def _recomputed(node: Node, saved: set[Node]) -> bool:
    """Whether W computes a node of I again."""
    return node in saved or _view(node) or node.op == "placeholder"


def _cheap(node: Node) -> bool:
    if node.op == "get_attr":
        return True
    operator: Any = node.target
    if not isinstance(operator, OPERATOR):
        return False
    return _view(node) or torch.Tag.pointwise in operator.tags or not node.all_input_nodes


def _view(node: Node) -> bool:
    operator: Any = node.target
    return isinstance(operator, OPERATOR) and operator.is_view


def _writes(node: Node) -> bool:
    operator: Any = node.target
    return isinstance(operator, OPERATOR) and operator._schema.is_mutable


def _graph(
    whole: GraphModule, inputs: Sequence[Node], own: set[Node], outputs: Sequence[Any]
) -> GraphModule:
    """Make a graph of some nodes of another, in their order. ``inputs`` become placeholders."""
    made = Graph()
    new: dict[Node, Node] = {}
    for node in inputs:
        new[node] = made.placeholder(node.name)
        new[node].meta = dict(node.meta)
    for node in whole.graph.nodes:
        if node in own and node not in new:
            new[node] = made.node_copy(node, new.__getitem__)
    end = made.output([new[x] if isinstance(x, Node) else None for x in outputs])
    # Strides stay as traced: the other graph is compiled for these strides.
    end.meta["user_visible_output_idxs"] = [i for i, x in enumerate(outputs) if x is not None]
    return GraphModule(whole, made)
