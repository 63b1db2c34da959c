"""The memory and the operators of one rank, while the rank's program runs on fake tensors.

A fake tensor has a shape, a dtype and a storage, and no numbers. So a step of any size runs in
seconds on any machine. ``RankTrace`` sees each operator of the program: it counts the bytes of new
storages until the last tensor of each is gone, and it writes down what each kernel reads, writes
and computes. The compiled parts of a step do not run operator by operator. ``Counting`` takes the
place of inductor's code generator: a graph is read once (graph_cost.py), and each call of it
repeats its allocations and its kernels.

Fake tensors are private to torch. The program does not know of them."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode_stack,
    _pop_mode_temporarily,
)

from dtron.distributed.saved_tensors import storage_id
from dtron.planner.graph_cost import GraphCost, read_graph, rounded
from dtron.planner.graph_nodes import memory_of
from dtron.planner.operator_names import VIEWS, WITHOUT_KERNEL
from dtron.planner.operators import (
    Operator,
    library_operator,
    name_of,
    tensors_in,
)
from dtron.planner.planned_attention import attention
from dtron.torch_compile import fake_mode, is_fake, tracer
from dtron.training.compiled_units import join_tensors, split_tensors
from dtron.training.traced_function import GraphCompiler, TracedFunction

ACTIVATIONS, GRADIENTS, WORKING = "activations", "gradients", "working"
MESSAGES, HOST = "messages", "host"


@contextmanager
def fake_tensors(trace: RankTrace) -> Iterator[None]:
    """Tensors that are made inside have no numbers, and ``trace`` sees them. They are on the CPU,
    for code that chooses the kernels of a GPU (``planned`` in torch_compile.py)."""
    mode = fake_mode(static_shapes=True, allow_non_fake_inputs=True)
    mode.attention = attention
    mode.kernels, mode.as_kernel, mode.pause = "cuda", partial(_as_kernel, mode), _pause
    mode.on_host = partial(trace.making, HOST)
    with mode, trace:
        yield


@contextmanager
def _pause() -> Iterator[None]:
    """No trace sees what runs inside: a compiler traces it."""
    modes = _get_current_dispatch_mode_stack()
    if modes and isinstance(modes[-1], RankTrace):
        with _pop_mode_temporarily():
            yield
    else:
        yield


def _as_kernel(mode: Any, fn: Callable) -> Callable:
    """Return a function without intermediate tensors in memory."""

    def run(*args: Any) -> Any:
        with tracer(mode):
            return fn(*args)

    return run


@dataclass
class Memory:
    """The bytes of one rank.

    ``live``: bytes by kind, now.
    ``peak``: the bytes by kind at the largest total.
    ``on_host``, ``host``: bytes in the host's memory, now and at most."""

    live: Counter[str] = field(default_factory=Counter)
    peak: Counter[str] = field(default_factory=Counter)
    total: int = 0
    largest: int = 0
    on_host: int = 0
    host: int = 0

    def add(self, kind: str, n: int) -> None:
        if kind == HOST:
            self.on_host += n
            self.host = max(self.host, self.on_host)
            return
        self.live[kind] += n
        self.total += n
        if self.total > self.largest:
            self.largest, self.peak = self.total, Counter(self.live)

    def begin(self) -> None:
        """Forget the peak so far."""
        self.largest, self.peak = self.total, Counter(self.live)


class RankTrace(TorchDispatchMode):
    """``with RankTrace() as trace``: collects ``trace.memory`` and ``trace.operators``.

    ``kind``: the kind of the storages that are made now; see ``making``."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.memory = Memory()
        self.operators: list[Operator] = []
        self.kind = WORKING
        self._known: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
        self._tokens: dict[int, int] = {}  # ``id`` of a collective's storage: its token
        self._token = 0

    @contextmanager
    def making(self, kind: str) -> Iterator[None]:
        """Storages that are made inside are of this kind."""
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before

    def mark(self, name: str) -> None:
        """Note a place in the order of the operators."""
        self.operators.append(Operator("mark", name))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            # The first call of a kind also runs the operator on the global shapes, to find the
            # result's placements. No trace sees what runs here.
            func(*args, **(kwargs or {}))
            return NotImplemented  # DTensor calls the operators of this rank's tensors
        if name_of(func) == "wait_tensor":  # a fake wait would allocate its result again
            token = self._tokens.get(storage_id(args[0]), 0)
            self.operators.append(Operator("wait", "wait", token=token))
            return args[0]
        out = func(*args, **(kwargs or {}))
        name, results = name_of(func), [x for x in tensors_in(out) if is_fake(x)]
        written = out if results or not name.endswith("_") else args[0]  # _foreach_add_: no result
        collective = func.namespace in ("_c10d_functional", "_dtensor")
        for x in results:
            self.track(x, MESSAGES if collective and self.kind == WORKING else self.kind)
        if (
            tensors_in(written)
            and name not in VIEWS
            and name not in WITHOUT_KERNEL
            and func.namespace != "prim"
        ):
            group = next((x for x in reversed(args) if isinstance(x, str)), "")
            made = library_operator(func, args, written, group)
            if any(self._known.get(x.untyped_storage()) == HOST for x in tensors_in((args, out))):
                made = replace(made, kind="host")
            if made.kind == "collective":
                self._token += 1
                made = replace(made, token=self._token)
                self._tokens |= dict.fromkeys(map(storage_id, results), self._token)
            self.operators.append(made)
        return out

    def track(self, x: Tensor, kind: str) -> None:
        """Count the storage of a tensor, until it is gone."""
        storage = x.untyped_storage()
        if storage in self._known:
            return
        self._known[storage] = kind
        n = rounded(storage.nbytes())
        self.memory.add(kind, n)
        weakref.finalize(storage, self.memory.add, kind, -n)

    def run(self, cost: GraphCost, args: list[Any]) -> None:
        """Run the events of a graph."""
        first, self._token = self._token, self._token + len(cost.operators) + 1
        add = self.memory.add
        for kind, index, n in cost.events:
            if kind == "run":
                operator = cost.operators[index]
                if operator.token:
                    operator = replace(operator, token=first + operator.token)
                self.operators.append(operator)
            elif kind == "drop":
                args[index] = None
            else:
                add(WORKING, n if kind == "allocate" else -n)
        add(WORKING, -cost.returned)


class Counting:
    """A ``CodeGenerator`` (torch_compile.py) that counts.

    ``trace``: takes the operators and allocations of each call. It may change between ranks that
        share compiled functions."""

    def __init__(self, trace: RankTrace):
        self.trace = trace

    def graph(
        self, graph: Any, inputs: Sequence[Any], weights: Sequence[int] = (), **options: Any
    ) -> Callable:
        late = set(weights) if options.get("is_backward") else set()
        planned = _PlannedGraph(self, graph, late)

        def run(args: list[Any]) -> list[Any]:
            return planned(args)

        run.__dict__["_boxed_call"] = True  # torch hands its references to the arguments over
        return run

    def function(self, fn: Callable) -> Callable:
        compiled = TracedFunction(_call, GraphCompiler(self))

        def run(*args: Any) -> Any:
            call, tensors = split_tensors((fn, *args))
            kind = compiled.kind(tensors, call)
            return join_tensors(kind.extra, list(kind.run(*tensors)))

        return run


class _PlannedGraph:
    """A function in the place of a compiled graph.

    ``late``: the indices of the results that are gradients of weights."""

    def __init__(self, counting: Counting, graph: Any, late: set[int]):
        self._counting, self._late, self._cost = counting, late, read_graph(graph)
        nodes = list(graph.graph.nodes)
        self._places = {n: i for i, n in enumerate(n for n in nodes if n.op == "placeholder")}
        outputs = nodes[-1].args[0]
        self._values = [None if node is None else node.meta["val"] for node in outputs]
        self._outputs = outputs
        self._owners = [None if node is None else memory_of(node) for node in outputs]

    def __call__(self, args: list[Any]) -> list[Any]:
        given, trace = list(args), self._counting.trace
        args.clear()
        made = {x: given[self._places[x]] for x in self._owners if x in self._places}
        trace.run(self._cost, given)
        results: list[Any] = []
        rows = zip(self._outputs, self._values, self._owners, strict=True)
        for i, (node, value, owner) in enumerate(rows):
            if not isinstance(value, Tensor):
                results.append(value)
            elif node in made:
                results.append(made[node])
            elif owner in made:
                results.append(_view(made[owner], value))
            else:
                with trace.making(GRADIENTS if i in self._late else ACTIVATIONS):
                    x = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype)
                made[owner] = made[node] = x
                results.append(x)
        return results


def _call(tensors: list[Tensor], call: Any) -> tuple[list[Tensor], Any]:
    fn, *args = join_tensors(call, tensors)
    result, made = split_tensors(fn(*args))
    return made, result


def _view(x: Tensor, like: Tensor) -> Tensor:
    """Return a view of the memory of x, with another tensor's shape."""
    with torch.no_grad():
        return x.as_strided(like.size(), like.stride(), like.storage_offset())
