"""The device mesh, and the operations on it that a layer may use.

A mesh is an n-dimensional array of ranks with named axes. dtron's axes, outermost (slowest link)
first:

    pp            pipeline stages
    dp_replicate  replicas of the whole sharded model (HSDP)
    dp            data parallelism; ZeRO shards weights over it, and over cp
    cp            context parallelism; each sequence is split
    tp            tensor parallelism; adjacent ranks, because it communicates most

The ranks of dp, cp and tp together have a second set of axis names, for expert weights only:

    edp           data parallelism of experts; ZeRO shards expert weights over it
    ep            expert parallelism; each rank has some of the experts
    etp           tensor parallelism within each expert

One DeviceMesh has both views (distributed/mesh_shape.py). Its dims are *atoms*, and an axis is one
or more atoms.

One table, in rules.py, defines how tensors are sharded on the mesh. A ``Layout`` is a mesh together
with such a table. A layer uses the mesh only through the methods of Layout. On one device
(``Layout()``) each of these methods is the identity, so the one-device program is the same program.

Left out: a cost model that picks the mesh. Axes of size 1 are dropped from the DeviceMesh of the
tensors: with fewer mesh dims there are fewer placements to plan and nothing to normalise.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement

from dtron.distributed.collectives import AxisGroup, all_reduce
from dtron.distributed.mesh_shape import MeshShape, parts
from dtron.distributed.redistribute import Unshard, part_of, shard
from dtron.errors import PlacementError
from dtron.local_region import input_gradients, local_region, split_adapted
from dtron.rules import EXCHANGED, RULES, Rules, expand, place, place_gathered
from dtron.tree import Adapted, Leaf

# DTensor warns about sums over two mesh axes one after the other. Here they are few and small.
logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)


Axes = tuple[str | None, ...]


def build_mesh(
    shape: MeshShape, device_type: str, backends: Mapping[int | str, Any] | None = None
) -> DeviceMesh | None:
    """Build the DeviceMesh over the running processes. Its dims are the atoms larger than 1; on one
    device the result is None.

    ``backends``: for some atoms, the backend of their process groups, if it is not the device's
        default backend."""
    names, sizes = tuple(shape.atoms), tuple(shape.atoms.values())
    if not names:
        return None
    override = None if backends is None else dict(backends)
    return init_device_mesh(device_type, sizes, mesh_dim_names=names, backend_override=override)


def axes_of(mesh: DeviceMesh | None) -> tuple[str, ...]:
    """Return the names of a mesh's dims; () for None."""
    return () if mesh is None else tuple(mesh.mesh_dim_names or ())


def ranks_along(mesh: DeviceMesh | None, axis: str) -> DeviceMesh | None:
    """Return the ranks along one axis as a one-dim mesh; None if the mesh does not have the axis.
    Every process must make the first call for an axis: if the axis consists of several atoms, the
    call creates a process group."""
    atoms = parts(axes_of(mesh), axis)
    if mesh is None or not atoms:
        return None
    if len(atoms) > 1:
        return mesh[atoms]._flatten(axis)
    return mesh if mesh.ndim == 1 else mesh[atoms[0]]


def by_rows(layout: Layout) -> Layout:
    """Return a layout in which cp shards rows, like dp, and no sequences. It is for programs that
    do not train: their rows are many and short, or are one token. The placements of weights do not
    change."""
    return replace(layout, rules={**layout.rules, "rows": layout.rules["tokens"], "sequence": ()})


def stage_mesh(mesh: DeviceMesh | None) -> DeviceMesh | None:
    """Return the submesh of this process's pipeline stage: all mesh dims but pp."""
    axes = tuple(a for a in axes_of(mesh) if a != "pp")
    return mesh if mesh is None or len(axes) == mesh.ndim else mesh[axes] if axes else None


@dataclass(frozen=True)
class Layout(Leaf):
    """A mesh and the rules that place tensors on it. ``Layout()`` is one device; there each method
    is the identity.

    ``compute``: the dtype to which ``unshard`` casts weights; None: no cast.
    ``reduce``: the dtype in which a weight's gradients are summed; None: the weight's dtype, but at
        least float32.
    ``groups``: the ranks along each axis of ``rules.EXCHANGED`` that the mesh has; see ``group``.
        They are derived from the mesh.

    Axis arguments are logical axis names, one per dim. None is a dim that is never sharded.
    ``"+vocab"`` means that a sum over the mesh axes of ``vocab`` is still pending, and ``"^vocab"``
    that a maximum is."""

    mesh: DeviceMesh | None = None
    rules: Rules = field(default_factory=lambda: RULES)
    compute: torch.dtype | None = None
    reduce: torch.dtype | None = None
    groups: dict[str, AxisGroup] = field(init=False, default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        for axis in EXCHANGED:
            if (ranks := ranks_along(self.mesh, axis)) is not None:
                self.groups[axis] = self._group(ranks, axis)

    def _group(self, ranks: DeviceMesh, axis: str) -> AxisGroup:
        # The coordinate is read here, and from the whole mesh. Simulated ranks compute it by tensor
        # operations, once per mesh. A recomputed region would count these operations as its own.
        assert self.mesh is not None
        place, coordinate = 0, self.mesh.get_coordinate()
        assert coordinate is not None  # this process is one of the mesh's ranks
        for atom in parts(self.axes, axis):
            i = self.axes.index(atom)
            place = place * self.mesh.size(i) + coordinate[i]
        return AxisGroup(ranks, place)

    def group(self, axis: str) -> AxisGroup | None:
        """Return the ranks along an ``EXCHANGED`` axis (rules.py); None if the mesh lacks it."""
        return self.groups.get(axis)

    @property
    def axes(self) -> tuple[str, ...]:
        """The dims of the mesh (atoms, each larger than 1), in the order of the placements."""
        return axes_of(self.mesh)

    def placements(self, *axes: str | None) -> tuple[Placement, ...]:
        """One placement per mesh axis for a tensor with these logical axes; see ``place``."""
        return place(self.rules, self.axes, *axes)

    def constrain(self, x: Tensor, *axes: str | None) -> Tensor:
        """Redistribute an activation to the placements of these axes. Backward redistributes the
        gradient to the placements of x. So a constrain that moves nothing in forward still matters:
        it fixes the point at which a gradient is reduced."""
        if self.mesh is None:
            return x
        return cast(DTensor, x).redistribute(self.mesh, self.placements(*axes))

    def shard(self, x: Tensor, *axes: str | None) -> Tensor:
        """Shard a tensor that every rank holds whole. Communicates nothing."""
        if self.mesh is None:
            return x
        return shard(x, self.mesh, self.placements(*axes))

    def iota(self, axis: str, size: int, device: torch.device | str) -> Tensor:
        """Return ``arange(size)``, sharded like ``axis``. Inside a local region, this tensor holds
        the indices of a rank's own shard."""
        return self.shard(torch.arange(size, device=device), axis)

    def unshard(self, w: Tensor, *axes: str | None, fp8: bool = False) -> Tensor:
        """Cast one weight with these logical axes to the compute dtype, and undo its ZeRO sharding:
        all-gather it over each mesh axis of a ``rules.ZERO`` row. Backward reduce-scatters the
        gradient over these mesh axes; the gradient stays Partial over all other axes. A weight that
        is already ``ready`` is returned as it is, without an autograd node.

        ``fp8``: all-gather in 8 bits, for a matmul that rounds the weight to 8 bits anyway."""
        dtype = self.compute_dtype(w)
        if self.mesh is None:
            return w.to(dtype)
        if self.ready(w, *axes):
            return w
        return Unshard.apply(w, self.unsharded(*axes), dtype, self.summed(w), fp8)

    def ready(self, w: Tensor, *axes: str | None) -> bool:
        """Whether ``unshard`` has nothing to do for this weight."""
        return w.dtype == self.compute_dtype(w) and not self.needs_unshard(w, *axes)

    def compute_dtype(self, w: Tensor) -> torch.dtype:
        """The dtype in which a weight computes. Codes of a quantised weight (1 byte) stay codes."""
        return w.dtype if self.compute is None or w.itemsize == 1 else self.compute

    def summed(self, w: Tensor) -> torch.dtype:
        """The dtype in which a weight's gradients are summed."""
        return self.reduce or torch.promote_types(w.dtype, torch.float32)

    def needs_unshard(self, w: Tensor, *axes: str | None) -> bool:
        """Whether ``unshard`` would communicate for this weight."""
        return self.mesh is not None and self.unsharded(*axes) != tuple(cast(DTensor, w).placements)

    def shape(self, w: Tensor, *axes: str | None) -> list[float]:
        """The shape of a rank's shard of a weight after ``unshard``, with fractions where the mesh
        does not divide a dim."""
        return part_of(w.shape, self.mesh, self.unsharded(*axes))

    def unsharded(self, *axes: str | None) -> tuple[Placement, ...]:
        """The placements of a weight with these logical axes after ``unshard``."""
        return place_gathered(self.rules, self.axes, *axes)

    def local_map(
        self,
        fn: Callable,
        ins: Sequence[Axes | None],
        out: Axes | list[Axes],
    ) -> Callable:
        """Make a local region: ``fn`` runs on each rank's own shards, with declared placements of
        inputs and outputs.

        ``ins``: the axes of each input. Inputs that are None at call time are passed on. An input
            may be an ``Adapted`` weight; ``ins`` has the axes that are declared for the weight.
        ``out``: the axes of the output; a list if ``fn`` returns several tensors.

        The placements of the input gradients follow from these declarations. A mesh axis splits the
        region's work if some input is sharded over this axis. Over such an axis, an input that is
        replicated receives one summand of its gradient from each rank. Raises PlacementError if an
        input has other placements than declared.
        """
        if self.mesh is None:
            return fn

        def region(*args: Any) -> Any:
            if not any(isinstance(arg, Adapted) for arg in args):
                return self._region(fn, ins, out)(*args)
            leaves, axes, joined = split_adapted(args, ins)
            return self._region(lambda *xs: fn(*joined(xs)), axes, out)(*leaves)

        return region

    def _region(self, fn: Callable, ins: Sequence[Axes | None], out: Axes | list[Axes]) -> Callable:
        """Make the local region of ``local_map`` for inputs that are tensors."""
        assert self.mesh is not None
        outs: Any = (
            [self.placements(*axes) for axes in out]
            if isinstance(out, list)
            else self.placements(*out)
        )
        placements = [None if axes is None else self.placements(*axes) for axes in ins]
        gradients = self.input_gradients(placements)
        return local_region(fn, self.mesh, placements, gradients, outs, ins)

    def input_gradients(
        self, placements: Sequence[tuple[Placement, ...] | None]
    ) -> list[Sequence[Placement] | None]:
        """The placements of the gradients of a local region's inputs; see ``local_map``."""
        return input_gradients(placements, len(self.axes))

    def from_local(self, x: Tensor, *axes: str | None) -> Tensor:
        """Make a DTensor from this rank's local tensor. Not differentiable."""
        if self.mesh is None:
            return x
        return DTensor.from_local(x, self.mesh, self.placements(*axes), run_check=False)

    def to_local(self, x: Tensor, *axes: str | None) -> Tensor:
        """Return this rank's local tensor. Raises PlacementError if x does not have the placements
        of these axes. Not differentiable."""
        if self.mesh is None:
            return x
        x = cast(DTensor, x)
        if x.placements != self.placements(*axes):
            raise PlacementError(
                f"a tensor has the placements {x.placements} over {self.axes}, but {axes} is "
                f"{self.placements(*axes)}; constrain it first"
            )
        return x.to_local()

    def dims(self, axis: str) -> tuple[int, ...]:
        """The dims of the mesh that shard a logical axis."""
        return tuple(self.axes.index(atom) for atom in expand(self.rules[axis], self.axes))

    def parts(self, axis: str) -> int:
        """The number of shards of a logical axis."""
        sizes: list[int] = [] if self.mesh is None else [self.mesh.size(d) for d in self.dims(axis)]
        return math.prod(sizes)

    def all_reduce(self, x: Tensor, axis: str, op: str = "sum") -> Tensor:
        """All-reduce, inside a local region, over the mesh axes of a logical axis. Not
        differentiable."""
        return x if self.mesh is None else all_reduce(x, self.mesh, self.dims(axis), op)
