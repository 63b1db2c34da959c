"""The kernels and the memory of one graph of operators, as inductor would run it.

Inductor runs matmuls, attention and messages by libraries. It fuses everything between them: a
result that only fused operators read is never in memory. So a graph is read as *buffers*. A buffer
is in memory if a library reads or writes it, if the graph returns it, or if a reduction makes it.
All other results are recomputed inside the kernels that read them.

Kernels that read a common large buffer over the same number of elements, with no library call
between them, are one kernel. Its bytes are counted once.

The graph's memory follows from the order of its kernels: a buffer is allocated when it is written
and freed after its last reader. ``GraphCost.events`` has these events, so that the plan can run
them between those of other graphs (rank_trace.py).

Left out: inductor's own order of kernels, its reuse of a buffer by another shape, and its limit on
how much a kernel recomputes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch.fx import GraphModule, Node

from dtron.planner.graph_nodes import (
    access_of,
    base_of,
    by_library,
    inputs_of,
    is_reduction,
    is_view,
    memory_of,
    nodes_in,
    results_of,
)
from dtron.planner.operator_names import IN_PLACE, WITHOUT_KERNEL
from dtron.planner.operators import (
    Operator,
    called,
    library_operator,
    name_of,
    nbytes,
)


class Event(NamedTuple):
    """A change of memory, or a kernel.

    ``kind``: "allocate" or "free" of ``nbytes``; "drop" of the argument ``which``; "run" of the
        operator ``which``."""

    kind: str
    which: int = 0
    nbytes: int = 0


@dataclass(frozen=True)
class GraphCost:
    """What one call of a graph does, in order.

    ``operators``: its kernels and messages.
    ``returned``: the bytes that its events have allocated and that its results take over."""

    operators: tuple[Operator, ...]
    events: tuple[Event, ...]
    returned: int


@dataclass
class _Buffer:
    """A result in memory.

    ``node``: the node that writes it.
    ``library``: a library writes it.
    ``inside``: the operators that its kernel computes.
    ``reads``: the buffers that its kernel reads.
    ``elements``: the elements over which its kernel runs.
    ``level``: the library calls and sums of whole tensors on the longest way to it."""

    node: Node
    library: bool
    inside: list[Node] = field(default_factory=list)
    reads: list[Node] = field(default_factory=list)
    elements: int = 0
    level: int = 0

    @property
    def ends_a_kernel(self) -> bool:
        """Whether no kernel can both write and read it: a number that a whole tensor gives is
        there after the last element."""
        return self.library or all(x.numel() == 1 for x in results_of(self.node))


def read_graph(graph: GraphModule) -> GraphCost:
    """Return the cost of a graph whose nodes have fake tensors as ``meta["val"]``."""
    return _Reader(graph).cost()


class _Reader:
    def __init__(self, graph: GraphModule):
        self.nodes = list(graph.graph.nodes)
        self.outputs = set(nodes_in(self.nodes[-1].args))
        self.inputs = [n for n in self.nodes if n.op == "placeholder"]
        self.returned = {base_of(n) for n in self.outputs}
        self.buffers: dict[Node, _Buffer] = {}

    def cost(self) -> GraphCost:
        for node in self.nodes:
            if node.op == "call_function" and self._in_memory(node):
                self.buffers[node] = self._buffer(node)
        return self._run(self._kernels())

    def _users(self, node: Node) -> list[Node]:
        """The nodes that read a node, or a view of it."""
        found = []
        for user in node.users:
            found += self._users(user) if is_view(user) else [user]
        return found

    def _in_memory(self, node: Node) -> bool:
        name = name_of(node.target)
        if is_view(node) or name in WITHOUT_KERNEL or not results_of(node):
            return False
        if node in self.returned or by_library(node) or name in ("cat", "copy_"):
            return True
        return is_reduction(node) or any(map(by_library, self._users(node)))

    def _buffer(self, node: Node) -> _Buffer:
        library = by_library(node)
        buffer = _Buffer(node, library, [node])
        seen: set[Node] = set()
        stack = list(node.all_input_nodes)
        while stack:
            x = base_of(stack.pop())
            if x in seen:
                continue
            seen.add(x)
            if x in self.buffers or x.op == "placeholder":
                buffer.reads.append(x)
            elif x.op == "call_function" and name_of(x.target) not in WITHOUT_KERNEL:
                buffer.inside.append(x)
                stack += x.all_input_nodes
        own = [self.buffers[x] for x in buffer.reads if x in self.buffers]
        buffer.level = max((b.level + b.ends_a_kernel for b in own), default=0)
        sizes = [x.numel() for x in (*results_of(node), *inputs_of(node))]
        buffer.elements = int(max(sizes, default=0))
        return buffer

    def _kernels(self) -> list[list[_Buffer]]:
        """Return the kernels in the order in which they run: one library call each, or buffers
        that one fused kernel writes."""
        kernels: list[list[_Buffer]] = []
        writer: dict[Node, int] = {}

        def reaches(start: int, goal: int, seen: set[int]) -> bool:
            """Whether a kernel reads, directly or not, what the kernel ``goal`` writes."""
            if start == goal:
                return True
            seen.add(start)
            before = {writer[x] for b in kernels[start] for x in b.reads if x in writer}
            return any(reaches(i, goal, seen) for i in before - seen if i not in seen)

        def joins(i: int, buffer: _Buffer) -> bool:
            if not _fuses(kernels[i], buffer):
                return False
            others = {writer[x] for x in buffer.reads if x in writer} - {i}
            return not any(reaches(j, i, set()) for j in others)

        for buffer in self.buffers.values():
            home = len(kernels)
            if not buffer.library:
                home = next((i for i in reversed(range(home)) if joins(i, buffer)), home)
            if home == len(kernels):
                kernels.append([])
            kernels[home].append(buffer)
            writer[buffer.node] = home
        return self._in_order(kernels)

    def _in_order(self, kernels: list[list[_Buffer]]) -> list[list[_Buffer]]:
        """Sort kernels: each after the kernels whose buffers it reads, and else in the order of
        the graph."""
        places = {n: i for i, n in enumerate(self.nodes)}
        writer = {b.node: i for i, kernel in enumerate(kernels) for b in kernel}
        needs = [
            {writer[x] for b in kernel for x in b.reads if writer.get(x, i) != i}
            for i, kernel in enumerate(kernels)
        ]
        left = sorted(range(len(kernels)), key=lambda i: min(places[b.node] for b in kernels[i]))
        done: dict[int, None] = {}
        while left:
            ready = next((i for i in left if needs[i] <= done.keys()), left[0])
            left.remove(ready)
            done[ready] = None
        return [kernels[i] for i in done]

    def _run(self, kernels: list[list[_Buffer]]) -> GraphCost:
        last: dict[Node, int] = {}
        for i, kernel in enumerate(kernels):
            for buffer in kernel:
                last |= dict.fromkeys(map(memory_of, buffer.reads), i)
        kept = {memory_of(x) for x in self.outputs}
        tokens = {b.node: i for i, kernel in enumerate(kernels, start=1) for b in kernel}
        places = {n: i for i, n in enumerate(self.inputs)}
        events: list[Event] = []
        operators: list[Operator] = []
        for node in self.inputs:  # what no kernel reads is free at once
            if node not in last and node not in kept:
                events.append(Event("drop", places[node]))
        for i, kernel in enumerate(kernels):
            inside = {b.node for b in kernel}
            written = [b for b in kernel if self._leaves(b, inside, kept)]
            reads = list(dict.fromkeys(x for b in kernel for x in b.reads if x not in inside))
            owners = list(dict.fromkeys(map(memory_of, reads)))
            dead = [x for x in owners if last[x] == i and x not in kept]
            allocated = [Event("allocate", 0, _allocated(b.node)) for b in written]
            freed = [
                Event("drop", places[x]) if x in places else Event("free", 0, _allocated(x))
                for x in dead
                if x in places or _allocated(x)
            ]
            beside = kernel[0].library and name_of(kernel[0].node.target) not in IN_PLACE
            run = Event("run", i)
            # Other kernels may write their result over a buffer that they are the last to read.
            events += [*allocated, run, *freed] if beside else [*freed, *allocated, run]
            token = tokens.get(memory_of(kernel[0].node), 0)
            operators.append(self._operator(kernel, written, reads, token))
            unread = [b for b in written if b.node not in last and b.node not in kept]
            events += [Event("free", 0, _allocated(b.node)) for b in unread]
        sign = {"allocate": 1, "free": -1}
        returned = sum(sign.get(event.kind, 0) * event.nbytes for event in events)
        return GraphCost(tuple(operators), tuple(events), returned)

    def _leaves(self, buffer: _Buffer, inside: set[Node], kept: set[Node]) -> bool:
        """Whether a buffer is read outside of its kernel."""
        if buffer.library or buffer.node in kept or name_of(buffer.node.target) == "copy_":
            return True
        readers = [b for b in self.buffers.values() if buffer.node in b.reads]
        return any(b.node not in inside for b in readers)

    def _operator(
        self, kernel: list[_Buffer], written: list[_Buffer], reads: list[Node], token: int
    ) -> Operator:
        node = kernel[0].node
        if name_of(node.target) == "wait_tensor":
            return Operator("wait", "wait", token=token)
        if kernel[0].library:
            target, args = called(node.target, node.args)
            args = torch.fx.node.map_arg(tuple(args), lambda n: n.meta["val"])
            group = next((x for x in reversed(args) if isinstance(x, str)), "")
            made = library_operator(target, args, results_of(node), group)
            return replace(made, token=token)
        read = sum(nbytes(x) for n in reads for x in results_of(n))
        made = sum(nbytes(x) for b in written for x in results_of(b.node))
        name = "+".join(dict.fromkeys(name_of(b.node.target) for b in kernel))
        access = access_of([x for b in kernel for x in b.inside])
        return Operator("elementwise", name, 0.0, read, made, access=access)


def _fuses(kernel: list[_Buffer], buffer: _Buffer) -> bool:
    """Whether inductor would write this buffer in the same kernel."""
    first = kernel[0]
    if first.library or first.level != buffer.level:
        return False
    nodes, reads = {b.node for b in kernel}, {x for b in kernel for x in b.reads}
    own = set(buffer.reads)
    # Kernels that share a mask or a vector gain nothing.
    if not nodes & own and 4 * _bytes_of(reads & own) < _bytes_of(own):
        return False
    same = any(b.elements == buffer.elements for b in kernel)
    return same or (bool(nodes & set(buffer.reads)) and len(set(buffer.reads) - nodes) == 0)


def _bytes_of(nodes: Iterable[Node]) -> int:
    return sum(nbytes(x) for node in nodes for x in results_of(node))


def _allocated(node: Node) -> int:
    """The bytes that the allocator reserves for the results of a node."""
    if name_of(node.target) in ("copy_", "wait_tensor") or node.op == "placeholder":
        return 0
    return sum(rounded(nbytes(x)) for x in results_of(node))


def rounded(n: int) -> int:
    """Bytes in the blocks of torch's allocator."""
    return -(-n // 512) * 512
