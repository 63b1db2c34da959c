"""The mesh of devices and the one table that says how tensors lie on it.

A mesh is an n-dimensional array of ranks with named axes. dtron's axes, outermost (slowest link) first:

    pp            pipeline stages
    dp_replicate  replicas of the whole sharded model (HSDP)
    dp            data parallelism; the axis that ZeRO shards weights over
    cp            context parallelism; each sequence is split
    tp            tensor parallelism; adjacent ranks, because it communicates most

A tensor's dims have *logical* axes: ``w_up`` is ``(embed, mlp)``, an activation ``x_TD`` is
``(tokens, act_embed)``. ``RULES`` maps each logical axis to the mesh axes that shard it. That table is the
whole description of data, tensor and sequence parallelism and of ZeRO: turning one off is editing a row, and
the layers never ask which is on (the idea is that of logical axis rules in GSPMD, arXiv:2105.04663).

A ``Layout`` is a mesh together with such a table. Its verbs are all a layer may use, and on one device
(``Layout()``) each of them is the identity, so that the one-device program is the same program.

Left out: a cost model that picks the mesh. The axes of size 1 are dropped from the DeviceMesh that tensors
live on: a shorter mesh means fewer placements to plan and nothing to normalise.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

# Functional collectives are the only ones that autograd, torch.compile and simulated ranks all understand;
# they are semi-private, so they are imported here alone.
import torch.distributed._functional_collectives as funcol
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.experimental import local_map

from dtron.dtensor import Gather, code, shard
from dtron.shape import MeshShape

# DTensor warns wherever two mesh axes are reduced one after the other; for our few small sums that is
# intended.
logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)


class PlacementError(ValueError):
    """A tensor lies elsewhere than was declared."""


Rules = Mapping[str, tuple[str, ...]]

RULES: Rules = {
    # activations
    "tokens": ("dp_replicate", "dp", "cp"),  # between the collectives of a tensor-parallel layer
    "tokens_sp": ("dp_replicate", "dp", "cp", "tp"),  # the residual stream: sequence parallelism
    "rows": ("dp_replicate", "dp"),  # tokens where each rank needs its sequences whole
    "sequence": ("cp",),  # the parts of a sequence
    "act_embed": (),  # also the small weights (norms, biases) that every rank keeps whole
    # weights
    "embed": ("dp",),  # the ZeRO row
    "heads": ("tp",),
    "kv_heads": ("tp",),
    "head_dim": (),
    "mlp": ("tp",),
    "vocab": ("tp",),
    "positions": (),
}


def rules_for(zero: int) -> Rules:
    """ZeRO stage 0 is the table with its ``embed`` row emptied; stages 1 to 3 share the table (see
    step.py)."""
    return {**RULES, "embed": ()} if zero == 0 else RULES


def place(rules: Rules, mesh_axes: Sequence[str], *axes: str | None) -> tuple[Placement, ...]:
    """One placement per mesh axis for a tensor with these logical axes.

    Raises ValueError for an axis without a row, and for two dims that would share a mesh axis: an unknown
    axis must never silently replicate.
    """
    where: dict[str, Placement] = {}
    for dim, axis in enumerate(axes):
        if axis is None:
            continue
        name = axis.removeprefix("+")
        if name not in rules:
            raise ValueError(f"logical axis {name!r} has no row in the rules: {', '.join(rules)}; add one")
        for mesh_axis in rules[name]:
            if mesh_axis in where:
                raise ValueError(f"{axes}: two dims share mesh axis {mesh_axis!r}; change a row of the rules")
            where[mesh_axis] = Partial() if axis.startswith("+") else Shard(dim)
    return tuple(where.get(mesh_axis, Replicate()) for mesh_axis in mesh_axes)


def build_mesh(shape: MeshShape, device_type: str) -> DeviceMesh | None:
    """The DeviceMesh over the running processes: the axes larger than 1, or None on one device."""
    axes = [(a, n) for a, n in shape.sizes.items() if n > 1]
    if not axes:
        return None
    return init_device_mesh(device_type, [n for _, n in axes], mesh_dim_names=[a for a, _ in axes])


def stage_mesh(mesh: DeviceMesh | None) -> DeviceMesh | None:
    """The part of a mesh that is one pipeline stage's: that of this process."""
    axes = tuple(a for a in mesh.mesh_dim_names if a != "pp") if mesh is not None else ()
    return mesh if mesh is None or len(axes) == mesh.ndim else mesh[axes] if axes else None


@dataclass(frozen=True)
class Layout:
    """A mesh and the rules that place tensors on it; ``Layout()`` is one device, where each verb is the
    identity.

    ``compute`` is the dtype that weights are cast to where they are gathered (None: left as they are), and
    ``reduce`` the dtype that a weight's gradient is cast to before any reduction (None: the weight's own).

    Axis arguments are logical axis names, one per dim; None is a dim that is never sharded, and ``"+vocab"``
    says that a sum over the mesh axes of ``vocab`` is still pending.
    """

    mesh: DeviceMesh | None = None
    rules: Rules = field(default_factory=lambda: RULES)
    compute: torch.dtype | None = None
    reduce: torch.dtype | None = None

    @property
    def axes(self) -> tuple[str, ...]:
        """The mesh axes that are larger than 1, in the order of the placements."""
        return tuple(self.mesh.mesh_dim_names) if self.mesh is not None else ()

    def placements(self, *axes: str | None) -> tuple[Placement, ...]:
        """One placement per mesh axis for a tensor with these logical axes; see ``place``."""
        return place(self.rules, self.axes, *axes)

    def constrain(self, x: Tensor, *axes: str | None) -> Tensor:
        """Redistribute an activation. Backward brings the gradient back to the placement x came with, which
        is why a constrain that moves nothing in forward still matters: it pins where a gradient is
        reduced."""
        if self.mesh is None:
            return x
        return x.redistribute(self.mesh, self.placements(*axes))

    def shard(self, x: Tensor, *axes: str | None) -> Tensor:
        """A value that every rank holds whole becomes a sharded one. Communicates nothing."""
        if self.mesh is None:
            return x
        return shard(x, self.mesh, self.placements(*axes))

    def iota(self, axis: str, size: int, device: torch.device | str) -> Tensor:
        """``arange(size)`` sharded like ``axis``: inside a local region it tells a rank which part it has."""
        return self.shard(torch.arange(size, device=device), axis)

    def gather(self, w: Tensor) -> Tensor:
        """Undo the ZeRO shard of one weight and cast it for compute: an all-gather over the mesh axes of
        ``embed``; in backward the gradient is reduce-scattered over them, and stays Partial over all others.
        A weight that is ready already is returned as it is, without a trace in autograd."""
        dtype = self.compute or w.dtype
        if self.mesh is None:
            return w.to(dtype)
        placements = self.gathered(w.placements)
        if placements == tuple(w.placements) and w.dtype == dtype:
            return w
        return Gather.apply(w, code(placements), dtype, self.reduce or w.dtype)

    def gathers(self, w: Tensor) -> bool:
        """Whether ``gather`` would communicate for this weight."""
        return self.mesh is not None and self.gathered(w.placements) != tuple(w.placements)

    def gathered(self, placements: Sequence[Placement]) -> tuple[Placement, ...]:
        """Where a weight that lies so lies once it is gathered."""
        zero = self.rules["embed"]
        return tuple(
            Replicate() if axis in zero and p.is_shard() else p
            for axis, p in zip(self.axes, placements, strict=True)
        )

    def local(
        self,
        fn: Callable,
        ins: Sequence[tuple[str | None, ...] | None],
        out: tuple[str | None, ...],
    ) -> Callable:
        """A local region: ``fn`` on each rank's own shards, with declared placements in and out.

        The placements of the gradients follow: over a mesh axis that splits the region's work (some input is
        sharded over it) an input that is whole on every rank receives one summand of its gradient from each.
        Inputs that are None at call time are passed on. Raises ValueError where an input lies otherwise.
        """
        if self.mesh is None:
            return fn
        placements = [self.placements(*axes) if axes is not None else None for axes in ins]
        gradients = self.input_gradients(placements)

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
                out_placements=list(self.placements(*out)),
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
        return [
            p and [Partial() if split[i] and x.is_replicate() else x for i, x in enumerate(p)]
            for p in placements
        ]

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

    def parts(self, axis: str) -> int:
        """Into how many parts a logical axis is cut."""
        n = 1
        for mesh_axis in self.rules[axis]:
            if mesh_axis in self.axes:
                n *= self.mesh.size(self.axes.index(mesh_axis))
        return n

    def all_reduce(self, x: Tensor, axis: str, op: str = "sum") -> Tensor:
        """Inside a local region: reduce over the mesh axes of a logical axis. Not differentiable."""
        for mesh_axis in self.rules[axis]:
            if mesh_axis in self.axes:
                x = funcol.wait_tensor(funcol.all_reduce(x, op, (self.mesh, self.axes.index(mesh_axis))))
        return x

    # Inside a local region, over the ranks that a logical axis is cut over. Not differentiable: a region that
    # uses one writes its backward. What they give is on its way; ``wait`` for it before it is used, and let
    # work that does not need it come first.

    def all_gather(self, x: Tensor, axis: str) -> Tensor:
        """Everybody's x, end to end along dim 0."""
        mesh, i = self._one(axis)
        n = mesh.size(i)
        return torch.ops._c10d_functional.all_gather_into_tensor(x.contiguous(), n, _name(mesh, i))

    def reduce_scatter(self, x: Tensor, axis: str) -> Tensor:
        """Of the sum of everybody's x, one part of dim 0 each."""
        mesh, i = self._one(axis)
        n = mesh.size(i)
        return torch.ops._c10d_functional.reduce_scatter_tensor(x.contiguous(), "sum", n, _name(mesh, i))

    def all_to_all(self, x: Tensor, axis: str) -> Tensor:
        """Part i of dim 0 goes to the i-th of the ranks; what comes is in their order too."""
        mesh, i = self._one(axis)
        parts = [x.shape[0] // mesh.size(i)] * mesh.size(i)
        return torch.ops._c10d_functional.all_to_all_single(x.contiguous(), parts, parts, _name(mesh, i))

    def shift(self, x: Tensor, axis: str, by: int = 1) -> Tensor:
        """x goes to the rank that is ``by`` further on, in a ring, and that of the one as far behind comes.
        An all-to-all of which all other parts are empty; a send would be no functional collective."""
        mesh, i = self._one(axis)
        n, rank = mesh.size(i), mesh.get_coordinate()[i]
        to, of = (_one_hot(x.shape[0], rank + d, n) for d in (by, n - by))
        return torch.ops._c10d_functional.all_to_all_single(x.contiguous(), of, to, _name(mesh, i))

    @staticmethod
    def wait(x: Tensor) -> Tensor:
        return funcol.wait_tensor(x)

    def _one(self, axis: str) -> tuple[DeviceMesh, int]:
        """The one dim of the mesh that a logical axis is cut over."""
        (dim,) = (self.axes.index(a) for a in self.rules[axis] if a in self.axes)
        return self.mesh, dim


def _name(mesh: DeviceMesh, dim: int) -> str:
    return mesh.get_group(dim).group_name


def _one_hot(size: int, at: int, n: int) -> list[int]:
    """``size`` at place ``at % n`` of n, 0 elsewhere: in arithmetic alone, since a simulated rank's number is
    one for each rank, and compares with nothing."""
    return [size * (1 - ((at + 2 * n - j) % n + n - 1) // n) for j in range(n)]
