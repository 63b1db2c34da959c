"""This rank's shard of a weight as a range of each dim, for readers of weight files."""

from __future__ import annotations

import torch
from torch import Tensor

from dtron.distributed.redistribute import ShardSpec
from dtron.distributed.simulated_ranks import is_simulated
from dtron.mesh import Layout
from dtron.params import WeightSpec

Range = tuple[int, int]  # start, stop


def shard_range(w: WeightSpec, layout: Layout, device: str) -> list[Range] | None:
    """Return the range of each dim, or None if the whole weight is needed: on one device, and if
    all ranks are simulated in this process.

    This function does no shard arithmetic. The layout shards the indices 0 to n - 1 of each dim,
    and the first and last local index give the range."""
    if layout.mesh is None:
        return None
    ids = [
        layout.to_local(layout.iota(a, n, device), a) for a, n in zip(w.axes, w.shape, strict=True)
    ]
    if any(is_simulated(i) for i in ids):
        return None
    return [(int(i[0]), int(i[-1]) + 1) if len(i) else (0, 0) for i in ids]


def place_shard(x: Tensor, w: WeightSpec, layout: Layout, ranges: list[Range] | None) -> Tensor:
    """Return a weight with the layout's placements from its shard ``x``. The shard is not copied.

    ``ranges``: the ranges of the shard (None: ``x`` is the whole weight)."""
    if ranges is None:
        return layout.shard(x, *w.axes)
    assert layout.mesh is not None  # one device has no ranges
    whole = torch.empty(w.shape, device="meta")
    return ShardSpec(layout.placements(*w.axes), whole.shape, whole.stride()).to_dtensor(
        x, layout.mesh
    )
