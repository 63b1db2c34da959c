"""The global gradient norm, and clipping by it.

Only the norm communicates. Each rank sums the squares of its gradients; each square is divided by
the number of ranks that hold the same element. One all-reduce per mesh axis then gives the exact
global norm.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

from dtron.distributed.redistribute import full, to_local
from dtron.tree import flat


def global_norm(
    grads: Any, spec: Any = None, over_stages: Callable[[Tensor | None], Tensor] | None = None
) -> Tensor:
    """Return the Euclidean norm of the whole gradient, exact on every mesh. The norm is a scalar on
    the device, and the host does not wait for it. It is float64 if the gradients are float64.

    ``spec``: the declared tree. With it, twins are not counted.
    ``over_stages``: sums a number over the pipeline ranks, where None counts as 0. None: all stages
        are here."""
    twins = [False] * len(flat(grads)) if spec is None else [w.twin for w in flat(spec)]
    counted = [g for g, twin in zip(flat(grads), twins, strict=True) if not twin]
    if not counted:  # all weights of these stages are frozen
        assert over_stages is not None
        return over_stages(None).sqrt()
    wide = torch.promote_types(counted[0].dtype, torch.float32)
    norms = _norms([to_local(g) for g in counted], wide)
    mesh = next((g.device_mesh for g in counted if isinstance(g, DTensor)), None)
    if mesh is None:
        total = torch.stack(norms).square().sum()
    else:
        copies = [  # the number of ranks that hold the same shard
            math.prod(n for n, p in zip(mesh.shape, g.placements, strict=True) if not p.is_shard())
            for g in counted
        ]
        # Python scalars, because a copy of numbers to the device would make the host wait for it.
        torch._foreach_div_(norms, [math.sqrt(n) for n in copies])
        total = torch.stack(norms).square().sum()
        partial = [Partial()] * mesh.ndim
        total = full(DTensor.from_local(total, mesh, partial, run_check=False))
    return (total if over_stages is None else over_stages(total)).sqrt()


def _norms(grads: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return the norm of each gradient, with one ``_foreach_norm`` kernel per dtype. A list of
    several dtypes would launch one kernel per gradient."""
    norms: dict[int, Tensor] = {}
    for kind in {g.dtype: None for g in grads}:
        where = [i for i, g in enumerate(grads) if g.dtype == kind]
        norms |= zip(where, torch._foreach_norm([grads[i] for i in where], 2, dtype), strict=True)
    return [norms[i] for i in range(len(grads))]


def clip_scale(norm: Tensor, limit: float) -> Tensor:
    """Return the factor that scales gradients of this norm to a norm of at most ``limit``.

    ``limit``: 0 means no limit."""
    return (limit / norm).clamp(max=1.0) if limit > 0 else torch.ones_like(norm)
