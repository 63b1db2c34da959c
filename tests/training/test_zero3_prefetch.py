"""The prefetch pass of ZeRO-3: another order, fewer collectives, and the same values. On drawn
graphs and on those of a real stage."""

from __future__ import annotations

import operator
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.fx import Graph, GraphModule, Interpreter, Node

import dtron.training.zero3_prefetch
from dtron.training.zero3_prefetch import Zero3Prefetch

OPS, ATEN = torch.ops._c10d_functional, torch.ops.aten
GATHER, TOGETHER = OPS.all_gather_into_tensor.default, OPS.all_gather_into_tensor_coalesced.default
EXCHANGE, WAIT, PRODUCT = OPS.all_to_all_single.default, OPS.wait_tensor.default, ATEN.mm.default
N, RANKS = 4, 2


class Alone(Interpreter):
    """Run a graph without other ranks. The values of the other rank are this rank's plus one."""

    def call_function(self, target, args, kwargs):
        both = lambda x: torch.cat([x, x + 1])
        stand_ins = {
            GATHER: lambda x, *_: both(x),
            TOGETHER: lambda xs, *_: [both(x) for x in xs],
            EXCHANGE: lambda x, *_: x.flip(0),
            WAIT: lambda x: x,
        }
        return super().call_function(stand_ins.get(target, target), args, kwargs)


@dataclass
class Drawn:
    """A graph of a stage: matmuls with weights, gradients that leave it, and other collectives."""

    graph: Graph = field(default_factory=Graph)
    leave: list[Node] = field(default_factory=list)

    def call(self, target, *args, like: tuple[int, ...] = (N, N)) -> Node:
        node = self.graph.call_function(target, args)
        node.meta["val"] = torch.empty(like, device="meta")
        return node

    def whole(self, w: Node, along: int) -> Node:
        size = (N, N) if along == 0 else (N * RANKS, N // RANKS)
        got = self.call(WAIT, self.call(GATHER, w, RANKS, "dp", like=size), like=size)
        if along == 0:
            return got
        pieces = self.call(ATEN.split.Tensor, got, N)
        return self.call(
            ATEN.cat.default, [self.call(operator.getitem, pieces, i) for i in range(RANKS)], along
        )

    def product(self, x: Node, w: Node) -> Node:
        return self.call(ATEN.div.Scalar, self.call(PRODUCT, x, w), 7.0)

    def exchanged(self, x: Node, group: str = "dp") -> Node:
        return self.call(WAIT, self.call(EXCHANGE, x, [2, 2], [2, 2], group))


KINDS = (
    *("product", "both", "again", "mixed", "constant", "part", "two parts"),
    *("gradient", "kept gradient", "two gradients", "joined gradient"),
    *("exchange", "other group", "activation"),
)


def drawn(plan: list[tuple[str, int, bool]]) -> GraphModule:
    """Build a graph from a plan. A step has a kind, the dim along which its weight is gathered, and
    whether the gather is here or at the start."""
    d = Drawn()
    x = d.graph.placeholder("x")
    parts = [d.graph.placeholder(f"w{i}") for i in range(len(plan))]
    x.meta["val"] = torch.empty(N, N, device="meta")
    for w, (kind, along, _) in zip(parts, plan, strict=True):
        flat = along == 0 or kind in ("constant", "part", "two parts")
        w.meta["val"] = torch.empty((N // RANKS, N) if flat else (N, N // RANKS), device="meta")
    first = [
        d.whole(w, along) if not here and kind in ("product", "both", "mixed") else None
        for w, (kind, along, here) in zip(parts, plan, strict=True)
    ]
    wholes: list[Node] = []
    kept: list[Node] = []
    joined: list[Node] = []
    constant = part = None
    for (kind, along, _), w, ready in zip(plan, parts, first, strict=True):
        if kind in ("product", "both"):
            w = d.call(ATEN.neg.default, w) if kind == "both" and ready is None else w
            wholes.append(ready if ready is not None else d.whole(w, along))
            x = d.product(x, wholes[-1])
        elif kind == "again" and wholes:
            x = d.product(x, wholes[along % len(wholes)])
        elif kind == "gradient":
            d.leave.append(
                d.call(ATEN.abs.default, d.exchanged(d.call(ATEN.t.default, d.product(x, x))))
            )
        elif kind == "kept gradient":  # and sent at the end
            kept.append(d.product(x, x))
        elif kind == "constant":  # an input of several gathers, used elsewhere too
            if constant is None:
                constant = d.call(ATEN.full.default, [], 3.0, like=())
            x = d.call(
                ATEN.mul.Tensor,
                d.product(x, d.whole(d.call(ATEN.mul.Tensor, w, constant), 0)),
                constant,
            )
        elif kind in ("part", "two parts"):  # the shard itself is used, too
            if part is None:
                part = d.call(ATEN.abs.default, w)
            x = d.call(ATEN.mul.Tensor, x, d.call(ATEN.sum.default, part, like=()))
            if kind == "two parts":
                x = d.product(x, d.whole(d.call(ATEN.neg.default, part), 0))
            x = d.product(x, d.whole(part, 0))
        elif kind == "joined gradient":  # concatenated with a later value
            joined.append(d.exchanged(x))
            joined[-1].args[0].meta["stays"] = True
        elif kind == "mixed":  # a weight concatenated with another value
            w = ready if ready is not None else d.whole(w, along)
            line = d.call(ATEN.cat.default, [w, x], like=(2 * N, N))
            x = d.product(x, d.call(ATEN.slice.Tensor, line, 0, 1, N + 1))
        elif kind == "two gradients":  # their sum leaves
            a, b = d.exchanged(x), d.exchanged(d.product(x, x))
            d.leave.append(d.call(ATEN.add.Tensor, a, b))
        elif kind in ("exchange", "other group"):
            x = d.product(x, d.exchanged(x, "dp" if kind == "exchange" else "tp"))
        elif kind == "activation":
            half = d.call(ATEN.slice.Tensor, x, 0, 0, N // RANKS)
            x = d.product(x, d.call(WAIT, d.call(GATHER, half, RANKS, "dp")))
    d.leave += [d.exchanged(d.call(ATEN.t.default, g)) for g in kept]
    d.leave += [d.call(ATEN.add.Tensor, g, x) for g in joined]
    d.graph.output((x, *d.leave))
    d.graph.lint()
    return GraphModule({}, d.graph)


PLANS = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 1), st.booleans()), max_size=12)


def values(module: GraphModule) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    sizes = [n.meta["val"].shape for n in module.graph.nodes if n.op == "placeholder"]
    return list(Alone(module).run(*(torch.randn(s, generator=random) for s in sizes)))


def moved(module: GraphModule, bucket: int) -> GraphModule:
    module = deepcopy(module)
    Zero3Prefetch("dp", bucket)(module.graph)
    module.recompile()
    return module


def check_order(graph: Graph) -> None:
    """Each bucket is issued at the first use of the bucket before, neither later nor earlier. A
    reduced gradient is waited for one edge after it was sent, or at the end."""
    place = {n: i for i, n in enumerate(graph.nodes)}
    asked = [
        n for n in graph.nodes if n.target in (TOGETHER, GATHER) and first_use(n, place) is not None
    ]
    asked = [n for n in asked if not comes_of_product(n)]
    uses = [first_use(n, place) for n in asked]
    assert uses == sorted(uses)
    for i in range(1, len(asked)):
        assert place[asked[i]] < uses[i - 1] and (i == 1 or place[asked[i]] > uses[i - 2])
    products = [place[n] for n in graph.nodes if n.target is PRODUCT]
    for n in graph.nodes:
        leaves = n.target is EXCHANGE and n.args[-1] == "dp" and not feeds_product(n)
        if leaves and uses and "stays" not in n.meta:
            wait = min(place[user] for user in n.users)
            edges = [use for use in uses if place[n] < use < wait]
            sources = reach(n, lambda x: x.all_input_nodes)
            made = max((place[x] for x in sources if x.target is PRODUCT), default=-1)
            at_once = not any(made < p < place[n] for p in products)
            assert len(edges) == 1 or (at_once and not any(p > wait for p in products))


def reach(n: Node, step: Callable) -> set[Node]:
    found: set[Node] = set()
    rest = [n]
    while rest:
        new = set(step(rest.pop())) - found
        found |= new
        rest += new
    return found


def feeds_product(n: Node) -> bool:
    return any(x.target is PRODUCT for x in reach(n, lambda x: x.users))


def comes_of_product(n: Node) -> bool:
    return any(x.target is PRODUCT for x in reach(n, lambda x: x.all_input_nodes))


def first_use(n: Node, place: dict[Node, int]) -> int | None:
    return min((place[x] for x in reach(n, lambda x: x.users) if x.target is PRODUCT), default=None)


@given(PLANS, st.sampled_from([1, 100, 200, 10**6]))
def test_another_order_is_the_same_program(plan, bucket):
    before = drawn(plan)
    after = moved(before, bucket)
    for want, got in zip(values(before), values(after), strict=True):
        assert torch.equal(want, got)
    count = lambda module, target: sum(n.target is target for n in module.graph.nodes)
    assert all(count(before, t) == count(after, t) for t in (PRODUCT, EXCHANGE))
    check_order(after.graph)


FULL = [("product", i % 2, i % 3 == 0) for i in range(6)]
SENDS = [step for i in range(6) for step in (("product", i % 2, True), ("gradient", 0, True))]


def test_buckets_are_one_collective_each():
    """A weight has 64 bytes. A bucket holds one, two or all weights. The first bucket has no more
    than FIRST."""
    sizes = {64: [1] * 6, 100: [2] * 3, 10**6: [6]}
    for bucket, want in sizes.items():
        graph = moved(drawn(FULL), bucket).graph
        assert [len(n.args[0]) for n in graph.nodes if n.target is TOGETHER] == want


def test_the_first_bucket_is_small(monkeypatch):
    monkeypatch.setattr(dtron.training.zero3_prefetch, "FIRST", 64)
    graph = moved(drawn([("product", 0, True)] * 12), 256).graph
    assert [len(n.args[0]) for n in graph.nodes if n.target is TOGETHER] == [1, 2, 4, 4, 1]


def swapped(graph, bucket, one=dtron.training.zero3_prefetch._coalesce):
    nodes = one(graph, bucket)
    outs = nodes[1:]
    for n, i in zip(outs, reversed(range(len(outs))), strict=True):
        n.args = (nodes[0], i)
    return nodes


def mixed_up(n, found):
    return n.target in (WAIT, ATEN.cat.default)


@pytest.mark.parametrize(
    ("name", "mutant", "plan"),
    [
        ("_coalesce", swapped, [("product", 0, True)] * 4),  # a weight for another
        (
            "_completes_gather",
            mixed_up,
            [("product", 0, True), ("mixed", 0, False)],
        ),  # x before it is computed
        (
            "_start_early",
            lambda start, place: None,
            [*SENDS, ("kept gradient", 0, True), ("again", 0, True)],
        ),
        (
            "_wait_order",
            lambda n, place: (0, -place[n]),
            SENDS,
        ),  # a user of a wait before the wait
    ],
)
def test_mutants_are_noticed(monkeypatch, name, mutant, plan):
    def check():
        before = drawn(plan)
        after = moved(before, 100)
        assert all(map(torch.equal, values(before), values(after)))
        check_order(after.graph)

    check()
    monkeypatch.setattr(dtron.training.zero3_prefetch, name, mutant)
    with pytest.raises((AssertionError, RuntimeError)):
        check()


def test_a_graph_without_gathers_is_left_alone():
    before = drawn([("gradient", 0, True), ("exchange", 0, True), ("gradient", 0, True)])
    after = moved(before, 100)
    assert [n.name for n in before.graph.nodes] == [n.name for n in after.graph.nodes]


def test_code_is_kept_for_the_same_pass_alone():
    assert Zero3Prefetch("1").uuid() == Zero3Prefetch("1").uuid()
    assert (
        Zero3Prefetch("1").uuid() != Zero3Prefetch("2").uuid()
        and Zero3Prefetch("1").uuid() != Zero3Prefetch("1", 64).uuid()
    )
