"""Prefetch of weights in a compiled ZeRO-3 stage: weights are all-gathered one bucket ahead, and
gradients are sent one bucket later.

An all-gather by copy engines (distributed/copy_engine.py) uses no SM. But wherever a matmul waits
for a copy, or a copy for a matmul, there is a gap as long as several small kernels. Inductor's
scheduler moves collectives one by one, each ahead of enough compute to hide it. Under ZeRO-3 this
gives 28 gaps per block. ``Zero3Prefetch`` reduces them to six gaps per block. It sorts the
all-gathers by the first use of their weights and fills buckets of ``BUCKET`` bytes, about one block
each. The all-gathers of a bucket become one coalesced all-gather. The first use of a bucket is
called its edge. The all-gather of a bucket is issued at the edge of the previous bucket, and waited
for at its own edge. The gradients of a block are sent at the next edge and waited for at the edge
after it. (FSDP prefetches in the same way, by units that the model defines, Zhao et al. 2023,
arXiv:2304.11277, section 3.3. Here nothing in the model defines a unit.)

    edge:  |          use bucket 1         |          use bucket 2         |
           | gather 2, wait 1, send grads  | gather 3, wait 2, wait grads  |

The pass works on a graph of operators, forward or backward, without in-place writes. So any
topological order of the graph is the same program. Memory, besides the weights in use: one
prefetched bucket, and the gradients sent between two edges. A node stays where it is if one of its
inputs does not exist yet at the new position.

Left out:

* Weights that are all-gathered over two mesh axes in sequence: training/compiled_stage.py leaves
  these weights to inductor.
* Small buckets in FP8. The first use of an FP8 weight is its unpacking, and forward unpacks weights
  at the start of their block. So buckets smaller than a block are not hidden.
* A search for the best bucket size. The compute of a bucket must be long enough to hide the next
  bucket; a larger bucket only costs memory.

Inductor takes such a pass as a ``CustomGraphPass``. This class is not public and is imported only
in this file."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._ops import HigherOrderOperator
from torch.fx import Graph, Node
from torch.utils.flop_counter import flop_registry

BUCKET = 2**27  # bytes of gathered weights
# Bytes of the first bucket: all compute waits for this bucket. Each later bucket is twice as large,
# up to BUCKET.
FIRST = 2**25

_OPS, _ATEN = torch.ops._c10d_functional, torch.ops.aten
_COPIES = (_ATEN.cat.default, _ATEN.clone.default)


@dataclass
class WeightGather:
    """An all-gather that depends on one input of the stage only: on a weight.

    ``start``: the all-gather.
    ``inputs``: the nodes between the stage's input and the all-gather.
    ``outputs``: waits, views and concatenations of its output.
    ``first_use``: the first node that computes with its output."""

    start: Node
    inputs: set[Node]
    outputs: set[Node]
    first_use: Node

    @property
    def bytes(self) -> int:
        gathered = self.start.meta["val"]
        return gathered.numel() * gathered.dtype.itemsize


class Zero3Prefetch(CustomGraphPass):
    """The pass, for the collectives of one process group.

    ``group``: the group's name.
    ``bucket``: bytes of a bucket."""

    def __init__(self, group: str, bucket: int = BUCKET):
        self._group, self._bucket = group, bucket

    def uuid(self) -> tuple:
        """The key of this pass in inductor's cache of compiled code."""
        return get_hash_for_files((__file__,)), self._group, self._bucket

    def __call__(self, graph: Graph) -> None:
        position = {n: i for i, n in enumerate(graph.nodes)}
        buckets = self._buckets(position)
        if not buckets:
            return
        edges = [*(bucket[0].first_use for bucket in buckets), graph.output_node()]
        outputs = [{n for x in bucket for n in x.outputs} for bucket in buckets]
        waits = [*(_in_order(nodes, position) for nodes in outputs), []]
        sends = self._delay_gradients(position, edges, waits)
        gathers = _start_gathers(graph, position, edges, buckets)
        placeholders = [n for n in graph.nodes if n.op == "placeholder"]
        for n in reversed(gathers[0]):
            placeholders[-1].append(n)
        # At an edge: send gradients, issue the all-gather of the next bucket, wait for this bucket.
        for edge, *nodes in zip(edges, sends, [*gathers[1:], [], []], waits, strict=True):
            for n in chain.from_iterable(nodes):
                edge.prepend(n)
        graph.lint()

    def _delay_gradients(
        self, position: dict[Node, int], edges: list[Node], waits: list[list[Node]]
    ) -> list[list[Node]]:
        """Return, for each edge, the all-to-alls to send there. The waits for these all-to-alls,
        and all nodes that depend on the waits, are added to ``waits`` of the edge after it. Behind
        the last bucket's edge, an all-to-all starts as soon as its input is computed."""
        sends: list[list[Node]] = [[] for _ in edges]
        last = len(edges) - 1
        wait_edge: dict[Node, int] = {}
        gather_outputs = {n for nodes in waits for n in nodes}
        for start, tail in list(self._trailing_all_to_alls(position, {*edges})):
            at = next(i for i, edge in enumerate(edges) if position[edge] > position[start])
            wait_at = min(at + 1, last)
            others = {x for n in tail for x in n.all_input_nodes} - {start, *tail}
            if any(x in gather_outputs or position[x] > position[edges[wait_at]] for x in others):
                continue  # it is combined with a tensor that does not exist yet at that edge
            if at == last:
                _start_early(start, position)
            else:
                sends[at].append(start)
            for n in tail:
                wait_edge[n] = max(wait_edge.get(n, 0), wait_at)
        for i, nodes in enumerate(waits):
            delayed = (n for n, at in wait_edge.items() if at == i)
            nodes += sorted(delayed, key=lambda n: _wait_order(n, position))
        return sends

    def _buckets(self, position: dict[Node, int]) -> list[list[WeightGather]]:
        """Sort the all-gathers of weights into buckets, by first use."""
        gathers = [
            gather
            for n in position
            if n.target is _OPS.all_gather_into_tensor.default and self._in_group(n)
            if (gather := _weight_gather(n, position)) is not None
        ]
        buckets: list[list[WeightGather]] = []
        room = 0
        for gather in sorted(gathers, key=lambda x: position[x.first_use]):
            if room <= 0 and not (buckets and buckets[-1][-1].first_use is gather.first_use):
                room = min(self._bucket, FIRST << len(buckets))
                buckets.append([])
            buckets[-1].append(gather)
            room -= gather.bytes
        return buckets

    def _trailing_all_to_alls(
        self, position: dict[Node, int], edges: set[Node]
    ) -> Iterator[tuple[Node, list[Node]]]:
        """Find every all-to-all on which no matmul, attention or other collective depends, and all
        nodes that depend on the all-to-all."""
        for n in position:
            if n.target is _OPS.all_to_all_single.default and self._in_group(n):
                tail = _reachable(n, _users, _is_no_output)
                needed = any(_is_compute(x) or _is_collective(x) for x in tail if not _is_wait(x))
                if not needed and not edges & {n, *tail}:
                    yield n, _in_order(tail, position)

    def _in_group(self, n: Node) -> bool:
        group = n.args[-1]
        return getattr(group, "group_name", group) == self._group


def _weight_gather(n: Node, position: dict[Node, int]) -> WeightGather | None:
    """Return the all-gather ``n`` with the nodes around it. None if the all-gather depends on a
    matmul, on attention, on another collective, or on several inputs of the stage."""
    inputs = _reachable(n, _inputs, _is_no_placeholder)
    outputs = _reachable(n, _users, _completes_gather)
    uses = {user for x in (n, *outputs) for user in x.users} - outputs
    sources = {x for y in (n, *inputs) for x in y.all_input_nodes if x.op == "placeholder"}
    if not uses or len(sources) != 1 or any(_is_compute(x) or _is_collective(x) for x in inputs):
        return None
    return WeightGather(n, inputs, outputs, min(uses, key=position.__getitem__))


def _start_gathers(
    graph: Graph,
    position: dict[Node, int],
    edges: list[Node],
    buckets: list[list[WeightGather]],
) -> list[list[Node]]:
    """Return, for each bucket, the nodes to move to the edge before it: its all-gather, and the
    inputs of the all-gather that are computed behind this edge."""
    gathers: list[list[Node]] = []
    moved: set[Node] = set()
    for before, bucket in zip([-1, *map(position.__getitem__, edges)], buckets, strict=False):
        late = {n for x in bucket for n in x.inputs if position[n] > before} - moved
        moved |= late
        gathers.append(_in_order(late, position) + _coalesce(graph, bucket))
    return gathers


def _coalesce(graph: Graph, bucket: list[WeightGather]) -> list[Node]:
    """Replace the all-gathers of a bucket by one coalesced all-gather, whose outputs all users read
    from now on."""
    starts = [gather.start for gather in bucket]
    with graph.inserting_before(graph.output_node()):
        shards = [n.args[0] for n in starts]
        coalesced = graph.call_function(
            _OPS.all_gather_into_tensor_coalesced.default, (shards, *starts[0].args[1:])
        )
        outs = [graph.call_function(operator.getitem, (coalesced, i)) for i in range(len(starts))]
    coalesced.meta["val"] = [n.meta["val"] for n in starts]
    for n, out in zip(starts, outs, strict=True):
        out.meta.update(n.meta)
        n.replace_all_uses_with(out)
        graph.erase_node(n)
    return [coalesced, *outs]


def _in_order(nodes: Iterable[Node], position: dict[Node, int]) -> list[Node]:
    return sorted(nodes, key=position.__getitem__)


def _start_early(start: Node, position: dict[Node, int]) -> None:
    """Move an all-to-all to directly after the node that computes its input. The views and copies
    in between, which only lay out the input, move too."""
    laid_out = _reachable(start, _inputs, _lays_out_input)
    moved = [*_in_order(laid_out, position), start]
    sources = {x for n in moved for x in n.all_input_nodes} - laid_out
    computed = max(sources, key=position.__getitem__)
    for n in reversed(moved):
        computed.append(n)


def _wait_order(n: Node, position: dict[Node, int]) -> tuple[int, int]:
    """Sort key of waits: the wait for the newest all-to-all comes first, because it covers the
    waits for all earlier all-to-alls."""
    source = n.all_input_nodes[0]
    if source.target is _OPS.all_to_all_single.default:
        return 0, -position[source]
    return 1, position[n]


def _reachable(
    n: Node,
    neighbours: Callable[[Node], Iterable[Node]],
    included: Callable[[Node, set[Node]], bool],
) -> set[Node]:
    """All nodes that can be reached from ``n``, without ``n``.

    ``included``: whether the search includes a node, given the nodes reached so far."""
    reached, rest = {n}, [n]
    while rest:
        new = {x for x in neighbours(rest.pop()) if included(x, reached)} - reached
        reached |= new
        rest += new
    return reached - {n}


_inputs, _users = operator.attrgetter("all_input_nodes"), operator.attrgetter("users")


def _is_no_placeholder(n: Node, reached: set[Node]) -> bool:
    return n.op != "placeholder"


def _is_no_output(n: Node, reached: set[Node]) -> bool:
    return n.op != "output"


def _lays_out_input(n: Node, reached: set[Node]) -> bool:
    return _is_view(n) or n.target in _COPIES


def _is_wait(n: Node) -> bool:
    return n.target is _OPS.wait_tensor.default


def _is_collective(n: Node) -> bool:
    return getattr(n.target, "namespace", "") == "_c10d_functional"


def _is_compute(n: Node) -> bool:
    """Whether the node is a matmul, attention, or an operator that is opaque to the compiler."""
    return (
        isinstance(n.target, HigherOrderOperator)
        or getattr(n.target, "overloadpacket", None) in flop_registry
    )


def _is_view(n: Node) -> bool:
    schema = getattr(n.target, "_schema", None)
    return schema is not None and any(out.alias_info is not None for out in schema.returns)


def _completes_gather(n: Node, reached: set[Node]) -> bool:
    """Whether the node only waits for, views or concatenates nodes of ``reached``. An all-gather
    concatenates shards along the first dim. A weight that is sharded along another dim is
    concatenated from these shards afterwards."""
    lays_out = _is_view(n) or _is_wait(n) or n.target in (operator.getitem, _ATEN.cat.default)
    return lays_out and reached.issuperset(n.all_input_nodes)
