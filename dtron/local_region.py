"""Local regions: a function that runs on each rank's own shards, with declared placements of its
inputs and outputs. ``Layout.local_map`` makes them from logical axes.

The placements of the input gradients follow from the declarations. A mesh axis splits the region's
work if some input is sharded over this axis. Over such an axis, an input that is replicated
receives one summand of its gradient from each rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Partial, Placement, Replicate
from torch.distributed.tensor.experimental import local_map

from dtron.errors import PlacementError
from dtron.tree import Adapted, flat, leaf_axes, unflatten

Placements = tuple[Placement, ...]


def local_region(
    fn: Callable,
    mesh: DeviceMesh,
    placements: Sequence[Placements | None],
    gradients: Sequence[Sequence[Placement] | None],
    outs: Placements | list[Placements],
    names: Sequence[Any],
) -> Callable:
    """Make a local region of ``fn``. Inputs that are None at call time are passed on. Raises
    PlacementError, when it is called, if an input has other placements than declared.

    ``placements``, ``gradients``: of each input, and of its gradient.
    ``outs``: the placements of the output; a list if ``fn`` returns several tensors.
    ``names``: of each input's axes, for an error."""
    declared_outs: Any = tuple(map(list, outs)) if isinstance(outs, list) else list(outs)

    def region(*args: Any) -> Any:
        present = [arg is not None for arg in args]
        inputs, declared = _present(args, present), _present(placements, present)
        for i, (x, declaration) in enumerate(zip(inputs, declared, strict=True)):
            if x.placements != declaration:
                raise PlacementError(
                    f"input {i} of a local region has the placements {x.placements} over "
                    f"{mesh.mesh_dim_names}, but is declared {_present(names, present)[i]}, which "
                    f"is {declaration}; constrain it first"
                )

        def inner(*locals_: Any) -> Any:
            rest = iter(locals_)
            return fn(*(next(rest) if given else None for given in present))

        return local_map(
            inner,
            out_placements=declared_outs,
            in_placements=declared,
            in_grad_placements=_present(gradients, present),
            device_mesh=mesh,
        )(*inputs)

    return region


def input_gradients(
    placements: Sequence[Placements | None], axes: int
) -> list[Sequence[Placement] | None]:
    """Return the placements of the gradients of a local region's inputs.

    ``axes``: the number of mesh axes."""
    given = [p for p in placements if p is not None]
    splits = [any(p[i].is_shard() for p in given) for i in range(axes)]

    def gradient(x: Placement, split: bool) -> Placement:
        if x.is_partial():  # each summand has the gradient of the sum
            return Replicate()
        return Partial() if split and x.is_replicate() else x

    return [
        p and [gradient(x, split) for x, split in zip(p, splits, strict=True)] for p in placements
    ]


def split_adapted(
    args: Sequence[Any], axes: Sequence[tuple[Any, ...] | None]
) -> tuple[list[Any], list[Any], Callable[[Sequence[Tensor]], list[Any]]]:
    """Split the ``Adapted`` weights among the inputs of a region into tensors. Return all inputs as
    tensors, the axes of each, and a function that puts such tensors back into nodes.

    ``axes``: the axes of each input; for an adapted weight, those declared for the weight."""
    leaves, split = list[Any](), list[Any]()
    for arg, own in zip(args, axes, strict=True):
        adapted = isinstance(arg, Adapted) and own is not None
        leaves += flat(arg) if adapted else [arg]
        split += leaf_axes(arg, own) if adapted and own is not None else [own]

    def joined(xs: Sequence[Tensor]) -> list[Any]:
        rest = iter(xs)
        return [
            unflatten(arg, [next(rest) for _ in flat(arg)])
            if isinstance(arg, Adapted)
            else next(rest)
            for arg in args
        ]

    return leaves, split, joined


def _present(xs: Sequence[Any], present: Sequence[bool]) -> tuple[Any, ...]:
    return tuple(x for x, given in zip(xs, present, strict=True) if given)
