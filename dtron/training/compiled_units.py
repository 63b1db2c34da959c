"""Regional compilation: each kind of function is compiled once, however often a stage calls it.

A stage of 80 equal blocks, traced as one graph, takes 80 times as long to compile as one block. So
a stage is not one graph. It calls *units* (``Units`` in torch_compile.py): its blocks, and the
loss. Units of one kind (the same function, the same shapes and plain values) share one compiled
graph for forward and one for backward. The time of a first step then does not depend on the number
of layers. (PyTorch calls this regional compilation:
https://docs.pytorch.org/tutorials/recipes/regional_compilation.html.)

Between units the stage runs in Python, which is slower than a graph to launch its few kernels. A
recorded step (cuda_graph.py) has no Python.

A graph takes and returns local tensors of each rank. Inside, ``LocalToDTensor`` makes DTensors of
the local tensors. The tracer sees through DTensors, so only kernels and collectives are left.

Left out: a graph that joins neighbouring units. Inductor cannot fuse the last addition of a block
with the norm of the next block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from dtron.distributed.fp8_all_gather import Unpack
from dtron.distributed.placement_codes import code, decode
from dtron.distributed.redistribute import LocalToDTensor, ShardSpec, output_gradient
from dtron.layers.recompute import recompute_in_backward
from dtron.params import Fp8GatherRule
from dtron.torch_compile import DIRECT
from dtron.training.backward_halves import BackwardHalves
from dtron.training.gathered_weight import LocalWeight, Saved
from dtron.training.unit_key import unit_key
from dtron.training.zero3_prefetch import Prefetch
from dtron.tree import Leaf


@dataclass(frozen=True)
class Slot(Leaf):
    """The place of a tensor in an argument.

    ``index``: its index in the list of tensors."""

    index: int


@dataclass(frozen=True)
class Node(Leaf):
    """A container of slots, nodes and plain values. ``make(**children)``, or ``make(*children)``
    for a sequence, is the container.

    ``make``: the class, or ``partial``."""

    make: Any
    children: Any


@dataclass(frozen=True)
class TensorSpec:
    """How a unit gets one tensor from its local tensor.

    ``placements``: encoded by ``code``; None: a plain tensor.
    ``differentiable``: whether it has a gradient.
    ``packed``: for a weight that was all-gathered in 8 bits, the slot of its messages, the sharded
        dim, and the shape of a shard."""

    placements: tuple[int, ...] | None
    shape: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    differentiable: bool = False
    packed: tuple[int, int, tuple[int, ...]] | None = None


class CompiledUnits:
    """Calls functions as compiled units: ``call(fn, *args)``.

    ``compile``: compiles a function of local tensors.
    ``halves``: splits the backward of units (None: it is not split)."""

    def __init__(
        self, mesh: DeviceMesh | None, compile: Callable, halves: BackwardHalves | None = None
    ):
        self._mesh, self._halves = mesh, halves
        self._prefetch: Prefetch | None = None
        by_graph = None if halves is None else self._compiler_of_halves
        self._run = compile(self._traced, key=self._key, by_graph=by_graph)
        # The arguments of the unit that is called, for its key, and its weights.
        self._called: list[tuple[Any, ...]] = [()]
        self._weights: list[list[Tensor]] = [[]]

    def _key(self) -> str | None:
        return unit_key(self._mesh, *self._called[0])

    def _compiler_of_halves(self, compile: Callable, inputs: Sequence[Tensor]) -> Callable:
        assert self._halves is not None
        return self._halves.compiler(compile, inputs, self._weights[0])

    def gathering(self, prefetch: Prefetch) -> CompiledUnits:
        """Return the same units with the weights that ``prefetch`` all-gathers."""
        units = copy(self)
        units._prefetch = prefetch
        return units

    def gathered(
        self, order: Sequence[tuple[Any, Fp8GatherRule | None]], to_loss: bool = False
    ) -> Iterator[Any]:
        """See ``Units.gathered``."""
        if self._prefetch is None:
            return DIRECT.gathered(order)
        return self._prefetch.gathered(order, to_loss)

    def __call__(self, fn: Callable, *args: Any) -> tuple[Tensor, ...]:
        found = _Found()
        shape = _split((fn, *args), found)
        like = None if self._mesh is None else found.tensors[0].new_empty(1)
        unit = found.unit
        hooks = nullcontext() if unit is None else saved_tensors_hooks(unit.pack, unit.unpack)
        self._called[0], self._weights[0] = (shape, tuple(found.specs)), found.weights
        with hooks:
            results, out = self._run(shape, found.tensors, tuple(found.specs), like)
        self._weights[0] = []
        return tuple(
            x if spec is None else _FromUnit.apply(x, self._mesh, *spec)
            for x, spec in zip(results, out, strict=True)
        )

    def _traced(
        self, shape: Node, tensors: list[Tensor], specs: tuple[TensorSpec, ...], like: Tensor | None
    ) -> tuple[list[Tensor], list[tuple | None]]:
        mesh = self._mesh
        if mesh is not None:
            assert like is not None
            replicated = [Replicate()] * mesh.ndim
            like = DTensor.from_local(like, mesh, replicated, run_check=False)
        locals_ = [
            x if spec.packed is None else _unpacked(x, tensors, spec.packed)
            for x, spec in zip(tensors, specs, strict=True)
        ]
        dtensors = [_inside(x, spec, like) for x, spec in zip(locals_, specs, strict=True)]
        fn, *args = _join(shape, dtensors)
        results: list[Tensor] = []
        out: list[tuple | None] = []
        for y in fn(*args):
            if isinstance(y, DTensor):
                results.append(_local_output(y))
                out.append((code(y.placements), tuple(y.shape), tuple(y.stride())))
            else:
                results.append(y)
                out.append(None)
        return results, out


def _unpacked(
    carrier: Tensor, tensors: list[Tensor], packed: tuple[int, int, tuple[int, ...]]
) -> Tensor:
    messages, dim, shape = packed

    def unpack(rows: Tensor, carrier: Tensor) -> tuple[Tensor]:
        return (Unpack.apply(rows, carrier, shape, dim),)

    return recompute_in_backward(unpack, tensors[messages], carrier)[0]


def _inside(x: Tensor, spec: TensorSpec, like: Tensor | None) -> Tensor:
    if spec.placements is None:
        return x
    assert isinstance(like, DTensor)
    if spec.differentiable:
        return LocalToDTensor.apply(x, like, spec.placements, spec.shape, spec.stride)
    full = ShardSpec(decode(spec.placements), torch.Size(spec.shape), spec.stride)
    return full.to_dtensor(x, like.device_mesh)


@dataclass
class _Found:
    """The tensors of an argument.

    ``weights``: the tensors that are weights.
    ``unit``: the unit whose gathered weights are among them."""

    tensors: list[Tensor] = field(default_factory=list)
    specs: list[TensorSpec] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    unit: Saved | None = None

    def slot(self, x: Tensor, spec: TensorSpec) -> Slot:
        for i, other in enumerate(self.tensors):
            if other is x and self.specs[i] == spec:
                return Slot(i)
        self.tensors.append(x)
        self.specs.append(spec)
        return Slot(len(self.tensors) - 1)


def _split(x: Any, found: _Found) -> Any:
    """Move the tensors of an argument to ``found``. Return the argument with slots in their place.
    A part without tensors is returned as it is."""
    if isinstance(x, LocalWeight):
        found.unit, spec = x.unit or found.unit, _spec(x.spec, x.local.requires_grad)
        found.weights.append(x.local)
        if x.messages is not None:
            rows, shape, dim = x.messages
            messages = found.slot(rows, TensorSpec(None))
            spec = replace(spec, packed=(messages.index, dim, tuple(shape)))
        return found.slot(x.local, spec)
    if isinstance(x, DTensor):
        spec = ShardSpec.of(x)
        local = x.to_local(grad_placements=spec.gradient.placements)
        return found.slot(local, _spec(spec, local.requires_grad))
    if isinstance(x, Tensor):
        return found.slot(x, TensorSpec(None))
    if isinstance(x, Leaf):
        return x
    if isinstance(x, partial):
        made = _split((x.func, x.args, x.keywords), found)
        return Node(partial, made.children) if isinstance(made, Node) else x
    children: Any
    if isinstance(x, Mapping):
        children = {name: _split(child, found) for name, child in x.items()}
        return Node(dict, children) if any(map(_changed, children.values())) else x
    if isinstance(x, (tuple, list)):
        children = tuple(_split(child, found) for child in x)
        if not any(map(_changed, children)):
            return x
        return Node(type(x) if hasattr(x, "_make") else tuple, children)
    if is_dataclass(x) and not isinstance(x, type):
        children = {f.name: _split(getattr(x, f.name), found) for f in fields(x) if f.init}
        return Node(type(x), children) if any(map(_changed, children.values())) else x
    return x


def _changed(x: Any) -> bool:
    return isinstance(x, (Slot, Node))


def _spec(spec: ShardSpec, differentiable: bool) -> TensorSpec:
    return TensorSpec(code(spec.placements), tuple(spec.shape), tuple(spec.stride), differentiable)


def _join(x: Any, tensors: list[Tensor]) -> Any:
    """Put the tensors into their slots."""
    if isinstance(x, Slot):
        return tensors[x.index]
    if not isinstance(x, Node):
        return x
    if isinstance(x.children, dict):
        made = {name: _join(child, tensors) for name, child in x.children.items()}
        return made if x.make is dict else x.make(**made)
    parts = [_join(child, tensors) for child in x.children]
    if x.make is partial:
        fn, args, keywords = parts
        return partial(fn, *args, **keywords)
    return tuple(parts) if x.make is tuple else x.make(*parts)  # or a NamedTuple


def _local_output(y: DTensor) -> Tensor:
    """The local tensor of ``y``."""
    return y.to_local(grad_placements=output_gradient(y.placements))


class _FromUnit(torch.autograd.Function):
    """Make a DTensor of a unit's local output. Backward returns the local tensor of its gradient,
    after a redistribution if the gradient does not have the placements that the unit expects."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mesh: DeviceMesh,
        placements: tuple[int, ...],
        shape: tuple[int, ...],
        stride: tuple[int, ...],
    ) -> Tensor:
        ctx.placements = decode(placements)
        return ShardSpec(ctx.placements, torch.Size(shape), stride).to_dtensor(x, mesh)

    @staticmethod
    def backward(ctx: Any, g: DTensor) -> tuple[Tensor | None, ...]:
        g = g.redistribute(g.device_mesh, output_gradient(ctx.placements))
        return g.to_local(), None, None, None, None
