"""Which part of a weight this rank has, for those that read weights from files: by ranges of each
dim."""

from __future__ import annotations

import torch
from torch import Tensor

from dtron.distributed.redistribute import ShardSpec
from dtron.distributed.simulated_ranks import is_simulated
from dtron.mesh import Layout
from dtron.params import WeightSpec

Box = list[tuple[int, int]]


def shard_range(w: WeightSpec, layout: Layout, device: str) -> Box | None:
    """The range of each dim; None where the whole weight is wanted: on one device, and where all
    ranks are simulated here. No arithmetic of shards: the layout is asked to cut the numbers of
    each dim's places."""
    if layout.mesh is None:
        return None
    ids = [
        layout.to_local(layout.iota(a, n, device), a) for a, n in zip(w.axes, w.shape, strict=True)
    ]
    if any(is_simulated(i) for i in ids):
        return None
    return [(int(i[0]), int(i[-1]) + 1) if len(i) else (0, 0) for i in ids]


def lay(x: Tensor, w: WeightSpec, layout: Layout, box: Box | None) -> Tensor:
    """A weight that lies as the layout says, from the part in ``box``, which is not copied."""
    if box is None:
        return layout.shard(x, *w.axes)
    whole = torch.empty(w.shape, device="meta")
    return ShardSpec(layout.placements(*w.axes), whole.shape, whole.stride()).whole(x, layout.mesh)
