"""Regional compilation: each kind of function is compiled once, however often a stage calls it.

A stage of 80 equal blocks, traced as one graph, takes 80 times as long to compile as one block. So
a stage is not one graph. It calls *units* (``Units`` in torch_compile.py): its blocks, and the
loss. Units of one kind (the same function, the same shapes and plain values) share one compiled
graph for forward and one for backward. The time of a first step then does not depend on the number
of layers. (PyTorch calls this regional compilation:
https://docs.pytorch.org/tutorials/recipes/regional_compilation.html.)

Between units the stage runs in Python, which is slower than a graph to launch its few kernels. A
recorded step (cuda_graph.py) has no Python.

A graph takes and returns local tensors of each rank (traced_function.py). Inside,
``LocalToDTensor`` makes DTensors of the local tensors. The tracer sees through DTensors, so only
kernels and collectives are left.

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
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from dtron.distributed.fp8_all_gather import Unpack
from dtron.distributed.redistribute import LocalToDTensor, ShardSpec, output_gradient
from dtron.distributed.saved_tensors import saved_by
from dtron.layers.recompute import recompute_in_backward
from dtron.params import Fp8GatherRule
from dtron.torch_compile import DIRECT
from dtron.training.gathered_weight import LocalWeight, Saved
from dtron.training.traced_function import GraphCompiler, Kind, TracedFunction
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

    ``shards``: the spec of the DTensor; None: a plain tensor.
    ``differentiable``: whether it has a gradient.
    ``packed``: for a weight that was all-gathered in 8 bits, the slot of its messages, the sharded
        dim, and the shape of a shard."""

    shards: ShardSpec | None = None
    differentiable: bool = False
    packed: tuple[int, int, tuple[int, ...]] | None = None


class CompiledUnits:
    """Calls functions as compiled units: ``call(fn, *args)``."""

    def __init__(self, mesh: DeviceMesh | None, compiler: GraphCompiler):
        self._mesh = mesh
        self._prefetch: Prefetch | None = None
        self._traced = TracedFunction(self._unit, compiler, mesh)

    @property
    def kinds(self) -> dict[Any, Kind]:
        """The kinds of units that have been compiled."""
        return self._traced.kinds

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
        plain = shape, tuple(found.specs)
        kind = self._traced.kind(found.tensors, *plain, weights=found.weights, static=found.static)
        unit = found.unit
        hooks = nullcontext() if unit is None else saved_by(unit.pack, unit.unpack)
        with hooks:
            results = kind.run(*found.tensors)
        return tuple(
            x if spec is None else _FromUnit.apply(x, self._mesh, spec)
            for x, spec in zip(results, kind.extra, strict=True)
        )

    def _unit(
        self, tensors: list[Tensor], shape: Node, specs: tuple[TensorSpec, ...]
    ) -> tuple[list[Tensor], list[ShardSpec | None]]:
        """Run a unit on local tensors. Return its local results, and their specs."""
        locals_ = [
            x if spec.packed is None else _unpacked(x, tensors, spec.packed)
            for x, spec in zip(tensors, specs, strict=True)
        ]
        fn, *args = _join(shape, list(map(self._inside, locals_, specs)))
        outputs = fn(*args)
        results = [_local_output(y) if isinstance(y, DTensor) else y for y in outputs]
        return results, [ShardSpec.of(y) if isinstance(y, DTensor) else None for y in outputs]

    def _inside(self, x: Tensor, spec: TensorSpec) -> Tensor:
        if spec.shards is None:
            return x
        assert self._mesh is not None
        if spec.differentiable:
            return LocalToDTensor.apply(x, self._mesh, spec.shards)
        return spec.shards.to_dtensor(x, self._mesh)


def _unpacked(
    carrier: Tensor, tensors: list[Tensor], packed: tuple[int, int, tuple[int, ...]]
) -> Tensor:
    messages, dim, shape = packed

    def unpack(rows: Tensor, carrier: Tensor) -> tuple[Tensor]:
        return (Unpack.apply(rows, carrier, shape, dim),)

    return recompute_in_backward(unpack, tensors[messages], carrier)[0]


@dataclass
class _Found:
    """The tensors of an argument.

    ``weights``: the indices of weights.
    ``static``: the indices of weights that have been all-gathered. They are free to keep for
        backward: a handle is saved in place of each.
    ``unit``: the unit whose gathered weights are among them."""

    tensors: list[Tensor] = field(default_factory=list)
    specs: list[TensorSpec] = field(default_factory=list)
    weights: list[int] = field(default_factory=list)
    static: list[int] = field(default_factory=list)
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
        spec = TensorSpec(x.spec, x.local.requires_grad)
        if x.messages is not None:
            rows, shape, dim = x.messages
            messages = found.slot(rows, TensorSpec())
            found.static.append(messages.index)
            spec = replace(spec, packed=(messages.index, dim, tuple(shape)))
        slot = found.slot(x.local, spec)
        found.weights.append(slot.index)
        if x.unit is not None:
            found.unit = x.unit
            if x.messages is None:
                found.static.append(slot.index)
        return slot
    if isinstance(x, DTensor):
        spec = ShardSpec.of(x)
        local = x.to_local(grad_placements=spec.gradient.placements)
        return found.slot(local, TensorSpec(spec, local.requires_grad))
    if isinstance(x, Tensor):
        return found.slot(x, TensorSpec())
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


def split_tensors(x: Any) -> tuple[Any, list[Tensor]]:
    """Return an argument with slots in the place of its tensors, and the tensors."""
    found = _Found()
    return _split(x, found), found.tensors


def join_tensors(x: Any, tensors: list[Tensor]) -> Any:
    """Put tensors into the slots of ``split_tensors``."""
    return _join(x, tensors)


def _changed(x: Any) -> bool:
    return isinstance(x, (Slot, Node))


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
    def forward(ctx: Any, x: Tensor, mesh: DeviceMesh, spec: ShardSpec) -> Tensor:
        ctx.placements = spec.placements
        return spec.to_dtensor(x, mesh)

    @staticmethod
    def backward(ctx: Any, g: DTensor) -> tuple[Tensor | None, ...]:
        g = g.redistribute(g.device_mesh, output_gradient(ctx.placements))
        return g.to_local(), None, None
