"""The mesh of devices, and what a layer may ask of it.

A mesh is an n-dimensional array of ranks with named axes. dtron's axes, outermost (slowest link)
first:

    pp            pipeline stages
    dp_replicate  replicas of the whole sharded model (HSDP)
    dp            data parallelism; ZeRO shards weights over it, and over cp
    cp            context parallelism; each sequence is split
    tp            tensor parallelism; adjacent ranks, because it communicates most

and, another way to name the ranks of dp, cp and tp together, for the weights of experts alone:

    edp           data parallelism of experts; the axis that ZeRO shards them over
    ep            expert parallelism; each rank has some of the experts
    etp           tensor parallelism within each expert

How one DeviceMesh has both views stands in distributed/mesh_shape.py: its dims are *atoms*, an axis
is one or more of them.

How tensors lie on it is said by one table, in rules.py. A ``Layout`` is a mesh together with such a
table. Its verbs are all a layer may use, and on one device (``Layout()``) each of them is the
identity, so that the one-device program is the same program.

Left out: a cost model that picks the mesh. The axes of size 1 are dropped from the DeviceMesh that
tensors live on: a shorter mesh means fewer placements to plan and nothing to normalise.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate
from torch.distributed.tensor.experimental import local_map

from dtron.distributed.collectives import RingGroup, all_reduce
from dtron.distributed.mesh_shape import MeshShape, parts
from dtron.distributed.redistribute import Unshard, code, part_of, shard
from dtron.errors import PlacementError
from dtron.rules import RULES, Rules, expand, place, whole

# DTensor warns wherever two mesh axes are reduced one after the other; for our few small sums that
# is intended.
logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)


def build_mesh(
    shape: MeshShape, device_type: str, backends: Mapping[str, str] | None = None
) -> DeviceMesh | None:
    """The DeviceMesh over the running processes: the atoms larger than 1, or None on one device.
    ``backends``: of the groups along some of them, where it is not the device's own."""
    names, sizes = list(shape.atoms), list(shape.atoms.values())
    if not names:
        return None
    return init_device_mesh(device_type, sizes, mesh_dim_names=names, backend_override=backends)


def ranks_along(mesh: DeviceMesh | None, axis: str) -> DeviceMesh | None:
    """The ranks along one axis, as a mesh of one dim; None where there are none. The first time,
    every process must call this: it makes a process group where the axis is several atoms."""
    atoms = parts(mesh.mesh_dim_names, axis) if mesh is not None else ()
    if not atoms:
        return None
    return (
        mesh[atoms]._flatten(axis) if len(atoms) > 1 else mesh if mesh.ndim == 1 else mesh[atoms[0]]
    )


def stage_mesh(mesh: DeviceMesh | None) -> DeviceMesh | None:
    """The part of a mesh that is one pipeline stage's: that of this process."""
    axes = tuple(a for a in mesh.mesh_dim_names if a != "pp") if mesh is not None else ()
    return mesh if mesh is None or len(axes) == mesh.ndim else mesh[axes] if axes else None


@dataclass(frozen=True)
class Layout:
    """A mesh and the rules that place tensors on it; ``Layout()`` is one device, where each verb is
    the identity.

    ``experts`` and ``context`` are made of the mesh: the ranks that tokens are sent between (ep),
    as a mesh of one dim, and those that have the parts of a sequence (cp). ``compute`` is the dtype
    that weights are cast to where they are gathered (None: left as they are), and ``reduce`` the
    dtype that a weight's gradients are added up in (None: the weight's own, but float32 at least).

    Axis arguments are logical axis names, one per dim; None is a dim that is never sharded, and
    ``"+vocab"`` says that a sum over the mesh axes of ``vocab`` is still pending.
    """

    mesh: DeviceMesh | None = None
    rules: Rules = field(default_factory=lambda: RULES)
    compute: torch.dtype | None = None
    reduce: torch.dtype | None = None
    experts: DeviceMesh | None = field(init=False, default=None, compare=False)
    context: RingGroup | None = field(init=False, default=None, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "experts", ranks_along(self.mesh, "ep"))
        object.__setattr__(self, "context", self._peers("cp"))

    def _peers(self, axis: str) -> RingGroup | None:
        ranks = ranks_along(self.mesh, axis)
        if ranks is None:
            return None
        # Asked here, and of the whole mesh: simulated ranks find it by tensor operations, once for
        # a mesh, which a region that is recomputed would count as its own.
        place, coordinate = 0, self.mesh.get_coordinate()
        for atom in parts(self.axes, axis):
            i = self.axes.index(atom)
            place = place * self.mesh.size(i) + coordinate[i]
        return RingGroup(ranks, place)

    @property
    def axes(self) -> tuple[str, ...]:
        """The dims of the mesh (atoms, each larger than 1), in the order of the placements."""
        return tuple(self.mesh.mesh_dim_names) if self.mesh is not None else ()

    def placements(self, *axes: str | None) -> tuple[Placement, ...]:
        """One placement per mesh axis for a tensor with these logical axes; see ``place``."""
        return place(self.rules, self.axes, *axes)

    def constrain(self, x: Tensor, *axes: str | None) -> Tensor:
        """Redistribute an activation. Backward brings the gradient back to the placement x came
        with, which is why a constrain that moves nothing in forward still matters: it pins where a
        gradient is reduced."""
        if self.mesh is None:
            return x
        return x.redistribute(self.mesh, self.placements(*axes))

    def shard(self, x: Tensor, *axes: str | None) -> Tensor:
        """A value that every rank holds whole becomes a sharded one. Communicates nothing."""
        if self.mesh is None:
            return x
        return shard(x, self.mesh, self.placements(*axes))

    def iota(self, axis: str, size: int, device: torch.device | str) -> Tensor:
        """``arange(size)`` sharded like ``axis``: inside a local region it tells a rank which part
        it has."""
        return self.shard(torch.arange(size, device=device), axis)

    def gather(self, w: Tensor, *axes: str | None, narrow: bool = False) -> Tensor:
        """Undo the ZeRO shard of one weight with these logical axes and cast it for compute: an
        all-gather over each mesh axis of a ``rules.ZERO`` row; in backward the gradient is
        scattered over them, and stays Partial over all others. A weight that is ready already is
        returned as it is, without a trace in autograd. ``narrow``: in 8 bits, for who rounds to
        them anyway."""
        dtype = self.compute or w.dtype
        if self.mesh is None:
            return w.to(dtype)
        if self.ready(w, *axes):
            return w
        return Unshard.apply(w, code(self.gathered(*axes)), dtype, self.summed(w), narrow)

    def ready(self, w: Tensor, *axes: str | None) -> bool:
        """Whether ``gather`` has nothing to do for this weight."""
        return w.dtype == (self.compute or w.dtype) and not self.gathers(w, *axes)

    def summed(self, w: Tensor) -> torch.dtype:
        """What a weight's gradients are added up in."""
        return self.reduce or torch.promote_types(w.dtype, torch.float32)

    def gathers(self, w: Tensor, *axes: str | None) -> bool:
        """Whether ``gather`` would communicate for this weight."""
        return self.mesh is not None and self.gathered(*axes) != tuple(w.placements)

    def shape(self, w: Tensor, *axes: str | None) -> list[float]:
        """Of a rank's part of a weight once it is gathered; a fraction where the mesh does not
        divide it."""
        return part_of(w.shape, self.mesh, self.gathered(*axes))

    def gathered(self, *axes: str | None) -> tuple[Placement, ...]:
        """Where a weight with these logical axes lies once it is gathered."""
        return place(whole(self.rules), self.axes, *axes)

    def local(
        self,
        fn: Callable,
        ins: Sequence[tuple[str | None, ...] | None],
        out: tuple[str | None, ...] | list[tuple[str | None, ...]],
    ) -> Callable:
        """A local region: ``fn`` on each rank's own shards, with declared placements in and out (a
        list of them where ``fn`` gives several).

        The placements of the gradients follow: over a mesh axis that splits the region's work (some
        input is sharded over it) an input that is whole on every rank receives one summand of its
        gradient from each. Inputs that are None at call time are passed on. Raises UserError where
        an input lies otherwise.
        """
        if self.mesh is None:
            return fn
        placements = [self.placements(*axes) if axes is not None else None for axes in ins]
        gradients = self.input_gradients(placements)
        lie = lambda axes: list(self.placements(*axes))
        outs = tuple(lie(axes) for axes in out) if isinstance(out, list) else lie(out)

        def region(*args):
            present = [arg is not None for arg in args]
            pick = lambda xs: tuple(x for x, here in zip(xs, present, strict=True) if here)
            for i, (x, lies) in enumerate(zip(pick(args), pick(placements), strict=True)):
                if x.placements != lies:
                    raise PlacementError(
                        f"input {i} of a local region lies {x.placements} over {self.axes}, but is declared "
                        f"{pick(ins)[i]}, which is {lies}; constrain it first"
                    )

            def inner(*locals_):
                rest = iter(locals_)
                return fn(*(next(rest) if here else None for here in present))

            return local_map(
                inner,
                out_placements=outs,
                in_placements=pick(placements),
                in_grad_placements=pick(gradients),
                device_mesh=self.mesh,
            )(*pick(args))

        return region

    def input_gradients(
        self, placements: Sequence[tuple[Placement, ...] | None]
    ) -> list[list[Placement] | None]:
        """Where the gradients of a local region's inputs lie; see ``local``."""
        given = [p for p in placements if p is not None]
        split = [any(p[i].is_shard() for p in given) for i in range(len(self.axes))]

        def back(x: Placement, split: bool) -> Placement:
            if x.is_partial():  # each summand's gradient is that of the sum
                return Replicate()
            return Partial() if split and x.is_replicate() else x

        return [p and [back(x, at) for x, at in zip(p, split, strict=True)] for p in placements]

    def from_local(self, x: Tensor, *axes: str | None) -> Tensor:
        """A tensor from this rank's part of it. Not differentiable."""
        if self.mesh is None:
            return x
        return DTensor.from_local(x, self.mesh, self.placements(*axes), run_check=False)

    def to_local(self, x: Tensor, *axes: str | None) -> Tensor:
        """This rank's part of a tensor that must lie as these axes say; ValueError otherwise. Not
        differentiable."""
        if self.mesh is None:
            return x
        if x.placements != self.placements(*axes):
            raise PlacementError(
                f"a tensor lies {x.placements} over {self.axes}, not as {axes}; constrain it first"
            )
        return x.to_local()

    def dims(self, axis: str) -> tuple[int, ...]:
        """The dims of the mesh that shard a logical axis."""
        return tuple(self.axes.index(atom) for atom in expand(self.rules[axis], self.axes))

    def parts(self, axis: str) -> int:
        """Into how many parts a logical axis is cut."""
        return math.prod([self.mesh.size(dim) for dim in self.dims(axis)])

    def all_reduce(self, x: Tensor, axis: str, op: str = "sum") -> Tensor:
        """Inside a local region: reduce over the mesh axes of a logical axis. Not
        differentiable."""
        return all_reduce(x, self.mesh, self.dims(axis), op)


def by_rows(layout: Layout) -> Layout:
    """The layout with cp one more way to cut rows, for what has no sequences to cut, as in
    generation, where a row's next token is but one. Weights lie where they lay."""
    return replace(layout, rules={**layout.rules, "rows": layout.rules["tokens"], "sequence": ()})
