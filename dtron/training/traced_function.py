"""Functions of tensors, traced and compiled once for each kind of arguments.

``torch.compile`` first interprets the bytecode of a function (dynamo), to find its operators and
the conditions (guards) under which these operators are the same in the next call. Our functions
need neither. All that their operators depend on are their plain arguments and the shapes of their
tensors. So a kind of call is a key of these values, and a function is traced by running it:
AOTAutograd runs it on fake tensors, through Python, DTensor and autograd, and records forward and
backward as graphs of operators on local tensors. The backend compiles these graphs. On a mesh the
interpretation took twice as long as all the rest of the trace.

torch can keep compiled graphs on disk. It does not know the function that is traced, so it needs a
key of all that the function depends on (unit_key.py).

Left out: shapes that vary. Each new shape is traced and compiled anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from operator import getitem
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule

from dtron.torch_compile import fake_mode, is_fake, own_generator, tracer
from dtron.training.backward_halves import BackwardHalves
from dtron.training.unit_key import describe, disk_key


@dataclass(frozen=True)
class GraphCompiler:
    """How graphs are compiled.

    ``backend``: a backend of ``torch.compile``, or a ``CodeGenerator``.
    ``options``: inductor's options.
    ``budget``: the share of activations that the partitioner may save for backward; 1.0 is all that
        it would save by itself. The rest is recomputed, cheapest first.
    ``halves``: splits backward graphs (None: they are not split)."""

    backend: Any = "inductor"
    options: dict[str, Any] | None = None
    budget: float = 1.0
    halves: BackwardHalves | None = None

    def compile(
        self, graph: GraphModule, inputs: list[Tensor], key: str | None, weights: Sequence[int]
    ) -> Callable[..., Sequence[Tensor]]:
        """Compile a graph of one function.

        ``key``: contains all that the function depends on; None: torch keeps no graph on disk.
        ``weights``: the indices of the inputs that are weights."""
        with ExitStack() as settings:
            if self.budget < 1:
                kept = torch._functorch.config.patch(activation_memory_budget=self.budget)
                settings.enter_context(kept)
            generator = own_generator(self.backend)
            if self.backend != "inductor" and generator is None:
                return _backend(self.backend)(graph, inputs)
            # Imported here: it takes a second.
            from torch._inductor.compile_fx import compile_fx, compile_fx_inner

            one_graph: Callable = compile_fx_inner
            if generator is not None:
                one_graph = partial(generator.graph, weights=tuple(weights))
            if self.halves is not None:
                one_graph = self.halves.compiler(one_graph, weights)
                # A donated buffer would be overwritten by a graph that is not its last reader.
                settings.enter_context(torch._functorch.config.patch(donated_buffer=False))
            if self.halves is not None or generator is not None or key is None:
                # torch keeps no pair of graphs of a compiler that it does not know.
                off = torch._functorch.config.patch(enable_autograd_cache=False)
                settings.enter_context(off)
            compile = cast(Callable, compile_fx)
            return compile(graph, inputs, inner_compile=one_graph, config_patches=self.options)


def _backend(name: Any) -> Callable:
    from torch._dynamo.backends.registry import lookup_backend

    return lookup_backend(name) if isinstance(name, str) else name


@dataclass
class Kind:
    """One kind of call.

    ``run``: the compiled function of the tensors.
    ``extra``: what the function has returned beside tensors.
    ``refers``: objects that the key of this kind names by address."""

    run: Callable[..., Sequence[Tensor]]
    extra: Any
    refers: list[Any] = field(default_factory=list)


class TracedFunction:
    """A compiled function ``fn(tensors, *plain) -> (results, extra)``.

    ``fn``: takes and returns lists of tensors. Its operators, and ``extra``, depend only on its
        plain arguments, and on the shapes, strides, dtypes and devices of its tensors.
    ``context``: plain values that ``fn`` depends on, too, such as the mesh."""

    def __init__(self, fn: Callable, compiler: GraphCompiler, *context: Any):
        self._fn, self._compiler, self._context = fn, compiler, context
        self.kinds: dict[Any, Kind] = {}

    def __call__(self, tensors: list[Tensor], *plain: Any) -> Sequence[Tensor]:
        return self.kind(tensors, *plain).run(*tensors)

    def kind(
        self,
        tensors: list[Tensor],
        *plain: Any,
        weights: Sequence[int] = (),
        static: Sequence[int] = (),
    ) -> Kind:
        """Return the kind of this call, which is traced and compiled if it is the first.

        ``weights``: the indices of the tensors that are weights.
        ``static``: the indices of the tensors that the partitioner counts as free to keep."""
        text, unknown = describe(plain)
        key = text, tuple(map(_metadata, tensors)), torch.is_grad_enabled(), tuple(static)
        if key not in self.kinds:
            self.kinds[key] = self._trace(tensors, plain, weights, static)
            self.kinds[key].refers += unknown
        return self.kinds[key]

    def _trace(
        self,
        tensors: list[Tensor],
        plain: tuple[Any, ...],
        weights: Sequence[int],
        static: Sequence[int],
    ) -> Kind:
        mode = fake_mode(tensors)
        key = disk_key(*self._context, *plain, tuple(static), torch.is_grad_enabled())
        with tracer(mode):
            fakes = [_fake(x, mode) for x in tensors]
            with mode, torch.no_grad():  # torch asks for the number of results before it traces
                results, extra = self._fn(fakes, *plain)
            call = _Call(lambda *xs: tuple(self._fn(list(xs), *plain)[0]), key)
            graph = _graph_of(call, len(tensors), len(results), static)
            return Kind(self._compiler.compile(graph, fakes, key, weights), extra)


class _Call(torch.nn.Module):
    """A function as the only operator of a graph. torch puts the text of ``key`` in its own key."""

    def __init__(self, fn: Callable, key: str | None):
        super().__init__()
        self.forward, self._key = fn, key

    def __reduce__(self) -> tuple[Any, ...]:
        return str, (self._key,)


def _graph_of(call: _Call, inputs: int, outputs: int, static: Sequence[int]) -> GraphModule:
    graph = Graph()
    tensors: list[Any] = [graph.placeholder(f"tensor_{i}") for i in range(inputs)]
    for i, x in enumerate(tensors):
        x._dynamo_source = None
        if i in static:
            x.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    results = graph.call_module("call", tuple(tensors))
    graph.output(tuple([graph.call_function(getitem, (results, i)) for i in range(outputs)]))
    module: Any = GraphModule({"call": call}, graph)
    # AOTAutograd reads which inputs are static only from a graph that looks like one of dynamo.
    module.meta["dynamo_compile_id"], module._param_name_to_source = None, {}
    return module


def _fake(x: Tensor, mode: Any) -> Tensor:
    """Return a tensor of the same kind without memory. The compiled graph may keep it, so a fake
    tensor of a plan, whose memory is counted, is not taken as it is."""
    if not is_fake(x):
        return mode.from_tensor(x, static_shapes=True)
    with mode:
        like = torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=x.device)
    return like.requires_grad_(x.requires_grad)


def _metadata(x: Tensor) -> tuple[Any, ...]:
    return tuple(x.shape), x.stride(), x.dtype, x.device, x.requires_grad
