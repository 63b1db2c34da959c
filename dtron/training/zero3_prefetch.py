"""The order of a compiled stage under ZeRO-3: weights come a bucket ahead, gradients go a bucket
later.

A weight that copy engines carry (distributed/copy_engine.py) costs no processor on its way, but
each place where a product has to wait for a copy, or a copy for a product, is a gap as long as
several small kernels. Inductor's scheduler moves collectives one by one, each ahead by as much work
as hides it: under ZeRO-3 that is 28 such places in a block. ``Zero3Prefetch`` makes it six. It puts
all gathers of a bucket, ``BUCKET`` bytes of weights in the order in which they are used, about a
block, into one collective; asks for it where the bucket before is first used; and waits for it
where it is first used itself. What leaves a block, its gradients, is sent at the next of these
places and waited for at the one after. (FSDP prefetches by units of its own in the same way, Zhao
et al. 2023, arXiv:2304.11277, section 3.3; here nothing in the model says what a unit is.)

    edge:  |          use bucket 1         |          use bucket 2         |
           | gather 2, wait 1, send grads  | gather 3, wait 2, wait grads  |

It is a pass over a graph of operators, forward or backward, in which nothing is overwritten: so any
order in which each comes after what it needs is the same program. Beside the weights in use there
is a bucket on its way, and of gradients what leaves between two edges. What needs something that is
not there yet stays where it is.

Left out: weights that are gathered over two axes of the mesh one after the other
(training/compiled_stage.py leaves these to inductor); in 8 bits a weight is used where it is
unpacked, which forward does at the entry of its block, so that buckets smaller than a block are not
hidden there; and a search for the best size: a bucket must be long enough in use to hide the next,
and more only costs memory.

Inductor takes such a pass by a class that is not public, imported here alone."""

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
FIRST = (
    2**25
)  # of the first bucket, for which everything waits; each has twice the one before until then

_OPS, _ATEN = torch.ops._c10d_functional, torch.ops.aten
_COPIES = (_ATEN.cat.default, _ATEN.clone.default)


@dataclass
class WeightGather:
    """A gather of no more than one of the stage's inputs, as a weight's is: what it is made of,
    views and waits of what it gives, and the first that computes with them."""

    start: Node
    made_of: list[Node]
    given: list[Node]
    use: Node

    @property
    def bytes(self) -> int:
        whole = self.start.meta["val"]
        return whole.numel() * whole.dtype.itemsize


class Zero3Prefetch(CustomGraphPass):
    """The pass, for what goes over the process group of this name."""

    def __init__(self, group: str, bucket: int = BUCKET):
        self._group, self._bucket = group, bucket

    def uuid(self) -> tuple:
        """Compiled code is kept for who has the same."""
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
        for start, tail in list(self._sent(graph, place, {*edges})):
            at = next(i for i, edge in enumerate(edges) if place[edge] > place[start])
            until = place[edges[min(at + 1, len(buckets))]]
            others = {x for n in tail for x in n.all_input_nodes} - {start, *tail}
            if any(x in brought or place[x] > until for x in others):
                continue  # it joins what is not there yet
            if at == len(buckets):
                _hasten(start, place)
            else:
                asked[at].append(start)
            for n in tail:
                late[n] = max(late.get(n, 0), min(at + 1, len(buckets)))
        for i, after in enumerate(given):
            after += sorted((n for n, at in late.items() if at == i), key=lambda n: _soon(n, place))
        starts: list[list[Node]] = []
        moved: set[Node] = set()
        for before, bucket in zip([-1, *map(place.__getitem__, edges)], buckets, strict=False):
            late_parts = {n for x in bucket for n in x.made_of if place[n] > before} - moved
            moved |= late_parts
            starts.append(_ordered(late_parts, place) + _one(graph, bucket))
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
        """All gathers that need not wait for anything, in the order of their use."""
        found = []
        for n in graph.nodes:
            if n.target is _OPS.all_gather_into_tensor.default and self._ours(n):
                made_of = _reached(
                    n, lambda x: x.all_input_nodes, lambda x, _: x.op != "placeholder"
                )
                given = _reached(n, lambda x: x.users, _brought)
                uses = {user for x in (n, *given) for user in x.users} - given
                sources = {
                    x for y in (n, *made_of) for x in y.all_input_nodes if x.op == "placeholder"
                }
                if (
                    uses
                    and len(sources) == 1
                    and not any(_works(x) or _communicates(x) for x in made_of)
                ):
                    use = min(uses, key=place.__getitem__)
                    found.append(
                        WeightGather(n, _ordered(made_of, place), _ordered(given, place), use)
                    )
        buckets, room = [], 0
        for fetch in sorted(found, key=lambda x: place[x.use]):
            if room <= 0 and not (buckets and buckets[-1][-1].use is fetch.use):
                room = min(self._bucket, FIRST << len(buckets))
                buckets.append([])
            buckets[-1].append(fetch)
            room -= fetch.bytes
        return buckets

    def _sent(
        self, graph: Graph, place: dict[Node, int], edges: set[Node]
    ) -> Iterator[tuple[Node, list[Node]]]:
        """Every all-to-all for which no other work waits, and all that follows from it."""
        for n in graph.nodes:
            if n.target is _OPS.all_to_all_single.default and self._ours(n):
                tail = _reached(n, lambda x: x.users, lambda x, _: x.op != "output")
                waits_for_it = any(_works(x) or (_communicates(x) and not _waits(x)) for x in tail)
                if not waits_for_it and not edges & {n, *tail}:
                    yield n, _ordered(tail, place)

    def _ours(self, n: Node) -> bool:
        group = n.args[-1]
        return getattr(group, "group_name", group) == self._group


def _one(graph: Graph, bucket: list[WeightGather]) -> list[Node]:
    """One collective instead of a bucket's. All that reads them reads it now."""
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


def _hasten(start: Node, place: dict[Node, int]) -> None:
    """To where what it sends has been computed, with what only lays that out."""
    laid_out = _reached(
        start, lambda x: x.all_input_nodes, lambda x, _: _views(x) or x.target in _COPIES
    )
    chain = [*_ordered(laid_out, place), start]
    computed = max({x for n in chain for x in n.all_input_nodes} - laid_out, key=place.__getitem__)
    for n in reversed(chain):
        computed.append(n)


def _soon(n: Node, place: dict[Node, int]) -> tuple[int, int]:
    """The wait for what was sent last is to come first: it is one for all others."""
    source = n.all_input_nodes[0]
    return (0, -place[source]) if source.target is _OPS.all_to_all_single.default else (1, place[n])


def _reached(
    n: Node, step: Callable[[Node], Iterable[Node]], goes: Callable[[Node, set[Node]], bool]
) -> set[Node]:
    """All that steps lead to from n, as far as it ``goes``, given what has been reached."""
    found, rest = {n}, [n]
    while rest:
        new = {x for x in step(rest.pop()) if goes(x, found)} - found
        found |= new
        rest += new
    return found - {n}


def _waits(n: Node) -> bool:
    return n.target is _OPS.wait_tensor.default


def _communicates(n: Node) -> bool:
    return getattr(n.target, "namespace", "") == "_c10d_functional"


def _works(n: Node) -> bool:
    """Products and attention, and what a compiler does not look into."""
    return (
        isinstance(n.target, HigherOrderOperator)
        or getattr(n.target, "overloadpacket", None) in flop_registry
    )


def _views(n: Node) -> bool:
    schema = getattr(n.target, "_schema", None)
    return schema is not None and any(out.alias_info is not None for out in schema.returns)


def _brought(n: Node, found: set[Node]) -> bool:
    """Whether it does no more to what was found than wait for it, look at it, and put its pieces
    together: gathered along another dim than the first, they come one after the other."""
    lays_out = _views(n) or _waits(n) or n.target in (operator.getitem, _ATEN.cat.default)
    return lays_out and found.issuperset(n.all_input_nodes)
