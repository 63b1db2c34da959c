"""A backward in two halves: the gradient of a stage's input now (I), those of its weights later
(W).

Autograd makes both at once, but its graph tells them apart. Follow it from the output: some nodes
lead to the stage's input, the others to weights only. A node of the first kind with a child of the
second is where a weight joins the stream: a matrix product, a norm's scale. To make only the
input's gradient is to ask autograd for nothing else; the engine then skips the weight's half of
each such node, and a hook notes what arrives there. W goes back to every node with what arrived,
and asks for the weight's half alone. Nothing is computed twice (the idea is that of Qi et al. 2023,
arXiv:2401.10241; a test counts the matrix products).

A node written in Python (a custom ``autograd.Function``: the fused loss, a compiled region) makes
all its gradients in one call. Those are made in I and kept, by node: two losses may share a head. A
recomputed block needs its activations for both halves and has them only once, so the runner does
not split stages that recompute: I makes everything and W hands it over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

DeferredWeightGrad = Callable[[], list[Tensor | None]]


def backward(
    ends: Sequence[GradientEdge], x: Tensor | None, weights: Sequence[Tensor], gs: Sequence[Tensor]
) -> tuple[Tensor | None, DeferredWeightGrad]:
    """Both halves at once; ``later()`` only hands over. ``ends`` are what has gradients, ``gs``
    these. None for what no end depends on."""
    inputs = [*weights] if x is None else [x, *weights]
    grads = list(torch.autograd.grad(list(ends), inputs, list(gs), allow_unused=True))
    gx = None if x is None else grads.pop(0)
    return gx, lambda: grads


def backward_input(
    ends: Sequence[GradientEdge], x: Tensor, weights: Sequence[Tensor], gs: Sequence[Tensor]
) -> tuple[Tensor, DeferredWeightGrad]:
    """``(gradient of x, later)``, where ``later()`` makes the gradients of the weights, once."""
    joins = _joins([end.node for end in ends], get_gradient_edge(x).node)
    opaque = [(node, edges) for node, edges in joins if _makes_all_at_once(node)]
    plain = [(node, edges) for node, edges in joins if not _makes_all_at_once(node)]
    arrived: dict[Node, tuple[Tensor | None, ...]] = {}
    made: dict[Node, tuple[Tensor | None, ...]] = {}
    hooks = [
        node.register_prehook(lambda gs, node=node: arrived.update({node: gs})) for node, _ in plain
    ]
    hooks += [
        node.register_hook(lambda gs, _, node=node: made.update({node: gs})) for node, _ in opaque
    ]
    # Asked for, so that they are made; but what is returned is the sum of all ways to such an edge,
    # some of them W's.
    asked = {(e.node, e.output_nr): e for _, edges in opaque for e in edges.values()}
    try:
        inputs = [x, *asked.values()]
        gx, *_ = torch.autograd.grad(
            list(ends), inputs, list(gs), retain_graph=True, allow_unused=True
        )
    finally:
        for hook in hooks:
            hook.remove()

    def later() -> list[Tensor | None]:
        edges, grads = [], []
        for node, children in opaque:
            edges += children.values()
            grads += [made[node][i] if node in made else None for i in children]
        for node, children in plain:
            children = list(children.values())
            outputs = [(i, gi) for i, gi in enumerate(arrived.get(node, ())) if gi is not None]
            if outputs:
                edges += children
                grads += torch.autograd.grad(
                    [GradientEdge(node, i) for i, _ in outputs],
                    children,
                    [gi for _, gi in outputs],
                    allow_unused=True,
                )
        arrived.clear()
        made.clear()
        there = [(e, gi) for e, gi in zip(edges, grads, strict=True) if gi is not None]
        if not there:
            return [None] * len(weights)
        edges, grads = zip(*there, strict=True)
        return list(torch.autograd.grad(edges, weights, grads, allow_unused=True))

    return gx, later


def _makes_all_at_once(node: Node) -> bool:
    return isinstance(node, torch.autograd.function.BackwardCFunction)


def _joins(roots: Sequence[Node], goal: Node) -> list[tuple[Node, dict[int, GradientEdge]]]:
    """The nodes that lead to ``goal`` and have children that do not, with the edges to those
    children by their place among the node's."""
    leads: dict[Node, bool] = {goal: True}
    stack = list(roots)
    while stack:
        node = stack[-1]
        children = [child for child, _ in node.next_functions if child is not None]
        unknown = [child for child in children if child not in leads]
        if node in leads or not unknown:
            leads.setdefault(node, any(leads[child] for child in children))
            stack.pop()
        else:
            stack += unknown
    return [
        (node, edges)
        for node, does in leads.items()
        if does
        and (
            edges := {
                place: GradientEdge(c, i)
                for place, (c, i) in enumerate(node.next_functions)
                if c is not None and not leads[c]
            }
        )
    ]
