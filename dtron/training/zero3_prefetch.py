"""Prefetch of weights in a compiled ZeRO-3 stage: weights are all-gathered one bucket ahead, and
gradients are sent one bucket later.

An all-gather by copy engines (distributed/copy_engine.py) uses no SM. But wherever a matmul waits
for a copy, or a copy for a matmul, there is a gap as long as several small kernels. Inductor's
scheduler moves collectives one by one, each ahead of enough compute to hide it. Under ZeRO-3 this
gives 28 such gaps per block. ``Zero3Prefetch`` reduces them to six. It sorts the all-gathers by the
first use of their weights and fills buckets of ``BUCKET`` bytes, about one block each. The
all-gathers of a bucket become one collective. This collective is issued at the first use of the
previous bucket, and waited for at the first use of its own bucket. These first uses are called
edges. The gradients of a block are sent at the next edge and waited for at the edge after it.
(FSDP prefetches in the same way, by units that it defines, Zhao et al. 2023, arXiv:2304.11277,
section 3.3. Here nothing in the model defines a unit.)

    edge:  |          use bucket 1         |          use bucket 2         |
           | gather 2, wait 1, send grads  | gather 3, wait 2, wait grads  |

The pass works on a graph of operators, forward or backward, without in-place writes. So any
topological order of the graph is the same program. Memory, besides the weights in use: one
prefetched bucket, and the gradients sent between two edges. A node stays in its place if one of its
inputs does not exist yet at the new place.

Left out:

* Weights that are all-gathered over two mesh axes in sequence: training/compiled_stage.py leaves
  them to inductor.
* Small buckets in FP8. The first use of an FP8 weight is its unpacking, and forward unpacks weights
  at the start of their block. So buckets smaller than a block are not hidden there.
* A search for the best bucket size. The compute of a bucket must be long enough to hide the next
  bucket; a larger bucket only costs memory.

Inductor takes such a pass as a ``CustomGraphPass``. This class is not public and is imported only
in this file."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._ops import HigherOrderOperator
from torch.fx import Graph, Node
from torch.utils.flop_counter import flop_registry

BUCKET = 2**27  # bytes of gathered weights
# Bytes of the first bucket, for which all compute waits. Each later bucket is twice as large, up to
# BUCKET.
FIRST = 2**25

_OPS, _ATEN = torch.ops._c10d_functional, torch.ops.aten
_COPIES = (_ATEN.cat.default, _ATEN.clone.default)


@dataclass
class WeightGather:
    """An all-gather that depends on one input of the stage only: on a weight.

    ``start``: the all-gather.
    ``made_of``: the nodes between the stage's input and the all-gather.
    ``given``: waits, views and concatenations of its output.
    ``use``: the first node that computes with its output."""

    start: Node
    made_of: list[Node]
    given: list[Node]
    use: Node

    @property
    def bytes(self) -> int:
        whole = self.start.meta["val"]
        return whole.numel() * whole.dtype.itemsize


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
        place = {n: i for i, n in enumerate(graph.nodes)}
        buckets = self._buckets(graph, place)
        if not buckets:
            return
        edges = [*(bucket[0].use for bucket in buckets), graph.output_node()]
        given = [_ordered({n for x in bucket for n in x.given}, place) for bucket in buckets] + [[]]
        asked: list[list[Node]] = [[] for _ in edges]
        late: dict[Node, int] = {}
        brought = {n for after in given for n in after}
        for start, tail in list(self._trailing_all_to_alls(graph, place, {*edges})):
            at = next(i for i, edge in enumerate(edges) if place[edge] > place[start])
            until = place[edges[min(at + 1, len(buckets))]]
            others = {x for n in tail for x in n.all_input_nodes} - {start, *tail}
            if any(x in brought or place[x] > until for x in others):
                continue  # it is combined with a tensor that does not exist yet at that edge
            if at == len(buckets):
                _start_early(start, place)
            else:
                asked[at].append(start)
            for n in tail:
                late[n] = max(late.get(n, 0), min(at + 1, len(buckets)))
        for i, after in enumerate(given):
            after += sorted(
                (n for n, at in late.items() if at == i), key=lambda n: _wait_order(n, place)
            )
        starts: list[list[Node]] = []
        moved: set[Node] = set()
        for before, bucket in zip([-1, *map(place.__getitem__, edges)], buckets, strict=False):
            late_parts = {n for x in bucket for n in x.made_of if place[n] > before} - moved
            moved |= late_parts
            starts.append(_ordered(late_parts, place) + _coalesce(graph, bucket))
        inputs = [n for n in graph.nodes if n.op == "placeholder"]
        for n in reversed(starts[0]):
            inputs[-1].append(n)
        for edge, sent, following, after in zip(
            edges, asked, [*starts[1:], [], []], given, strict=True
        ):
            for n in (*sent, *following, *after):
                edge.prepend(n)
        graph.lint()

    def _buckets(self, graph: Graph, place: dict[Node, int]) -> list[list[WeightGather]]:
        """Sort into buckets, by first use, all all-gathers that depend on no matmul, attention or
        other collective."""
        found = []
        for n in graph.nodes:
            if n.target is _OPS.all_gather_into_tensor.default and self._in_group(n):
                made_of = _reachable(
                    n, lambda x: x.all_input_nodes, lambda x, _: x.op != "placeholder"
                )
                given = _reachable(n, lambda x: x.users, _completes_gather)
                uses = {user for x in (n, *given) for user in x.users} - given
                sources = {
                    x for y in (n, *made_of) for x in y.all_input_nodes if x.op == "placeholder"
                }
                if (
                    uses
                    and len(sources) == 1
                    and not any(_is_compute(x) or _is_collective(x) for x in made_of)
                ):
                    use = min(uses, key=place.__getitem__)
                    found.append(
                        WeightGather(n, _ordered(made_of, place), _ordered(given, place), use)
                    )
        buckets: list[list[WeightGather]] = []
        room = 0
        for fetch in sorted(found, key=lambda x: place[x.use]):
            if room <= 0 and not (buckets and buckets[-1][-1].use is fetch.use):
                room = min(self._bucket, FIRST << len(buckets))
                buckets.append([])
            buckets[-1].append(fetch)
            room -= fetch.bytes
        return buckets

    def _trailing_all_to_alls(
        self, graph: Graph, place: dict[Node, int], edges: set[Node]
    ) -> Iterator[tuple[Node, list[Node]]]:
        """Find every all-to-all on which no matmul, attention or other collective depends, and all
        nodes that depend on it."""
        for n in graph.nodes:
            if n.target is _OPS.all_to_all_single.default and self._in_group(n):
                tail = _reachable(n, lambda x: x.users, lambda x, _: x.op != "output")
                waits_for_it = any(
                    _is_compute(x) or (_is_collective(x) and not _is_wait(x)) for x in tail
                )
                if not waits_for_it and not edges & {n, *tail}:
                    yield n, _ordered(tail, place)

    def _in_group(self, n: Node) -> bool:
        group = n.args[-1]
        return getattr(group, "group_name", group) == self._group


def _coalesce(graph: Graph, bucket: list[WeightGather]) -> list[Node]:
    """Replace the all-gathers of a bucket by one coalesced all-gather. All their users read its
    outputs now."""
    starts = [fetch.start for fetch in bucket]
    with graph.inserting_before(graph.output_node()):
        sent = [n.args[0] for n in starts]
        one = graph.call_function(
            _OPS.all_gather_into_tensor_coalesced.default, (sent, *starts[0].args[1:])
        )
        outs = [graph.call_function(operator.getitem, (one, i)) for i in range(len(starts))]
    one.meta["val"] = [n.meta["val"] for n in starts]
    for n, out in zip(starts, outs, strict=True):
        out.meta.update(n.meta)
        n.replace_all_uses_with(out)
        graph.erase_node(n)
    return [one, *outs]


def _ordered(nodes: Iterable[Node], place: dict[Node, int]) -> list[Node]:
    return sorted(nodes, key=place.__getitem__)


def _start_early(start: Node, place: dict[Node, int]) -> None:
    """Move an all-to-all to directly after the node that computes its input. The views and copies
    in between, which only lay out the input, move too."""
    laid_out = _reachable(
        start, lambda x: x.all_input_nodes, lambda x, _: _is_view(x) or x.target in _COPIES
    )
    chain = [*_ordered(laid_out, place), start]
    computed = max({x for n in chain for x in n.all_input_nodes} - laid_out, key=place.__getitem__)
    for n in reversed(chain):
        computed.append(n)


def _wait_order(n: Node, place: dict[Node, int]) -> tuple[int, int]:
    """Sort key of waits: the wait for the newest all-to-all comes first, because it covers the
    waits for all earlier ones."""
    source = n.all_input_nodes[0]
    return (0, -place[source]) if source.target is _OPS.all_to_all_single.default else (1, place[n])


def _reachable(
    n: Node, step: Callable[[Node], Iterable[Node]], goes: Callable[[Node, set[Node]], bool]
) -> set[Node]:
    """All nodes that can be reached from ``n``, without ``n``.

    ``step``: the neighbours of a node.
    ``goes``: whether the search includes a node, given the nodes found so far."""
    found, rest = {n}, [n]
    while rest:
        new = {x for x in step(rest.pop()) if goes(x, found)} - found
        found |= new
        rest += new
    return found - {n}


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


def _completes_gather(n: Node, found: set[Node]) -> bool:
    """Whether the node only waits for, views or concatenates nodes of ``found``. An all-gather puts
    shards one after the other along the first dim. A weight that is sharded along another dim is
    concatenated from them afterwards."""
    lays_out = _is_view(n) or _is_wait(n) or n.target in (operator.getitem, _ATEN.cat.default)
    return lays_out and found.issuperset(n.all_input_nodes)
