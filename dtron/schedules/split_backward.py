"""A backward in two halves: first the gradient of a stage's input (I), later the gradients of
its weights (W).

Autograd computes both halves at once, but its graph separates them. Seen from the output, some
nodes lead to the stage's input and the other nodes lead to weights only. A node of the first kind
with a child of the second kind is a *join*: a weight joins the stream there, in a matmul or a
norm's scale. I asks autograd for the input's gradient only. The engine then skips the weight's half
of each join, and a hook saves the gradient that arrives at the join. W passes the saved gradient to
each join again and asks for the weight's half alone. Nothing is computed twice (the idea is from Qi
et al. 2023, arXiv:2401.10241; a test counts the matmuls).

A node written in Python (a custom ``autograd.Function``, such as the fused loss) computes all its
gradients in one call. These gradients are computed in I and saved by node, because two losses may
share a head. The node of a compiled unit has a graph for each half. It runs the first in I, and
leaves the second for W (training/backward_halves.py).

A recomputed block needs its activations for both halves and has them only once. So the runner does
not split stages that recompute: I computes all gradients and W returns them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

# A node written in Python, such as a custom ``autograd.Function``, dies with the graph above it.
_NODES_DIE = torch.__version__ < "2.13"

DeferredWeightGrad = Callable[[], list[Tensor | None]]


def backward(
    ends: Sequence[GradientEdge], x: Tensor | None, weights: Sequence[Tensor], gs: Sequence[Tensor]
) -> tuple[Tensor | None, DeferredWeightGrad]:
    """Compute both halves at once, and return ``(gradient of x, later)``. ``later()`` only returns
    the weight gradients. A gradient is None if no end depends on its tensor.

    ``ends``: the outputs' graph edges.
    ``gs``: the gradients of the ends."""
    inputs = [*weights] if x is None else [x, *weights]
    made = torch.autograd.grad(list(ends), inputs, list(gs), allow_unused=True)
    grads: list[Tensor | None] = list(made)
    gx = None if x is None else grads.pop(0)

    def later() -> list[Tensor | None]:
        return grads

    return gx, later


class CompiledHalves(Protocol):
    """Where the nodes of compiled units leave their second halves.

    ``deferring``: they leave them."""

    deferring: bool

    def take(self) -> DeferredWeightGrad | None:
        """Return the second half of the node that has just run (None: there is none). It returns a
        gradient for each edge of the node, and None where the edge leads to no weight."""


class _NoHalves:
    deferring = False

    def take(self) -> None:
        return None


def backward_input(
    ends: Sequence[GradientEdge],
    x: Tensor,
    weights: Sequence[Tensor],
    gs: Sequence[Tensor],
    compiled: CompiledHalves | None = None,
) -> tuple[Tensor, DeferredWeightGrad]:
    """Return ``(gradient of x, later)``. ``later()`` computes the gradients of the weights; it
    may be called once.

    ``compiled``: the second halves of compiled units."""
    compiled = compiled or _NoHalves()
    joins = _joins([end.node for end in ends], get_gradient_edge(x).node)
    opaque = [(node, edges) for node, edges in joins if _makes_all_at_once(node)]
    plain = [(node, edges) for node, edges in joins if not _makes_all_at_once(node)]
    arrived: dict[Node, tuple[Tensor | None, ...]] = {}
    made: dict[Node, DeferredWeightGrad] = {}

    def save_arrived(node: Node, gs: tuple[Tensor | None, ...]) -> None:
        arrived[node] = gs

    def save_made(node: Node, gs: tuple[Tensor | None, ...], _: Any) -> None:
        # The first half has the gradients of all that is no weight of the unit, such as the
        # embedding of another token, which joins the stream in this unit.
        made[node] = partial(_all_gradients, gs, compiled.take())

    hooks = [node.register_prehook(partial(save_arrived, node)) for node, _ in plain]
    hooks += [node.register_hook(partial(save_made, node)) for node, _ in opaque]
    # Requested only so that the opaque nodes compute them. The returned values are not used: each
    # is a sum over all paths to its edge, and some of these paths belong to W.
    # Edges to nodes written in Python do not keep these nodes alive in torch 2.11. The whole graph
    # does, and then its saved tensors too stay until W.
    below = [e.node for _, edges in opaque for e in edges.values()]
    owner = ends if _NODES_DIE and any(map(_makes_all_at_once, below)) else None
    asked = {(e.node, e.output_nr): e for _, edges in opaque for e in edges.values()}
    compiled.deferring = True
    inputs: Any = [x, *asked.values()]  # torch takes a list of both, its annotation does not
    try:
        # Only plain nodes run again. Compiled nodes refuse a graph that is retained.
        gx, *_ = torch.autograd.grad(
            list(ends), inputs, list(gs), retain_graph=bool(plain), allow_unused=True
        )
    finally:
        compiled.deferring = False
        for hook in hooks:
            hook.remove()
    # Without the opaque nodes: what they have saved for I alone is freed.
    halves = [(made[node], edges) for node, edges in opaque if node in made]
    made.clear()

    def later(owner: Any = owner) -> list[Tensor | None]:
        edges: list[GradientEdge] = []
        grads: list[Tensor | None] = []
        while halves:
            half, children = halves.pop()
            theirs = half()
            edges += children.values()
            grads += [theirs[i] for i in children]
        for node, children in plain:
            below = list(children.values())
            outputs = [(i, gi) for i, gi in enumerate(arrived.get(node, ())) if gi is not None]
            if outputs:
                edges += below
                grads += torch.autograd.grad(
                    [GradientEdge(node, i) for i, _ in outputs],
                    below,
                    [gi for _, gi in outputs],
                    allow_unused=True,
                )
        arrived.clear()
        there = [(e, gi) for e, gi in zip(edges, grads, strict=True) if gi is not None]
        if not there:
            return [None] * len(weights)
        reached, theirs = zip(*there, strict=True)
        return list(torch.autograd.grad(reached, weights, theirs, allow_unused=True))

    return gx, later


def _all_gradients(
    first: Sequence[Tensor | None], later: DeferredWeightGrad | None
) -> list[Tensor | None]:
    if later is None:
        return list(first)
    return [a if b is None else b for a, b in zip(first, later(), strict=True)]


def _makes_all_at_once(node: Node) -> bool:
    return isinstance(node, torch.autograd.function.BackwardCFunction)


def _joins(roots: Sequence[Node], goal: Node) -> list[tuple[Node, dict[int, GradientEdge]]]:
    """Return the nodes that lead to ``goal`` and have children that do not. Each comes with its
    edges to these children, by input index."""
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
    joins = []
    for node in (node for node, does in leads.items() if does):
        edges = {
            place: GradientEdge(child, i)
            for place, (child, i) in enumerate(node.next_functions)
            if child is not None and not leads[child]
        }
        if edges:
            joins.append((node, edges))
    return joins
