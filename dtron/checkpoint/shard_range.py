"""The shard of a weight that this rank holds, as a range of each dim. The readers of weight files
use it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dtron.distributed.redistribute import ShardSpec
from dtron.distributed.simulated_ranks import is_simulated
from dtron.mesh import Layout
from dtron.params import WeightSpec

Box = list[tuple[int, int]]


def shard_range(w: WeightSpec, layout: Layout, device: str) -> Box | None:
    """Return the range of each dim. Return None if the whole weight is wanted: on one device, and
    where all ranks are simulated in this process. There is no shard arithmetic here: the layout
    shards the indices 0 to n - 1 of each dim, and the first and last local index give the range."""
    if layout.mesh is None:
        return None
    ids = [
        layout.to_local(layout.iota(a, n, device), a) for a, n in zip(w.axes, w.shape, strict=True)
    ]
    if any(is_simulated(i) for i in ids):
        return None
    return [(int(i[0]), int(i[-1]) + 1) if len(i) else (0, 0) for i in ids]


def lay(x: Tensor, w: WeightSpec, layout: Layout, box: Box | None) -> Tensor:
    """Return a weight with the layout's placements, from the shard ``x`` of the ranges in ``box``.
    The shard is not copied."""
    if box is None:
        return layout.shard(x, *w.axes)
    whole = torch.empty(w.shape, device="meta")
    return ShardSpec(layout.placements(*w.axes), whole.shape, whole.stride()).whole(x, layout.mesh)
